import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metricface.losses.center import CenterLoss, center
from tests.vectors import case

VECTOR = case("A11.center_loss")
X4 = torch.tensor(VECTOR["inputs"]["X"], dtype=torch.float64)
LABELS = torch.tensor(VECTOR["inputs"]["labels"])
Rows = NDArray[np.float64]


def with_centers(rows: Any, **settings: Any) -> CenterLoss:
    centers = torch.tensor(rows, dtype=torch.float64)
    loss = CenterLoss(*centers.shape, **settings).double()
    loss.centers.copy_(centers)
    return loss


def oracle(x: Rows, labels: list[int], centers: Rows, alpha: float) -> tuple[float, Rows]:
    """The paper's sum, and the centres after its step, one class and one image at a time."""
    total, moved = 0.0, centers.copy()
    for row, y in zip(x, labels, strict=True):
        total += 0.5 * sum((a - c) ** 2 for a, c in zip(row, centers[y], strict=True))
    for j in range(len(centers)):
        images = [row for row, y in zip(x, labels, strict=True) if y == j]
        delta = np.zeros(centers.shape[1])
        for row in images:
            delta += centers[j] - row
        moved[j] -= alpha * delta / (1 + len(images))
    return total, moved


@pytest.mark.parametrize(("reduction", "name"), [("sum", "paper_sum"), ("mean", "caffe_mean")])
def test_loss_gradient_and_new_centres_are_the_published_ones(reduction: str, name: str) -> None:
    loss = with_centers(VECTOR["inputs"]["centers"], alpha=VECTOR["inputs"]["alpha"], reduction=reduction)
    x = X4.clone().requires_grad_()
    value = loss(x, LABELS)
    value.backward()
    assert value.item() == pytest.approx(VECTOR["expected"][name], abs=1e-6)
    assert torch.allclose(loss.centers, torch.tensor(VECTOR["expected"]["new_centers"]).double(), atol=1e-6)
    assert x.grad is not None
    scale = 1 if reduction == "sum" else 4
    assert torch.allclose(scale * x.grad, torch.tensor(VECTOR["expected"]["grad_x_paper"]).double(), atol=1e-6)


