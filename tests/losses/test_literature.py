"""What the losses over pairs and triplets have in common, each beside its loop."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from metricface.identities import find_identities
from metricface.losses import (
    AngularLoss,
    CircleLoss,
    GeneralizedLiftedStructureLoss,
    LiftedStructureLoss,
    MultiSimilarityLoss,
    NPairLoss,
    TripletLoss,
)
from metricface.losses.anchor_sets import Exponents, Linear, every_set
from metricface.miners import BatchAllMiner
from metricface.tuples import check_batch
from tests.losses import oracles

Oracle = Callable[[oracles.Rows, oracles.Rows, oracles.Partners], float]


def swapped(x: oracles.Rows, refs: oracles.Rows, of: oracles.Partners) -> float:
    listed = [(i, p, n) for i in range(len(x)) for p in of.positives[i] for n in of.negatives[i]]
    terms = oracles.triplet_terms(x, refs, listed, 0.3, "euclidean", swap=True)
    return sum(terms) / len(terms)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    oracle: Oracle


CASES: dict[str, Case] = {
    "generalised lifted": Case(
        lambda: GeneralizedLiftedStructureLoss(0.7), lambda x, y, of: oracles.generalized_lifted(x, y, of, 0.7)
    ),
    "lifted": Case(lambda: LiftedStructureLoss(0.7), lambda x, y, of: oracles.lifted(x, y, of, 0.7)),
    "multi-similarity": Case(
        lambda: MultiSimilarityLoss(2.0, 20.0, 0.4), lambda x, y, of: oracles.multi_similarity(x, y, of, 2.0, 20.0, 0.4)
    ),
    "circle": Case(lambda: CircleLoss(0.3, 16.0), lambda x, y, of: oracles.circle(x, y, of, 0.3, 16.0)),
    "n-pair": Case(NPairLoss, oracles.n_pair),
    "angular": Case(lambda: AngularLoss(36.0), lambda x, y, of: oracles.angular(x, y, of, 36.0)),
    "swap": Case(lambda: TripletLoss(0.3, distance="euclidean", normalize=False, swap=True), swapped),
}


def all_but(*names: str) -> pytest.MarkDecorator:
    kept = [name for name in CASES if name not in names]
    return pytest.mark.parametrize("case", [CASES[name] for name in kept], ids=kept)


EVERY_LOSS = all_but()
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
ITSELF = torch.arange(8)


def rows(number: int, seed: int = 0, dim: int = 4) -> Tensor:
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_duplicates() -> Tensor:
    x = rows(8)
    x[1], x[5] = x[0], x[0]  # of one identity, and of another
    return x


def every_triplet(labels: Tensor, ref_labels: Tensor, itself: Iterable[int]) -> tuple[Tensor, ...]:
    of = oracles.partners(labels.tolist(), ref_labels.tolist(), list(itself))
    listed = [(i, p, n) for i in range(len(labels)) for p in of.positives[i] for n in of.negatives[i]]
    return tuple(torch.tensor(listed).unbind(1))


def every_pair(labels: Tensor, ref_labels: Tensor, itself: Iterable[int]) -> tuple[Tensor, ...]:
    of = oracles.partners(labels.tolist(), ref_labels.tolist(), list(itself))
    pairs = ([(i, j) for i in range(len(labels)) for j in some[i]] for some in of)
    return tuple(column for some in pairs for column in torch.tensor(some).unbind(1))


def gradients(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(value, inputs)
    assert all(bool(torch.isfinite(grad).all()) for grad in found)
    return list(found)


@EVERY_LOSS
@pytest.mark.parametrize("x", [rows(8), with_duplicates()], ids=["random", "duplicates"])
def test_a_batch_by_itself_agrees_with_the_loop(case: Case, x: Tensor) -> None:
    of = oracles.partners(LABELS.tolist(), LABELS.tolist(), range(8))
    assert case.make()(x, LABELS).item() == pytest.approx(case.oracle(x.numpy(), x.numpy(), of), rel=1e-9)


@EVERY_LOSS
@pytest.mark.parametrize("listed", [False, True])
def test_separate_references_agree_with_the_loop_whether_listed_or_not(case: Case, listed: bool) -> None:
    x, y = rows(8), rows(11, seed=1)
    ref_labels = torch.tensor([9, 2, 0, 0, 1, 0, 7, 2, 2, 1, 9])
    nowhere = [-1] * 8
    of = oracles.partners(LABELS.tolist(), ref_labels.tolist(), nowhere)
    indices = every_pair(LABELS, ref_labels, nowhere) if listed else None
    value = case.make()(x, LABELS, indices, y, ref_labels)
    assert value.item() == pytest.approx(case.oracle(x.numpy(), y.numpy(), of), rel=1e-9)


@EVERY_LOSS
def test_an_anchor_among_its_references_is_not_its_own_positive(case: Case) -> None:
    x, y = rows(8), torch.cat([rows(3, seed=1), rows(8)[[7, 0, 1, 2, 3, 4, 5, 6]]])
    ref_labels = torch.cat([torch.tensor([1, 4, 2]), LABELS[[7, 0, 1, 2, 3, 4, 5, 6]]])
    itself = torch.tensor([4, 5, 6, 7, -1, 9, 10, 3])  # of the fifth nothing is said
    of = oracles.partners(LABELS.tolist(), ref_labels.tolist(), itself.tolist())
    value = case.make()(x, LABELS, None, y, ref_labels, self_index=itself)
    assert value.item() == pytest.approx(case.oracle(x.numpy(), y.numpy(), of), rel=1e-9)


def shuffled(columns: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A list of pairs in another order: columns of one length get one order."""
    orders = [torch.randperm(len(column), generator=torch.Generator().manual_seed(3)) for column in columns]
    return tuple(column[order] for column, order in zip(columns, orders, strict=True))


