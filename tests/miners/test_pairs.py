"""The pair miners against loops over float64, and their worked example."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metricface.distances import Distance, unit_rows
from metricface.miners import MultiSimilarityMiner, PairMarginMiner
from metricface.tuples import Pairs
from tests import oracles
from tests.vectors import case

LABEL_VALUES = [-7, 0, 2**24, 2**24 + 1, 2**40]


def pairs(found: Pairs) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    assert type(found) is Pairs
    assert all(index.dtype == torch.int64 for index in found)
    p_anchor, positive, n_anchor, negative = (index.tolist() for index in found)
    return list(zip(p_anchor, positive, strict=True)), list(zip(n_anchor, negative, strict=True))


def batch(seed: int) -> tuple[list[Tensor], dict[str, Tensor], list[Any]]:
    """A batch on a grid, half of the time with references: as arguments, and as the oracles take it."""
    rng = np.random.default_rng(seed)
    count, dim = int(rng.integers(1, 9)), int(rng.integers(1, 4))
    values = rng.choice(LABEL_VALUES, size=int(rng.integers(1, 5)), replace=False)
    x, labels = rng.integers(-2, 3, (count, dim)).astype(float), rng.choice(values, count)
    if rng.integers(2):
        return [torch.from_numpy(x), torch.from_numpy(labels)], {}, [x, x, labels, labels, np.arange(count)]
    size = int(rng.integers(0, 90))
    y, ref_labels = rng.integers(-2, 3, (size, dim)).astype(float), rng.choice(values, size)
    itself = np.full(count, -1)
    if size:
        y[0], ref_labels[0], itself[0] = x[0], labels[0], 0
    given_ = [torch.from_numpy(part) for part in (x, labels, y, ref_labels)]
    return given_, {"self_index": torch.from_numpy(itself)}, [x, y, labels, ref_labels, itself]


DISTANCES = st.sampled_from(["euclidean", "squared_euclidean"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), DISTANCES, st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([0.0, 2.0, 3.0, math.inf]))
def test_pairs_beyond_and_within_two_thresholds(
    seed: int, distance: Distance, pos_margin: float, neg_margin: float
) -> None:
    given_, named, (x, y, labels, ref_labels, itself) = batch(seed)
    miner = PairMarginMiner(pos_margin, neg_margin, distance=distance, normalize=False, tile_rows=3)
    dist = oracles.distances(x, y, distance)
    expected = oracles.pair_margin(dist, labels, ref_labels, itself, pos_margin, neg_margin)
    assert pairs(miner(*given_, **named)) == expected
    assert miner.last is not None
    every = [
        sum(len(oracles.positives(a, labels, ref_labels, itself)) for a in range(len(labels))),
        sum(len(oracles.negatives(a, labels, ref_labels)) for a in range(len(labels))),
    ]
    assert [int(v) for v in miner.last[3:]] == [*every, len(expected[0]), len(expected[1]), 0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), DISTANCES, st.sampled_from([0.0, 0.5, 2.0]))
def test_multi_similarity_pairs_are_those_that_the_other_kind_reaches(
    seed: int, distance: Distance, epsilon: float
) -> None:
    given_, named, (x, y, labels, ref_labels, itself) = batch(seed)
    miner = MultiSimilarityMiner(epsilon, distance=distance, normalize=False, tile_rows=3)
    dist = oracles.distances(x, y, distance)
    expected = oracles.multi_similarity(dist, labels, ref_labels, itself, epsilon)
    assert pairs(miner(*given_, **named)) == expected


def test_the_worked_example_of_multi_similarity_mining() -> None:
    inputs, expected = case("A8.multi_similarity_mined")["inputs"], case("A8.multi_similarity_mined")["expected"]
    x, labels = torch.tensor(inputs["X"], dtype=torch.float64), torch.tensor(inputs["labels"])
    found = MultiSimilarityMiner(inputs["eps"])(x, labels)
    cosines, loss = unit_rows(x) @ unit_rows(x).T, 0.0
    for a in set(found.positive_anchor.tolist()) & set(found.negative_anchor.tolist()):
        s_ap = cosines[a, found.positive[found.positive_anchor == a]]
        s_an = cosines[a, found.negative[found.negative_anchor == a]]
        loss += torch.exp(-inputs["alpha"] * (s_ap - inputs["lam"])).sum().log1p().item() / inputs["alpha"]
        loss += torch.exp(inputs["beta"] * (s_an - inputs["lam"])).sum().log1p().item() / inputs["beta"]
    assert loss / len(x) == pytest.approx(expected, abs=1e-6)


def test_a_limit_leaves_out_negative_pairs_only_and_counts_them() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) // 4
    every = pairs(PairMarginMiner(0.0, math.inf)(x, labels))
    miner = PairMarginMiner(0.0, math.inf, max_pairs=100, generator=torch.Generator().manual_seed(1))
    positive, negative = pairs(miner(x, labels))
    assert positive == every[0]
    assert len(set(negative)) == 100
    assert set(negative) < set(every[1])
    assert miner.last is not None
    assert int(miner.last.left_out) == len(every[1]) - 100


@pytest.mark.parametrize("make", [PairMarginMiner, MultiSimilarityMiner])
def test_nothing_to_mine_is_an_empty_result(make: Any) -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for arguments in (
        (x[:0], torch.arange(0)),
        (x[:1], torch.arange(1)),
        (x, torch.arange(6), x[:0], torch.arange(0)),
    ):
        assert pairs(make()(*arguments)) == ([], [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairMarginMiner(-0.1), "pos_margin must be a distance"),
        (lambda: PairMarginMiner(0.1, math.nan), "neg_margin must be a distance"),
        (lambda: PairMarginMiner(distance="dot"), "'cosine'"),  # type: ignore[arg-type]
        (lambda: MultiSimilarityMiner(-1.0), "epsilon must be finite"),
        (lambda: MultiSimilarityMiner(max_pairs=0), "max_pairs must be a whole number"),
    ],
)
def test_settings_that_mean_nothing_are_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_are_shown() -> None:
    assert repr(PairMarginMiner()) == (
        "PairMarginMiner(pos_margin=0.2, neg_margin=0.8, distance='euclidean', normalize=True)"
    )
    assert repr(MultiSimilarityMiner()) == "MultiSimilarityMiner(epsilon=0.1, distance='cosine', normalize=True)"
