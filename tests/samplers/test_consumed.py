"""What state_dict says behind a DataLoader: batches that training received, however many were fetched ahead."""

import copy
import gc
import itertools
import json
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from samplers import ImageBatchSampler


class Numbers(Dataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


BATCHES = 10
LOADERS: list[dict[str, Any]] = [
    {"num_workers": 0},
    {"num_workers": 1, "prefetch_factor": 8},  # nearly an epoch ahead, and more than a short epoch
    {"num_workers": 1, "persistent_workers": True},
]
each_loader = pytest.mark.parametrize("options", LOADERS, ids=str)


def make(batches: int = BATCHES) -> ImageBatchSampler:
    return ImageBatchSampler(batches * 3, 3, seed=5)


def loader_of(sampler: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(10_000), batch_sampler=sampler, **options)


def where(sampler: ImageBatchSampler) -> tuple[int, int]:
    state = sampler.state_dict()
    assert (sampler.epoch, sampler.position) == (state["epoch"], state["position"])
    return state["epoch"], state["position"]


class Repeated:
    """A wrapper that never ends, as timm's MultiEpochsDataLoader uses."""

    def __init__(self, sampler: ImageBatchSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield from self.sampler


class Sharded:
    """A wrapper whose iterator is a generator, as accelerate's BatchSamplerShard."""

    def __init__(self, sampler: ImageBatchSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.sampler:  # noqa: UP028
            yield batch


class Sliced(Sharded):
    """A wrapper whose iterator can neither be weakly referenced nor seen on the stack."""

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(iter(self.sampler), None)


def test_torch_still_counts_what_its_loader_hands_out() -> None:
    """The attributes we read. If this fails, samplers/consumed.py needs another way before torch is raised."""
    for workers in (0, 1):
        iterator = iter(DataLoader(Numbers(8), batch_size=2, num_workers=workers))
        assert isinstance(iterator, _BaseDataLoaderIter)
        assert vars(iterator)["_num_yielded"] == 0
        next(iterator)
        next(iterator)
        assert vars(iterator)["_num_yielded"] == 2
        assert "_sampler_iter" in vars(iterator)
        del iterator


@pytest.mark.parametrize("options", [*LOADERS, {"num_workers": 2}], ids=str)
def test_the_position_is_what_training_received_at_every_step_of_several_epochs(options: dict[str, Any]) -> None:
    sampler = make()
    loader = loader_of(sampler, **options)
    expected = make()
    for epoch in range(3):
        assert where(sampler) == (epoch, 0)
        for step, (batch, planned) in enumerate(zip(loader, expected, strict=True), start=1):
            assert batch.tolist() == planned
            assert where(sampler) == ((epoch, step) if step < BATCHES else (epoch + 1, 0))


@each_loader
@pytest.mark.parametrize("wrapper", [Sharded, Sliced])
def test_wrapped_samplers_count_and_advance_as_bare_ones(options: dict[str, Any], wrapper: Any) -> None:
    sampler = make()
    loader = loader_of(wrapper(sampler), **options)
    seen = [[batch.tolist() for batch in loader] for _ in range(3)]  # nobody asks for the state in between
    bare = make()
    assert seen == [list(bare) for _ in range(3)]
    for step, _ in enumerate(loader, start=1):
        assert where(sampler) == ((3, step) if step < BATCHES else (4, 0))


@each_loader
@pytest.mark.parametrize(("wrapped", "left_after"), [(False, 1), (False, 9), (True, 7)])
def test_an_epoch_left_early_starts_again(options: dict[str, Any], wrapped: bool, left_after: int) -> None:
    sampler = make()
    loader = loader_of(Sharded(sampler) if wrapped else sampler, **options)
    for _ in itertools.islice(loader, left_after):
        pass
    again = [batch.tolist() for batch in loader]
    assert again == list(make())
    assert where(sampler) == (1, 0)


@each_loader
@pytest.mark.parametrize("left_after", [1, 9])
def test_the_count_outlives_the_loader(options: dict[str, Any], left_after: int) -> None:
    sampler = make()
    loader = loader_of(sampler, **options)
    for step, _ in enumerate(loader, start=1):
        if step == left_after:
            break
    assert where(sampler) == (0, left_after)
    del loader
    assert where(sampler) == (0, left_after)


@each_loader
def test_the_count_outlives_a_loader_that_was_never_asked(options: dict[str, Any]) -> None:
    sampler = make()
    iterator = iter(loader_of(sampler, **options))
    for _ in range(4):
        next(iterator)
    cycle = [iterator]  # so that only the cyclic collector frees it
    cycle.append(cycle)  # type: ignore[arg-type]
    del iterator, cycle
    gc.collect()
    assert where(sampler) == (0, 4)


def test_the_sampler_does_not_keep_a_loaders_iterator_alive() -> None:
    sampler = make()
    iterator = iter(loader_of(sampler, num_workers=1))
    next(iterator)
    workers = vars(iterator)["_workers"]
    del iterator
    assert not any(worker.is_alive() for worker in workers)
    assert where(sampler) == (0, 1)


def test_the_sampler_keeps_nothing_of_a_loader_that_is_gone() -> None:
    sampler, dataset = make(), Numbers(100)
    iterator = iter(DataLoader(dataset, batch_sampler=sampler))
    next(iterator)
    ref = weakref.ref(dataset)
    del iterator, dataset
    assert ref() is None
    assert where(sampler) == (0, 1)


@pytest.mark.parametrize("options", LOADERS[:2], ids=str)
@pytest.mark.parametrize("batches", [2, 10])
def test_a_wrapper_that_repeats_for_ever_is_followed_over_the_ends_of_epochs(
    options: dict[str, Any], batches: int
) -> None:
    sampler, expected = make(batches), make(batches)
    iterator = iter(loader_of(Repeated(sampler), **options))
    for epoch in range(4):
        for step, planned in enumerate(expected, start=1):
            assert next(iterator).tolist() == planned
            assert where(sampler) == ((epoch, step) if step < batches else (epoch + 1, 0))


def test_in_a_plain_loop_what_was_pulled_is_what_was_consumed() -> None:
    sampler = make()
    for step, _ in enumerate(sampler, start=1):
        assert where(sampler) == ((0, step) if step < BATCHES else (1, 0))
    assert where(sampler) == (1, 0)


def test_iterators_that_are_made_and_dropped_change_nothing() -> None:
    sampler = make()
    for _ in range(3):
        iter(sampler)
        iter(loader_of(sampler))
    assert where(sampler) == (0, 0)


@each_loader
@pytest.mark.parametrize("stop", [5, 10, 19])
def test_a_resumed_run_sees_exactly_the_batches_the_uninterrupted_one_would(options: dict[str, Any], stop: int) -> None:
    straight = make()
    plan = [batch for _ in range(3) for batch in straight]
    sampler = make()
    loader = loader_of(sampler, **options)
    seen: list[list[int]] = []
    while len(seen) < stop:
        for batch in loader:
            seen.append(batch.tolist())
            if len(seen) == stop:
                break
    saved = json.loads(json.dumps(sampler.state_dict()))
    resumed = make()
    resumed.load_state_dict(saved)
    loader = loader_of(resumed, **options)
    while len(seen) < len(plan):
        seen.extend(batch.tolist() for batch in loader)
    assert seen == plan


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_a_copy_made_in_the_middle_of_an_epoch_goes_on_from_there(duplicate: Any) -> None:
    sampler = make()
    iterator = iter(loader_of(sampler, num_workers=1))
    for _ in range(4):
        next(iterator)
    twin = duplicate(sampler)
    assert where(twin) == (0, 4)
    assert list(twin) == list(make())[4:]


def test_a_torch_that_no_longer_counts_is_an_error_and_not_a_wrong_state(monkeypatch: pytest.MonkeyPatch) -> None:
    iterator = iter(loader_of(make()))
    del vars(iterator)["_num_yielded"]
    with pytest.raises(RuntimeError, match="_num_yielded"):
        next(iterator)


def test_frames_of_user_code_are_not_opened() -> None:
    """Reading f_locals of a running function would keep whatever it held at that moment alive."""

    class Held(torch.Tensor):
        pass

    held = torch.zeros(3).as_subclass(Held)
    ref = weakref.ref(held)
    next(iter(make()))
    del held
    assert ref() is None
