import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning import reducers
from pytorch_metric_learning.distances import LpDistance

from metricface.losses import GeneralizedLiftedStructureLoss, LiftedStructureLoss
from metricface.losses.lifted import generalized_lifted_structure, lifted_structure
from tests.losses import oracles
from tests.vectors import case

GENERALIZED, ORIGINAL = case("A4.lifted_generalised"), case("A4.lifted_original")
U6 = torch.tensor(ORIGINAL["inputs"]["X"], dtype=torch.float64)
LABELS = torch.tensor(ORIGINAL["inputs"]["labels"])
RAW = LpDistance(normalize_embeddings=False)


def batch() -> torch.Tensor:
    return torch.randn(16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_generalised_loss_has_the_values_of_hermans() -> None:
    expected = GENERALIZED["expected"]
    assert GeneralizedLiftedStructureLoss()(U6, LABELS).item() == pytest.approx(expected["mean"], abs=1e-6)
    dist = torch.cdist(U6, U6)
    near, far = ([[j for j in range(6) if j != i and (j // 3 == i // 3) == same] for i in range(6)] for same in (1, 0))
    losses = generalized_lifted_structure(
        torch.stack([dist[i, near[i]] for i in range(6)]), torch.stack([dist[i, far[i]] for i in range(6)]), margin=1.0
    )
    assert losses.tolist() == pytest.approx(expected["per_anchor"], abs=1e-6)


def test_original_loss_has_the_published_value() -> None:
    assert LiftedStructureLoss()(U6, LABELS).item() == pytest.approx(ORIGINAL["expected"], abs=1e-6)


def test_a_pair_within_reach_of_no_negative_has_no_loss_and_is_counted() -> None:
    assert lifted_structure(torch.tensor([1.0, 2.0]), torch.tensor([-1.5, 1.0])).tolist() == [0.0, 4.5]
    x = torch.tensor([[0.0], [0.1], [50.0], [50.1], [0.2], [0.4]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    of = oracles.partners(labels.tolist(), labels.tolist(), range(6))
    for loss, oracle in (
        (LiftedStructureLoss(), oracles.lifted),
        (GeneralizedLiftedStructureLoss(), oracles.generalized_lifted),
    ):
        assert loss(x, labels).item() == pytest.approx(oracle(x.numpy(), x.numpy(), of, 1.0), rel=1e-9)


def test_embeddings_are_normalised_only_where_asked() -> None:
    x, labels = batch(), torch.arange(16) // 4
    unit = torch.nn.functional.normalize(x, dim=1)
    for make in (LiftedStructureLoss, GeneralizedLiftedStructureLoss):
        assert make(normalize=True)(x, labels).item() == pytest.approx(make()(unit, labels).item(), rel=1e-9)
        assert make()(x, labels).item() != pytest.approx(make()(unit, labels).item(), rel=1e-3)


def test_pmls_losses_agree_on_raw_rows_where_every_anchor_has_both() -> None:
    x, labels = batch(), torch.arange(16) // 4
    for ours, theirs in (
        (LiftedStructureLoss(), pml.LiftedStructureLoss(distance=RAW)),
        (GeneralizedLiftedStructureLoss(), pml.GeneralizedLiftedStructureLoss(distance=RAW)),
    ):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        mine, other = ours(a, labels), theirs(b, labels)
        assert mine.item() == pytest.approx(other.item(), rel=1e-6)
        grads = torch.autograd.grad(mine, a)[0], torch.autograd.grad(other, b)[0]
        assert torch.allclose(*grads, atol=1e-6)


def test_pml_gives_an_anchor_without_positives_a_loss_and_ours_does_not() -> None:
    x, labels = batch()[:5], torch.tensor([0, 0, 1, 1, 2])
    of = oracles.partners(labels.tolist(), labels.tolist(), range(5))
    theirs = pml.GeneralizedLiftedStructureLoss(distance=RAW, reducer=reducers.MeanReducer())(x, labels).item()
    ours = GeneralizedLiftedStructureLoss()(x, labels).item()
    assert ours == pytest.approx(oracles.generalized_lifted(x.numpy(), x.numpy(), of, 1.0), rel=1e-9)
    alone = max(0.0, math.log(sum(np.exp(1 - oracles.dist(x[4].numpy(), x[j].numpy())) for j in range(4))))
    assert theirs == pytest.approx((4 * ours + alone) / 5, rel=1e-6)


def test_negatives_listed_for_an_anchor_are_seen_from_its_positive_too() -> None:
    x = batch()[:4].numpy()
    d = [[oracles.dist(a, b) for b in x] for a in x]
    listed = tuple(torch.tensor(c) for c in ([0, 0], [1, 1], [2, 3]))
    total = sum(math.exp(1 - d[i][n]) for i in (0, 1) for n in (2, 3))
    value = LiftedStructureLoss()(batch()[:4], torch.tensor([0, 0, 1, 2]), listed)
    assert value.item() == pytest.approx((math.log(total) + d[0][1]) ** 2 / 2, rel=1e-9)


def test_pml_takes_negatives_of_references_from_anchors_of_the_same_row_number() -> None:
    x, y = batch()[:6].numpy(), batch()[6:12].numpy()
    labels, ref_labels = [0, 0, 1, 1, 2, 2], [2, 0, 1, 0, 1, 2]
    of = oracles.partners(labels, ref_labels, [-1] * 6)
    sides = torch.tensor(labels), None, torch.tensor(y), torch.tensor(ref_labels)
    ours = LiftedStructureLoss()(torch.tensor(x), *sides).item()
    theirs = pml.LiftedStructureLoss(distance=RAW)(torch.tensor(x), *sides).item()
    terms = []
    for i, near in enumerate(of.positives):
        for j in near:
            pairs = {(i, n) for n in of.negatives[i]} | {(j, n) for n in of.negatives[j]}  # x[j] is another image
            total = sum(math.exp(1 - oracles.dist(x[a], y[n])) for a, n in pairs)
            terms.append(max(0.0, math.log(total) + oracles.dist(x[i], y[j])) ** 2 / 2)
    assert theirs == pytest.approx(np.mean(terms), rel=1e-6)
    assert ours == pytest.approx(oracles.lifted(x, y, of, 1.0), rel=1e-9)
    assert ours != pytest.approx(theirs, rel=1e-2)


@pytest.mark.parametrize("make", [LiftedStructureLoss, GeneralizedLiftedStructureLoss])
@pytest.mark.parametrize("margin", [math.nan, math.inf, "soft", True])
def test_a_margin_that_is_no_number_is_an_error(
    make: type[LiftedStructureLoss] | type[GeneralizedLiftedStructureLoss], margin: float
) -> None:
    with pytest.raises(ValueError, match="margin must be a finite number"):
        make(margin)


def test_settings_are_shown() -> None:
    assert repr(LiftedStructureLoss(0.5)) == "LiftedStructureLoss(margin=0.5, normalize=False)"
    assert repr(GeneralizedLiftedStructureLoss()) == "GeneralizedLiftedStructureLoss(margin=1.0, normalize=False)"