@EVERY_LOSS
@pytest.mark.parametrize("separate", [False, True])
def test_a_list_of_every_pair_gives_value_and_gradient_of_none(case: Case, separate: bool) -> None:
    x, y = with_duplicates().requires_grad_(), rows(6, seed=2).requires_grad_()
    ref_labels = torch.tensor([3, 0, 0, 1, 1, 2])
    sides = (y, ref_labels) if separate else ()
    listed = shuffled(every_pair(LABELS, *((ref_labels, [-1] * 8) if separate else (LABELS, range(8)))))
    found = []
    for indices in (None, listed):
        value = case.make()(x, LABELS, indices, *sides)
        found.append([value, *gradients(3.0 * value, *((x, y) if separate else (x,)))])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


@all_but("swap")  # a triplet loss is a mean over triplets, each as often as it is listed
def test_what_a_list_repeats_counts_once(case: Case) -> None:
    x = rows(8)
    listed = torch.stack(every_triplet(LABELS, LABELS, range(8)))[:, ::3]
    again = torch.cat([listed, listed[:, ::2], listed[:, :5]], dim=1)
    once, twice = (case.make()(x, LABELS, tuple(columns.unbind(0))) for columns in (listed, again))
    assert twice.item() == pytest.approx(once.item(), rel=1e-12)


@all_but("circle")  # its weights have no gradient: see test_circle.py
@pytest.mark.parametrize("listed", [False, True])
def test_gradients_are_those_of_finite_differences(case: Case, listed: bool) -> None:
    x, y, ref_labels = rows(8).requires_grad_(), rows(6, seed=2).requires_grad_(), torch.tensor([3, 0, 0, 1, 1, 2])
    indices = tuple(c[::2] for c in every_triplet(LABELS, LABELS, range(8))) if listed else None
    assert torch.autograd.gradcheck(lambda x: case.make()(x, LABELS, indices), (x,))
    indices = tuple(c[::2] for c in every_triplet(LABELS, ref_labels, [-1] * 8)) if listed else None
    assert torch.autograd.gradcheck(lambda x, y: case.make()(x, LABELS, indices, y, ref_labels), (x, y))


