import math

import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor

from metricface.losses import MarginBasedLoss
from metricface.losses.margin_based import margin_based
from tests.losses import oracles
from tests.vectors import case

CONST = case("A5.margin_const_beta")
X6 = torch.tensor(CONST["inputs"]["X"], dtype=torch.float64)
LABELS = torch.tensor(CONST["inputs"]["labels"])
ALL = tuple(torch.tensor(oracles.all_triplets(LABELS.tolist())).unbind(1))
BOTH = pytest.mark.parametrize("indices", [None, ALL], ids=["streamed", "given"])


def with_betas(values: list[float], *, nu: float = 0.0, learn_beta: bool = True) -> MarginBasedLoss:
    loss = MarginBasedLoss(len(values), alpha=0.2, nu=nu, learn_beta=learn_beta).double()
    with torch.no_grad():
        loss.beta.copy_(torch.tensor(values))
    return loss


@BOTH
def test_one_beta_gives_the_published_value(indices: tuple[Tensor, ...] | None) -> None:
    loss = MarginBasedLoss(alpha=0.2, beta=1.2).double()(X6, LABELS, indices)
    assert loss.item() == pytest.approx(CONST["expected"]["loss"], abs=1e-6)


@BOTH
def test_class_betas_and_nu_give_the_published_value_and_gradient(indices: tuple[Tensor, ...] | None) -> None:
    """nu counts an anchor once for each of its triplets, and is divided by the number of active pairs."""
    vector = case("A5.margin_class_beta_nu")
    loss = with_betas(vector["inputs"]["beta"], nu=vector["inputs"]["nu"])
    value = loss(X6, LABELS, indices)
    value.backward()
    assert value.item() == pytest.approx(vector["expected"]["loss"], abs=1e-6)
    assert loss.beta.grad is not None
    assert loss.beta.grad.tolist() == pytest.approx(vector["expected"]["dbeta"], abs=1e-6)


@BOTH
def test_a_triplet_with_both_pairs_active_counts_twice_in_the_divisor(indices: tuple[Tensor, ...] | None) -> None:
    vector = case("A5.bool_plus_bool_trap")
    value = with_betas(vector["inputs"]["beta"])(X6, LABELS, indices).item()
    assert value == pytest.approx(vector["expected"]["correct_loss"], abs=1e-6)
    assert value != pytest.approx(vector["expected"]["wrong_loss"], abs=1e-3)


@BOTH
def test_embeddings_are_normalised_whatever_their_length(indices: tuple[Tensor, ...] | None) -> None:
    loss = MarginBasedLoss().double()
    stretched = X6 * torch.tensor([[1.0], [2.0], [0.5], [7.0], [1.0], [3.0]], dtype=torch.float64)
    assert loss(stretched, LABELS, indices).item() == pytest.approx(CONST["expected"]["loss"], abs=1e-6)


def test_random_batches_with_separate_references_agree_with_the_loop_oracle() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    refs = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    labels, ref_labels = torch.tensor([0, 0, 1, 2, 3, 3, 1, 2]), torch.tensor([0, 1, 1, 2, 2, 2, 5, 0, 0, 0])
    betas = [1.1, 1.4, 1.25, 1.3]
    listed = oracles.all_triplets(labels.tolist(), ref_labels.tolist())
    unit_x, unit_refs = oracles.unit(x.numpy()), oracles.unit(refs.numpy())
    # float32 parameters round the betas: take what the loss really holds.
    loss = with_betas(betas, nu=0.3)
    expected = oracles.margin_based(unit_x, unit_refs, labels.tolist(), listed, 0.2, loss.beta.tolist(), 0.3)
    for indices in (None, tuple(torch.tensor(listed).unbind(1))):
        assert loss(x, labels, indices, refs, ref_labels).item() == pytest.approx(expected, rel=1e-10)


def test_pmls_loss_agrees_in_value_and_gradients_without_nu() -> None:
    generator = torch.Generator().manual_seed(5)
    x, labels = torch.randn(24, 16, generator=generator), torch.arange(24) // 4
    ours, theirs = MarginBasedLoss(6), pml.MarginLoss(learn_beta=True, num_classes=6)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, other = ours(a, labels), theirs(b, labels)
    mine.backward()
    other.backward()
    assert mine.item() == pytest.approx(other.item(), rel=1e-5)
    for left, right in ((a.grad, b.grad), (ours.beta.grad, theirs.beta.grad)):
        assert left is not None
        assert right is not None
        assert torch.allclose(left, right, atol=1e-6)


