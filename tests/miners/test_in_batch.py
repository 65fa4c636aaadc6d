"""The miners against loops over float64, on exact inputs: ties and boundaries included."""

import copy
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metricface.distances import Distance, pairwise, unit_rows
from metricface.miners import (
    BatchAllMiner,
    BatchHardMiner,
    DistanceWeightedMiner,
    EasyPositiveMiner,
    MiningCounts,
    RandomHardMiner,
    RandomMiner,
    SemiHardMiner,
)
from metricface.tuples import Triplets
from tests import oracles
from tests.largest import LargestTensor
from tests.vectors import case

LABEL_VALUES = [-7, 0, 3, 2**24, 2**24 + 1, 2**40]
Make = Callable[..., nn.Module]
FEW: dict[str, Make] = {  # of at most one triplet a positive pair
    "semi_hard": SemiHardMiner,
    "semi_random": lambda **kw: SemiHardMiner(negative="random", fallback="hardest", **kw),
    "hard": BatchHardMiner,
    "easy_positive": EasyPositiveMiner,
    "easy_positive_hard": lambda **kw: EasyPositiveMiner("hardest", **kw),
    "weighted": DistanceWeightedMiner,
    "uniform": lambda **kw: DistanceWeightedMiner(fallback="uniform", nonzero_loss_cutoff=0.8, **kw),
    "random_hard": RandomHardMiner,
}
ALL_IN_WINDOW: dict[str, Make] = {"semi_all": lambda **kw: SemiHardMiner(negative="all", fallback="easiest", **kw)}
EVERY_MINER = [*FEW.values(), *ALL_IN_WINDOW.values()]
MINERS = pytest.mark.parametrize("make", EVERY_MINER, ids=[*FEW, *ALL_IN_WINDOW])
MINERS_OF_FEW = pytest.mark.parametrize("make", FEW.values(), ids=FEW)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(triplets: Triplets) -> list[tuple[int, int, int]]:
    assert all(index.dtype == torch.int64 for index in triplets)
    return list(zip(*(index.tolist() for index in triplets), strict=True))


