import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metricface.diagnostics import embedding_statistics, mining_statistics
from tests.vectors import case

HERMANS = case("A3.batch_all")
U6 = torch.tensor(HERMANS["inputs"]["X"], dtype=torch.float64)
LABELS = torch.tensor(HERMANS["inputs"]["labels"])


def points(*places: float) -> Tensor:
    return torch.tensor(places)[:, None]


def as_floats(statistics: dict[str, Tensor]) -> dict[str, float]:
    assert all(value.ndim == 0 for value in statistics.values())
    return {name: value.item() for name, value in statistics.items()}


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on operations that make a device wait: reading a value, or a result whose size is in the data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")), name
        return func(*args, **(kwargs or {}))


def test_batch_all_has_hermans_share_of_active_triplets() -> None:
    listed = [
        (a, p, n)
        for a in range(6)
        for p in range(6)
        for n in range(6)
        if a != p and LABELS[a] == LABELS[p] and LABELS[a] != LABELS[n]
    ]
    triplets = torch.tensor(listed).unbind(1)
    found = as_floats(mining_statistics(U6, LABELS, triplets, margin=0.2, distance="euclidean"))
    expected = HERMANS["expected"]
    assert found["triplets"] == expected["n_triplets"]
    assert found["active_share"] == pytest.approx(expected["n_active"] / expected["n_triplets"])
    assert (found["anchors"], found["anchor_share"]) == (6, 1)


def test_easy_semi_hard_and_hard_are_told_apart_on_a_line() -> None:
    x, labels = points(0.0, 1.0, 1.125, 0.5, 3.0, 1.0), torch.tensor([0, 0, 1, 2, 3, 4])
    negatives = torch.tensor([2, 3, 4, 5])  # d_an 1.125 semi-hard, 0.5 hard, 3 easy, 1 = d_ap: hard
    triplets = (torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long), negatives)
    found = as_floats(mining_statistics(x, labels, triplets, margin=0.25, distance="euclidean"))
    assert found == {
        "triplets": 4,
        "active_share": 0.75,
        "easy_share": 0.25,
        "semi_hard_share": 0.25,
        "hard_share": 0.5,
        "d_ap_mean": 1.0,
        "d_an_mean": (1.125 + 0.5 + 3.0 + 1.0) / 4,
        "anchors": 1,
        "anchor_share": 0.5,  # of images 0 and 1; the others have no partner
    }


def test_under_the_soft_margin_every_triplet_is_active() -> None:
    x, labels = points(0.0, 1.0, 1.125, 0.5), torch.tensor([0, 0, 1, 2])
    triplets = (torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([2, 3]))
    found = as_floats(mining_statistics(x, labels, triplets, margin="soft", distance="squared_euclidean"))
    assert (found["active_share"], found["easy_share"]) == (1, 0)
    assert (found["semi_hard_share"], found["hard_share"]) == (0.5, 0.5)


def test_normalize_measures_between_unit_rows() -> None:
    x, labels = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-5.0, 0.0]]), torch.tensor([0, 0, 1])
    triplets = (torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))
    found = as_floats(mining_statistics(x, labels, triplets, margin=0.2, distance="euclidean", normalize=True))
    assert found["d_ap_mean"] == pytest.approx(math.sqrt(2))
    assert found["d_an_mean"] == pytest.approx(2)


def test_many_triplets_are_measured_from_all_distances_with_the_same_result() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(16, 256, generator=generator), torch.arange(16) // 4
    anchor = torch.arange(16).repeat(5000)
    positive = anchor // 4 * 4 + (anchor + 1) % 4
    negative = (anchor + 4) % 16
    few = mining_statistics(x, labels, (anchor[:16], positive[:16], negative[:16]), margin=1.0, distance="euclidean")
    many = mining_statistics(x, labels, (anchor, positive, negative), margin=1.0, distance="euclidean")
    for name in ("active_share", "hard_share", "d_ap_mean", "d_an_mean", "anchors", "anchor_share"):
        assert many[name].item() == pytest.approx(few[name].item(), rel=1e-5)


def test_anchors_are_counted_once_and_positives_not_at_all() -> None:
    triplets = (torch.tensor([0, 0, 0]), torch.tensor([1, 2, 1]), torch.tensor([3, 3, 4]))
    found = as_floats(mining_statistics(U6, LABELS, triplets, margin=0.2, distance="cosine"))
    assert (found["triplets"], found["anchors"]) == (3, 1)
    assert found["anchor_share"] == pytest.approx(1 / 6)


