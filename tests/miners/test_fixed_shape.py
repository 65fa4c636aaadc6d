"""The fixed-shape form: the miners' own triplets, without synchronisation, in one graph."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from metricface.losses.triplet import triplet
from metricface.miners import BatchHardMiner, DistanceWeightedMiner, MaskedTriplets, SemiHardMiner
from tests import oracles


def rows(masked: MaskedTriplets, within: int = 24) -> list[tuple[int, int, int]]:
    assert all(column.shape == masked.valid.shape for column in masked.triplets)
    assert all(((column >= 0) & (column < within)).all() for column in masked.triplets)  # also where nothing is valid
    return [
        (a, p, n)
        for a, p, n, valid in zip(*(c.tolist() for c in masked.triplets), masked.valid.tolist(), strict=True)
        if valid
    ]


def faces(seed: int, count: int = 24, people: int = 6, dim: int = 3) -> tuple[Tensor, Tensor]:
    """Identities of one to many images in mixed order, on a grid: exact distances, and ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (count, dim), generator=generator).float(), torch.randint(
        people, (count,), generator=generator
    )


DETERMINISTIC: dict[str, Any] = {
    "hard": BatchHardMiner(normalize=False),
    "semi_hard": SemiHardMiner(2.0, normalize=False),
    "hardest": SemiHardMiner(2.0, fallback="hardest", normalize=False),
    "easiest": SemiHardMiner(2.0, fallback="easiest", normalize=False),
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(list(DETERMINISTIC)), st.sampled_from([None, 5]), st.booleans())
def test_it_gives_the_miners_own_triplets(seed: int, name: str, tile_rows: int | None, references: bool) -> None:
    x, labels = faces(seed)
    miner = DETERMINISTIC[name]
    miner.tile_rows = tile_rows
    arguments: tuple[Any, ...] = (x, labels)
    named: dict[str, Any] = {}
    if references:
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        arguments, named = (x, labels, x[order], labels[order]), {"self_index": order.argsort()}
    expected = list(zip(*(column.tolist() for column in miner(*arguments, **named)), strict=True))
    masked = miner.masked(*arguments, **named, max_positives=23)
    assert rows(masked) == expected
    assert len(masked.valid) == (24 if name == "hard" else 24 * 23)
    assert int(masked.left_out) == 0


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("limit", [1, 2])
def test_positives_beyond_the_limit_are_counted_and_are_no_negatives_either(name: str, limit: int) -> None:
    x, labels = faces(3, people=3)
    masked = DETERMINISTIC[name].masked(x, labels, max_positives=limit)
    sides = labels.numpy(), labels.numpy(), np.arange(24)
    positives = [oracles.positives(a, *sides) for a in range(24)]
    assert int(masked.left_out) == sum(max(0, len(p) - limit) for p in positives)
    found = rows(masked)
    assert found
    assert all(p in positives[a][:limit] and labels[a] != labels[n] for a, p, n in found)


def test_draws_by_distance_follow_their_chances() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(12, 3, generator=generator, dtype=torch.float64))
    labels = torch.arange(12) // 2
    sides = oracles.distances(x.numpy(), x.numpy(), "euclidean"), labels.numpy(), labels.numpy()
    chances = oracles.distance_weighted_chances(*sides, 3, 0.5, 1.4)
    counts = np.zeros((12, 12))
    torch.manual_seed(0)
    for _ in range(3000):
        for a, _, n in rows(DistanceWeightedMiner().masked(x, labels, max_positives=1)):
            counts[a, n] += 1
    for a in range(12):
        possible = chances[a] > 0
        assert counts[a, ~possible].sum() == 0
        assert counts[a].sum() == 3000
        assert stats.chisquare(counts[a, possible], chances[a, possible] * 3000).pvalue > 1e-4


def test_draws_from_a_window_stay_in_it_and_reach_all_of_it() -> None:
    x, labels = faces(1, count=12, people=3)
    sides = oracles.distances(x.numpy(), x.numpy(), "squared_euclidean"), labels.numpy(), labels.numpy(), np.arange(12)
    windows = oracles.semi_hard_windows(*sides, 4.0)
    drawn: dict[tuple[int, int], set[int]] = {pair: set() for pair in windows}
    miner = SemiHardMiner(4.0, negative="random", normalize=False)
    torch.manual_seed(0)
    for _ in range(200):
        for a, p, n in rows(miner.masked(x, labels, max_positives=11)):
            drawn[a, p].add(n)
    assert drawn == {pair: set(window) for pair, window in windows.items()}


def test_where_no_negative_is_eligible_the_fallback_draws_from_all() -> None:
    x, labels = torch.eye(6), torch.arange(6) // 2  # all at distance 1.414
    assert rows(DistanceWeightedMiner().masked(x, labels, max_positives=1), within=6) == []
    found = rows(DistanceWeightedMiner(fallback="uniform").masked(x, labels, max_positives=1), within=6)
    assert [(a, p) for a, p, _ in found] == [(0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)]
    assert all(labels[a] != labels[n] for a, _, n in found)


RANDOM: dict[str, Any] = {
    "semi_random": SemiHardMiner(negative="random"),
    "weighted": DistanceWeightedMiner(),
    "uniform": DistanceWeightedMiner(fallback="uniform"),
}
ALL = pytest.mark.parametrize("miner", [*DETERMINISTIC.values(), *RANDOM.values()], ids=[*DETERMINISTIC, *RANDOM])


@ALL
def test_nothing_waits_for_the_device(miner: Any) -> None:
    x, labels = faces(0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # raises where a value has to be known
        fake = mode.from_tensor(x), mode.from_tensor(labels)
        assert miner.masked(*fake, max_positives=4).valid.shape[0] in (24, 96)
    with pytest.raises(Exception, match=r"(?i)data.?dependent|_local_scalar|nonzero|item"), mode:
        miner(*fake)


@ALL
def test_a_training_step_compiles_into_one_graph(miner: Any) -> None:
    def step(embeddings: Tensor, labels: Tensor) -> Tensor:
        (a, p, n), valid, _ = miner.masked(embeddings.detach(), labels, max_positives=3)
        d_ap, d_an = ((embeddings[a] - embeddings[other]).square().sum(dim=1) for other in (p, n))
        value: Tensor = (triplet(d_ap, d_an, margin=0.2) * valid).sum() / valid.sum().clamp_min(1)
        return value

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        x, labels = faces(seed)
        x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        expected = step(x, labels)
        torch.manual_seed(seed)
        assert compiled(x, labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_without_positives_or_of_one_identity_has_no_valid_triplet() -> None:
    x, _ = faces(0)
    for labels in (torch.arange(24), torch.zeros(24).long()):
        for miner in (*DETERMINISTIC.values(), *RANDOM.values()):
            assert rows(miner.masked(x, labels, max_positives=2)) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: BatchHardMiner().masked(x, y, max_positives=0), "max_positives must be a whole number"),
        (lambda x, y: BatchHardMiner().masked(x, y, x, max_positives=2), "belong together"),
        (lambda x, y: BatchHardMiner().masked(x, y, x[:0], y[:0], max_positives=2), "at least one reference"),
        (lambda x, y: SemiHardMiner(negative="all").masked(x, y, max_positives=2), "negative='all'"),
        (
            lambda x, y: DistanceWeightedMiner(generator=torch.Generator()).masked(x, y, max_positives=2),
            "global generator",
        ),
        (
            lambda x, y: SemiHardMiner(generator=torch.Generator()).masked(x, y, max_positives=2),
            "its own generator",
        ),
    ],
)
def test_what_cannot_have_a_fixed_shape_is_an_error(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*faces(0))