class Problem:
    """A small batch on an integer grid, where distances are exact and tie often; half of them with references."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        count, dim = int(rng.integers(1, 9)), int(rng.integers(1, 4))
        values = rng.choice(LABEL_VALUES, size=int(rng.integers(1, 5)), replace=False)
        self.x = rng.integers(-2, 3, (count, dim)).astype(float)
        self.labels = rng.choice(values, count)
        self.y, self.ref_labels, self.self_index = self.x, self.labels, np.arange(count)
        self.separate = bool(rng.integers(2))
        if self.separate:
            size = int(rng.integers(0, 90))
            self.y, self.ref_labels = rng.integers(-2, 3, (size, dim)).astype(float), rng.choice(values, size)
            self.self_index = np.full(count, -1)
            for i in range(min(count, size)):
                if rng.integers(2):  # this anchor is among the references, at row i
                    self.y[i], self.ref_labels[i], self.self_index[i] = self.x[i], self.labels[i], i

    def mine(self, miner: nn.Module, dtype: torch.dtype = torch.float32) -> Triplets:
        x, labels = torch.from_numpy(self.x).to(dtype), torch.from_numpy(self.labels)
        if not self.separate:
            found = miner(x, labels)
            assert type(found) is Triplets
            return found
        y, ref_labels = torch.from_numpy(self.y).to(dtype), torch.from_numpy(self.ref_labels)
        found = miner(x, labels, y, ref_labels, self_index=torch.from_numpy(self.self_index))
        assert type(found) is Triplets
        return found

    def sides(self, distance: str) -> tuple[Any, Any, Any, Any]:
        return oracles.distances(self.x, self.y, distance), self.labels, self.ref_labels, self.self_index


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(["euclidean", "squared_euclidean"]), st.sampled_from([None, 1, 3]))
def test_batch_hard_is_the_farthest_positive_and_the_closest_negative(
    seed: int, distance: Distance, tile_rows: int | None
) -> None:
    problem = Problem(seed)
    miner = BatchHardMiner(distance=distance, normalize=False, tile_rows=tile_rows)
    assert rows(problem.mine(miner)) == oracles.batch_hard(*problem.sides(distance))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["euclidean", "squared_euclidean"]),
    st.sampled_from([1.0, 2.5, math.inf]),
    st.sampled_from(["skip", "easiest", "hardest"]),
    st.sampled_from([None, 1, 3]),
)
def test_semi_hard_is_the_closest_negative_of_each_window_or_what_the_fallback_says(
    seed: int, distance: Distance, margin: float, fallback: Any, tile_rows: int | None
) -> None:
    problem = Problem(seed)
    miner = SemiHardMiner(margin, fallback=fallback, distance=distance, normalize=False, tile_rows=tile_rows)
    expected = oracles.semi_hard(*problem.sides(distance), margin, fallback)
    assert rows(problem.mine(miner)) == expected
    windows = oracles.semi_hard_windows(*problem.sides(distance), margin)
    assert miner.last is not None
    assert [int(value) for value in miner.last] == [
        len(problem.labels),
        sum(
            not oracles.positives(i, problem.labels, problem.ref_labels, problem.self_index)
            for i in range(len(problem.labels))
        ),
        sum(not oracles.negatives(i, problem.labels, problem.ref_labels) for i in range(len(problem.labels))),
        len(windows),
        sum(not window for window in windows.values()),
        len(expected),
        0,
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["euclidean", "squared_euclidean"]),
    st.sampled_from([1.0, math.inf]),
    st.sampled_from(["skip", "easiest", "hardest"]),
    st.sampled_from([None, 1, 3]),
)
def test_all_semi_hard_negatives_are_the_whole_window_or_what_the_fallback_says(
    seed: int, distance: Distance, margin: float, fallback: Any, tile_rows: int | None
) -> None:
    problem = Problem(seed)
    miner = SemiHardMiner(
        margin, negative="all", fallback=fallback, distance=distance, normalize=False, tile_rows=tile_rows
    )
    windows = oracles.semi_hard_windows(*problem.sides(distance), margin)
    one = {(a, p): n for a, p, n in oracles.semi_hard(*problem.sides(distance), margin, fallback)}
    expected = [
        (a, p, n) for (a, p), window in windows.items() for n in window or ([one[a, p]] if (a, p) in one else [])
    ]
    assert rows(problem.mine(miner)) == expected
    assert miner.last is not None
    assert int(miner.last.pairs_without_candidate) == sum(not window for window in windows.values())
    assert int(miner.last.triplets) == len(expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(["euclidean", "squared_euclidean"]), st.sampled_from([0.0, 2.5]))
def test_a_random_hard_negative_violates_the_margin_of_its_pair(seed: int, distance: Distance, margin: float) -> None:
    problem = Problem(seed)
    miner = RandomHardMiner(margin, distance=distance, normalize=False, generator=seeded(seed))
    windows = oracles.violating(*problem.sides(distance), margin)
    found = rows(problem.mine(miner))
    assert [(a, p) for a, p, _ in found] == [pair for pair, window in windows.items() if window]
    assert all(n in windows[a, p] for a, p, n in found)
    assert miner.last is not None
    assert int(miner.last.pairs_without_candidate) == sum(not window for window in windows.values())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["euclidean", "squared_euclidean"]),
    st.sampled_from(["semi_hard", "hardest"]),
    st.sampled_from([None, 1, 3]),
)
def test_easy_positive_is_the_closest_positive_and_the_closest_negative_that_is_allowed(
    seed: int, distance: Distance, negative: Any, tile_rows: int | None
) -> None:
    problem = Problem(seed)
    miner = EasyPositiveMiner(negative, distance=distance, normalize=False, tile_rows=tile_rows)
    assert rows(problem.mine(miner)) == oracles.easy_positive(*problem.sides(distance), negative)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_batch_all_is_every_triplet_once_and_a_limit_takes_as_many_different_ones(seed: int, limit: int) -> None:
    problem = Problem(seed)
    _, labels, ref_labels, self_index = problem.sides("euclidean")
    expected = oracles.batch_all(labels, ref_labels, self_index)
    assert sorted(rows(problem.mine(BatchAllMiner()))) == expected
    miner = BatchAllMiner(max_triplets=limit, generator=seeded(seed))
    some = rows(problem.mine(miner))
    assert len(set(some)) == len(some) == min(limit, len(expected))
    assert set(some) <= set(expected)
    assert [a for a, _, _ in some] == sorted(a for a, _, _ in some)
    assert miner.last is not None
    assert int(miner.last.left_out) == len(expected) - len(some)


@pytest.mark.parametrize("limit", [7, 40, 180])  # drawn one by one, and from a permutation
def test_a_limited_batch_all_draws_evenly_from_every_triplet(limit: int) -> None:
    x, labels = torch.zeros(12, 2), torch.arange(12) // 3
    every = oracles.batch_all(labels.numpy(), labels.numpy(), np.arange(12))
    assert len(every) == 216
    counts, times, generator = dict.fromkeys(every, 0), 30_000 // limit, seeded(limit)
    for _ in range(times):
        for triplet in rows(BatchAllMiner(max_triplets=limit, generator=generator)(x, labels)):
            counts[triplet] += 1
    share = limit / 216
    # Draws without replacement vary less than independent ones, by the share that is left.
    statistic = sum((count - times * share) ** 2 for count in counts.values()) / (times * share * (1 - share))
    assert 1e-3 < stats.chi2.cdf(statistic * 215 / 216, 215) < 1 - 1e-3


def test_a_limited_semi_hard_miner_draws_evenly_from_all_windows() -> None:
    x, labels = faces(identities=8, dim=4)
    miner = SemiHardMiner(math.inf, negative="all")
    every = rows(miner(x, labels))
    limit, times = len(every) // 3, 600
    counts, generator = dict.fromkeys(every, 0), seeded(3)
    for _ in range(times):
        few = SemiHardMiner(math.inf, negative="all", max_triplets=limit, generator=generator)
        some = rows(few(x, labels))
        assert len(set(some)) == len(some) == limit
        assert few.last is not None
        assert int(few.last.left_out) == len(every) - limit
        for triplet in some:
            counts[triplet] += 1
    share = limit / len(every)
    statistic = sum((count - times * share) ** 2 for count in counts.values()) / (times * share * (1 - share))
    assert 1e-3 < stats.chi2.cdf(statistic, len(every)) < 1 - 1e-3
    found = [
        rows(SemiHardMiner(math.inf, negative="all", max_triplets=50, generator=seeded(1), tile_rows=size)(x, labels))
        for size in (1, 5, 100)
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("make", [BatchHardMiner, SemiHardMiner, EasyPositiveMiner, RandomHardMiner])
def test_a_zero_row_has_cosine_zero_with_every_row(make: Make) -> None:
    # From the first row: a positive at cosine .9, a zero row (0), a negative at cosine .3, one at -.5.
    x = torch.tensor([[1.0, 0.0], [0.9, 0.19**0.5], [0.0, 0.0], [0.3, 0.91**0.5], [-0.5, 0.75**0.5], [0.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 2, 3, 4])
    found = {n for a, _, n in rows(make(distance="cosine", normalize=False)(x, labels)) if a == 0}
    if make is RandomHardMiner:
        assert found == set()
    elif make is SemiHardMiner:
        # d_ap = 0.1, and the window ends before 1, where a zero row lies
        in_window = rows(SemiHardMiner(0.85, negative="all", distance="cosine")(x, labels))
        assert [n for a, _, n in in_window if a == 0] == [3]
    else:
        assert found == {3}
    zero = rows(make(distance="cosine")(x, torch.tensor([0, 1, 5, 2, 3, 5])))
    assert all(a not in (2, 5) or p in (2, 5) for a, p, _ in zero)


def test_the_worked_example_of_random_hard() -> None:
    inputs, expected = case("C1.candidate_sets")["inputs"], case("C1.candidate_sets")["expected"]
    x, labels = torch.tensor(inputs["X"], dtype=torch.float64), torch.tensor(inputs["labels"])
    drawn: set[tuple[int, int, int]] = set()
    miner = RandomHardMiner(inputs["alpha"], normalize=False, generator=seeded())
    for _ in range(60):
        drawn |= set(rows(miner(x, labels)))
    assert [triplet for triplet in sorted(drawn) if triplet[0] < triplet[1]] == [
        tuple(row) for row in expected["vgg_a_lt_p"]
    ]
    assert len(drawn) == expected["n_vgg_all"]


def test_the_worked_example_of_easy_positive() -> None:
    inputs, expected = case("C8.easy_positive")["inputs"], case("C8.easy_positive")["expected"]
    x, labels = torch.tensor(inputs["X"], dtype=torch.float64), torch.tensor(inputs["labels"])
    cosines = unit_rows(x) @ unit_rows(x).T
    for name, negative in (("EPHN", "hardest"), ("EPSHN", "semi_hard")):
        a, p, n = EasyPositiveMiner(negative)(x, labels)  # type: ignore[arg-type]
        s_ap, s_an = cosines[a, p], cosines[a, n]
        kept = (s_ap > 0) & (s_an > 0)  # as the authors' loss has it
        loss = torch.nn.functional.softplus((s_an - s_ap)[kept] / inputs["sigma"]).mean().item()
        assert loss == pytest.approx(expected[name], abs=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(["euclidean", "squared_euclidean"]))
def test_a_random_semi_hard_negative_lies_in_the_window_of_its_pair(seed: int, distance: Distance) -> None:
    problem = Problem(seed)
    miner = SemiHardMiner(2.5, negative="random", distance=distance, normalize=False, generator=seeded(seed))
    windows = oracles.semi_hard_windows(*problem.sides(distance), 2.5)
    found = rows(problem.mine(miner))
    assert [(a, p) for a, p, _ in found] == [pair for pair, window in windows.items() if window]
    assert all(n in windows[a, p] for a, p, n in found)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([3, 17, 512]), st.sampled_from(["skip", "uniform"]))
def test_distance_weighting_takes_every_positive_pair_once_with_an_eligible_negative(
    seed: int, dim: int, fallback: Any
) -> None:
    problem = Problem(seed)
    spread = np.random.default_rng(0).normal(size=(problem.x.shape[1], dim))
    problem.x, problem.y = oracles.unit(problem.x @ spread), oracles.unit(problem.y @ spread)
    miner = DistanceWeightedMiner(fallback=fallback, generator=seeded(seed), nonzero_loss_cutoff=1.1)
    dist, labels, ref_labels, self_index = problem.sides("euclidean")
    chances = oracles.distance_weighted_chances(dist, labels, ref_labels, dim, 0.5, 1.1)
    uniform = fallback == "uniform"
    expected = []
    for a in range(len(labels)):
        allowed = {int(n) for n in np.flatnonzero(chances[a] > 1e-40)}
        if uniform and not chances[a].any():
            allowed = set(oracles.negatives(a, labels, ref_labels))
        if allowed:
            expected += [(a, p, allowed) for p in oracles.positives(a, labels, ref_labels, self_index)]
    found = rows(problem.mine(miner, torch.float64))
    assert [(a, p) for a, p, _ in found] == [(a, p) for a, p, _ in expected]
    assert all(n in allowed for (_, _, n), (_, _, allowed) in zip(found, expected, strict=True))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_the_random_miner_takes_every_positive_pair_once_with_any_negative(seed: int) -> None:
    problem = Problem(seed)
    found = rows(problem.mine(RandomMiner(generator=seeded(seed))))
    _, labels, ref_labels, self_index = problem.sides("euclidean")
    others = [oracles.negatives(a, labels, ref_labels) for a in range(len(labels))]
    pairs = [
        (a, p) for a in range(len(labels)) if others[a] for p in oracles.positives(a, labels, ref_labels, self_index)
    ]
    assert [(a, p) for a, p, _ in found] == pairs
    assert all(n in others[a] for a, _, n in found)


def test_the_worked_examples_of_batch_hard() -> None:
    for name in ("C2.batch_hard_indices", "A3.batch_hard"):
        inputs, expected = case(name)["inputs"], case(name)["expected"]
        x = torch.tensor(inputs["X"], dtype=torch.float64)
        a, p, n = BatchHardMiner(normalize=False)(x, torch.tensor(inputs["labels"]))
        if name.startswith("C2"):
            assert rows(Triplets(a, p, n)) == [tuple(row) for row in expected]
        else:
            dist = pairwise(x, x, "euclidean")
            np.testing.assert_allclose(dist[a, p] - dist[a, n], expected["per_anchor_diff"], atol=1e-6)


def test_the_worked_examples_of_semi_hard_windows() -> None:
    inputs, expected = case("C1.candidate_sets")["inputs"], case("C1.candidate_sets")["expected"]
    x, labels = torch.tensor(inputs["X"], dtype=torch.float64), torch.tensor(inputs["labels"])
    drawn: set[tuple[int, int, int]] = set()
    miner = SemiHardMiner(inputs["alpha"], negative="random", normalize=False, generator=seeded())
    for _ in range(40):
        drawn |= set(rows(miner(x, labels)))
    assert sorted(drawn) == [tuple(row) for row in expected["semi_hard_all"]]


@pytest.mark.parametrize("name", ["C1.tfa_semihard_fallback", "C1.tfa_semihard_U6"])
def test_an_infinite_margin_with_the_easiest_fallback_is_tensorflow_addons(name: str) -> None:
    inputs, expected = case(name)["inputs"], case(name)["expected"]
    x = torch.tensor(inputs["X"], dtype=torch.float64)
    a, p, n = SemiHardMiner(math.inf, fallback="easiest", normalize=False)(x, torch.tensor(inputs["labels"]))
    dist = pairwise(x, x, "squared_euclidean")
    loss = (dist[a, p] - dist[a, n] + inputs["margin"]).clamp_min(0).mean().item()
    assert loss == pytest.approx(expected, abs=1e-6)


def test_the_worked_example_of_distance_weighting_is_drawn_in_its_proportions() -> None:
    inputs = case("C5.dw_probabilities_3d")["inputs"]
    expected = np.array(case("C5.dw_probabilities_3d")["expected"])
    x, labels = torch.tensor(inputs["X"], dtype=torch.float64), torch.tensor(inputs["labels"])
    draws = 20_000
    for row in range(6):
        # The row as many anchors, each with one positive: the row itself, of which self_index says nothing.
        many = torch.full((draws,), row)
        negative = (labels != labels[row]).nonzero()[:, 0]
        references = torch.cat([torch.tensor([row]), negative])
        miner = DistanceWeightedMiner(generator=seeded(row))
        found = miner(x[many], labels[many], x[references], labels[references])
        counts = np.bincount(references[found.negative].numpy(), minlength=6)
        possible = expected[row] > 0
        assert counts[~possible].sum() == 0
        chances = expected[row][possible] / expected[row].sum()  # rounded to six digits in the example
        assert stats.chisquare(counts[possible], chances * draws).pvalue > 1e-3


def test_opposite_negatives_spoil_no_other_row() -> None:
    inputs, expected = case("C5.dw_antipodal")["inputs"], case("C5.dw_antipodal")["expected"]
    x, labels = torch.tensor(inputs["X"]), torch.tensor(inputs["labels"])
    miner = DistanceWeightedMiner(generator=seeded())
    found = rows(miner(x, labels))
    assert {(a, n) for a, _, n in found} == {(a, n) for a, ns in enumerate(expected["eligible"]) for n in ns}
    assert miner.last is not None
    assert int(miner.last.pairs_without_candidate) == 2


def test_close_positives_in_512_dimensions_cost_no_anchor_its_negatives() -> None:
    random = np.random.RandomState(0)
    common = random.randn(512)
    x = oracles.unit(random.randn(6, 512) + 0.45 * common)
    x[1], x[4] = (oracles.unit((x[i] + 0.01 * x[i + 1])[None])[0] for i in (0, 3))
    labels = torch.tensor(case("C5.dw_underflow_512")["inputs"]["labels"])
    found = DistanceWeightedMiner(generator=seeded())(torch.from_numpy(x).float(), labels)
    assert sorted(set(found.anchor.tolist())) == case("C5.pml_dw_512")["expected"]
    assert len(found.anchor) == 12


def test_a_semi_hard_window_is_drawn_from_evenly() -> None:
    draws = 30_000
    x = torch.zeros(draws, 1)
    references = torch.tensor([[1.0], [0.5], [1.1], [1.2], [1.3], [1.4], [3.0]])
    miner = SemiHardMiner(1.0, negative="random", distance="euclidean", normalize=False, generator=seeded())
    found = miner(x, torch.zeros(draws).long(), references, torch.tensor([0, 1, 1, 2, 2, 3, 3]))
    counts = np.bincount(found.negative.numpy(), minlength=7)
    assert counts[[0, 1, 6]].tolist() == [0, 0, 0]
    assert stats.chisquare(counts[2:6]).pvalue > 1e-3


def test_random_hard_negatives_are_drawn_evenly_from_all_that_violate() -> None:
    draws = 30_000
    x = torch.zeros(draws, 1)
    references = torch.tensor([[1.0], [0.5], [1.1], [1.2], [1.3], [1.4], [3.0]])
    miner = RandomHardMiner(0.35, distance="euclidean", normalize=False, generator=seeded())
    found = miner(x, torch.zeros(draws).long(), references, torch.tensor([0, 1, 1, 2, 2, 3, 3]))
    counts = np.bincount(found.negative.numpy(), minlength=7)
    assert counts[[0, 5, 6]].tolist() == [0, 0, 0]
    assert stats.chisquare(counts[1:5]).pvalue > 1e-3


def test_random_negatives_are_drawn_evenly_around_the_anchors_own_identity() -> None:
    draws = 30_000
    ref_labels = torch.tensor([5, 1, 9, 5, 5, 2, 9, 7])
    miner = RandomMiner(generator=seeded())
    found = miner(torch.zeros(draws, 2), torch.full((draws,), 5), torch.zeros(8, 2), ref_labels)
    counts = np.bincount(found.negative.numpy(), minlength=8)
    assert counts[[0, 3, 4]].tolist() == [0, 0, 0]
    assert stats.chisquare(counts[[1, 2, 5, 6, 7]]).pvalue > 1e-3


def faces(identities: int = 24, images: int = 4, dim: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clustered embeddings with duplicates and a zero row."""
    centres = torch.randn(identities, dim, generator=seeded(seed))
    x = centres.repeat_interleave(images, 0) + torch.randn(identities * images, dim, generator=seeded(seed + 1))
    x[1], x[-1] = x[0], 0.0
    return x, torch.arange(identities).repeat_interleave(images)


