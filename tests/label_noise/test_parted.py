import numpy as np
import pytest

from metricface.label_noise.parted import find_parted, part
from metricface.label_noise.people import People
from tests.label_noise.simulated import simulate


def test_two_people_under_one_label_are_found_and_parted_as_they_are() -> None:
    made = simulate(200, 8)
    second = np.flatnonzero((made.person < 40) & (made.person % 2 == 1))
    made = made.relabelled(second, made.labels[second] - 1)  # 0 + 1, 2 + 3, ...
    people = People(made.embeddings, made.labels)
    found = find_parted(people)
    merged = set(range(0, 40, 2))
    names = people.table.identities[found.identities]
    assert merged <= set(names[: found.found].tolist())
    assert found.found <= 22
    for name, side in zip(names[: found.found], found.sides, strict=False):
        if name in merged:
            assert {frozenset(made.person[part].tolist()) for part in (side.larger, side.smaller)} == {
                frozenset({name}),
                frozenset({name + 1}),
            }
            assert len(side.larger) + len(side.smaller) + len(side.apart) == 16
    assert (found.false_share[:20] < 0.1).all()
    assert found.share == pytest.approx(20 / 180, abs=0.04)


def test_a_single_stranger_is_no_second_person() -> None:
    made = simulate(100, 8)
    people = People(made.embeddings, made.labels)
    coordinates = people.coordinates(np.array([*range(8), 100]))
    found = part(people.model, coordinates)
    assert found is not None
    assert 8 in found.apart
    assert len(found.larger) + len(found.smaller) + len(found.apart) == 9


def test_equal_images_cannot_be_parted() -> None:
    made = simulate(100, 8)
    people = People(made.embeddings, made.labels)
    assert part(people.model, people.coordinates(np.zeros(6, dtype=np.int64))) is None


def test_small_identities_are_counted_and_not_judged() -> None:
    made = simulate(80, 6)
    kept = np.flatnonzero((made.person >= 40) | (np.arange(480) % 6 < 3))
    found = find_parted(People(made.embeddings[kept], made.labels[kept]))
    assert (len(found.identities), found.unjudged) == (40, 40)


def test_few_large_identities_are_not_judged() -> None:
    made = simulate(20, 6)
    found = find_parted(People(made.embeddings, made.labels))
    assert (len(found.identities), found.found, found.unjudged) == (0, 0, 20)


def test_a_person_with_very_many_images_is_no_two_people() -> None:
    made = simulate(100, 8)
    more = np.random.default_rng(3).normal(size=(2500, 32)) * 0.5 + made.embeddings[:8].mean(axis=0)
    embeddings = np.concatenate([made.embeddings, more])
    labels = np.concatenate([made.labels, np.zeros(2500, dtype=np.int64)])
    found = find_parted(People(embeddings, labels))
    assert 0 not in found.identities[: found.found]


def test_a_wrong_probability_is_an_error() -> None:
    made = simulate(20, 6)
    with pytest.raises(ValueError, match="probability must lie above 0"):
        find_parted(People(made.embeddings, made.labels), probability=0.0)
