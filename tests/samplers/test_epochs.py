"""The promises about epochs and state, against a model that is nothing but a list of batches."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import IdentityBalancedBatchSampler, ImageBatchSampler
from samplers.epochs import EpochBatchSampler

LENGTH = 5


class Counting(EpochBatchSampler):
    """Batch b of epoch e is [e, b]."""

    def __init__(self, *, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        super().__init__(LENGTH, {"seed": seed}, rank=rank, world_size=world_size)

    def _batches(self, epoch: int, first: int) -> Iterator[list[int]]:
        for batch in range(first, LENGTH):
            yield [epoch, batch]


def epoch_of(epoch: int, first: int = 0) -> list[list[int]]:
    return [[epoch, batch] for batch in range(first, LENGTH)]


def left_early(sampler: EpochBatchSampler, after: int) -> None:
    iterator = iter(sampler)
    for _ in range(after):
        next(iterator)


def loaded(epoch: int, position: int) -> Counting:
    sampler = Counting()
    sampler.load_state_dict({**sampler.state_dict(), "epoch": epoch, "position": position})
    return sampler


def test_a_finished_epoch_is_followed_by_the_next() -> None:
    sampler = Counting()
    assert [list(sampler) for _ in range(3)] == [epoch_of(0), epoch_of(1), epoch_of(2)]
    assert (sampler.epoch, sampler.position) == (3, 0)


def test_once_set_epoch_was_called_an_epoch_repeats_until_another_is_set() -> None:
    sampler = Counting()
    sampler.set_epoch(4)
    assert [list(sampler), list(sampler)] == [epoch_of(4), epoch_of(4)]
    sampler.set_epoch(4)
    assert (sampler.epoch, sampler.position) == (4, 0)
    sampler.set_epoch(2)
    assert list(sampler) == epoch_of(2)


def test_set_epoch_after_a_finished_epoch_starts_driving_there() -> None:
    sampler = Counting()
    list(sampler)
    sampler.set_epoch(1)
    assert [list(sampler), list(sampler)] == [epoch_of(1), epoch_of(1)]


@pytest.mark.parametrize(("first", "epoch", "then"), [(0, 0, (0, 0)), (0, 1, (1, 0)), (1, 0, (0, 1)), (1, 1, (1, 0))])
def test_after_set_epoch_the_position_says_where_the_next_iteration_starts(
    first: int, epoch: int, then: tuple[int, int]
) -> None:
    sampler = loaded(0, first)
    left_early(sampler, 3)
    assert (sampler.epoch, sampler.position) == (0, first + 3)
    sampler.set_epoch(epoch)
    assert (sampler.epoch, sampler.position) == then
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == then
    assert list(sampler) == epoch_of(*then)


def test_set_epoch_of_the_epoch_under_way_does_not_stop_the_count() -> None:
    sampler = Counting()
    for step, _ in enumerate(sampler, start=1):
        if step == 2:
            sampler.set_epoch(0)
            assert (sampler.epoch, sampler.position) == (0, 0)
        else:
            assert (sampler.epoch, sampler.position) == (0, step)
    assert list(sampler) == epoch_of(0)


def test_after_loading_the_rest_of_the_epoch_comes_and_then_the_next_epoch() -> None:
    sampler = loaded(3, 2)
    assert (sampler.epoch, sampler.position, len(sampler)) == (3, 2, LENGTH)
    assert [list(sampler), list(sampler)] == [epoch_of(3, 2), epoch_of(4)]


def test_a_resumed_epoch_left_early_starts_again_where_it_was_loaded() -> None:
    sampler = loaded(3, 2)
    left_early(sampler, 2)
    assert sampler.position == 4
    assert list(sampler) == epoch_of(3, 2)


def test_the_usual_resume_loop_keeps_the_position_and_another_epoch_drops_it() -> None:
    sampler = loaded(3, 2)
    seen = []
    for epoch in range(sampler.epoch, 5):
        sampler.set_epoch(epoch)
        seen += list(sampler)
    assert seen == epoch_of(3, 2) + epoch_of(4)
    other = loaded(3, 2)
    other.set_epoch(4)
    other.set_epoch(3)
    assert list(other) == epoch_of(3)


@pytest.mark.parametrize("stop", range(3 * LENGTH + 1))
@pytest.mark.parametrize("driven_before", [False, True])
@pytest.mark.parametrize("driven_after", [None, "sampler", "script"])
def test_no_batch_is_lost_or_repeated_by_stopping_anywhere(
    stop: int, driven_before: bool, driven_after: str | None
) -> None:
    """Saved inside the loop, right after a batch; whoever drives, before and after."""
    seen: list[list[int]] = []
    sampler, saved, script_epoch = Counting(), None, 0
    for epoch in range(3):
        if stop == len(seen):
            break
        script_epoch = epoch
        if driven_before:
            sampler.set_epoch(epoch)
        for batch in sampler:
            seen.append(batch)
            if len(seen) == stop:
                saved = sampler.state_dict()
                break
    resumed = Counting()
    if saved is not None:
        resumed.load_state_dict(saved)
    if driven_after is None:
        while len(seen) < 3 * LENGTH:
            seen += list(resumed)
    else:
        # The script's own count of the epoch only fits a state of a sampler that the script drove.
        first = script_epoch if driven_after == "script" and driven_before else resumed.epoch
        for epoch in range(first, 3):
            resumed.set_epoch(epoch)
            seen += list(resumed)
    assert seen == epoch_of(0) + epoch_of(1) + epoch_of(2)


actions = st.lists(
    st.one_of(
        st.just("epoch"),
        st.tuples(st.just("break"), st.integers(1, LENGTH - 1)),
        st.tuples(st.just("set"), st.integers(0, 3)),
        st.just("reload"),
    ),
    max_size=12,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(actions)
def test_any_order_of_epochs_breaks_settings_and_reloads_follows_the_written_rules(actions: list[Any]) -> None:
    sampler, driven = Counting(), False
    epoch, start, position, ended = 0, 0, 0, False
    for action in actions:
        if action == "epoch" or action[0] == "break":
            if ended and not (start == LENGTH and driven):
                epoch, start = (epoch if driven else epoch + 1), 0
            expected = epoch_of(epoch, start)
            if action == "epoch":
                assert list(sampler) == expected
                position, ended, start = LENGTH, True, 0
            else:
                iterator = iter(sampler)
                taken = [batch for _, batch in zip(range(action[1]), iterator, strict=False)]
                assert taken == expected[: action[1]]
                position = start + len(taken)
                ended = position == LENGTH
                start = 0 if ended else start
        elif action[0] == "set":
            sampler.set_epoch(action[1])
            driven = True
            if action[1] != epoch or (ended and start != LENGTH):
                epoch, start, position, ended = action[1], 0, 0, False
            else:
                position = start
        else:
            state = sampler.state_dict()
            sampler, driven = Counting(), False
            sampler.load_state_dict(state)
            epoch, start = state["epoch"], state["position"]
            position, ended = start, start == LENGTH
        reached = (epoch + 1, 0) if ended and not driven else (epoch, position)
        assert (sampler.epoch, sampler.position) == reached


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (4, 4), (-1, 2)])
def test_a_rank_out_of_range_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        Counting(rank=rank, world_size=world_size)


@pytest.mark.parametrize(("name", "value"), [("world_size", 0), ("rank", 0.5), ("world_size", "2")])
def test_ranks_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        Counting(**{name: value})


def test_a_state_of_another_plan_is_refused_and_says_what_differs() -> None:
    with pytest.raises(ValueError, match="seed was 1 and is 2 here"):
        Counting(seed=2).load_state_dict(Counting(seed=1).state_dict())
    labels = [0, 0, 1, 1, 2]
    state = IdentityBalancedBatchSampler(labels, 2, 2).state_dict()
    with pytest.raises(ValueError, match="images_per_identity was 2 and is 3 here"):
        IdentityBalancedBatchSampler(labels, 2, 3).load_state_dict(state)
    with pytest.raises(ValueError, match="small_identities was 'repeat' and is 'skip' here"):
        IdentityBalancedBatchSampler(labels, 2, 2, small_identities="skip").load_state_dict(state)
    with pytest.raises(ValueError, match="labels was"):
        IdentityBalancedBatchSampler([0, 1, 0, 1, 2], 2, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="sampler was 'IdentityBalancedBatchSampler' and is 'ImageBatchSampler' here"):
        ImageBatchSampler(5, 2).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"position": LENGTH + 1}, "beyond"), ({"position": -1}, "position"), ({"epoch": -1}, "epoch")],
)
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(change: dict[str, int], words: str) -> None:
    sampler = loaded(2, 3)
    with pytest.raises(ValueError, match=words):
        sampler.load_state_dict({**sampler.state_dict(), **change})
    assert list(sampler) == epoch_of(2, 3)


def test_a_state_without_its_parts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not a state of Counting.*plan missing"):
        Counting().load_state_dict({"epoch": 1, "position": 0})


@pytest.mark.parametrize("state", [None, {"epoch": 0, "position": 0, "plan": None}])
def test_what_is_no_state_is_refused_and_changes_nothing(state: Any) -> None:
    sampler = loaded(2, 3)
    with pytest.raises(ValueError, match=r"state of Counting.* found None"):
        sampler.load_state_dict(state)
    assert list(sampler) == epoch_of(2, 3)


@pytest.mark.parametrize("seed", [1.7, "7", None])
def test_seeds_are_whole_numbers(seed: Any) -> None:
    for build in (
        lambda: ImageBatchSampler(4, 2, seed=seed),
        lambda: IdentityBalancedBatchSampler([0, 1], 1, 1, seed=seed),
    ):
        with pytest.raises(TypeError, match="seed must be a whole number"):
            build()


def test_a_negative_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        Counting().set_epoch(-1)