@MINERS
@pytest.mark.parametrize("tile_rows", [1, 7, 96, 1000])
def test_neither_choices_nor_draws_depend_on_the_size_of_tiles(make: Make, tile_rows: int) -> None:
    # Unit rows on a grid, whose distances are exact: no tile rounds them differently.
    problem = [(2 * torch.randint(0, 2, (70, 64), generator=seeded(1)) - 1) / 8, torch.arange(70) // 3]
    expected = None
    for rows_at_once in (None, tile_rows):
        torch.manual_seed(0)
        found = rows(make(tile_rows=rows_at_once, normalize=False)(*problem))
        assert expected in (None, found)
        expected = found
    assert expected


@MINERS
def test_a_clone_of_the_batch_with_self_index_gives_what_the_batch_itself_gives(make: Make) -> None:
    x, labels = faces()
    torch.manual_seed(0)
    expected = rows(make()(x, labels))
    torch.manual_seed(0)
    found = make()(x, labels, x.clone(), labels.clone(), self_index=torch.arange(len(x)))
    assert rows(found) == expected
    assert expected


@pytest.mark.parametrize("make", [BatchHardMiner, SemiHardMiner, EasyPositiveMiner, BatchAllMiner])
def test_each_ranks_share_against_all_ranks_gathered_gives_what_one_process_finds(make: Make) -> None:
    x, labels = (part[:-1] for part in faces())  # without the zero row, to which all others are equally far
    expected = sorted(rows(make()(x, labels)))
    found = []
    for mine in torch.split(torch.arange(95), 32):
        of_rank = make()(x[mine], labels[mine], x, labels, self_index=mine)
        found += [(int(mine[a]), p, n) for a, p, n in rows(of_rank)]
    assert sorted(found) == expected
    assert expected


@pytest.mark.parametrize("make", [BatchHardMiner, SemiHardMiner, EasyPositiveMiner, BatchAllMiner])
def test_the_order_of_a_batch_changes_the_numbers_of_its_rows_and_nothing_else(make: Make) -> None:
    x, labels = (part[:-1] for part in faces())  # without the zero row, to which all others are equally far
    x[1] += 0.01 * torch.randn(128, generator=seeded(7))  # nor equal rows
    order = torch.randperm(len(x), generator=seeded(5))
    moved = {tuple(order[list(t)].tolist()) for t in rows(make()(x[order].double(), labels[order]))}
    assert moved == set(rows(make()(x.double(), labels)))


@pytest.mark.parametrize("miner", [SemiHardMiner(), BatchHardMiner()])
@pytest.mark.parametrize("distance", get_args(Distance))
def test_float32_chooses_as_float64_wherever_distances_differ_beyond_rounding(
    miner: nn.Module, distance: Distance
) -> None:
    x, labels = (rows_[:-1] for rows_ in faces())  # all are at distance 1 from the zero row: ties that rounding breaks
    miner = type(miner)(distance=distance)
    single, double = (rows(miner(rows_, labels)) for rows_ in (x, x.double()))
    dist = oracles.distances(oracles.unit(x.double().numpy()), oracles.unit(x.double().numpy()), "squared_euclidean")
    assert len(single) == len(double)
    for (a, p, n), (b, q, m) in zip(single, double, strict=True):
        assert a == b
        assert abs(dist[a, p] - dist[b, q]) < 1e-6
        assert abs(dist[a, n] - dist[b, m]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@MINERS
def test_half_precision_and_autocast_are_mined_in_float32(make: Make, dtype: torch.dtype) -> None:
    x, labels = faces(dim=512)
    x = x.to(dtype)
    torch.manual_seed(0)
    expected = rows(make()(x.float(), labels))
    torch.manual_seed(0)
    assert rows(make()(x, labels)) == expected
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rows(make()(x.float(), labels)) == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@MINERS
def test_the_integer_type_of_labels_does_not_matter(make: Make, dtype: torch.dtype) -> None:
    x, labels = faces()
    torch.manual_seed(0)
    expected = rows(make()(x, labels))
    torch.manual_seed(0)
    assert rows(make()(x, labels.to(dtype), x, labels, self_index=torch.arange(len(x), dtype=torch.int32))) == expected


def nothing_to_mine() -> list[Any]:
    x, labels = faces()
    none = x[:0], labels[:0]
    return [
        pytest.param((x[:1], labels[:1]), id="one image"),
        pytest.param((x[:0], labels[:0]), id="no image"),
        pytest.param((x, torch.zeros_like(labels)), id="one identity"),
        pytest.param((x, torch.arange(len(x))), id="all distinct"),
        pytest.param((x, labels, *none), id="no references"),
        pytest.param((x, labels, x, labels + 100), id="references of other people"),
        pytest.param((x[:3], labels[:3], x[:3], labels[:3]), id="references of the same person only"),
    ]


@MINERS
@pytest.mark.parametrize("batch", nothing_to_mine())
def test_where_there_is_nothing_to_mine_the_triplets_are_empty(make: Make, batch: tuple[Tensor, ...]) -> None:
    for miner in (make(), RandomMiner(), BatchAllMiner(), BatchAllMiner(max_triplets=3)):
        assert rows(miner(*batch)) == []
        counts = miner.last
        assert isinstance(counts, MiningCounts)
        assert int(counts.triplets) == 0
        assert int(counts.pairs_without_candidate) == int(counts.pairs)


def test_counts_say_how_many_anchors_had_no_positive_or_no_negative() -> None:
    x, labels = torch.eye(5), torch.tensor([1, 1, 1, 2, 3])
    miner = BatchHardMiner()
    assert len(miner(x, labels).anchor) == 3
    assert miner.last is not None
    assert [int(value) for value in miner.last] == [5, 2, 0, 3, 0, 3, 0]
    miner(x, labels, x[:3], labels[:3])
    assert [int(value) for value in miner.last] == [5, 2, 3, 3, 3, 0, 0]


def test_batch_hard_never_picks_the_anchor_as_its_own_positive_when_images_are_duplicates() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert rows(BatchHardMiner()(x, torch.tensor([0, 0, 1, 1]))) == [(0, 1, 2), (1, 0, 2), (2, 3, 0), (3, 2, 0)]


def test_duplicates_as_positives_keep_their_window_when_their_distance_is_rounded_below_zero() -> None:
    x, labels = unit_rows(torch.randn(60, 512, generator=seeded())).repeat_interleave(2, 0), torch.arange(120) // 2
    assert (2 - 2 * x @ x.T).min() < 0
    assert len(rows(SemiHardMiner(1.5, distance="euclidean")(x, labels))) == 120


def test_a_collapsed_batch_has_no_semi_hard_negative_and_the_fallback_still_gives_every_pair() -> None:
    x, labels = torch.ones(12, 8), torch.arange(12) // 3
    assert rows(SemiHardMiner()(x, labels)) == []
    for fallback in ("easiest", "hardest"):
        found = rows(SemiHardMiner(fallback=fallback)(x, labels))
        assert len(found) == 24
        assert all(n == (3 if a < 3 else 0) for a, _, n in found)


@pytest.mark.parametrize("dim", [2, 128, 512])
def test_a_near_duplicate_negative_costs_no_other_anchor_its_triplets(dim: int) -> None:
    x = unit_rows(torch.randn(128, dim, generator=seeded()) + 0.5)
    labels = torch.arange(128) // 4
    x[4] = x[0] + 1e-4
    miner = DistanceWeightedMiner(generator=seeded(), nonzero_loss_cutoff=1.45)
    found = miner(x, labels)
    assert miner.last is not None
    assert len(found.anchor) == 128 * 3 - int(miner.last.pairs_without_candidate)
    assert len(set(found.anchor.tolist())) == 128
    if dim == 512:
        assert set(found.negative[found.anchor == 0].tolist()) == {4}


def test_mining_keeps_no_graph_and_no_state() -> None:
    x, labels = faces()
    x.requires_grad_()
    for make in EVERY_MINER:
        miner = make()
        miner(x, labels)
        assert dict(miner.state_dict()) == {}
        assert list(miner.parameters()) == []
        again = copy.deepcopy(miner)
        assert rows(again(x, labels)) is not None
    assert x.grad is None


@MINERS_OF_FEW
def test_no_tensor_is_larger_than_a_tile_or_the_embeddings_with_their_lengths(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metricface.miners.tiles.CPU_BLOCK", 8 * 256)
    x, labels = faces(identities=64, dim=8)
    with LargestTensor() as largest:
        make(tile_rows=8)(x, labels)
    assert largest.numbers <= max(8 * len(x), len(x) * (8 + 4)) < len(x) ** 2 / 20


@pytest.mark.parametrize("make", [BatchHardMiner, SemiHardMiner, EasyPositiveMiner])
def test_what_needs_no_whole_row_holds_no_more_than_a_block(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metricface.miners.tiles.CPU_BLOCK", 16 * 64)
    x, labels = faces(identities=64, dim=2)
    with LargestTensor() as largest:
        make(tile_rows=16)(x, labels)
    assert largest.numbers <= max(16 * 64, len(x) * (2 + 4))


def test_a_sample_of_every_triplet_makes_no_list_of_them_all() -> None:
    x, labels = faces(identities=64, images=8, dim=4)  # 1.8 million triplets of 512 images
    with LargestTensor() as largest:
        assert len(BatchAllMiner(max_triplets=1000, generator=seeded())(x, labels).anchor) == 1000
    assert largest.numbers <= 512 * 8


class Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the sizes of everything that is computed, views and empty memory aside."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            for tensor in made if isinstance(made, (tuple, list)) else (made,):
                self.numbers += tensor.numel() if isinstance(tensor, Tensor) else 0
        return made


@MINERS
def test_one_identity_alone_costs_no_more_than_a_draw_for_each_pair(make: Make) -> None:
    x = torch.randn(600, 4, generator=seeded())
    with Work() as work:  # type: ignore[no-untyped-call]
        make()(x, torch.zeros(600).long())
    assert work.numbers < 2 * 600**2


@MINERS
def test_one_large_identity_makes_work_for_its_own_anchors_only(make: Make) -> None:
    # One anchor with 600 positives among 64 anchors with 4: 856 pairs, not 64 x 600.
    labels, ref_labels = torch.arange(64), torch.cat([torch.zeros(600).long(), torch.arange(1, 64).repeat(4)])
    x, references = torch.randn(64, 4, generator=seeded(0)), torch.randn(852, 4, generator=seeded(1))
    with Work() as work:  # type: ignore[no-untyped-call]
        make()(x, labels, references, ref_labels)
    assert work.numbers < 8 * (852 + 64) * 896


def test_draws_come_from_the_generator_alone() -> None:
    x, labels = faces()
    for make in (
        lambda g: SemiHardMiner(negative="random", generator=g),
        lambda g: SemiHardMiner(negative="all", max_triplets=20, generator=g),
        lambda g: DistanceWeightedMiner(generator=g),
        lambda g: RandomHardMiner(generator=g),
        lambda g: BatchAllMiner(max_triplets=20, generator=g),
    ):
        before = torch.get_rng_state()
        first, second, other = (rows(make(seeded(seed))(x, labels)) for seed in (5, 5, 6))
        assert torch.equal(before, torch.get_rng_state())
        assert first == second != other


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SemiHardMiner(negative="closest"),  # type: ignore[arg-type]
            "negative='closest' is unknown; use one of 'hardest', 'random', 'all'",
        ),
        (lambda: SemiHardMiner(fallback="none"), "'skip', 'easiest', 'hardest'"),  # type: ignore[arg-type]
        (lambda: DistanceWeightedMiner(fallback="easiest"), "'skip', 'uniform'"),  # type: ignore[arg-type]
        (lambda: SemiHardMiner(0.0), "margin > 0"),
        (lambda: SemiHardMiner(math.nan), "margin > 0"),
        (lambda: BatchHardMiner(distance="l2"), "'squared_euclidean'"),  # type: ignore[arg-type]
        (lambda: SemiHardMiner("soft"), "margin > 0.*found 'soft'"),  # type: ignore[arg-type]
        (lambda: BatchHardMiner(tile_rows=0), "tile_rows"),
        (lambda: BatchAllMiner(max_triplets=0), "max_triplets must be a whole number"),
        (lambda: SemiHardMiner(max_triplets=1.5), "max_triplets must be a whole number"),  # type: ignore[arg-type]
        (lambda: RandomHardMiner(-1.0), "0 or more"),
        (lambda: EasyPositiveMiner("easy"), "'semi_hard', 'hardest'"),  # type: ignore[arg-type]
        (lambda: BatchHardMiner(tile_rows=2.5), "tile_rows must be a whole number"),  # type: ignore[arg-type]
        (lambda: DistanceWeightedMiner(cutoff="0.5"), "found cutoff='0.5'"),  # type: ignore[arg-type]
        (lambda: DistanceWeightedMiner(cutoff=1.5), "cutoff=1.5, nonzero_loss_cutoff=1.4"),
        (lambda: DistanceWeightedMiner(cutoff=0.0), "0 < cutoff"),
        (lambda: DistanceWeightedMiner(nonzero_loss_cutoff=math.nan), "0 < cutoff"),
    ],
)
def test_settings_that_mean_nothing_are_errors_that_say_what_would(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_embeddings_with_nan_are_an_error() -> None:
    x, labels = faces()
    x[5, 3] = torch.nan
    with pytest.raises(ValueError, match="first: row 5"):
        BatchHardMiner()(x, labels)


def test_rows_that_are_not_of_unit_length_are_an_error_where_the_miner_is_told_that_they_are() -> None:
    x, labels = faces()
    unit = unit_rows(x[:-1])  # without the zero row
    miner = DistanceWeightedMiner(normalize=False, generator=seeded())
    assert len(miner(unit, labels[:-1]).anchor) == len(miner(unit.bfloat16(), labels[:-1]).anchor) > 0
    with pytest.raises(ValueError, match=r"95 of 95 rows of embeddings are not of length 1 .first: row 0, length 5"):
        miner(5.0 * unit, labels[:-1])
    with pytest.raises(ValueError, match=r"1 of 96 rows of ref_emb .* row 95, length 0"):
        miner(unit, labels[:-1], unit_rows(x), labels)


@MINERS
def test_references_of_a_wider_type_are_mined_in_it(make: Make) -> None:
    x, labels = faces()
    torch.manual_seed(0)
    expected = rows(make()(x.double(), labels, x.double(), labels, self_index=torch.arange(len(x))))
    torch.manual_seed(0)
    assert rows(make()(x, labels, x.double(), labels, self_index=torch.arange(len(x)))) == expected


def test_settings_are_shown() -> None:
    assert repr(SemiHardMiner(0.3)) == (
        "SemiHardMiner(margin=0.3, negative='hardest', fallback='skip', distance='squared_euclidean', normalize=True)"
    )
    assert repr(DistanceWeightedMiner()) == (
        "DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4, fallback='skip', normalize=True)"
    )
    assert repr(RandomMiner()) == "RandomMiner()"


CLOSE = {
    "off centre": lambda noise: noise + 30.0,
    "far off centre": lambda noise: 1e-2 * noise + 7.0,
    "nearly collapsed": lambda noise: torch.ones_like(noise) + 0.03 * noise,
    "collapsed": lambda noise: torch.ones_like(noise) + 1e-4 * noise,
}


@pytest.mark.parametrize("make", CLOSE.values(), ids=CLOSE.keys())
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("distance", get_args(Distance))
def test_a_batch_close_together_far_from_the_origin_is_mined_by_its_distances(
    make: Callable[[Tensor], Tensor], normalize: bool, distance: Distance
) -> None:
    x, labels = make(torch.randn(256, 512, generator=seeded(0))), torch.arange(256) // 4
    exact = (unit_rows(x) if normalize or distance == "cosine" else x).double()
    dist = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist").square()
    rounding = 4e-6 * dist.mean()
    a, p, n = SemiHardMiner(math.inf, distance=distance, normalize=normalize)(x, labels)
    assert len(a) > 600
    assert (dist[a, p] < dist[a, n] + rounding).all()
    a, p, n = BatchHardMiner(distance=distance, normalize=normalize)(x, labels)
    same = labels[:, None] == labels
    assert (dist[a, n] <= dist.masked_fill(same, torch.inf).amin(dim=1) + rounding).all()
    assert (dist[a, p] >= dist.masked_fill(~same, 0.0).amax(dim=1) - rounding).all()
