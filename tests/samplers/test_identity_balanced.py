import itertools
import logging
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from samplers import IdentityBalancedBatchSampler

Batches = list[list[int]]


def labels_with(counts: list[int], seed: int = 0) -> list[int]:
    """Shuffled labels: identity i has counts[i] images."""
    labels: list[int] = (
        np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)) * 7 - 3, counts)).tolist()
    )
    return labels


def epochs_of(sampler: IdentityBalancedBatchSampler, epochs: int) -> list[Batches]:
    return [list(sampler) for _ in range(epochs)]


def joined(labels: Any, p: int, k: int, world_size: int, epochs: int, **options: Any) -> list[Batches]:
    """What all ranks see together, in the order of one process: identities of all ranks first, then singletons."""
    samplers = [
        IdentityBalancedBatchSampler(labels, p, k, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    parts = [sampler.places() for sampler in samplers]
    order = None if parts[0] is None else np.concatenate([part for part in parts if part is not None]).argsort()
    whole = [
        [list(itertools.chain(*batches)) for batches in zip(*epoch, strict=True)]
        for epoch in zip(*(epochs_of(sampler, epochs) for sampler in samplers), strict=True)
    ]
    return whole if order is None else [[[batch[i] for i in order] for batch in epoch] for epoch in whole]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    world_size = draw(st.sampled_from([1, 1, 2, 3]))
    p = world_size * draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(1, 12), min_size=p, max_size=25))
    return {
        "labels": labels_with(counts, draw(st.integers(0, 9))),
        "p": p,
        "k": draw(st.integers(1, 5)),
        "world_size": world_size,
        "seed": draw(st.integers(0, 5)),
    }


def usable(labels: list[int], at_least: int) -> dict[int, int]:
    return {label: count for label, count in Counter(labels).items() if count >= at_least}


def check_batch(batch: list[int], labels: list[int], p: int, k: int) -> list[int]:
    """P distinct identities, K images each, all distinct where possible; returns the identities."""
    counts = Counter(labels)
    identities = []
    for start in range(0, p * k, k):
        images = batch[start : start + k]
        (identity,) = {labels[image] for image in images}  # contiguous blocks
        identities.append(identity)
        times = Counter(images)
        assert len(times) == min(k, counts[identity])  # all are used before any repeats
        assert max(times.values()) - min(times.values()) <= 1
    assert len(set(identities)) == p
    return identities