def test_no_triplets_give_counts_of_zero_and_shares_that_are_not_numbers() -> None:
    empty = (torch.empty(0, dtype=torch.long),) * 3
    found = as_floats(mining_statistics(U6, LABELS, empty, margin=0.2, distance="euclidean"))
    assert (found["triplets"], found["anchors"], found["anchor_share"]) == (0, 0, 0)
    assert all(math.isnan(found[name]) for name in ("active_share", "easy_share", "hard_share", "d_ap_mean"))
    alone = as_floats(mining_statistics(U6, torch.arange(6), empty, margin=0.2, distance="euclidean"))
    assert math.isnan(alone["anchor_share"])


def test_nothing_waits_for_the_device_and_nothing_keeps_a_graph() -> None:
    x = U6.clone().requires_grad_()
    triplets = (torch.tensor([0, 3]), torch.tensor([1, 4]), torch.tensor([5, 2]))
    with NoWaiting():  # type: ignore[no-untyped-call]
        values = mining_statistics(x, LABELS, triplets, margin=0.2, distance="euclidean")
        values |= embedding_statistics(x)
    assert not any(value.requires_grad for value in values.values())


def test_embedding_statistics_agree_with_loops_over_all_pairs() -> None:
    x = U6.numpy()
    norms = np.sqrt((x**2).sum(1))
    unit = x / norms[:, None]
    cosines = [float(unit[i] @ unit[j]) for i in range(6) for j in range(6) if i != j]
    principal = np.linalg.eigvalsh(np.cov(unit.T, bias=True))
    found = as_floats(embedding_statistics(U6))
    assert found["norm_mean"] == pytest.approx(norms.mean())
    assert found["norm_std"] == pytest.approx(norms.std())
    assert found["spread"] == pytest.approx(1 - np.linalg.norm(unit.mean(0)))
    assert found["mean_cosine"] == pytest.approx(np.mean(cosines))
    assert found["effective_dimensions"] == pytest.approx(principal.sum() ** 2 / (principal**2).sum())


def test_effective_dimensions_count_directions_of_equal_variance_in_both_shapes() -> None:
    few_rows = torch.cat([torch.eye(4, 9), -torch.eye(4, 9)])
    many_rows = few_rows[:, :4].repeat(5, 1)
    for rows in (few_rows, many_rows):
        assert embedding_statistics(3 * rows)["effective_dimensions"].item() == pytest.approx(4)


def test_a_collapsed_batch_shows_and_odd_sizes_do_not_fail() -> None:
    one = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    found = as_floats(embedding_statistics(one.repeat(7, 1)))  # the mean of seven equal rows is not quite that row
    assert found["spread"] == pytest.approx(0, abs=1e-6)
    assert found["mean_cosine"] == pytest.approx(1, abs=1e-6)
    assert math.isnan(found["effective_dimensions"])
    assert math.isnan(as_floats(embedding_statistics(torch.ones(1, 4)))["mean_cosine"])
    assert all(math.isnan(value) for value in as_floats(embedding_statistics(torch.empty(0, 4))).values())
    assert math.isfinite(as_floats(embedding_statistics(torch.zeros(3, 4)))["spread"])


def test_ties_at_margin_zero_are_hard_but_not_active() -> None:
    x, labels = points(0.0, 1.0, 1.0), torch.tensor([0, 0, 1])
    triplets = tuple(torch.tensor([row]) for row in (0, 1, 2))
    found = as_floats(mining_statistics(x, labels, triplets, margin=0.0, distance="euclidean"))
    assert (found["hard_share"], found["semi_hard_share"], found["easy_share"]) == (1, 0, 0)
    assert found["active_share"] == 0


def test_labels_may_lie_on_another_device_than_embeddings() -> None:
    meta = torch.device("meta")
    triplets = tuple(torch.tensor([row], device=meta) for row in (0, 1, 2))
    found = mining_statistics(
        torch.ones(3, 2, device=meta), torch.tensor([0, 0, 1]), triplets, margin=0.0, distance="cosine"
    )
    assert all(value.device == meta for value in found.values())


def test_a_margin_that_is_no_number_is_an_error() -> None:
    empty = (torch.empty(0, dtype=torch.long),) * 3
    with pytest.raises(ValueError, match="a number or the word 'soft'; got 'hard'"):
        mining_statistics(U6, LABELS, empty, margin="hard", distance="euclidean")  # type: ignore[arg-type]
