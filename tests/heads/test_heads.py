import math
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor

from metricface import products
from metricface.heads import AdaFace, CContrastive, CosFace, MagFace, Softmax, SphereFace2
from metricface.heads.base import Head
from tests.heads.kinds import EVERY_KIND, Kind, filled
from tests.vectors import case

AM = case("B3.am_softmax")["inputs"]
X = torch.tensor(AM["X"], dtype=torch.float64)
LABELS = torch.tensor(AM["labels"])


def with_weight(head: Head, rows: Any) -> Head:
    head.double()
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(rows))
    return head


def cross_entropy(logits: np.ndarray[Any, np.dtype[np.float64]], labels: list[int]) -> float:
    return float(
        np.mean([math.log(sum(math.exp(v) for v in row)) - row[y] for row, y in zip(logits, labels, strict=True)])
    )


@pytest.mark.parametrize("name", ["B3.am_softmax", "B3.cosface_64_0.4"])
def test_cosface_has_the_published_values(name: str) -> None:
    vector = case(name)
    inputs = vector["inputs"]
    head = with_weight(CosFace(3, 2, margin_cos=inputs["m"], scale=inputs["s"]), inputs["W_rows"])
    loss = head(torch.tensor(inputs["X"], dtype=torch.float64), torch.tensor(inputs["labels"]))
    assert loss.item() == pytest.approx(vector["expected"], abs=1e-6)


def test_softmax_has_the_identification_values_of_deepid2() -> None:
    vector = case("A1b.deepid2_joint")
    inputs = vector["inputs"]
    head = with_weight(Softmax(3, 2, bias=False), inputs["W_rows"])
    for labels, name in ((inputs["labels_same"], "same"), (inputs["labels_diff"], "diff")):
        mean = head(torch.tensor(inputs["f"], dtype=torch.float64), torch.tensor(labels)).item()
        assert 2 * mean == pytest.approx(vector["expected"][name]["ident"], abs=1e-6)  # theirs: sum over the pair


def test_softmax_is_linear_with_its_bias_on_raw_embeddings() -> None:
    head = with_weight(Softmax(3, 2), AM["W_rows"])
    assert isinstance(head, Softmax)
    assert head.bias is not None
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.5, -1.0, 0.25]))
    logits = np.array(AM["X"]) @ np.array(AM["W_rows"]).T + np.array([0.5, -1.0, 0.25])
    assert head(X, LABELS).item() == pytest.approx(cross_entropy(logits, AM["labels"]), rel=1e-12)
    assert torch.allclose(head.logits(X), torch.tensor(logits))


def test_cosface_without_margin_is_softmax_over_scaled_cosines() -> None:
    head = with_weight(CosFace(3, 2, margin_cos=0.0, scale=10.0), AM["W_rows"])
    x, w = np.array(AM["X"]), np.array(AM["W_rows"])
    cos = (x / np.linalg.norm(x, axis=1)[:, None]) @ (w / np.linalg.norm(w, axis=1)[:, None]).T
    assert head(X, LABELS).item() == pytest.approx(cross_entropy(10 * cos, AM["labels"]), rel=1e-12)
    assert torch.allclose(head.logits(X), torch.tensor(10 * cos))


def test_logits_for_display_carry_no_margin_and_leave_the_loss_alone() -> None:
    head = with_weight(CosFace(3, 2, margin_cos=0.4), AM["W_rows"])
    before = head(X, LABELS).item()
    free = with_weight(CosFace(3, 2, margin_cos=0.0), AM["W_rows"])
    assert torch.equal(head.logits(X), free.logits(X))
    assert head(X, LABELS).item() == before
    assert torch.equal(head.logits(X).argmax(1), free.logits(X).argmax(1))


def test_cosface_agrees_with_pmls_in_value_and_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(16, 8, generator=generator), torch.randint(0, 5, (16,), generator=generator)
    ours, theirs = CosFace(5, 8, margin_cos=0.35, scale=64.0), pml.CosFaceLoss(5, 8, margin=0.35, scale=64)
    with torch.no_grad():
        ours.weight.copy_(theirs.W.T)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, other = ours(a, labels), theirs(b, labels)
    mine.backward()
    other.backward()
    assert mine.item() == pytest.approx(other.item(), rel=1e-5)
    for left, right in ((a.grad, b.grad), (ours.weight.grad, theirs.W.grad.T)):
        assert left is not None
        assert right is not None
        assert torch.allclose(left, right, atol=1e-4)