def test_pmls_nu_with_one_beta_is_added_undivided_and_ours_is_the_papers() -> None:
    ours, theirs = MarginBasedLoss(nu=0.1).double(), pml.MarginLoss(nu=0.1, learn_beta=True).double()
    base, active, anchors = CONST["expected"]["loss"], CONST["expected"]["active"], 36
    assert ours(X6, LABELS).item() == pytest.approx(base + 0.1 * 1.2 * anchors / active, abs=1e-6)
    assert theirs(X6, LABELS).item() == pytest.approx(base + 0.1 * 1.2, abs=1e-6)


@BOTH
@pytest.mark.parametrize("num_classes", [None, 2])
def test_gradient_is_that_of_finite_differences(num_classes: int | None, indices: tuple[Tensor, ...] | None) -> None:
    loss = MarginBasedLoss(num_classes, alpha=0.23, beta=1.17, nu=0.2).double()
    x = (X6 * torch.linspace(0.5, 1.7, 6, dtype=torch.float64)[:, None]).requires_grad_()

    def value(x: Tensor, beta: Tensor) -> Tensor:
        result = torch.func.functional_call(loss, {"beta": beta}, (x, LABELS, indices))
        assert isinstance(result, Tensor)
        return result

    assert torch.autograd.gradcheck(value, (x, loss.beta.detach().clone().requires_grad_()))


@BOTH
def test_nothing_active_is_zero_and_still_attached_even_with_nu(indices: tuple[Tensor, ...] | None) -> None:
    x = torch.tensor([[1.0, 0.0]] * 3 + [[-1.0, 0.0]] * 3, requires_grad=True)
    loss = MarginBasedLoss(2, nu=1.0)
    value = loss(x, LABELS, indices)
    value.backward()
    assert value.item() == 0.0
    for grad in (x.grad, loss.beta.grad):
        assert grad is not None
        assert not grad.any()


def test_no_triplets_give_zero_with_zero_gradient() -> None:
    empty = torch.empty(0, dtype=torch.long)
    for labels, indices in ((LABELS, (empty,) * 3), (torch.zeros(6, dtype=torch.long), None), (torch.arange(6), None)):
        x = X6.clone().requires_grad_()
        value = MarginBasedLoss(nu=0.5)(x, labels, indices)
        value.backward()
        assert value.item() == 0.0
        assert x.grad is not None
        assert not x.grad.any()


@BOTH
def test_duplicates_of_two_identities_do_not_make_the_gradient_infinite(indices: tuple[Tensor, ...] | None) -> None:
    x = torch.full((6, 512), 0.37).requires_grad_()
    value = MarginBasedLoss()(x, LABELS, indices)
    value.backward()
    assert value.item() == pytest.approx(1.4, rel=1e-6)  # no positive is active, every negative has alpha + beta
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("learn_beta", [True, False])
def test_beta_is_saved_whether_learned_or_fixed(learn_beta: bool) -> None:
    loss = with_betas([1.0, 1.5], learn_beta=learn_beta)
    assert loss.state_dict()["beta"].tolist() == [1.0, 1.5]
    assert len(list(loss.parameters())) == int(learn_beta)
    other = MarginBasedLoss(2, learn_beta=learn_beta)
    other.load_state_dict(loss.state_dict())
    assert other.beta.tolist() == [1.0, 1.5]


def test_labels_without_a_beta_are_refused_by_name() -> None:
    for labels in (LABELS + 1, LABELS - 1):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), one beta per class"):
            MarginBasedLoss(2)(X6, labels)


def test_functional_form_is_unreduced() -> None:
    pos, neg = margin_based(torch.tensor([0.5, 1.5]), torch.tensor([1.5, 1.0]), torch.tensor(1.2), alpha=0.2)
    assert pos.tolist() == pytest.approx([0.0, 0.5], abs=1e-6)
    assert neg.tolist() == pytest.approx([0.0, 0.4], abs=1e-6)


def test_wrong_settings_say_what_is_allowed() -> None:
    for number in (0, 2.5, True):
        with pytest.raises(ValueError, match="num_classes must be a whole number, at least 1"):
            MarginBasedLoss(number)  # type: ignore[arg-type]
    for name in ("alpha", "beta", "nu"):
        for value in (-1.0, math.nan, math.inf, "1"):
            with pytest.raises(ValueError, match=f"{name} must be 0 or more and finite"):
                MarginBasedLoss(**{name: value})  # type: ignore[arg-type]
