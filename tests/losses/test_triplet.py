import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pytorch_metric_learning import distances as pml_distances
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning import reducers as pml_reducers

from metricface.distances import DISTANCES, Distance
from metricface.losses import TripletLoss
from metricface.losses.triplet import triplet
from metricface.tuples import Triplets
from tests.losses import oracles
from tests.vectors import case

FACENET = case("A2.triplet_facenet")
X6 = torch.tensor(FACENET["inputs"]["X"], dtype=torch.float64)
HERMANS = case("A3.batch_all")
U6 = torch.tensor(HERMANS["inputs"]["X"], dtype=torch.float64)
LABELS = torch.tensor(HERMANS["inputs"]["labels"])
PLAIN: dict[str, Any] = {"distance": "euclidean", "normalize": False}
RAW_SQUARED: dict[str, Any] = {"distance": "squared_euclidean", "normalize": False}
EVERY_DISTANCE = pytest.mark.parametrize("distance", DISTANCES)


def as_tuple(triplets: oracles.TripletList) -> Triplets:
    return Triplets(*torch.tensor(triplets, dtype=torch.long).reshape(-1, 3).unbind(1))


ALL = as_tuple(oracles.all_triplets(LABELS.tolist()))
BATCH_HARD = as_tuple([(0, 2, 5), (1, 2, 5), (2, 0, 5), (3, 4, 2), (4, 5, 2), (5, 4, 2)])


def test_defaults_are_facenets_on_its_published_triplets() -> None:
    given = as_tuple(FACENET["inputs"]["triplets"])
    expected = FACENET["expected"]
    assert TripletLoss()(X6, LABELS, given).item() == pytest.approx(expected["mean"], abs=1e-6)
    assert TripletLoss(reduction="sum")(X6, LABELS, given).item() == pytest.approx(expected["sum"], abs=1e-6)
    assert TripletLoss(reduction="active")(X6, LABELS, given).item() == pytest.approx(0.2, abs=1e-6)
    # The definition normalises: the length of the embeddings must not matter.
    assert TripletLoss()(3 * X6, LABELS, given).item() == pytest.approx(expected["mean"], abs=1e-6)


def test_defaults_square_the_distance() -> None:
    hard = as_tuple([(0, 2, 1)])  # squared distances 0.8 and 0.4 on the unit circle
    assert TripletLoss()(X6, LABELS, hard).item() == pytest.approx(0.8 - 0.4 + 0.2, abs=1e-6)


@pytest.mark.parametrize("indices", [None, ALL], ids=["streamed", "given"])
def test_batch_all_has_the_values_of_hermans_under_each_meaning_of_mean(indices: Triplets | None) -> None:
    expected, margin = HERMANS["expected"], HERMANS["inputs"]["margin"]
    for reduction, name in (("sum", "sum"), ("mean", "mean_all"), ("active", "mean_nonzero")):
        loss = TripletLoss(margin, reduction=reduction, **PLAIN)  # type: ignore[arg-type]
        assert loss(U6, LABELS, indices).item() == pytest.approx(expected[name], abs=1e-6)
    for reduction in ("mean", "active"):  # under the soft margin every triplet is active
        soft = TripletLoss("soft", reduction=reduction, **PLAIN)  # type: ignore[arg-type]
        assert soft(U6, LABELS, indices).item() == pytest.approx(expected["soft_mean"], abs=1e-6)


def test_batch_hard_triplets_have_the_values_of_hermans() -> None:
    expected = case("A3.batch_hard")["expected"]
    assert TripletLoss(0.2, **PLAIN)(U6, LABELS, BATCH_HARD).item() == pytest.approx(expected["hinge_mean"], abs=1e-6)
    assert TripletLoss("soft", **PLAIN)(U6, LABELS, BATCH_HARD).item() == pytest.approx(expected["soft_mean"], abs=1e-6)
    gaps = [TripletLoss(0.0, **PLAIN)(U6, LABELS, [column[i : i + 1] for column in BATCH_HARD]) for i in range(6)]
    assert [gap.item() for gap in gaps] == pytest.approx(expected["per_anchor_diff"], abs=1e-6)