@settings(max_examples=80, deadline=None, derandomize=True)
@given(cases(), st.sampled_from(["repeat", "skip"]))
def test_every_promise_about_batches_holds(case: dict[str, Any], small: str) -> None:
    labels, p, k = case["labels"], case["p"], case["k"]
    identities = usable(labels, k if small == "skip" else 1)
    assume(len(identities) >= p)
    cycle = max(-(-count // k) for count in identities.values())
    epochs = joined(labels, p, k, case["world_size"], cycle, seed=case["seed"], small_identities=small)
    for batches in epochs:
        assert len(batches) == -(-len(identities) // p)  # the exact length of an epoch
        visited = [identity for batch in batches for identity in check_batch(batch, labels, p, k)]
        assert set(visited) == set(identities)
        main = visited[: len(identities)]
        assert len(set(main)) == len(identities)  # fillers come last, and nothing else comes twice
        assert max(Counter(visited).values()) <= 2
    # Over ceil(n / K) epochs of main visits every image of an identity appears.
    for identity, count in identities.items():
        seen: set[int] = set()
        for batches in epochs[: -(-count // k)]:
            flat = [image for batch in batches for image in batch][: len(identities) * k]
            seen |= {image for image in flat if labels[image] == identity}
        assert seen == {index for index, label in enumerate(labels) if label == identity}


def test_every_whole_cycle_takes_all_images_and_epochs_across_two_cycles_may_not() -> None:
    labels = labels_with([5, 7])  # cycles of 3 and 4 epochs
    epochs = [batch for (batch,) in epochs_of(IdentityBalancedBatchSampler(labels, 2, 2), 24)]

    def complete(count: int, first: int) -> bool:
        label = {5: -3, 7: 4}[count]
        taken = {image for batch in epochs[first : first + -(-count // 2)] for image in batch if labels[image] == label}
        return len(taken) == count

    assert all(complete(5, first) for first in range(0, 24, 3))
    assert all(complete(7, first) for first in range(0, 24, 4))
    assert not all(complete(5, first) for first in range(22))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_a_filler_takes_other_images_than_the_main_visit_as_far_as_there_are_others(case: dict[str, Any]) -> None:
    labels, p, k = case["labels"], case["p"], case["k"]
    counts = Counter(labels)
    for batches in joined(labels, p, k, case["world_size"], 3, seed=case["seed"]):
        visits = [batch[start : start + k] for batch in batches for start in range(0, p * k, k)]
        main = {labels[visit[0]]: set(visit) for visit in visits[: len(counts)]}
        for visit in visits[len(counts) :]:
            identity = labels[visit[0]]
            fresh = set(visit) - main[identity]
            assert len(fresh) == min(k, max(counts[identity] - k, 0))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), st.integers(1, 3), st.sampled_from(["repeat", "skip"]), st.integers(0, 15))
def test_singletons_end_each_batch_as_distinct_negatives_and_all_get_their_turn(
    case: dict[str, Any], per_rank: int, small: str, more: int
) -> None:
    p, k, world_size = case["p"], case["k"], case["world_size"]
    n = per_rank + more  # whether or not the ranks can have as many each
    counts = [*Counter(case["labels"]).values(), *[6] * p, *[1] * (n + more)]
    labels = labels_with(counts, case["seed"])
    singles = {labels.index(label) for label, count in Counter(labels).items() if count == 1}
    many = usable(labels, max(2, k if small == "skip" else 2))
    per_epoch = -(-len(many) // p)
    turns_needed = -(-len(singles) // n)
    epochs = -(-turns_needed // per_epoch)
    options = {"seed": case["seed"], "small_identities": small, "singletons_per_batch": n}
    served = joined(labels, p, k, world_size, epochs, **options)
    assert served == joined(labels, p, k, 1, epochs, **options)
    batches = [batch for epoch in served for batch in epoch]
    assert len(batches) == per_epoch * epochs
    turns = []
    for batch in batches:
        assert len(batch) == p * k + n
        assert set(check_batch(batch[: p * k], labels, p, k)) <= set(many)
        assert len(set(batch[p * k :])) == n
        assert set(batch[p * k :]) <= singles
        turns.append(set(batch[p * k :]))
    assert set().union(*turns[:turns_needed]) == singles


@settings(max_examples=50, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_resuming_anywhere_on_another_world_size_continues_the_same_global_plan(
    case: dict[str, Any], data: st.DataObject
) -> None:
    labels, p, k = case["labels"], case["p"], case["k"]
    plan = joined(labels, p, k, 1, 2, seed=case["seed"])
    stop = data.draw(st.integers(0, 2 * len(plan[0]) - 1))
    before = data.draw(st.sampled_from([size for size in range(1, p + 1) if p % size == 0]))
    after = data.draw(st.sampled_from([size for size in range(1, p + 1) if p % size == 0]))
    sampler = IdentityBalancedBatchSampler(labels, p, k, seed=case["seed"], rank=before - 1, world_size=before)
    pulled = 0
    while pulled < stop:
        for _ in sampler:
            pulled += 1
            if pulled == stop:
                break
    parts = []
    for rank in range(after):
        resumed = IdentityBalancedBatchSampler(labels, p, k, seed=case["seed"], rank=rank, world_size=after)
        resumed.load_state_dict(sampler.state_dict())
        parts.append([batch for _ in range(2 - sampler.epoch) for batch in resumed])
    rest = [list(itertools.chain(*step)) for step in zip(*parts, strict=True)]
    assert rest == [batch for epoch in plan for batch in epoch][stop:]


def test_seeds_epochs_and_cycles_differ_and_the_same_seed_and_epoch_repeat_exactly() -> None:
    labels = labels_with([4] * 30)

    def first(seed: int, epoch: int) -> list[int]:
        sampler = IdentityBalancedBatchSampler(labels, 6, 2, seed=seed)
        sampler.set_epoch(epoch)
        return next(iter(sampler))

    batches = [first(seed, epoch) for seed in (0, 1) for epoch in range(5)]
    assert all(a != b for i, a in enumerate(batches) for b in batches[:i])
    assert first(1, 4) == batches[-1]
    # Two cycles of one identity pair its images differently for some identities.
    pairs = [
        {frozenset(batch[i : i + 2]) for batch in epoch for i in range(0, 12, 2)}
        for epoch in epochs_of(IdentityBalancedBatchSampler(labels, 6, 2), 4)
    ]
    assert pairs[0] | pairs[1] != pairs[2] | pairs[3]


def test_which_identities_meet_is_uniform_over_epochs() -> None:
    labels = labels_with([2] * 9)
    sampler = IdentityBalancedBatchSampler(labels, 3, 2)
    met = np.zeros((9, 9), dtype=int)
    for epoch in range(400):
        sampler.set_epoch(epoch)
        for batch in sampler:
            rows = [(labels[image] + 3) // 7 for image in batch[::2]]
            met[np.ix_(rows, rows)] += 1
    expected = 400 * 2 / 8  # each of the 8 others stands in the same batch with chance 2 / 8
    others = met[~np.eye(9, dtype=bool)]
    assert abs(others - expected).max() < 5 * expected**0.5


def test_the_order_does_not_depend_on_how_many_batches_are_planned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = labels_with([3, 1, 5, 2, 2, 1, 1, 8] * 9)
    build: Any = {"singletons_per_batch": 4, "world_size": 2, "rank": 1}
    whole = epochs_of(IdentityBalancedBatchSampler(labels, 4, 3, **build), 2)
    monkeypatch.setattr("samplers.epochs._PLANNED_AT_ONCE", 20)
    assert epochs_of(IdentityBalancedBatchSampler(labels, 4, 3, **build), 2) == whole


def test_string_and_integer_labels_of_the_same_order_give_the_same_batches() -> None:
    labels = [0, 0, 1, 1, 1, 2, 2, 3]
    names = ["ann", "ann", "bob", "bob", "bob", "eva", "eva", "zoe"]
    assert list(IdentityBalancedBatchSampler(names, 2, 2)) == list(IdentityBalancedBatchSampler(labels, 2, 2))


def test_the_plan_is_pinned_so_that_saved_positions_keep_their_meaning() -> None:
    sampler = IdentityBalancedBatchSampler([0, 0, 0, 1, 1, 2, 3, 3, 4, 5], 2, 2, seed=11, singletons_per_batch=2)
    assert epochs_of(sampler, 2) == [[[6, 7, 3, 4, 8, 5], [2, 0, 6, 7, 9, 8]], [[1, 2, 6, 7, 5, 8], [4, 3, 0, 1, 9, 5]]]


def test_skip_says_how_many_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    labels = labels_with([1, 2, 3, 4, 5, 1])
    with caplog.at_level(logging.WARNING):
        sampler = IdentityBalancedBatchSampler(labels, 2, 3, small_identities="skip")
    assert (sampler.left_out_identities, sampler.left_out_images, sampler.usable_identities) == (3, 4, 3)
    assert "leaves out 3 of 6 identities (4 of 16 images)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        kept = IdentityBalancedBatchSampler(labels, 2, 3)
        served = IdentityBalancedBatchSampler(labels, 2, 3, small_identities="skip", singletons_per_batch=2)
    assert (kept.left_out_identities, kept.left_out_images) == (0, 0)
    assert (served.left_out_identities, served.left_out_images) == (1, 2)  # singletons are used
    assert "leaves out 1 of 6" in caplog.text


def test_repeat_says_for_how_many_identities_one_image_fills_all_places(caplog: pytest.LogCaptureFixture) -> None:
    labels = labels_with([1, 2, 3, 4, 5, 1])
    with caplog.at_level(logging.WARNING):
        IdentityBalancedBatchSampler(labels, 2, 3)
    (record,) = caplog.records
    assert "fills 3 places with one image for 2 of 6 identities" in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        IdentityBalancedBatchSampler(labels, 2, 1)  # one place is not repeated
        IdentityBalancedBatchSampler(labels, 2, 3, singletons_per_batch=2)
        IdentityBalancedBatchSampler(labels_with([2, 3, 4]), 2, 3)
    assert not caplog.records


@pytest.mark.parametrize("small", ["repeat", "skip"])
def test_of_several_ranks_only_the_first_logs(small: Any, caplog: pytest.LogCaptureFixture) -> None:
    labels = labels_with([1, 2, 3, 4, 5, 1])
    with caplog.at_level(logging.WARNING):
        for rank in (1, 0):
            IdentityBalancedBatchSampler(labels, 2, 3, small_identities=small, rank=rank, world_size=2)
            assert len(caplog.records) == (rank == 0)


def test_batches_are_lists_of_plain_int() -> None:
    for batch in IdentityBalancedBatchSampler(np.array([0, 0, 1, 1], dtype=np.uint8), 2, 2):
        assert type(batch) is list
        assert {type(index) for index in batch} == {int}


@pytest.mark.parametrize(
    ("counts", "p", "k", "options", "words"),
    [
        ([2, 2, 4], 4, 2, {}, r"needs 4 identities \(small_identities=\"repeat\"\); these labels have 3 of 3. Lower"),
        ([2, 2, 4], 2, 3, {"small_identities": "skip"}, 'needs 2 identities with at least 3 .* have 1 of 3.*"repeat"'),
        ([1, 1, 4], 2, 3, {"singletons_per_batch": 1}, "1 of 3 .2 with one image are set aside"),
        ([5], 2, 2, {}, r"one identity only \(5 images\)"),
        ([2, 2, 1], 2, 2, {"singletons_per_batch": 2}, "singletons_per_batch=2 .* have 1 of 3"),
        ([2, 2], 0, 2, {}, "identities_per_batch must be at least 1"),
        ([2, 2], 1, 0, {}, "images_per_identity must be at least 1"),
        ([2, 2], 1, 1, {"singletons_per_batch": -1}, "singletons_per_batch must be at least 0"),
        ([2, 2], 2, 2, {"small_identities": "drop"}, '"repeat" or "skip", found \'drop\''),
        ([2] * 9, 6, 2, {"world_size": 4}, "identities_per_batch=6 .* world_size=4: pass 4 or 8"),
        ([2] * 4, 4, 2, {"world_size": 4, "rank": 4}, "rank=4 is out of range"),
        ([], 1, 1, {}, "empty"),
    ],
)
def test_wrong_arguments_say_what_was_asked_what_was_found_and_what_to_do(
    counts: list[int], p: int, k: int, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        IdentityBalancedBatchSampler(labels_with(counts), p, k, **options)
