import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import ImageBatchSampler


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 4), st.integers(0, 3), st.integers(0, 99))
def test_all_ranks_together_see_each_image_once_an_epoch_in_even_batches(
    num_images: int, batch_size: int, world_size: int, epoch: int, seed: int
) -> None:
    num_batches = -(-num_images // batch_size)
    if num_images // num_batches < world_size:
        with pytest.raises(ValueError, match="fewer than one image"):
            ImageBatchSampler(num_images, batch_size, world_size=world_size)
        return
    ranks = []
    for rank in range(world_size):
        sampler = ImageBatchSampler(num_images, batch_size, seed=seed, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) == num_batches
    seen = [index for batches in ranks for batch in batches for index in batch]
    assert sorted(seen) == list(range(num_images))
    assert all(type(index) is int for index in seen)
    whole = [sum(len(part) for part in parts) for parts in zip(*ranks, strict=True)]
    assert max(whole) <= batch_size
    assert max(whole) - min(whole) <= 1
    for parts in zip(*ranks, strict=True):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert min(map(len, parts)) >= 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(8, 300), st.integers(8, 40), st.data())
def test_resuming_on_another_number_of_ranks_continues_the_same_plan(
    num_images: int, batch_size: int, data: st.DataObject
) -> None:
    whole = ImageBatchSampler(num_images, batch_size, seed=1)
    stop = data.draw(st.integers(0, len(whole) - 1))
    plan = list(whole)
    first = ImageBatchSampler(num_images, batch_size, seed=1)
    for _, _batch in zip(range(stop), first, strict=False):
        pass
    parts = []
    for rank in range(3):
        sampler = ImageBatchSampler(num_images, batch_size, seed=1, rank=rank, world_size=3)
        sampler.load_state_dict(first.state_dict())
        parts.append(list(sampler))
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == plan[stop:]


def test_epochs_and_seeds_have_orders_of_their_own_and_repeat_exactly() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = ImageBatchSampler(50, 8, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(0, 0), order(0, 1), order(1, 0), order(-1, 0)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert order(0, 1) == orders[1]


def test_the_order_does_not_depend_on_how_many_batches_are_planned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(ImageBatchSampler(500, 7))
    monkeypatch.setattr("samplers.epochs._PLANNED_AT_ONCE", 20)
    assert list(ImageBatchSampler(500, 7)) == whole


def test_the_plan_is_pinned_so_that_saved_positions_keep_their_meaning() -> None:
    assert list(ImageBatchSampler(10, 4, seed=3)) == [[0, 3, 2], [9, 5, 8], [1, 7, 6, 4]]


@pytest.mark.parametrize(("num_images", "batch_size"), [(0, 4), (4, 0), (-1, 1)])
def test_sizes_below_one_are_refused(num_images: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match=re.escape("must be at least 1")):
        ImageBatchSampler(num_images, batch_size)