def test_squared_distances_give_other_values_than_plain_ones() -> None:
    expected = case("A3.squared_variants")["expected"]
    batch_all = TripletLoss(0.2, reduction="active", **RAW_SQUARED)(U6, LABELS)
    assert batch_all.item() == pytest.approx(expected["batch_all_mean_nonzero"], abs=1e-6)
    batch_hard = TripletLoss(0.2, **RAW_SQUARED)(U6, LABELS, BATCH_HARD)
    assert batch_hard.item() == pytest.approx(expected["batch_hard_mean"], abs=1e-6)


def test_soft_margin_has_no_margin() -> None:
    assert triplet(torch.tensor(1.0), torch.tensor(1.0), margin="soft").item() == pytest.approx(math.log(2))


def test_soft_margin_neither_overflows_nor_loses_its_gradient_far_out() -> None:
    d_ap = torch.tensor([0.0, 500.0], requires_grad=True)
    losses = triplet(d_ap, torch.tensor([500.0, 0.0]), margin="soft")
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.tolist() == [0.0, 500.0]
    assert d_ap.grad is not None
    assert d_ap.grad.tolist() == [0.0, 1.0]


def test_soft_triplets_whose_loss_rounds_to_zero_are_still_active() -> None:
    x, labels = torch.tensor([[0.0], [0.0], [500.0]]), torch.tensor([0, 0, 1])
    given = as_tuple([(0, 1, 2), (0, 2, 1)])  # losses 0 and 500
    assert TripletLoss("soft", reduction="active", **PLAIN)(x, labels, given).item() == 250


