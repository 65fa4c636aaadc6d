import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metricface.losses import ContrastiveLoss, DeepID2Loss
from tests.largest import LargestTensor
from tests.losses import oracles
from tests.vectors import case

VECTOR = case("A1b.deepid2_joint")
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])


def loss_with(weight: Any, *, bias: bool = False, **settings: Any) -> DeepID2Loss:
    weight = torch.tensor(weight, dtype=torch.float64)
    loss = DeepID2Loss(*weight.shape, bias=bias, **settings).double()
    with torch.no_grad():
        loss.identification.weight.copy_(weight)
        if loss.identification.bias is not None:
            loss.identification.bias.copy_(torch.arange(len(weight)) / 3)
    return loss


def rows(number: int, seed: int = 0, dim: int = 4) -> Tensor:
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(**settings: Any) -> DeepID2Loss:
    return loss_with(rows(5, seed=9).tolist(), bias=True, margin=1.7, verification_weight=0.3, **settings)


def oracle(loss: DeepID2Loss, x: Tensor, y: Tensor, ref_labels: Tensor, pairs: list[tuple[int, int]]) -> float:
    head = loss.identification
    assert head.bias is not None
    classes = head.weight.detach().numpy(), head.bias.detach().numpy()
    of_x = oracles.cross_entropies(x.numpy(), LABELS.tolist(), *classes)
    of_y = oracles.cross_entropies(y.numpy(), ref_labels.tolist(), *classes)
    terms = []
    for i, j in pairs:
        d = oracles.dist(x[i].numpy(), y[j].numpy())
        verif = d * d / 2 if LABELS[i] == ref_labels[j] else max(0.0, loss.margin - d) ** 2 / 2
        terms.append(of_x[i] + of_y[j] + loss.verification_weight * verif)
    return float(np.mean(terms))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", ["same", "diff"])
def test_a_pair_has_the_published_value(kind: str, listed: bool) -> None:
    inputs, expected = VECTOR["inputs"], VECTOR["expected"][kind]
    x, labels = torch.tensor(inputs["f"], dtype=torch.float64), torch.tensor(inputs[f"labels_{kind}"])
    loss = loss_with(inputs["W_rows"], margin=inputs["m"], verification_weight=inputs["lam"])
    empty, pair = torch.empty(0, dtype=torch.long), (torch.tensor([0]), torch.tensor([1]))
    indices = ((*pair, empty, empty) if kind == "same" else (empty, empty, *pair)) if listed else None
    assert loss(x, labels, indices).item() == pytest.approx(expected["joint"], abs=1e-6)
    loss.verification_weight = 0.0
    assert loss(x, labels, indices).item() == pytest.approx(expected["ident"], abs=1e-6)
    verification = ContrastiveLoss(inputs["m"])(x, labels, indices)
    assert verification.item() == pytest.approx(expected["verif"], abs=1e-6)


def test_every_pair_of_a_batch_agrees_with_the_loop() -> None:
    x, loss = rows(8), made()
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    assert loss(x, LABELS).item() == pytest.approx(oracle(loss, x, x, LABELS, pairs), rel=1e-9)


@pytest.mark.parametrize("known", [False, True])
def test_every_pair_with_references_agrees_with_the_loop(known: bool) -> None:
    x, loss = rows(8), made()
    y, ref_labels = torch.cat([rows(3, seed=2), rows(8)[:2]]), torch.tensor([4, 0, 3, 0, 0])
    itself = torch.tensor([3, 4, -1, -1, -1, -1, -1, -1])
    pairs = [(i, j) for i in range(8) for j in range(5) if not (known and int(itself[i]) == j)]
    value = loss(x, LABELS, None, y, ref_labels, self_index=itself if known else None)
    assert value.item() == pytest.approx(oracle(loss, x, y, ref_labels, pairs), rel=1e-9)


