import math

import pytest
import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.distances import DotProductSimilarity

from metricface.distances import unit_rows
from metricface.losses import NPairLoss
from tests.losses import oracles
from tests.vectors import case

VECTOR = case("A7.n_pair_mc")
ANCHORS, POSITIVES = (torch.tensor(VECTOR["inputs"][name], dtype=torch.float64) for name in ("f", "f_plus"))
LABELS = torch.arange(2)
# What PML gives by default, which normalises (see FORMULAS.md, A7).
NORMALISED = 0.327649


def interleaved() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([ANCHORS, POSITIVES], dim=1).flatten(0, 1), torch.tensor([0, 0, 1, 1])


def test_one_pair_of_each_identity_is_n_pair_mc() -> None:
    value = NPairLoss()(ANCHORS, LABELS, None, POSITIVES, LABELS)
    assert value.item() == pytest.approx(VECTOR["expected"], abs=1e-6)
    cross_entropy = torch.nn.functional.cross_entropy(ANCHORS @ POSITIVES.T, LABELS)
    assert value.item() == pytest.approx(cross_entropy.item(), rel=1e-12)


def test_nothing_is_normalised_unlike_in_pml_by_default() -> None:
    unit = [unit_rows(rows) for rows in (ANCHORS, POSITIVES)]
    assert NPairLoss()(unit[0], LABELS, None, unit[1], LABELS).item() == pytest.approx(NORMALISED, abs=1e-6)
    assert pml.NPairsLoss()(*interleaved()).item() == pytest.approx(NORMALISED, abs=1e-6)
    raw = pml.NPairsLoss(distance=DotProductSimilarity(normalize_embeddings=False))
    assert raw(*interleaved()).item() == pytest.approx(VECTOR["expected"], abs=1e-6)


def test_all_pairs_of_a_batch_are_more_than_pmls_one_pair_of_each_identity() -> None:
    x, labels = interleaved()
    of = oracles.partners(labels.tolist(), labels.tolist(), range(4))
    expected = oracles.n_pair(x.numpy(), x.numpy(), of)
    assert NPairLoss()(x, labels).item() == pytest.approx(expected, rel=1e-9)
    assert expected != pytest.approx(VECTOR["expected"], rel=0.1)


def test_the_penalty_is_the_mean_squared_length_of_all_rows() -> None:
    lengths = [float((row @ row).item()) for row in torch.cat([ANCHORS, POSITIVES])]
    plain = NPairLoss()(ANCHORS, LABELS, None, POSITIVES, LABELS).item()
    value = NPairLoss(0.1)(ANCHORS, LABELS, None, POSITIVES, LABELS)
    assert value.item() == pytest.approx(plain + 0.1 * sum(lengths) / 4, rel=1e-9)
    x, labels = interleaved()
    assert NPairLoss(0.1)(x, labels).item() == pytest.approx(NPairLoss()(x, labels).item() + 0.1 * sum(lengths) / 4)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: NPairLoss(0.1)(x, labels), (leaf,))
    assert NPairLoss(0.1)(x[:0], labels[:0]).item() == 0.0


def test_pairs_whose_anchor_has_no_listed_negative_are_not_counted() -> None:
    x, labels = interleaved()
    listed = tuple(torch.tensor(column) for column in ([0, 2], [1, 3], [0, 0], [2, 3]))
    gaps = [float((x[0] @ x[n] - x[0] @ x[1]).item()) for n in (2, 3)]
    expected = math.log(1 + sum(math.exp(gap) for gap in gaps))
    assert NPairLoss()(x, labels, listed).item() == pytest.approx(expected, rel=1e-9)


def test_dot_products_in_the_thousands_overflow_nothing() -> None:
    x, labels = interleaved()[0], torch.tensor([0, 1, 0, 1])
    leaf = (1e3 * x).float().requires_grad_()
    value = NPairLoss()(leaf, labels)
    (grad,) = torch.autograd.grad(value, leaf)
    assert value.item() > 1e4
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("weight", [-0.1, math.nan, True])
def test_a_weight_that_means_nothing_is_an_error(weight: float) -> None:
    with pytest.raises(ValueError, match="l2_weight must be 0 or more"):
        NPairLoss(weight)


def test_settings_are_shown() -> None:
    assert repr(NPairLoss(0.02)) == "NPairLoss(l2_weight=0.02)"
