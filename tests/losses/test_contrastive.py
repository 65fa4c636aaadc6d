import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor

from metricface.losses import ContrastiveLoss
from metricface.losses.contrastive import contrastive
from tests.losses import oracles
from tests.vectors import case

VECTOR = case("A1.contrastive_hadsell")
X = torch.tensor(VECTOR["inputs"]["X"], dtype=torch.float64)
LABELS = torch.tensor(VECTOR["inputs"]["labels"])


def pairs_tuple(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split pairs of the shared test data into a miner's 4-tuple."""
    same = [(i, j) for i, j in pairs if LABELS[i] == LABELS[j]]
    other = [(i, j) for i, j in pairs if LABELS[i] != LABELS[j]]
    columns = [[pair[place] for pair in group] for group in (same, other) for place in (0, 1)]
    a1, p, a2, n = (torch.tensor(column, dtype=torch.long) for column in columns)
    return a1, p, a2, n


UNORDERED = pairs_tuple(oracles.all_unordered_pairs(LABELS.tolist()))


def test_the_fifteen_unordered_pairs_give_the_published_sum_and_mean() -> None:
    expected = VECTOR["expected"]
    assert ContrastiveLoss(1.0, reduction="sum")(X, LABELS, UNORDERED).item() == pytest.approx(
        expected["sum"], abs=1e-6
    )
    assert ContrastiveLoss(1.0)(X, LABELS, UNORDERED).item() == pytest.approx(expected["mean"], abs=1e-6)


def test_single_pairs_have_the_published_values() -> None:
    for pair, name in (((0, 1), "pair_0_1"), ((0, 5), "pair_0_5")):
        loss = ContrastiveLoss(1.0)(X, LABELS, pairs_tuple([pair]))
        assert loss.item() == pytest.approx(VECTOR["expected"][name], abs=1e-6)


def test_without_a_tuple_every_ordered_pair_counts_so_the_mean_is_the_same_and_the_sum_doubles() -> None:
    assert ContrastiveLoss(1.0)(X, LABELS).item() == pytest.approx(VECTOR["expected"]["mean"], abs=1e-6)
    assert ContrastiveLoss(1.0, reduction="sum")(X, LABELS).item() == pytest.approx(
        2 * VECTOR["expected"]["sum"], abs=2e-6
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_random_batches_agree_with_the_loop_oracle(normalize: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4])
    rows = oracles.unit(x.numpy()) if normalize else x.numpy()
    terms = oracles.contrastive_terms(rows, labels.tolist(), oracles.all_unordered_pairs(labels.tolist()), 2.5)
    loss = ContrastiveLoss(2.5, normalize=normalize)(x, labels)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-10)


def test_pmls_loss_of_the_same_name_is_another_function() -> None:
    """Un-squared, without the 1/2, normalised, mean over non-zero terms of each kind."""
    theirs = pml.ContrastiveLoss()(X, LABELS).item()
    assert theirs == pytest.approx(case("A1.pml_contrastive_variant")["expected"], abs=1e-6)
    assert abs(theirs - ContrastiveLoss()(X, LABELS).item()) > 1


def test_one_positive_and_one_negative_pair_give_a_loss_where_pml_gives_zero() -> None:
    both = pairs_tuple([(0, 1), (0, 5)])
    expected = (VECTOR["expected"]["pair_0_1"] + VECTOR["expected"]["pair_0_5"]) / 2
    assert ContrastiveLoss(1.0)(X, LABELS, both).item() == pytest.approx(expected, abs=1e-6)
    assert pml.ContrastiveLoss()(X, LABELS, both).item() == 0.0


def test_triplets_are_split_into_their_pairs() -> None:
    triplets = (torch.tensor([0, 3]), torch.tensor([1, 4]), torch.tensor([5, 2]))
    as_pairs = pairs_tuple([(0, 1), (3, 4), (0, 5), (3, 2)])
    loss = ContrastiveLoss()
    assert loss(X, LABELS, triplets).item() == loss(X, LABELS, as_pairs).item()


@pytest.mark.parametrize("indices_tuple", [None, UNORDERED], ids=["every pair", "given pairs"])
def test_gradient_is_that_of_finite_differences(indices_tuple: tuple[Tensor, ...] | None) -> None:
    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ContrastiveLoss(1.1)(x, LABELS, indices_tuple), (x,))


def test_gradient_reaches_separate_references_too() -> None:
    x, refs = X[:2].clone().requires_grad_(), X[1:].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, refs: ContrastiveLoss(1.1)(x, LABELS[:2], None, refs, LABELS[1:]), (x, refs)
    )


@pytest.mark.parametrize("given", [False, True])
def test_duplicates_of_one_or_of_two_identities_are_at_distance_zero_with_zero_gradient(given: bool) -> None:
    x = torch.full((3, 64), 0.37).requires_grad_()
    labels = torch.tensor([0, 0, 1])
    indices = (torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), torch.tensor([2])) if given else None
    loss = ContrastiveLoss(1.0)(x, labels, indices)
    loss.backward()
    assert loss.item() == pytest.approx(0.25 if given else 1 / 3)  # 1/2 m^2 for the negatives, 0 for the positives
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_no_pairs_give_zero_with_zero_gradient() -> None:
    empty = torch.empty(0, dtype=torch.long)
    for x, labels, indices in ((X, LABELS, (empty,) * 4), (X, LABELS, (empty,) * 3), (X[:1], LABELS[:1], None)):
        x = x.clone().requires_grad_()
        loss = ContrastiveLoss()(x, labels, indices)
        loss.backward()
        assert loss.item() == 0.0
        assert x.grad is not None
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_functional_form_broadcasts_and_is_unreduced() -> None:
    dist = torch.tensor([[0.0, 0.5], [1.0, 2.0]])
    assert torch.allclose(contrastive(dist, torch.tensor(True), margin=1.0), dist.square() / 2)
    assert torch.allclose(contrastive(dist, torch.tensor(False), margin=1.0), torch.tensor([[0.5, 0.125], [0, 0]]))


def test_wrong_settings_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="'mean', 'sum'"):
        ContrastiveLoss(reduction="average")  # type: ignore[arg-type]
    for margin in (0.0, math.nan, math.inf, "soft", None):
        with pytest.raises(ValueError, match="margin must be positive and finite"):
            ContrastiveLoss(margin)  # type: ignore[arg-type]