def test_listed_pairs_count_as_often_as_they_are_listed() -> None:
    x, loss = rows(8), made()
    y, ref_labels = rows(4, seed=2), torch.tensor([4, 0, 1, 0])
    same, different = [(0, 1), (0, 1), (1, 3)], [(0, 2), (3, 0), (7, 0), (7, 0)]
    listed = (*torch.tensor(same).unbind(1), *torch.tensor(different).unbind(1))
    value = loss(x, LABELS, listed, y, ref_labels)
    assert value.item() == pytest.approx(oracle(loss, x, y, ref_labels, same + different), rel=1e-9)
    triplets = tuple(torch.tensor(column) for column in ([0, 3], [1, 2], [2, 0]))
    pairs = [(0, 1), (3, 2), (0, 2), (3, 0)]
    assert loss(x, LABELS, triplets, y, ref_labels).item() == pytest.approx(
        oracle(loss, x, y, ref_labels, pairs), rel=1e-9
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_a_list_of_every_pair_gives_value_and_gradients_of_none(separate: bool, streaming: bool) -> None:
    x, y, ref_labels = rows(8).requires_grad_(), rows(5, seed=2).requires_grad_(), torch.tensor([4, 0, 3, 0, 0])
    loss = made(streaming=streaming)
    near, far = ((LABELS[:, None] == (ref_labels if separate else LABELS)) == same for same in (True, False))
    if not separate:
        near &= ~torch.eye(8, dtype=torch.bool)
    listed = (*near.nonzero().unbind(1), *far.nonzero().unbind(1))
    inputs = [x, *([y] if separate else []), *loss.parameters()]
    found = []
    for indices in (None, listed):
        value = loss(x, LABELS, indices, *((y, ref_labels) if separate else ()))
        found.append([value, *torch.autograd.grad(value, inputs)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    x, loss = rows(8).requires_grad_(), made()
    weight = loss.identification.weight
    assert torch.autograd.gradcheck(lambda x, _: loss(x, LABELS), (x, weight))


def test_nothing_is_normalised() -> None:
    x, loss = rows(8), made()
    assert loss(2 * x, LABELS).item() != pytest.approx(loss(x, LABELS).item(), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_float32_loss_of_the_same_values(dtype: torch.dtype) -> None:
    half = rows(8).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    loss = DeepID2Loss(5, 4, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half, LABELS)
    expected = loss(full, LABELS)
    grads = torch.autograd.grad(value, half)[0], torch.autograd.grad(expected, full)[0]
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(grads[0].float(), grads[1], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", ["identical", "zero"])
def test_degenerate_embeddings_have_a_finite_loss_and_gradient(kind: str) -> None:
    x = (rows(8)[:1].expand(8, 4) if kind == "identical" else torch.zeros(8, 4)).clone().double().requires_grad_()
    loss = made()
    value = loss(x, LABELS)
    (grad,) = torch.autograd.grad(value, x)
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    assert value.item() == pytest.approx(oracle(loss, x.detach(), x.detach(), LABELS, pairs), rel=1e-9)
    assert torch.isfinite(grad).all()


def test_no_pair_gives_zero_with_zero_gradient() -> None:
    empty, loss = torch.empty(0, dtype=torch.long), made()
    for number, indices in ((8, (empty,) * 4), (8, (empty,) * 3), (1, None), (0, None)):
        x = rows(number).requires_grad_()
        value = loss(x, LABELS[:number], indices)
        (grad,) = torch.autograd.grad(value, x)
        assert value.item() == 0.0
        assert torch.equal(grad, torch.zeros_like(grad))


def test_no_table_of_all_pairs_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from metricface.miners import tiles

    monkeypatch.setattr(tiles, "CPU_BLOCK", 64 * 64)
    monkeypatch.setattr(tiles, "CPU_ROWS", 64)
    x = rows(400, dim=8).requires_grad_()
    loss = DeepID2Loss(100, 8)
    with LargestTensor() as largest:
        loss(x, torch.arange(400) // 4).backward()
    assert largest.numbers <= 400 * 100  # the classifier's logits; all distances are 160,000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verification_weight": -0.1}, "verification_weight must be 0 or more"),
        ({"margin": 0.0}, "margin must be positive"),
        ({"margin": math.nan}, "margin must be positive"),
        ({"num_classes": 0}, "at least 1 class"),
    ],
)
def test_settings_that_mean_nothing_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepID2Loss(**{"num_classes": 4, "embedding_dim": 3} | settings)


def test_a_label_without_a_class_is_an_error() -> None:
    loss = DeepID2Loss(3, 4)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\); found 0 to 3"):
        loss(rows(8), LABELS)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\); found 0 to 7"):
        loss(rows(3), LABELS[:3], None, rows(2), torch.tensor([0, 7]))


def test_settings_are_shown() -> None:
    assert "verification_weight=0.05, margin=1.0" in repr(DeepID2Loss(4, 3))
