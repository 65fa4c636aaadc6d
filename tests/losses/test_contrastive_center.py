import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from metricface.losses import contrastive_center as module
from metricface.losses.contrastive_center import ContrastiveCenterLoss, contrastive_center
from tests.largest import LargestTensor
from tests.vectors import case

VECTOR = case("A10.contrastive_center")
X2 = torch.tensor(VECTOR["inputs"]["X"], dtype=torch.float64)
LABELS = torch.tensor(VECTOR["inputs"]["labels"])
Rows = NDArray[np.float64]


def with_centers(rows: Any, **settings: Any) -> ContrastiveCenterLoss:
    centers = torch.as_tensor(rows, dtype=torch.float64)
    loss = ContrastiveCenterLoss(*centers.shape, **settings).double()
    with torch.no_grad():
        loss.centers.copy_(centers)
    return loss


def oracle(x: Rows, labels: list[int], centers: Rows, delta: float) -> tuple[float, Rows, Rows]:
    """The sum, and its gradients by the quotient rule, one image and one centre at a time."""
    total, by_x, by_centers = 0.0, np.zeros_like(x), np.zeros_like(centers)
    for i, y in enumerate(labels):
        own = float(((x[i] - centers[y]) ** 2).sum())
        below = delta + sum(float(((x[i] - c) ** 2).sum()) for j, c in enumerate(centers) if j != y)
        total += 0.5 * own / below
        for j, c in enumerate(centers):
            step = (x[i] - c) / below if j == y else -own * (x[i] - c) / below**2
            by_x[i] += step
            by_centers[j] -= step
    return total, by_x, by_centers


def drawn(rows: int, dim: int, seed: int) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("reduction", "share"), [("sum", 1.0), ("mean", 0.5)])
def test_loss_is_the_published_one(reduction: str, share: float) -> None:
    loss = with_centers(VECTOR["inputs"]["centers"], delta=VECTOR["inputs"]["delta"], reduction=reduction)
    assert loss(X2, LABELS).item() == pytest.approx(share * VECTOR["expected"], abs=1e-6)


