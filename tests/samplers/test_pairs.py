import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from samplers import PairBatchSampler
from tests.samplers.test_identity_balanced import labels_with


def pairs_of(sampler: PairBatchSampler, batch: list[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    a1, p, a2, n = (part.tolist() for part in sampler.indices_tuple)
    positive = [(batch[i], batch[j]) for i, j in zip(a1, p, strict=True)]
    return positive, [(batch[i], batch[j]) for i, j in zip(a2, n, strict=True)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=20),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.integers(0, 3),
)
def test_pairs_are_what_they_are_called_and_each_image_begins_one_positive_pair_an_epoch(
    counts: list[int], size: int, share: float, seed: int
) -> None:
    labels = labels_with(counts, seed)
    number = Counter(labels)
    firsts = {image for image, label in enumerate(labels) if number[label] > 1}
    positive = round(share * size)
    assume(positive <= len(firsts) and (share in (0.0, 1.0) or 0 < positive < size))
    sampler = PairBatchSampler(labels, size, positive_share=share, seed=seed)
    assert sampler.single_image_identities == sum(count == 1 for count in counts)
    for _ in range(2):
        begun: list[int] = []
        for batch in sampler:
            positives, negatives = pairs_of(sampler, batch)
            assert (len(positives), len(negatives)) == (positive, size - positive)
            assert all(labels[a] == labels[b] and a != b for a, b in positives)
            assert all(labels[a] != labels[b] for a, b in negatives)
            begun += [a for a, _ in positives]
            assert len({a for a, _ in positives}) == positive
        if positive:
            assert Counter(begun[: len(firsts)]) == Counter(firsts)
            assert len(begun) - len(firsts) < positive
        else:
            assert len(sampler) == -(-len(labels) // size)


def test_over_n_minus_1_epochs_each_image_meets_each_other_of_its_identity() -> None:
    labels = labels_with([4, 4, 4])
    sampler = PairBatchSampler(labels, 12, positive_share=0.5)  # 12 images, 6 positive pairs: no fillers
    for _ in range(3):
        met = Counter(pair for _ in range(3) for batch in sampler for pair in pairs_of(sampler, batch)[0])
        assert met == Counter((a, b) for a, b in itertools.permutations(range(12), 2) if labels[a] == labels[b])


def test_every_image_begins_a_negative_pair_in_its_turn_whatever_the_epochs() -> None:
    labels = labels_with([1] * 30 + [2, 2])
    sampler = PairBatchSampler(labels, 4, positive_share=0.25)  # 4 batches an epoch, 3 negative pairs each
    begun = [a for _ in range(3) for batch in sampler for a, _ in pairs_of(sampler, batch)[1]]
    assert set(begun) == set(range(34))  # 36 pairs


def test_partners_of_negative_pairs_are_drawn_evenly_from_the_images_of_others() -> None:
    labels = [0, 0, 0, 1, 2, 2]
    sampler = PairBatchSampler(labels, 6, positive_share=0.0)
    found = np.zeros((6, 6))
    for _ in range(1000):
        for batch in sampler:
            for a, b in pairs_of(sampler, batch)[1]:
                found[a, b] += 1
    for a in range(6):
        others = [b for b in range(6) if labels[b] != labels[a]]
        expected = 1000 / len(others)
        assert found[a].sum() == found[a][others].sum() == 1000
        assert np.abs(found[a][others] - expected).max() < 5 * expected**0.5


def test_ranks_have_pairs_of_both_kinds_and_the_tuple_fits_each_of_them() -> None:
    labels = labels_with([5] * 8)
    for rank in range(2):
        sampler = PairBatchSampler(labels, 12, positive_share=1 / 3, rank=rank, world_size=2)
        for batch in sampler:
            assert len(batch) == 12
            positives, negatives = pairs_of(sampler, batch)
            assert (len(positives), len(negatives)) == (2, 4)
            assert all(labels[a] == labels[b] for a, b in positives)
            assert all(labels[a] != labels[b] for a, b in negatives)


@pytest.mark.parametrize(
    ("labels", "size", "options", "words"),
    [
        ([0, 1, 2], 4, {}, "needs 2 images that have another .* have 0 of 3. Lower"),
        ([0, 0, 1, 1], 12, {}, "needs 6 images .* have 4 of 4"),
        ([0, 0, 0], 2, {}, "one identity only .3 images.*positive_share=1.0"),
        ([0, 0, 1], 0, {}, "pairs_per_batch must be at least 1"),
        ([0, 0, 1], 2, {"positive_share": 1.5}, r"positive_share=1.5 .* \[0, 1\]"),
        ([0, 0, 1], 4, {"positive_share": 0.1}, "positive_share=0.1 of 4 rounds to 0"),
        ([0, 0, 1], 4, {"positive_share": 0.9}, "positive_share=0.9 of 4 rounds to 4"),
        ([0, 0, 1, 1], 6, {"world_size": 2}, "positive_pairs=3 .* divisible by world_size=2: pass 2 or 4"),
        ([0, 0, 1, 1], 5, {"world_size": 2}, "negative_pairs=3 .* divisible"),
        ([0, 0, 1, 1], 2, {"rank": 1}, "rank=1 is out of range"),
        ([], 2, {}, "empty"),
    ],
)
def test_wrong_arguments_say_what_was_asked_what_was_found_and_what_to_do(
    labels: list[int], size: int, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        PairBatchSampler(labels, size, **options)


def test_one_identity_gives_positive_pairs_alone() -> None:
    sampler = PairBatchSampler([7] * 5, 5, positive_share=1.0)
    assert [len(batch) for batch in sampler] == [10]


def test_the_plan_is_pinned_so_that_saved_positions_keep_their_meaning() -> None:
    sampler = PairBatchSampler([0, 0, 0, 1, 1, 2, 3, 3], 4, seed=11)
    assert list(sampler) == [
        [7, 6, 3, 4, 3, 0, 5, 2],
        [1, 0, 2, 1, 4, 6, 2, 6],
        [4, 3, 0, 1, 7, 5, 6, 1],
        [6, 7, 7, 6, 0, 6, 1, 6],
    ]