@EVERY_DISTANCE
@pytest.mark.parametrize("margin", [0.3, "soft"])
def test_random_batches_with_separate_references_agree_with_the_loop_oracle(
    margin: float | Literal["soft"], distance: Distance
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    refs = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    labels, ref_labels = torch.tensor([0, 0, 1, 2, 3, 9, 9]), torch.tensor([0, 1, 1, 2, 2, 2, 4, 0, 0])
    listed = oracles.all_triplets(labels.tolist(), ref_labels.tolist())
    terms = oracles.triplet_terms(
        oracles.unit(x.numpy()), oracles.unit(refs.numpy()), listed, None if margin == "soft" else margin, distance
    )
    for indices in (None, as_tuple(listed)):
        loss = TripletLoss(margin, distance=distance)(x, labels, indices, refs, ref_labels)
        assert loss.item() == pytest.approx(np.mean(terms), rel=1e-10)


def test_anchors_found_among_their_references_by_self_index_are_not_their_own_positives() -> None:
    loss = TripletLoss(0.3, **PLAIN)
    shared = loss(U6, LABELS)
    with_clones = loss(U6, LABELS, None, U6.clone(), LABELS.clone(), self_index=torch.arange(6))
    assert with_clones.item() == pytest.approx(shared.item(), rel=1e-12)
    assert loss(U6, LABELS, None, U6.clone(), LABELS.clone()).item() != pytest.approx(shared.item())


@pytest.mark.parametrize("power", [1, 2])
def test_pmls_loss_agrees_under_the_same_distance_margin_and_reducer(power: int) -> None:
    generator = torch.Generator().manual_seed(2)
    x, labels = torch.randn(24, 16, generator=generator), torch.arange(24) // 4
    for reduction, reducer in (("active", pml_reducers.AvgNonZeroReducer()), ("mean", pml_reducers.MeanReducer())):
        theirs = pml.TripletMarginLoss(0.2, distance=pml_distances.LpDistance(power=power), reducer=reducer)
        ours = TripletLoss(0.2, distance="squared_euclidean" if power == 2 else "euclidean", reduction=reduction)  # type: ignore[arg-type]
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        mine, other = ours(a, labels), theirs(b, labels)
        (mine + other).backward()
        assert mine.item() == pytest.approx(other.item(), rel=1e-5)
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_pmls_loss_on_cosines_agrees_with_ours() -> None:
    x, labels = torch.randn(24, 16, generator=torch.Generator().manual_seed(2)), torch.arange(24) // 4
    theirs = pml.TripletMarginLoss(0.2, distance=pml_distances.CosineSimilarity())
    ours = TripletLoss(0.2, distance="cosine", normalize=False, reduction="active")
    assert ours(x, labels).item() == pytest.approx(theirs(x, labels).item(), rel=1e-5)


@pytest.mark.parametrize("indices", [None, ALL], ids=["streamed", "given"])
def test_a_zero_row_has_cosine_0_with_every_row(indices: Triplets | None) -> None:
    x = U6.clone()
    x[[0, 3]] = 0.0  # of either identity
    loss = TripletLoss("soft", distance="cosine", reduction="sum")(x, LABELS, indices)
    listed = oracles.all_triplets(LABELS.tolist())
    assert loss.item() == pytest.approx(sum(oracles.triplet_terms(x.numpy(), x.numpy(), listed, None, "cosine")))


@EVERY_DISTANCE
@pytest.mark.parametrize("margin", [0.3, "soft"])
@pytest.mark.parametrize("reduction", ["mean", "active", "sum"])
def test_swap_takes_the_closer_of_anchor_and_positive_among_references_too(
    reduction: Any, margin: float | Literal["soft"], distance: Distance
) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    refs = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    labels, ref_labels = torch.tensor([0, 0, 1, 2, 3, 9, 9]), torch.tensor([0, 1, 1, 2, 2, 2, 4, 0, 0])
    for sides in ((), (refs, ref_labels)):
        listed = oracles.all_triplets(labels.tolist(), ref_labels.tolist() if sides else None)
        u, v = oracles.unit(x.numpy()), oracles.unit((refs if sides else x).numpy())
        soft = None if margin == "soft" else margin
        terms, plain = (oracles.triplet_terms(u, v, listed, soft, distance, swap=swap) for swap in (True, False))
        active = len(terms) if soft is None else sum(term > 0 for term in terms)
        expected = sum(terms) / {"mean": len(terms), "active": active, "sum": 1}[reduction]
        assert sum(terms) > 1.1 * sum(plain)
        for indices in (None, as_tuple(listed)):
            loss = TripletLoss(margin, distance=distance, swap=True, reduction=reduction)
            assert loss(x, labels, indices, *sides).item() == pytest.approx(expected, rel=1e-10)


def test_pmls_swap_agrees_within_a_batch_and_takes_rows_of_the_wrong_side_with_references() -> None:
    generator = torch.Generator().manual_seed(5)
    x, refs = (torch.randn(12, 4, generator=generator) for _ in range(2))
    labels, ref_labels = torch.arange(12) // 3, torch.arange(12) % 4
    ours = TripletLoss(0.2, distance="euclidean", swap=True, reduction="active")
    theirs = pml.TripletMarginLoss(0.2, swap=True)
    assert ours(x, labels).item() == pytest.approx(theirs(x, labels).item(), rel=1e-5)
    listed = oracles.all_triplets(labels.tolist(), ref_labels.tolist())
    value = theirs(x, labels, as_tuple(listed), refs, ref_labels).item()
    assert ours(x, labels, None, refs, ref_labels).item() != pytest.approx(value, rel=1e-2)
    # Theirs is min(d_an, |x_p - r_n|), x_p being whatever anchor stands where the positive does among the references.
    u, v = oracles.unit(x.double().numpy()), oracles.unit(refs.double().numpy())
    wrong = [
        max(0.0, oracles.dist(u[a], v[p]) - min(oracles.dist(u[a], v[n]), oracles.dist(u[p], v[n])) + 0.2)
        for a, p, n in listed
    ]
    assert value == pytest.approx(sum(wrong) / sum(term > 0 for term in wrong), rel=1e-5)
    with pytest.raises(IndexError):  # and where there is none
        theirs(x[:6], labels[:6], as_tuple([(0, 8, 1)]), refs, ref_labels)


@pytest.mark.parametrize("indices", [None, ALL], ids=["streamed", "given"])
@pytest.mark.parametrize("reduction", ["mean", "active", "sum"])
@EVERY_DISTANCE
@pytest.mark.parametrize("margin", [0.23, "soft"])
def test_gradient_is_that_of_finite_differences(
    margin: float | Literal["soft"], distance: Distance, reduction: Any, indices: Triplets | None
) -> None:
    loss = TripletLoss(margin, distance=distance, reduction=reduction)
    x = U6.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, LABELS, indices), (x,))


