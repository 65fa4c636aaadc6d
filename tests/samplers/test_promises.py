"""What every batch sampler promises about ranks, epochs and state, for all of them and any shape of labels."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import IdentityBalancedBatchSampler, ImageBatchSampler, LookAlikeBatchSampler, PairBatchSampler
from samplers.epochs import EpochBatchSampler

Make = Callable[..., EpochBatchSampler]
P = 6  # divisible by 1, 2, 3 and 6 ranks
WORLDS = st.sampled_from([1, 2, 3, 6])


def table(labels: list[int], seed: int) -> Any:
    """Random neighbours, some missing, some twice, some the identity itself."""
    identities = len(set(labels))
    return np.random.default_rng(seed).integers(-1, identities, (identities, 4))


KINDS: dict[str, Callable[[list[int], int], Make]] = {
    "images": lambda labels, seed: lambda **ranks: ImageBatchSampler(len(labels), 8, seed=seed, **ranks),
    "even": lambda labels, seed: lambda **ranks: IdentityBalancedBatchSampler(labels, P, 3, seed=seed, **ranks),
    "count": lambda labels, seed: (
        lambda **ranks: IdentityBalancedBatchSampler(labels, P, 2, seed=seed, identity_weights="count", **ranks)
    ),
    "sqrt, groups": lambda labels, seed: (
        lambda **ranks: IdentityBalancedBatchSampler(
            labels, P, 2, seed=seed, identity_weights="sqrt", groups=[7 * i % 3 for i in range(len(labels))], **ranks
        )
    ),
    "look-alikes": lambda labels, seed: (
        lambda **ranks: LookAlikeBatchSampler(labels, P, 2, table(labels, seed), seed=seed, neighbourhood=3, **ranks)
    ),
    "pairs": lambda labels, seed: lambda **ranks: PairBatchSampler(labels, 2 * P, seed=seed, **ranks),
}
EVERY_KIND = pytest.mark.parametrize("kind", list(KINDS))


def labels_with(counts: list[int]) -> list[int]:
    found: list[int] = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts)).tolist()
    return found


# At least P identities with one image or more, and P images that have another of their identity.
SHAPES = st.tuples(
    st.lists(st.integers(1, 9), min_size=3, max_size=14), st.lists(st.integers(2, 4), min_size=3, max_size=5)
)


def together(parts: tuple[list[int], ...], kind: str) -> Any:
    """One batch of all ranks, in an order that does not depend on their number."""
    if kind == "pairs":  # each rank has its positive pairs, then its negative ones
        return sorted(tuple(pair) for part in parts for pair in np.array(part).reshape(-1, 2).tolist())
    return list(itertools.chain(*parts))


def served(make: Make, kind: str, world: int, epochs: int, state: Any = None) -> list[Any]:
    ranks = []
    for rank in range(world):
        sampler = make(rank=rank, world_size=world)
        if state is not None:
            sampler.load_state_dict(copy.deepcopy(state))
        ranks.append([batch for _ in range(epochs - sampler.epoch) for batch in sampler])
    return [together(parts, kind) for parts in zip(*ranks, strict=True)]


@EVERY_KIND
@settings(max_examples=15, deadline=None, derandomize=True)
@given(SHAPES, st.integers(0, 3), WORLDS)
def test_all_ranks_together_serve_the_batches_of_one(
    kind: str, shape: tuple[list[int], list[int]], seed: int, world: int
) -> None:
    make = KINDS[kind](labels_with(shape[0] + shape[1]), seed)
    assert served(make, kind, world, 2) == served(make, kind, 1, 2)


@EVERY_KIND
@settings(max_examples=15, deadline=None, derandomize=True)
@given(SHAPES, st.integers(0, 3), WORLDS, WORLDS, st.data())
def test_stopped_anywhere_and_resumed_on_another_number_of_ranks_the_plan_goes_on(
    kind: str, shape: tuple[list[int], list[int]], seed: int, before: int, after: int, data: st.DataObject
) -> None:
    make = KINDS[kind](labels_with(shape[0] + shape[1]), seed)
    plan = served(make, kind, 1, 2)
    stop = data.draw(st.integers(0, len(plan) - 1))
    sampler = make(rank=before - 1, world_size=before)
    for _ in itertools.islice(itertools.chain.from_iterable(itertools.repeat(sampler)), stop):
        pass
    assert served(make, kind, after, 2, sampler.state_dict()) == plan[stop:]


@EVERY_KIND
@settings(max_examples=10, deadline=None, derandomize=True)
@given(SHAPES, st.integers(0, 3))
def test_an_epoch_is_its_seed_and_number_and_has_the_length_that_len_says(
    kind: str, shape: tuple[list[int], list[int]], seed: int
) -> None:
    make = KINDS[kind](labels_with(shape[0] + shape[1]), seed)
    sampler = make()
    epochs = [list(sampler) for _ in range(3)]
    assert {len(epoch) for epoch in epochs} == {len(sampler)}
    again = make()
    again.set_epoch(2)
    assert list(again) == epochs[2]


@EVERY_KIND
def test_seeds_and_epochs_differ(kind: str) -> None:
    labels = labels_with([4, 5, 6, 7] * 6)
    epochs = [[list(sampler) for _ in range(3)] for seed in (0, 1) for sampler in [KINDS[kind](labels, seed)()]]
    flat = [str(epoch) for seeded in epochs for epoch in seeded]
    assert len(set(flat)) == 6


@EVERY_KIND
def test_a_state_of_other_labels_or_another_seed_is_refused(kind: str) -> None:
    labels = labels_with([4, 5, 6, 7] * 6)
    state = KINDS[kind](labels, 0)().state_dict()
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        KINDS[kind](labels, 1)().load_state_dict(state)
    if kind != "images":  # it knows no labels
        with pytest.raises(ValueError, match="labels was"):
            KINDS[kind](labels[::-1], 0)().load_state_dict(state)


@EVERY_KIND
def test_batches_are_lists_of_plain_int(kind: str) -> None:
    for batch in KINDS[kind](labels_with([4, 5, 6, 7] * 6), 0)():
        assert type(batch) is list
        assert {type(index) for index in batch} == {int}
