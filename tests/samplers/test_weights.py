"""Identities with more images more often: as often as asked, never twice in a batch, and nobody forgotten."""

import logging
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from samplers import IdentityBalancedBatchSampler
from samplers.visits import WeightedVisits
from tests.samplers.test_identity_balanced import check_batch, labels_with

WEIGHTS = st.sampled_from(["sqrt", "count"])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(1, 6), st.integers(1, 300)), min_size=2, max_size=40), st.data(), WEIGHTS)
def test_every_identity_has_its_visits_and_no_batch_has_one_twice(
    counts: list[int], data: st.DataObject, weights: Any
) -> None:
    p, k = data.draw(st.integers(1, len(counts))), data.draw(st.integers(1, 4))
    labels = labels_with(counts)
    sampler = IdentityBalancedBatchSampler(labels, p, k, identity_weights=weights)
    asked = {
        label: math.ceil(round(math.sqrt(count / k), 12) if weights == "sqrt" else count / k)
        for label, count in Counter(labels).items()
    }
    for _ in range(2):
        batches = list(sampler)
        assert len(batches) == len(sampler)
        visits = Counter(identity for batch in batches for identity in check_batch(batch, labels, p, k))
        wanted = {label: min(number, len(batches)) for label, number in asked.items()}
        assert all(visits[label] >= number for label, number in wanted.items())
        fillers = len(batches) * p - sum(wanted.values())
        assert sum(visits.values()) - sum(wanted.values()) == fillers
        assert 0 <= fillers < p  # as few as a whole number of batches needs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=4, max_size=30), st.integers(1, 4), st.integers(1, 4))
def test_by_count_an_epoch_shows_every_image_of_everybody_who_is_not_held_back(
    counts: list[int], p: int, k: int
) -> None:
    assume(p <= len(counts))
    labels = labels_with(counts)
    sampler = IdentityBalancedBatchSampler(labels, p, k, identity_weights="count")
    for _ in range(3):
        seen = {image for batch in sampler for image in batch}
        for label, count in Counter(labels).items():
            if math.ceil(count / k) <= len(sampler):
                assert {image for image, other in enumerate(labels) if other == label} <= seen


def test_visits_of_one_identity_continue_its_rotation_from_epoch_to_epoch() -> None:
    labels = labels_with([30, *[2] * 20])
    sampler = IdentityBalancedBatchSampler(labels, 3, 2, identity_weights="sqrt")  # 4 visits an epoch, cycles of 15
    taken = [image for _ in range(15) for batch in sampler for image in batch if labels[image] == -3]
    fillers = len(taken) - 15 * 4 * 2
    assert 0 <= fillers <= 15 * 2
    assert min(Counter(taken).values()) >= 4  # four whole cycles


def test_a_filler_takes_images_that_its_identitys_visits_of_the_epoch_did_not() -> None:
    labels = labels_with([8] * 7)
    sampler = IdentityBalancedBatchSampler(labels, 4, 2, identity_weights="sqrt")  # 14 visits in 4 batches of 4
    for _ in range(6):
        taken: dict[int, list[int]] = {}
        for batch in sampler:
            for image in batch:
                taken.setdefault(labels[image], []).append(image)
        filled = [images for images in taken.values() if len(images) > 4]
        assert len(filled) == 2
        assert all(len(set(images)) == 6 for images in filled)


def test_heavy_identities_meet_others_in_many_batches_rather_than_the_same_ones() -> None:
    """Dealt straight, two identities whose runs overlap would meet at each of their visits."""
    visits = WeightedVisits(np.full(400, 40), 20, 4, "count", 0)  # 10 visits each, 200 batches
    assert visits.num_batches == 200
    who = visits.epoch(0).at(np.arange(200), np.arange(20)).who
    met: Counter[tuple[int, int]] = Counter()
    for batch in who.tolist():
        met.update((a, b) for a in batch for b in batch if a < b)
    # 200 * 190 meetings over 79,800 pairs: 0.48 on average, 4 or 5 at most were all chance; straight dealing gives 10.
    assert max(met.values()) <= 6
    assert len(met) > 0.3 * 79_800


