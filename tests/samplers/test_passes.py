"""Several passes over one sampler at once: whose batches epoch and state count."""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from samplers import ImageBatchSampler

LENGTH = 5
each_loader = pytest.mark.parametrize("workers", [0, 2, None], ids=["no workers", "2 workers", "no loader"])


def make() -> ImageBatchSampler:
    return ImageBatchSampler(20, 4)


def source(sampler: ImageBatchSampler, workers: int | None) -> Any:
    if workers is None:
        return sampler
    return DataLoader(range(20), batch_sampler=sampler, collate_fn=list, num_workers=workers)  # type: ignore[arg-type]


def where(sampler: ImageBatchSampler) -> tuple[int, int]:
    return sampler.epoch, sampler.position


def reached(epoch: int, received: int) -> tuple[int, int]:
    return (epoch, received) if received < LENGTH else (epoch + 1, 0)


@each_loader
@pytest.mark.parametrize(("at", "kept"), [({3}, False), ({1, 5}, False), ({2, 4}, True)], ids=str)
def test_a_look_at_one_batch_changes_neither_the_order_nor_what_training_received(
    workers: int | None, at: set[int], kept: bool
) -> None:
    """Kept looks begin before the last batch: one begun there may as well be the next epoch."""
    sampler, expected, looks = make(), make(), []
    batches = source(sampler, workers)
    for epoch in range(3):
        seen = []
        for step, batch in enumerate(batches, start=1):
            seen.append(batch)
            if step in at:
                look = iter(batches)
                next(look)
                if kept:
                    looks.append(look)
                del look
            assert where(sampler) == reached(epoch, step)
        assert seen == list(expected)
        assert where(sampler) == (epoch + 1, 0)


@each_loader
def test_an_iterator_kept_for_looks_from_before_training_on_does_not_hold_training_back(workers: int | None) -> None:
    sampler, expected = make(), make()
    batches = source(sampler, workers)
    look = iter(batches)
    next(look)
    for epoch in range(3):
        seen = []
        for step, batch in enumerate(batches, start=1):
            seen.append(batch)
            assert where(sampler) == reached(epoch, step)
        next(look)
        assert where(sampler) == (epoch + 1, 0)
        assert seen == list(expected)


@each_loader
@pytest.mark.parametrize(("length", "kept"), [(3, True), (5, True), (10, False)])
def test_after_a_longer_look_the_state_is_training_again_two_batches_on(
    workers: int | None, length: int, kept: bool
) -> None:
    """5: all of the epoch, as an evaluation does inside the loop; 10: twice."""
    sampler, expected, looks = make(), make(), []
    batches = source(sampler, workers)
    for epoch in range(2):
        seen = []
        for step, batch in enumerate(batches, start=1):
            seen.append(batch)
            if step == 2:
                for _ in range(-(-length // LENGTH)):
                    look = iter(batches)
                    for _ in itertools.islice(look, min(length, LENGTH)):
                        pass
                    if kept:
                        looks.append(look)
                    del look
            # Two passes that are prefetched to their ends and both alive leave the order open until one ends.
            open_order = kept and workers and length >= LENGTH
            if step < 2 or step == LENGTH or (step == 4 and not open_order):
                assert where(sampler) == reached(epoch, step)
        assert seen == list(expected)


def test_of_two_prefetched_to_their_ends_the_one_that_ended_its_epoch_is_training() -> None:
    """Nobody pulls any more, so that only the counts are left to go by."""
    sampler = make()
    loader = source(sampler, 2)
    first, second = iter(loader), iter(loader)
    next(first)
    for _ in range(3):
        next(second)
    assert where(sampler) == (0, 3)
    next(second)
    for _ in range(4):
        next(first)
    assert where(sampler) == (1, 0)


def test_an_epoch_ended_beside_an_earlier_pass_that_goes_on_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    sampler = make()
    with caplog.at_level(logging.WARNING):
        for step, _ in enumerate(sampler):
            if step == 1:
                list(sampler)
    (record,) = caplog.records
    assert "goes on with batch 4 of epoch 0" in record.getMessage()


def test_the_next_epoch_beside_the_kept_iterator_of_the_last_is_no_case_to_warn_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampler, expected = make(), make()
    ended = iter(sampler)
    for _ in range(LENGTH):
        next(ended)
    with caplog.at_level(logging.WARNING):
        list(expected)
        assert list(sampler) == list(expected)
        assert where(sampler) == (2, 0)
    assert not caplog.records


@each_loader
def test_a_look_before_training_and_after_a_break_leaves_the_epochs_as_they_are(workers: int | None) -> None:
    sampler, expected = make(), make()
    batches = source(sampler, workers)
    next(iter(batches))
    assert list(batches) == list(expected)
    for _ in itertools.islice(batches, 3):
        pass
    assert where(sampler) == (1, 3)
    next(iter(batches))
    assert [list(batches), list(batches)] == [list(expected), list(expected)]
    assert where(sampler) == (3, 0)


def test_a_look_through_persistent_workers_restarts_their_one_iterator_and_the_state_says_so() -> None:
    sampler = make()
    options: Any = {"num_workers": 1, "persistent_workers": True, "collate_fn": list}
    loader: Any = DataLoader(range(20), batch_sampler=sampler, **options)  # type: ignore[arg-type]
    plan = list(make())
    training = iter(loader)
    assert [next(training), next(training)] == plan[:2]
    assert next(iter(loader)) == plan[0]
    assert where(sampler) == (0, 1)
    assert next(training) == plan[1]
    assert where(sampler) == (0, 2)


def test_a_wrapper_that_repeats_for_ever_is_followed_beside_looks() -> None:
    class Repeated:
        def __iter__(self) -> Iterator[list[int]]:
            while True:
                yield from sampler

    for workers in (0, 1):
        sampler, expected = make(), make()
        batches: Any = Repeated()
        loader = source(batches, workers)
        training = iter(loader)
        for epoch in range(3):
            for step, planned in enumerate(expected, start=1):
                assert next(training) == planned
                if step in (3, 5):
                    next(iter(loader))
                assert where(sampler) == reached(epoch, step)


def test_a_restarted_iterator_counts_from_its_first_batch() -> None:
    for workers in (0, 1):
        sampler = make()
        loader = source(sampler, workers)
        for epoch in range(2):
            training = iter(loader)  # the one before lives until this one is there
            for step in range(1, LENGTH + 1):
                next(training)
                assert where(sampler) == reached(epoch, step)
        training = iter(loader)
        next(training)
        training = iter(loader)
        next(training)
        del training
        assert where(sampler) == (2, 1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=12), st.sampled_from([0, None]))
def test_whoever_goes_on_last_by_two_batches_or_ends_is_training(turns: list[Any], workers: int | None) -> None:
    """Three passes begun in order, then turns of some batches each; a model that hears of every single batch."""
    sampler = make()
    batches = source(sampler, workers)
    iterators = [iter(batches) for _ in range(3)]
    received, training, since = [0, 0, 0], 0, [0, 0, 0]
    for one, count in [(0, 1), (1, 1), (2, 1), *turns]:
        for _ in range(min(count, LENGTH - received[one])):
            next(iterators[one])
            received[one] += 1
            since[one] += 1
            if one == training or since[one] == 2 or received[one] == LENGTH:
                training, since = one, [0, 0, 0]
    assert where(sampler) == reached(0, received[training])
