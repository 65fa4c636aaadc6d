"""Images of a visit from as many groups as possible, all of them in turn."""

import logging
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import IdentityBalancedBatchSampler, PairBatchSampler, group_by_identity
from samplers.rotation import CrossGroupRotation


@st.composite
def grouped(draw: st.DrawFn) -> tuple[list[int], list[str], int]:
    """Labels, the group of each image, K."""
    sizes = draw(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5), min_size=1, max_size=6))
    pairs = [
        (label, f"g{group}") for label, row in enumerate(sizes) for group, size in enumerate(row) for _ in range(size)
    ]
    pairs += [(label, "g0") for label in range(len(sizes))]  # at least one image each
    order = draw(st.permutations(range(len(pairs))))
    return [pairs[i][0] for i in order], [pairs[i][1] for i in order], draw(st.integers(1, 6))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(grouped(), st.integers(0, 3))
def test_a_visit_takes_as_many_groups_as_there_are_and_distinct_images(
    case: tuple[list[int], list[str], int], seed: int
) -> None:
    labels, groups, k = case
    table = group_by_identity(labels)
    rotation = CrossGroupRotation(table, groups, k, seed)
    identity, turns = np.repeat(np.arange(table.num_identities), 7), np.tile(np.arange(7), table.num_identities)
    for ahead in (0, 1):
        images = rotation.images(identity, turns, np.full(len(turns), ahead))
        for row, visit in zip(identity, images.tolist(), strict=True):
            own = [image for image, label in enumerate(labels) if label == table.identities[row]]
            assert set(visit) <= set(own)
            times = Counter(visit)
            assert len(times) == min(k, len(own))
            assert max(times.values()) - min(times.values()) <= 1
            sizes = Counter(groups[image] for image in own)
            taken = Counter(groups[image] for image in times)
            assert len(taken) == min(k, len(sizes))
            # As evenly as sizes allow: who has fewer than another has given all it has.
            assert all(taken[a] >= taken[b] - 1 or taken[a] == sizes[a] for a in sizes for b in sizes if taken[a])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grouped(), st.integers(0, 4))
def test_all_images_come_within_the_turns_that_are_promised(case: tuple[list[int], list[str], int], times: int) -> None:
    labels, groups, k = case
    table = group_by_identity(labels)
    rotation = CrossGroupRotation(table, groups, k, 0)
    for row in range(table.num_identities):
        own = table.images_of(row).tolist()
        sizes = Counter(groups[image] for image in own)
        for group, size in sizes.items():
            period = -(-len(sizes) // k) * size
            turns = np.arange(times * period, (times + 1) * period)
            images = rotation.images(np.full(period, row), turns, np.zeros(period, dtype=np.int64))
            assert {image for image in own if groups[image] == group} <= set(images.ravel().tolist())


def test_a_filler_of_the_same_turn_takes_other_images() -> None:
    table = group_by_identity([0] * 6)
    rotation = CrossGroupRotation(table, ["a", "a", "b", "b", "c", "c"], 3, 0)
    first, second = rotation.images(np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64), np.arange(2))
    assert set(first.tolist()).isdisjoint(second.tolist())


def test_a_sampler_with_groups_crosses_them_and_says_where_it_cannot(caplog: pytest.LogCaptureFixture) -> None:
    labels = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3]
    cameras = [0, 0, 0, 1, 0, 1, 1, 1, 5, 5, 2]
    with caplog.at_level(logging.WARNING):
        sampler = IdentityBalancedBatchSampler(labels, 2, 2, groups=cameras, min_images=2)
        pairs = PairBatchSampler(labels, 4, groups=np.array(cameras))
    assert "cannot take positives across groups for 1 of 3 usable identities" in caplog.text
    assert "cannot take positive pairs across groups for 1 of 3 identities that have any" in caplog.text
    for _ in range(3):
        for batch in sampler:
            for a, b in np.array(batch).reshape(-1, 2):
                assert cameras[a] != cameras[b] or labels[a] == 2
    for _ in range(6):
        for batch in pairs:
            for a, b in np.array(batch).reshape(-1, 2)[:2]:
                assert labels[a] == labels[b]
                assert cameras[a] != cameras[b] or labels[a] == 2
                assert a != b


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([0, 1], "for each of 4 images .* found 2"),
        ([0.5] * 4, "whole numbers or strings"),
        ([[0]] * 4, "one dimension"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        IdentityBalancedBatchSampler([0, 0, 1, 1], 2, 2, groups=groups)
    with pytest.raises(ValueError, match=words):
        PairBatchSampler([0, 0, 1, 1], 2, groups=groups)


def test_a_state_of_other_groups_is_refused() -> None:
    labels = [0, 0, 1, 1]
    state = IdentityBalancedBatchSampler(labels, 2, 2, groups=[0, 1, 0, 1]).state_dict()
    for groups in ([0, 1, 1, 0], None):
        with pytest.raises(ValueError, match="groups was"):
            IdentityBalancedBatchSampler(labels, 2, 2, groups=groups).load_state_dict(state)
