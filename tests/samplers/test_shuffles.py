import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from samplers.shuffles import key_of, keys_for, shuffled, turn


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_shuffle_of_any_size_holds_each_number_once(size: int, seed: int) -> None:
    assert sorted(shuffled(np.arange(size), size, key_of(seed)).tolist()) == list(range(size))


@pytest.mark.parametrize("root", [2**8, 2**16 - 1])
def test_sizes_next_to_a_square_stay_inside(root: int) -> None:
    for size in (root**2 - 1, root**2, root**2 + 1):
        places = np.concatenate((np.arange(500), np.arange(size - 500, size)))
        found = shuffled(places, size, key_of(size))
        assert found.min() >= 0
        assert found.max() < size
        assert len(set(found.tolist())) == 1000


def test_places_sizes_and_keys_broadcast_to_what_single_calls_give() -> None:
    sizes, keys = np.array([1, 2, 7, 500]), keys_for(key_of("k"), np.arange(4))
    together = shuffled(np.arange(3) % sizes[:, None], sizes[:, None], keys[:, None])
    alone = [[shuffled(t % n, n, k).item() for t in range(3)] for n, k in zip(sizes, keys, strict=True)]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 9, 16, 30])
def test_over_many_keys_every_pair_of_things_comes_together_equally_often(size: int) -> None:
    found = shuffled(np.arange(3) % size, size, keys_for(key_of("pairs"), np.arange(60_000))[:, None])
    for first, second in ((0, 1), (1, 2)) if size > 2 else ((0, 1),):
        seen = np.bincount(found[:, first] * size + found[:, second], minlength=size**2).reshape(size, size)
        assert not np.diag(seen).any()
        assert chisquare(seen[~np.eye(size, dtype=bool)]).pvalue > 1e-4


def test_the_shuffle_is_pinned_so_that_saved_positions_keep_their_meaning() -> None:
    assert shuffled(np.arange(10), 10, key_of("pin", 0)).tolist() == [0, 3, 7, 9, 4, 5, 1, 6, 8, 2]
    assert int(keys_for(key_of(-(2**80)), np.array([3]))[0]) == 14059456581193547470


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 50))
def test_a_turn_takes_distinct_places_and_a_cycle_takes_all(count: int, draw: int, cycle: int) -> None:
    length = -(-count // draw)
    seen: set[int] = set()
    for turns in range(cycle * length, (cycle + 1) * length):
        number, taken = turn(turns, np.array([count]), draw)
        assert number.tolist() == [cycle]
        assert len(set(taken[0].tolist())) == min(draw, count)
        seen |= set(taken[0].tolist())
    assert seen == set(range(count))