def test_gradient_reaches_separate_references_too() -> None:
    x, refs = U6[:2].clone().requires_grad_(), U6[1:].clone().requires_grad_()
    loss = TripletLoss(0.4, **PLAIN)
    assert torch.autograd.gradcheck(lambda x, refs: loss(x, LABELS[:2], None, refs, LABELS[1:]), (x, refs))


@pytest.mark.parametrize("margin", [0.2, "soft"])
@EVERY_DISTANCE
@pytest.mark.parametrize("given", [True, False])
def test_full_collapse_gives_the_margin_and_a_zero_gradient(
    margin: float | Literal["soft"], distance: Distance, given: bool
) -> None:
    x = torch.full((6, 512), 0.37).requires_grad_()
    loss = TripletLoss(margin, distance=distance)(x, LABELS, ALL if given else None)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) if margin == "soft" else 0.2, rel=1e-6)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_nothing_active_is_zero_with_zero_gradient_under_active() -> None:
    x = torch.tensor([[1.0, 0.0], [0.99, 0.1], [-1.0, 0.0], [-0.99, 0.1]], requires_grad=True)
    loss = TripletLoss(0.2, reduction="active")(x, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("reduction", ["mean", "active", "sum"])
def test_no_triplets_give_zero_with_zero_gradient(reduction: Any) -> None:
    empty = torch.empty(0, dtype=torch.long)
    one_identity, all_different = torch.zeros(6, dtype=torch.long), torch.arange(6)
    cases = ((LABELS, (empty,) * 3), (LABELS, (empty,) * 4), (one_identity, None), (all_different, None))
    for labels, indices in cases:
        x = U6.clone().requires_grad_()
        loss = TripletLoss(reduction=reduction)(x, labels, indices)
        loss.backward()
        assert loss.item() == 0.0
        assert x.grad is not None
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_wrong_settings_and_inputs_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="'euclidean', 'squared_euclidean', 'cosine'"):
        TripletLoss(distance="manhattan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'mean', 'active', 'sum'"):
        TripletLoss(reduction="nonzero")  # type: ignore[arg-type]
    for margin in ("softt", None, -0.1, math.nan, math.inf, True):
        with pytest.raises(ValueError, match="a finite number, 0 or more, or the word 'soft'; got"):
            TripletLoss(margin)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN"):
        TripletLoss()(U6 * torch.nan, LABELS)
    with pytest.raises(ValueError, match="same embeddings and references"):
        TripletLoss()(U6, LABELS, (torch.tensor([6]), torch.tensor([0]), torch.tensor([0])))


def test_settings_are_shown() -> None:
    assert repr(TripletLoss()) == (
        "TripletLoss(margin=0.2, distance='squared_euclidean', normalize=True, reduction='mean')"
    )
    assert repr(TripletLoss("soft", distance="cosine", swap=True)) == (
        "TripletLoss(margin='soft', distance='cosine', normalize=True, reduction='mean', swap=True)"
    )


def test_two_zero_references_have_cosine_zero_with_each_other_also_under_swap() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    one = Triplets(*(torch.tensor([row]) for row in (0, 1, 2)))  # d_ap = d_an = d_pn = 1
    assert TripletLoss(0.2, distance="cosine", swap=True, reduction="sum")(x, labels, one).item() == pytest.approx(0.2)
    distance = {(a, b): 1.0 - float(x[a] @ x[b]) for a in range(4) for b in range(4)}
    terms = [
        max(0.0, distance[a, p] - min(distance[a, n], distance[p, n]) + 0.2)
        for a, p, n in oracles.all_triplets(labels.tolist())
        if a != p
    ]
    loss = TripletLoss(0.2, distance="cosine", swap=True, reduction="sum")
    assert loss(x, labels).item() == pytest.approx(sum(terms))