@EVERY_LOSS
def test_only_the_side_that_asks_for_a_gradient_gets_one(case: Case) -> None:
    expected = [row.requires_grad_() for row in (rows(8), rows(6, seed=2))]
    ref_labels = torch.tensor([3, 0, 0, 1, 1, 2])
    both = gradients(case.make()(expected[0], LABELS, None, expected[1], ref_labels), *expected)
    for side in range(2):
        sides = [rows(8), rows(6, seed=2)]
        sides[side].requires_grad_()
        (alone,) = gradients(case.make()(sides[0], LABELS, None, sides[1], ref_labels), sides[side])
        assert torch.allclose(alone, both[side], rtol=1e-12)


@all_but("multi-similarity")
@pytest.mark.parametrize("labels", [[0] * 8, list(range(8))], ids=["one identity", "all different"])
def test_without_triplets_there_is_no_loss_and_no_gradient(case: Case, labels: list[int]) -> None:
    x = rows(8).requires_grad_()
    value = case.make()(x, torch.tensor(labels))
    (grad,) = gradients(value, x)
    assert value.item() == 0.0
    assert torch.equal(grad, torch.zeros_like(grad))


@EVERY_LOSS
@pytest.mark.parametrize("width", [3, 4])
def test_an_empty_list_and_an_empty_batch_give_zero_that_still_belongs_to_the_graph(case: Case, width: int) -> None:
    empty = torch.empty(0, dtype=torch.long)
    for number, indices in ((8, (empty,) * width), (0, None), (0, (empty,) * width)):
        x = rows(number).requires_grad_()
        value = case.make()(x, LABELS[:number], indices)
        (grad,) = gradients(value, x)
        assert value.item() == 0.0
        assert torch.equal(grad, torch.zeros_like(grad))
    x = rows(8).requires_grad_()
    value = case.make()(x, LABELS, None, rows(0), LABELS[:0])
    assert value.item() == 0.0
    gradients(value, x)


@EVERY_LOSS
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["identical", "zero", "some zero", "antipodal", "long"])
def test_degenerate_embeddings_have_a_finite_loss_and_gradient(
    case: Case, kind: str, dtype: torch.dtype, listed: bool
) -> None:
    x = rows(8, dim=16).to(dtype)
    if kind == "identical":
        x[:] = x[0].clone()
    elif kind == "zero":
        x[:] = 0.0
    elif kind == "some zero":
        x[[0, 3, 4]] = 0.0
    elif kind == "antipodal":
        x[:] = x[0] * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1], dtype=dtype)[:, None]
    else:
        x *= 1e3
    x.requires_grad_()
    value = case.make()(x, LABELS, every_pair(LABELS, LABELS, range(8)) if listed else None)
    gradients(value, x)
    assert torch.isfinite(value)
    assert value.item() > 0
    if kind != "long":  # where the loops overflow
        exact = x.detach().double().numpy()
        expected = case.oracle(exact, exact, oracles.partners(LABELS.tolist(), LABELS.tolist(), range(8)))
        assert value.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-9)


@EVERY_LOSS
def test_a_loss_over_everything_can_be_differentiated_only_once_and_says_so(case: Case) -> None:
    x = rows(8).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(case.make()(x, LABELS), x, create_graph=True)


@all_but("circle")
def test_a_list_can_be_differentiated_twice(case: Case) -> None:
    x, indices = rows(8).requires_grad_(), every_triplet(LABELS, LABELS, range(8))
    assert torch.autograd.gradgradcheck(lambda x: case.make()(x, LABELS, indices), (x,))


@EVERY_LOSS
def test_our_miners_feed_every_loss(case: Case) -> None:
    x = rows(8).requires_grad_()
    value = case.make()(x, LABELS, BatchAllMiner()(x, LABELS))
    (grad,) = gradients(value, x)
    assert value.item() > 0
    assert grad.abs().sum() > 0


def test_a_set_without_members_sums_to_minus_infinity() -> None:
    labels = torch.tensor([0, 0, 1])
    batch = check_batch(rows(3), labels, rows(2, seed=1), torch.tensor([0, 0]))
    exponents = Exponents(Linear(0.0, 1.0), Linear(1.0, -1.0), squared=False)
    sums = every_set(batch, find_identities(batch), exponents, torch.arange(3))
    empty = [[value == -torch.inf for value in column.tolist()] for column in sums]
    assert empty == [[False, False, True], [True, True, False]]
    assert not sums.has_both.any()