def test_sandbergs_variant_is_another_loss_and_another_step() -> None:
    vector = case("A11.center_loss_facenet_variant")
    centers, alfa = np.array(vector["inputs"]["centers"]), vector["inputs"]["alfa"]
    x, labels = np.array(vector["inputs"]["X"]), vector["inputs"]["labels"]
    theirs = float(((x - centers[labels]) ** 2).mean())  # over B x D, no 1/2
    moved = centers.copy()
    for row, y in zip(x, labels, strict=True):
        moved[y] -= (1 - alfa) * (centers[y] - row)  # summed, not divided by 1 + n
    assert theirs == pytest.approx(vector["expected"]["loss"], abs=1e-6)
    assert moved == pytest.approx(np.array(vector["expected"]["centers_after"]), abs=1e-6)

    loss = with_centers(vector["inputs"]["centers"], alpha=1 - alfa)
    value = loss(torch.tensor(x), torch.tensor(labels)).item()
    assert value == pytest.approx(theirs, abs=1e-6)  # the same here, where D = 2 makes up for the 1/2
    assert torch.allclose(loss.centers, torch.tensor(moved) / 3)  # two images each: over 1 + 2
    wide = np.concatenate([x, np.zeros((4, 2))], axis=1)
    value = with_centers(np.zeros((2, 4)))(torch.tensor(wide), torch.tensor(labels)).item()
    assert value == pytest.approx(2 * float((wide**2).mean()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_a_run_of_random_batches_agrees_with_the_loop_oracle(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    loss = with_centers(centers.tolist(), alpha=0.3, reduction="sum")
    expected_centers = centers.numpy()
    for size in (9, 1, 20):
        x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 6, (size,), generator=generator)  # class 6 has no image, ever
        expected, expected_centers = oracle(x.numpy(), labels.tolist(), expected_centers, 0.3)
        assert loss(x, labels.to(dtype)).item() == pytest.approx(expected, rel=1e-12)
        assert loss.centers.numpy() == pytest.approx(expected_centers, rel=1e-12)
    assert torch.equal(loss.centers[6], centers[6])


def test_the_order_of_a_batch_matters_neither_to_the_loss_nor_to_the_centres() -> None:
    mixed = torch.tensor([2, 0, 3, 1])
    one, two = (with_centers(VECTOR["inputs"]["centers"]) for _ in range(2))
    assert one(X4, LABELS).item() == pytest.approx(two(X4[mixed], LABELS[mixed]).item(), rel=1e-15)
    assert torch.allclose(one.centers, two.centers, rtol=1e-15)


def test_centres_are_a_buffer_that_is_saved_and_has_no_gradient() -> None:
    loss = CenterLoss(3, 2)
    loss(X4.float().requires_grad_(), LABELS).backward()
    assert list(loss.parameters()) == []
    assert not loss.centers.requires_grad
    other = CenterLoss(3, 2)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.centers, loss.centers)
    assert loss.centers.any()


def test_centres_move_neither_in_evaluation_mode_nor_under_no_grad_and_the_loss_is_the_same() -> None:
    loss = with_centers(VECTOR["inputs"]["centers"], reduction="sum")
    before = loss.centers.clone()
    loss.eval()
    assert loss(X4, LABELS).item() == 6.0
    loss.train()
    with torch.no_grad():
        assert loss(X4, LABELS).item() == 6.0
    assert torch.equal(loss.centers, before)
    loss(X4, LABELS)
    assert not torch.equal(loss.centers, before)


def test_alpha_may_be_changed_between_calls_and_0_fixes_the_centres() -> None:
    loss = with_centers(VECTOR["inputs"]["centers"], alpha=0.0)
    before = loss.centers.clone()
    loss(X4, LABELS)
    assert torch.equal(loss.centers, before)
    loss.alpha = 0.5
    loss(X4, LABELS)
    assert torch.allclose(loss.centers, torch.tensor(VECTOR["expected"]["new_centers"]).double(), atol=1e-6)


def test_repeated_batches_bring_centres_to_the_class_means() -> None:
    loss = CenterLoss(2, 2).double()
    for _ in range(60):
        loss(X4, LABELS)
    assert torch.allclose(loss.centers, torch.tensor([[1.5, 0.5], [0.0, 2.0]]).double(), atol=1e-9)
    assert loss.last is not None
    assert loss.last["center_distance"].item() == pytest.approx((2 * math.sqrt(0.5) + 2) / 4, abs=1e-9)


def test_a_warm_start_sets_class_means_and_counts_classes_without_an_image() -> None:
    loss = with_centers([[9.0, 9.0]] * 5)
    assert loss.centers_from(X4, torch.tensor([3, 0, 3, 3])) == 3
    expected = [[2.0, 1.0], [9.0, 9.0], [9.0, 9.0], [1 / 3, 4 / 3], [9.0, 9.0]]
    assert torch.allclose(loss.centers, torch.tensor(expected).double())
    assert loss.centers_from(X4[:0], LABELS[:0]) == 5
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\); found 0 to 5"):
        loss.centers_from(X4, torch.tensor([0, 1, 2, 5]))


class LargestNewTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most numbers in one tensor that any operation makes, all but those that write into `known`."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.numbers = known.data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.data_ptr() != self.known:
            self.numbers = max(self.numbers, result.numel())
        return result


def test_a_step_makes_no_tensor_larger_than_the_batch_whatever_the_number_of_classes() -> None:
    loss = CenterLoss(1_000_000, 4)
    x, labels = torch.randn(8, 4).requires_grad_(), torch.arange(8) * 100_000
    with LargestNewTensor(loss.centers) as largest:
        loss(x, labels).backward()
    assert largest.numbers == 8 * 4
    assert int(loss.centers.any(dim=1).sum()) == 8