@pytest.mark.parametrize("classes", [1, 2, 3, 40])
@pytest.mark.parametrize("numbers", [1 << 20, 1, 40])
def test_value_and_both_gradients_agree_with_the_loop_oracle(
    classes: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_NUMBERS", numbers)
    x, centers = drawn(9, 6, 0).requires_grad_(), 2.0 + drawn(classes, 6, 1)
    labels = torch.arange(9) * 5 % classes
    loss = with_centers(centers, delta=0.7)
    value = loss(x, labels)
    value.backward()
    total, by_x, by_centers = oracle(x.detach().numpy(), labels.tolist(), centers.numpy(), 0.7)
    assert value.item() == pytest.approx(total, rel=1e-12)
    assert x.grad is not None
    assert loss.centers.grad is not None
    assert x.grad.numpy() == pytest.approx(by_x, rel=1e-10, abs=1e-14)
    assert loss.centers.grad.numpy() == pytest.approx(by_centers, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradient_is_that_of_finite_differences(reduction: str) -> None:
    loss = with_centers(VECTOR["inputs"]["centers"], reduction=reduction)

    def value(x: Tensor, centers: Tensor) -> Tensor:
        result = torch.func.functional_call(loss, {"centers": centers}, (x, LABELS))
        assert isinstance(result, Tensor)
        return result

    inputs = (X2.clone().requires_grad_(), loss.centers.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradcheck(lambda x: value(x, inputs[1].detach()), inputs[:1])
    assert torch.autograd.gradcheck(lambda c: value(X2, c), inputs[1:])


@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (1e3, 1.0), (0.0, 1e4)])
def test_float32_keeps_sums_that_cancel(offset: float, spread: float) -> None:
    """Far from the origin, and where the own centre is nearly all of the sum: two classes, the other one met."""
    centers = (offset + spread * drawn(2, 30, 0)).float()
    x = centers[[1, 0]] + 0.3 * drawn(2, 30, 1).float()
    loss = ContrastiveCenterLoss(2, 30)
    with torch.no_grad():
        loss.centers.copy_(centers)
    x.requires_grad_()
    value = loss(x, torch.tensor([0, 1]))
    value.backward()
    total, by_x, by_centers = oracle(x.detach().double().numpy(), [0, 1], centers.double().numpy(), 1.0)
    assert value.item() == pytest.approx(total, rel=1e-6)
    assert x.grad is not None
    assert loss.centers.grad is not None
    assert x.grad.numpy() == pytest.approx(by_x, rel=1e-5)
    assert loss.centers.grad.numpy() == pytest.approx(by_centers, rel=1e-5)


def test_many_classes_make_no_tensor_larger_than_the_gradient_of_the_centres(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_NUMBERS", 1 << 12)
    loss, x = ContrastiveCenterLoss(100_000, 4), torch.randn(64, 4).requires_grad_()
    labels = torch.arange(64) * 1000
    with LargestTensor() as forward:
        value = loss(x, labels)
    assert forward.numbers <= 1 << 12
    with LargestTensor() as backward:
        value.backward()
    assert backward.numbers == 100_000 * 4  # B x C would be 16 times as large


def test_a_step_brings_embeddings_to_their_centres_and_centres_apart() -> None:
    loss = with_centers([[1.0, 0.0], [0.9, 0.1]])
    x = torch.tensor([[1.1, 0.3], [1.0, -0.2]], dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.SGD([x, loss.centers], lr=0.5)
    apart = (loss.centers[0] - loss.centers[1]).norm().item()
    for _ in range(200):
        optimiser.zero_grad()
        loss(x, LABELS).backward()
        optimiser.step()
    assert loss(x, LABELS).item() < 1e-3
    assert (loss.centers[0] - loss.centers[1]).norm().item() > 1.5 * apart


def test_centres_come_from_the_generator() -> None:
    one, two = (ContrastiveCenterLoss(100, 64, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one.centers, two.centers)
    assert one.centers.std().item() == pytest.approx(0.01, rel=0.05)
    assert [name for name, _ in one.named_parameters()] == ["centers"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_give_the_loss_and_gradients_of_float32(dtype: torch.dtype) -> None:
    labels = torch.arange(16) // 4
    half = torch.randn(16, 512, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    one, two = (ContrastiveCenterLoss(4, 512, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = one(half, labels)
    expected = two(full, labels)
    value.backward()
    expected.backward()
    assert value.dtype == one.centers.dtype == torch.float32
    assert value.item() == expected.item()
    for grad, other in ((half.grad, full.grad), (one.centers.grad, two.centers.grad)):
        assert grad is not None
        assert other is not None
        assert torch.allclose(grad.float(), other, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("x", [torch.zeros(6, 8), torch.full((6, 8), 0.3), torch.tensor([[1.0] * 8, [-1.0] * 8] * 3)])
@pytest.mark.parametrize("classes", [1, 2, 6])
@pytest.mark.parametrize("value", [0.0, 0.3, None])
def test_degenerate_batches_and_centres_stay_finite(x: Tensor, classes: int, value: float | None) -> None:
    loss = ContrastiveCenterLoss(classes, 8, delta=1e-6, generator=torch.Generator().manual_seed(0))
    if value is not None:
        torch.nn.init.constant_(loss.centers, value)
    leaf = x.clone().requires_grad_()
    found = loss(leaf, torch.arange(6) % classes)
    found.backward()
    assert torch.isfinite(found)
    for grad in (leaf.grad, loss.centers.grad):
        assert grad is not None
        assert torch.isfinite(grad).all()


def test_one_class_leaves_only_delta_below() -> None:
    x = X2.clone().requires_grad_()
    value = with_centers([[0.25, 1.0]], delta=2.0)(x, torch.zeros(2, dtype=torch.long))
    value.backward()
    assert value.item() == pytest.approx(0.25 * (0.3125 + 0.0025))
    assert x.grad is not None
    assert torch.allclose(x.grad, 0.5 * (X2 - torch.tensor([0.25, 1.0])))


def test_an_empty_batch_is_zero_in_the_graph() -> None:
    for reduction in ("sum", "mean"):
        loss = with_centers(VECTOR["inputs"]["centers"], reduction=reduction)
        x = torch.empty(0, 2, requires_grad=True)
        value = loss(x, LABELS[:0])
        value.backward()
        assert value.item() == 0.0
        assert x.grad is not None
        assert loss.centers.grad is not None
        assert not loss.centers.grad.any()


def test_a_second_derivative_is_refused_and_not_zero() -> None:
    x = X2.clone().requires_grad_()
    value = with_centers(VECTOR["inputs"]["centers"])(x, LABELS)
    with pytest.raises(RuntimeError, match="ContrastiveCenterLoss can be differentiated only once"):
        torch.autograd.grad(value, x, create_graph=True)


def test_functional_form_is_unreduced() -> None:
    found = contrastive_center(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 1.0]), delta=1.0)
    assert found.tolist() == [0.25, 0.0]


def test_wrong_batches_are_refused_by_name() -> None:
    loss = ContrastiveCenterLoss(2, 2)
    for labels in (LABELS + 1, LABELS - 1):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\); found"):
            loss(X2, labels)
    with pytest.raises(ValueError, match="embeddings have 3 dimensions, the centres 2"):
        loss(torch.ones(2, 3), LABELS)
    with pytest.raises(ValueError, match="ContrastiveCenterLoss looks at every embedding and takes no miner's tuple"):
        loss(X2, LABELS, (LABELS, LABELS, LABELS))
    with pytest.raises(ValueError, match="ContrastiveCenterLoss compares a batch with nothing outside of it"):
        loss(X2, LABELS, None, X2, LABELS)


def test_wrong_settings_say_what_is_allowed() -> None:
    for classes, dim in ((0, 2), (2, 0), (2.5, 2), (True, 2), (2, None)):
        with pytest.raises(ValueError, match="ContrastiveCenterLoss needs at least 1 class and 1 dimension"):
            ContrastiveCenterLoss(classes, dim)  # type: ignore[arg-type]
    for delta in (0.0, -1.0, math.nan, math.inf, "1"):
        with pytest.raises(ValueError, match="delta must be a finite number above 0"):
            ContrastiveCenterLoss(2, 2, delta=delta)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reduction='none' is unknown; use one of 'sum', 'mean'"):
        ContrastiveCenterLoss(2, 2, reduction="none")  # type: ignore[arg-type]