@EVERY_KIND
@pytest.mark.parametrize("streaming", [False, True])
def test_gradient_is_that_of_finite_differences(kind: Kind, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    head = filled(kind.make(6, 3, streaming=streaming)).eval()  # averages must not move between two calls
    if isinstance(head, AdaFace):  # no gradient flows through its lengths: hold the margins that they give
        monkeypatch.setattr(head, "quality", lambda lengths: torch.linspace(-1, 1, len(lengths)).double())
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 8.0
    labels = torch.tensor([0, 3, 3, 5, 1])
    parameters = dict(head.named_parameters())

    def value(x: Tensor, *values: Tensor) -> Tensor:
        replaced = dict(zip(parameters, values, strict=True))
        result = torch.func.functional_call(head, replaced, (x, labels))
        assert isinstance(result, Tensor)
        return result

    inputs = (x, *parameters.values())
    assert torch.autograd.gradcheck(value, tuple(t.detach().clone().requires_grad_() for t in inputs))


@EVERY_KIND
def test_value_is_that_of_the_paper_in_plain_loops(kind: Kind) -> None:
    head = filled(kind.make(7, 5))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator) * 10.0
    labels = torch.randint(0, 7, (40,), generator=generator)
    for training in (True, False):
        head.train(training)
        found = head(x, labels).item()  # averages move before they are used, and only in training
        assert found == pytest.approx(kind.expected(x, head, labels), rel=1e-10)