def test_gradient_is_that_of_finite_differences() -> None:
    for reduction in ("mean", "sum"):
        loss = with_centers(VECTOR["inputs"]["centers"], alpha=0.0, reduction=reduction)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, LABELS), X4.clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_with_centres_in_float32(dtype: torch.dtype) -> None:
    labels = torch.arange(16) // 4
    half = torch.randn(16, 512, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    one, two = CenterLoss(4, 512), CenterLoss(4, 512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = one(half, labels)
    expected = two(full, labels)
    value.backward()
    expected.backward()
    assert value.dtype == one.centers.dtype == torch.float32
    assert value.item() == expected.item()
    assert torch.equal(one.centers, two.centers)
    assert half.grad is not None
    assert full.grad is not None
    assert half.grad.dtype == dtype
    assert torch.allclose(half.grad.float(), full.grad, rtol=1e-2, atol=1e-6)


def test_embeddings_and_centres_of_different_precision_work_together() -> None:
    full, half = CenterLoss(3, 2), CenterLoss(3, 2).half()
    for x, loss in ((X4.float(), with_centers(VECTOR["inputs"]["centers"])), (X4, full), (X4.float(), half)):
        dtype = loss.centers.dtype
        assert loss(x, LABELS).dtype == x.dtype
        assert loss.centers.dtype == dtype


@pytest.mark.parametrize("x", [torch.zeros(6, 8), torch.full((6, 8), 0.3), torch.tensor([[1.0] * 8, [-1.0] * 8] * 3)])
@pytest.mark.parametrize("classes", [1, 3, 6])
def test_degenerate_batches_stay_finite(x: Tensor, classes: int) -> None:
    loss = CenterLoss(classes, 8)
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, torch.arange(6) % classes)
        value.backward()
        assert leaf.grad is not None
        assert torch.isfinite(value)
        assert torch.isfinite(leaf.grad).all()
        assert torch.isfinite(loss.centers).all()


def test_an_empty_batch_is_zero_in_the_graph_and_moves_nothing() -> None:
    for reduction in ("mean", "sum"):
        loss = with_centers(VECTOR["inputs"]["centers"], reduction=reduction)
        before = loss.centers.clone()
        x = torch.empty(0, 2, requires_grad=True)
        value = loss(x, LABELS[:0])
        value.backward()
        assert value.item() == 0.0
        assert x.grad is not None
        assert torch.equal(loss.centers, before)


def test_functional_form_is_unreduced() -> None:
    own = torch.tensor(VECTOR["inputs"]["centers"]).double()[LABELS]
    assert center(X4, own).tolist() == [0.5, 0.5, 0.5, 4.5]


def test_wrong_batches_are_refused_by_name() -> None:
    loss = CenterLoss(2, 2)
    for labels in (LABELS + 1, LABELS - 1):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\); found"):
            loss(X4, labels)
    with pytest.raises(ValueError, match="embeddings have 3 dimensions, the centres 2"):
        loss(torch.ones(4, 3), LABELS)
    with pytest.raises(ValueError, match="labels must be integers"):
        loss(X4, LABELS.double())
    with pytest.raises(ValueError, match="NaN or infinity"):
        loss(X4 * math.nan, LABELS)
    with pytest.raises(ValueError, match="CenterLoss looks at every embedding and takes no miner's tuple"):
        loss(X4, LABELS, (LABELS, LABELS, LABELS))
    with pytest.raises(ValueError, match="CenterLoss compares a batch with nothing outside of it; found ref_emb"):
        loss(X4, LABELS, None, X4, LABELS)
    with pytest.raises(ValueError, match="found ref_labels"):
        loss(X4, LABELS, ref_labels=LABELS)
    assert not loss.centers.any()


def test_wrong_settings_say_what_is_allowed() -> None:
    for classes, dim in ((0, 2), (2, 0), (2.5, 2), (True, 2), (2, None)):
        with pytest.raises(ValueError, match="CenterLoss needs at least 1 class and 1 dimension"):
            CenterLoss(classes, dim)  # type: ignore[arg-type]
    for alpha in (-0.1, 1.1, math.nan, "0.5"):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
            CenterLoss(2, 2, alpha=alpha)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reduction='none' is unknown; use one of 'mean', 'sum'"):
        CenterLoss(2, 2, reduction="none")  # type: ignore[arg-type]
