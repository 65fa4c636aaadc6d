import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metricface.evaluation.pairs import PairList, make_pairs


def as_sets(pairs: PairList, same: bool) -> list[frozenset[int]]:
    chosen = pairs.same == same
    return [frozenset(ends) for ends in zip(pairs.first[chosen].tolist(), pairs.second[chosen].tolist(), strict=True)]


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    labels=st.lists(st.integers(-2, 6), min_size=3, max_size=40),
    cap=st.integers(1, 8),
    seed=st.integers(0, 5),
)
def test_pairs_are_distinct_true_to_their_labels_and_capped(labels: list[int], cap: int, seed: int) -> None:
    number_of = {label: labels.count(label) for label in set(labels)}
    genuine_wanted = {label: min(cap, n * (n - 1) // 2) for label, n in number_of.items()}
    impostors = sum(labels[i] != labels[j] for i in range(len(labels)) for j in range(i))
    if not impostors or not sum(genuine_wanted.values()):
        return
    pairs = make_pairs(labels, genuine_per_identity=cap, seed=seed)
    for same in (True, False):
        found = as_sets(pairs, same)
        assert len(set(found)) == len(found)
        assert all(len(ends) == 2 for ends in found)
        assert all((len({labels[i] for i in ends}) == 1) == same for ends in found)
    genuine = [labels[min(ends)] for ends in as_sets(pairs, True)]
    assert {label: genuine.count(label) for label in number_of} == genuine_wanted
    assert len(as_sets(pairs, False)) == impostors  # fewer than 30,000, so all of them


@settings(max_examples=40, derandomize=True, deadline=None)
@given(labels=st.lists(st.integers(0, 5), min_size=6, max_size=60), folds=st.integers(2, 10))
def test_each_fold_has_as_many_genuine_as_impostor_pairs(labels: list[int], folds: int) -> None:
    labels = [*labels, 0, 0, 9]
    pairs = make_pairs(labels, folds=folds)
    genuine, impostor = (np.bincount(pairs.fold[side & (pairs.fold >= 0)]) for side in (pairs.same, ~pairs.same))
    balanced = min(int(pairs.same.sum()), int((~pairs.same).sum()))
    assert genuine.tolist() == impostor.tolist()
    assert genuine.sum() == balanced
    assert len(genuine) == min(folds, balanced)
    assert genuine.max() - genuine.min() <= 1
    assert pairs.fold.min() >= -1


def test_the_default_gives_ten_impostors_a_genuine_pair_and_at_least_30_000() -> None:
    few = make_pairs(np.repeat(np.arange(100), 4))
    assert (few.same.sum(), (~few.same).sum()) == (600, 30_000)
    many = make_pairs(np.repeat(np.arange(300), 10))
    assert (many.same.sum(), (~many.same).sum()) == (6_000, 60_000)


def test_impostors_are_drawn_evenly_from_all_pairs_of_different_people() -> None:
    labels = [0, 0, 0, 1, 1, 2]  # 11 pairs: 6 between 0 and 1, 3 between 0 and 2, 2 between 1 and 2
    seen: dict[frozenset[int], int] = {}
    for seed in range(3000):
        for ends in as_sets(make_pairs(labels, impostors=2, seed=seed), False):
            seen[ends] = seen.get(ends, 0) + 1
    assert len(seen) == 11
    expected = 6000 / 11
    assert max(abs(count - expected) for count in seen.values()) < 5 * np.sqrt(expected)


def test_genuine_pairs_of_a_person_above_the_cap_are_drawn_evenly() -> None:
    labels = [7, 3, 7, 7, 7]  # 6 pairs of 7, two of them drawn
    seen: dict[frozenset[int], int] = {}
    for seed in range(1200):
        for ends in as_sets(make_pairs(labels, genuine_per_identity=2, seed=seed), True):
            seen[ends] = seen.get(ends, 0) + 1
    assert len(seen) == 6
    assert max(abs(count - 400) for count in seen.values()) < 5 * np.sqrt(400)


def test_genuine_pairs_of_a_person_stay_together() -> None:
    labels = np.repeat(np.arange(40), 5)  # 10 pairs a person, 40 a fold
    pairs = make_pairs(labels)
    people = labels[pairs.first[pairs.same]]
    folds_of = [set(pairs.fold[: len(people)][people == person].tolist()) for person in range(40)]
    assert all(len(folds) == 1 for folds in folds_of)
    assert people[:40].tolist() != sorted(people[:40].tolist())  # people in random order


def test_the_result_depends_on_the_seed_alone() -> None:
    labels = np.repeat(np.arange(30), 5)
    one, again, other = make_pairs(labels, seed=1), make_pairs(labels, seed=1), make_pairs(labels, seed=2)
    assert np.array_equal(one.first, again.first)
    assert np.array_equal(one.second, again.second)
    assert not np.array_equal(one.second, other.second)


def test_a_hundred_thousand_images_take_no_table_of_all_pairs() -> None:
    labels = np.random.default_rng(0).integers(0, 20_000, 100_000)
    pairs = make_pairs(labels, genuine_per_identity=1)
    assert len(set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))) == len(pairs.same)
    assert np.array_equal(labels[pairs.first] == labels[pairs.second], pairs.same)


def test_labels_without_the_pairs_wanted_are_refused() -> None:
    with pytest.raises(ValueError, match="each of 3 identities has a single image"):
        make_pairs([0, 1, 2])
    with pytest.raises(ValueError, match="all images are of one identity"):
        make_pairs([4, 4, 4])
    with pytest.raises(ValueError, match="3 impostor pairs were asked for; from 1 to 2 can be had"):
        make_pairs([0, 0, 1], impostors=3)
    with pytest.raises(ValueError, match="whole numbers"):
        make_pairs([0.0, 1.0])
    with pytest.raises(ValueError, match="at least 1"):
        make_pairs([0, 0, 1], genuine_per_identity=0)