@EVERY_KIND
def test_losses_and_gradients_are_the_same_streamed_in_blocks_and_held(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(11, 5, dtype=torch.float64, generator=generator) * 10.0
    labels = torch.randint(0, 23, (11,), generator=generator)
    found = []
    for block, rows, streaming in ((1 << 19, 512, False), (40, 4, False), (40, 4, True)):
        monkeypatch.setattr(products, "CPU_BLOCK", block)
        monkeypatch.setattr(products, "CPU_ROWS", rows)
        head, a = filled(kind.make(23, 5, streaming=streaming)), x.clone().requires_grad_()
        loss = head(a, labels)
        loss.backward()
        assert head.last is not None
        found.append([loss.detach(), a.grad, *(p.grad for p in head.parameters()), head.last["accuracy"]])
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert mine is not None
            assert theirs is not None
            assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


@EVERY_KIND
def test_a_loss_can_be_differentiated_twice_over_the_same_graph(kind: Kind) -> None:
    head = filled(kind.make(6, 3)).eval()
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    loss = head(x, torch.tensor([0, 3, 3, 5, 1]))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


@EVERY_KIND
def test_a_backward_pass_does_not_see_what_later_batches_and_schedules_changed(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(8)
    x = 9.0 * torch.randn(5, 3, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 3, 3, 5, 1])

    def gradient(change: bool) -> Tensor:
        head, a = filled(kind.make(6, 3)), x.clone().requires_grad_()
        loss = head(a, labels)
        if change:
            head(-x, labels)  # moves averages
            for name in ("margin", "margin_cos", "margin_rad", "t", "m2", "lambda_min"):
                if isinstance(getattr(head, name, None), float):
                    setattr(head, name, 0.9 * getattr(head, name))
        (found,) = torch.autograd.grad(loss, a)
        return found

    assert torch.equal(gradient(True), gradient(False))


def test_products_are_held_only_where_a_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    real = products._plan

    def watched(*arguments: Any) -> Any:
        made.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(products, "_plan", watched)
    head, labels = Softmax(5, 4), torch.arange(3)
    head(torch.ones(3, 4), labels)
    with torch.no_grad():
        head(torch.ones(3, 4), labels)
    head.requires_grad_(False)(torch.ones(3, 4), labels)
    assert made == [True, False, False]


def test_a_second_derivative_is_refused_and_not_silently_zero() -> None:
    head, x = Softmax(4, 3), torch.randn(2, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(head(x, torch.tensor([0, 1])), x, create_graph=True)


@EVERY_KIND
def test_last_says_how_many_are_right_and_how_many_embeddings_are_zero(kind: Kind) -> None:
    head = filled(kind.make(4, 3)).eval()
    x = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    x[3] = x[7] = 0.0
    labels = torch.arange(12) % 4
    head(x, labels)
    assert head.last is not None
    logits = head.logits(x)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    right = logits.gather(1, labels[:, None])[:, 0] > others.amax(dim=1)  # ties, as of rows of zeros, are wrong
    assert head.last["accuracy"].item() == pytest.approx(right.double().mean().item())
    assert head.last["zero_embeddings"].item() == 2
    assert 0 < right.sum() < 12


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_are_computed_in_float32(kind: Kind, dtype: torch.dtype) -> None:
    head = kind.make(50, 512, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(16)
    half = torch.randn(16, 512, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    value, expected = head(half, labels), head(full, labels)
    value.backward()
    expected.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert head.logits(half).dtype == torch.float32
    assert half.grad is not None
    assert full.grad is not None
    assert half.grad.dtype == dtype
    assert torch.allclose(half.grad.float(), full.grad, rtol=1e-2, atol=1e-6)
    assert head.weight.dtype == torch.float32


@EVERY_KIND
def test_autocast_changes_neither_logits_nor_loss_nor_gradients(kind: Kind) -> None:
    results = []
    for enabled in (False, True):
        head = kind.make(50, 512, generator=torch.Generator().manual_seed(1))
        x = torch.randn(16, 512, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = head(x, torch.arange(16))
            logits = head.logits(x)
        value.backward()
        assert head.weight.dtype == torch.float32
        results.append([value.detach(), logits.detach(), x.grad, head.weight.grad])
    for without, under in zip(*results, strict=True):
        assert without is not None
        assert under is not None
        assert torch.equal(without, under)


@EVERY_KIND
@pytest.mark.parametrize("classes", [1, 2])
def test_one_and_two_classes_work(kind: Kind, classes: int) -> None:
    head = kind.make(classes, 4)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    loss = head(x, torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert x.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()
    if classes == 1 and kind.head not in (
        MagFace,
        SphereFace2,
        CContrastive,
    ):  # these ask for more than being told apart
        assert loss.item() == 0.0
        assert not x.grad.any()


@pytest.mark.parametrize("degrees", [0.0, 180.0])
def test_cosface_is_finite_where_an_embedding_lies_exactly_on_a_class_or_opposite(degrees: float) -> None:
    head = with_weight(CosFace(2, 2), [[1.0, 0.0], [0.0, 1.0]]).float()
    x = torch.tensor([[math.cos(math.radians(degrees)), 0.0]]).requires_grad_()
    loss = head(x, torch.tensor([0]))
    loss.backward()
    assert x.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


@EVERY_KIND
def test_zero_embeddings_and_zero_weights_are_finite(kind: Kind) -> None:
    head = kind.make(3, 4)
    torch.nn.init.zeros_(head.weight)
    x = torch.zeros(2, 4).requires_grad_()
    loss = head(x, torch.tensor([0, 2]))
    loss.backward()
    assert torch.isfinite(loss)
    for tensor in (x, head.weight):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


@EVERY_KIND
def test_an_empty_batch_is_zero_with_zero_gradient(kind: Kind) -> None:
    head = kind.make(3, 4)
    loss = head(torch.empty(0, 4), torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


@EVERY_KIND
def test_labels_that_are_no_classes_of_the_head_are_refused_by_name(kind: Kind) -> None:
    head, x = kind.make(3, 4).eval(), torch.ones(2, 4)
    for labels in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\); found"):
            head(x, torch.tensor(labels))
    for wrong in (torch.tensor([0.0, 1.0]), torch.tensor([True, False])):
        with pytest.raises(ValueError, match="labels must be integers"):
            head(x, wrong)
    with pytest.raises(ValueError, match=r"labels must be \(2,\)"):
        head(x, torch.tensor([0]))
    assert head(x, torch.tensor([0, 2], dtype=torch.int32)).item() == head(x, torch.tensor([0, 2])).item()


@EVERY_KIND
def test_wrong_sizes_and_values_are_refused_by_name(kind: Kind) -> None:
    for classes, dim in ((0, 4), (3, 0), (-1, 4), (2.5, 3), (3, None)):
        with pytest.raises(ValueError, match="needs at least 1 class and 1 dimension"):
            kind.make(classes, dim)  # type: ignore[arg-type]
    head = kind.make(3, 4)
    with pytest.raises(ValueError, match=r"floating \(batch, 4\)"):
        head(torch.ones(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        head(torch.full((2, 4), torch.nan), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"longer than .* \(first: row 1\)"):
        head(torch.tensor([[1.0] * 4, [1e20] * 4]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="found embeddings as list"):
        head([[1.0] * 4], torch.tensor([0]))
    with pytest.raises(ValueError, match="labels must be an integer tensor; found list"):
        head(torch.ones(2, 4), [0, 1])


def test_cosface_refuses_margins_and_scales_that_mean_nothing() -> None:
    for scale in (0.0, -1.0, math.nan, math.inf, "64"):
        with pytest.raises(ValueError, match="scale must be a finite number above 0"):
            CosFace(3, 4, scale=scale)  # type: ignore[arg-type]
    for margin in (-0.1, 2.0, math.nan, None):
        with pytest.raises(ValueError, match=r"margin_cos must lie in \[0, 2\)"):
            CosFace(3, 4, margin_cos=margin)  # type: ignore[arg-type]


@EVERY_KIND
def test_weights_come_from_the_generator_and_the_first_loss_is_that_of_guessing(kind: Kind) -> None:
    one, two = (kind.make(100, 64, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    assert one.weight.std().item() == pytest.approx(0.01, rel=0.05)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(6))
    if kind.head is Softmax:
        assert one(x, torch.arange(32)).item() == pytest.approx(math.log(100), rel=0.01)