@pytest.mark.parametrize("heavy", [[], [200], [5000], [3000, 2500, 1500], [8000, 700, 650, 600, 500]])
def test_an_identity_in_most_batches_does_not_keep_the_others_from_mixing(heavy: list[int]) -> None:
    counts = np.array([*heavy, *np.random.default_rng(0).geometric(0.05, 600)])
    visits = WeightedVisits(counts, 16, 4, "count", 0)
    who = visits.epoch(0).at(np.arange(visits.num_batches), np.arange(16)).who
    usual = np.flatnonzero((visits.visits >= 8) & (visits.visits < visits.num_batches // 4))
    assert len(usual) > 50
    most_met = []
    for one in usual:
        batches = who[(who == one).any(axis=1)]
        partners = np.bincount(batches.ravel(), minlength=len(counts))
        partners[one] = 0
        partners[: len(heavy)] = 0
        most_met.append(partners.max() / len(batches))
        assert (partners > 0).sum() > 0.3 * min(15 * len(batches), 600)
    assert np.mean(most_met) < 0.5  # dealt straight it would meet the same few at every visit


def test_which_identities_meet_is_even_over_epochs() -> None:
    counts = np.array([1, 1, 2, 2, 3, 3, 4, 4, 5, 5])  # visits with K = 1: 30 in 10 batches of 3
    visits = WeightedVisits(counts, 3, 1, "count", 0)
    met = np.zeros((10, 10))
    for epoch in range(600):
        for batch in visits.epoch(epoch).at(np.arange(10), np.arange(3)).who:
            met[np.ix_(batch, batch)] += 1
    np.fill_diagonal(met, np.nan)
    for pair in range(0, 10, 2):  # equals are treated as equals by everybody else
        others = np.delete(np.arange(10), [pair, pair + 1])
        left, right = met[pair][others], met[pair + 1][others]
        assert np.all(np.abs(left - right) < 5 * np.sqrt(left + right))
    assert np.nanmin(met) > 0


def test_shares_are_told_and_who_is_held_back_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    labels = labels_with([200, *[4] * 9])  # 50 and 9 visits: in batches of 5 nobody can have more than 1 in 5
    with caplog.at_level(logging.WARNING):
        sampler = IdentityBalancedBatchSampler(labels, 5, 4, identity_weights="count")
    batches = len(sampler)
    assert batches == 3  # 9 + 3 visits: 12 of 15 places
    assert sampler.asked_shares.max() == pytest.approx(200 / 236)
    assert sampler.realised_shares.max() == pytest.approx(3 / 12)
    assert sampler.realised_shares.sum() == pytest.approx(1.0)
    assert "has 1 identities in every batch" in caplog.text
    assert "25.00% of the visits in place of 84.75%" in caplog.text
    even = IdentityBalancedBatchSampler(labels, 5, 4)
    assert np.allclose(even.asked_shares, 0.1)
    assert np.allclose(even.realised_shares, 0.1)


def test_few_images_are_left_out_by_min_images_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    labels = labels_with([1, 2, 3, 4, 5, 1])
    with caplog.at_level(logging.WARNING):
        sampler = IdentityBalancedBatchSampler(labels, 2, 6, min_images=3)
    assert (sampler.left_out_identities, sampler.left_out_images, sampler.usable_identities) == (3, 4, 3)
    assert "leaves out 3 of 6 identities (4 of 16 images): fewer than 3 images each" in caplog.text
    kept = IdentityBalancedBatchSampler(labels, 2, 6, min_images=3, singletons_per_batch=2)
    assert (kept.left_out_identities, kept.usable_identities) == (1, 3)  # those with one image are negatives
    with pytest.raises(ValueError, match=r"needs 2 identities with at least 5 images .* have 1 of 6. .* or min_images"):
        IdentityBalancedBatchSampler(labels, 2, 2, min_images=5)
    with pytest.raises(ValueError, match="min_images must be at least 1"):
        IdentityBalancedBatchSampler(labels, 2, 2, min_images=0)


def test_unknown_weights_are_refused_with_the_right_ones() -> None:
    with pytest.raises(ValueError, match="uniform, sqrt, count; found 'log'"):
        IdentityBalancedBatchSampler([0, 0, 1, 1], 2, 2, identity_weights="log")  # type: ignore[arg-type]
