import numpy as np
import pytest

from metricface.label_noise.people import People
from metricface.label_noise.same_person import find_same_person
from tests.label_noise.simulated import Simulated, simulate


def split(made: Simulated, people: int) -> Simulated:
    """The second half of the images of the first people goes under a label of its own, 1000 + label."""
    images = int((made.labels == 0).sum())
    second = np.flatnonzero((made.person < people) & (np.arange(len(made.labels)) % images >= images // 2))
    return made.relabelled(second, made.labels[second] + 1000)


def test_people_under_two_labels_are_found_and_no_others() -> None:
    made = split(simulate(300, 8), 15)
    people = People(made.embeddings, made.labels)
    found = find_same_person(people)
    names = people.table.identities
    pairs = {(names[a], names[b]) for a, b in zip(found.first[: found.found], found.second, strict=False)}
    right = {(row, row + 1000) for row in range(15)}
    assert len(right & pairs) >= 11
    assert len(pairs - right) <= 1
    assert {(names[a], names[b]) for a, b in zip(found.first[:15], found.second, strict=False)} == right  # if ranked
    assert found.threshold == found.score[found.found - 1]
    likely = found.evidence > 0
    assert (np.diff(found.score[likely]) <= 0).all()
    assert likely[: likely.sum()].all()
    assert (found.first < found.second).all()
    assert len({*zip(found.first.tolist(), found.second.tolist(), strict=True)}) == len(found.first)


def test_where_everybody_is_one_person_the_expected_share_is_honest() -> None:
    made = simulate(200, 6)
    assert find_same_person(People(made.embeddings, made.labels)).found <= 1


def test_a_score_is_the_evidence_less_that_of_either_sides_look_alikes() -> None:
    made = split(simulate(30, 6, within=1.0), 3)
    people = People(made.embeddings, made.labels)
    found = find_same_person(people)
    every = np.array(
        [
            [
                people.model.evidence(
                    people.means[a : a + 1], people.images[[a]], people.means[b : b + 1], people.images[[b]]
                )[0]
                for b in range(33)
            ]
            for a in range(33)
        ]
    )
    np.fill_diagonal(every, -np.inf)
    for a, b, score, evidence in zip(found.first[:20], found.second, found.score, found.evidence, strict=False):
        expected = 0.0
        for row in (a, b):
            look_alikes = np.sort(every[row])[::-1][1:10]
            expected += 0.5 * (every[a, b] - look_alikes.mean()) / max(1.0, look_alikes.std())
        assert evidence == pytest.approx(every[a, b], rel=1e-5)
        assert score == pytest.approx(expected, rel=1e-4)


def test_people_of_a_test_set_are_found_in_the_training_set() -> None:
    made = simulate(260, 8)
    training = made.person < 220
    test = (made.person >= 200) & ~(training & (np.arange(2080) % 8 < 4))
    training &= ~test
    people = People(made.embeddings[training], made.labels[training])
    other = People(made.embeddings[test], made.labels[test], model=people.model)
    found = find_same_person(people, other)
    pairs = {
        (people.table.identities[a], other.table.identities[b])
        for a, b in zip(found.first[: found.found], found.second, strict=False)
    }
    assert {(row, row) for row in range(200, 220)} <= pairs
    assert len(pairs) <= 22


def test_most_of_a_test_set_may_be_in_the_training_set() -> None:
    made = simulate(100, 8)
    training = np.arange(800) % 8 < 4
    people = People(made.embeddings[training], made.labels[training])
    other = People(made.embeddings[~training], made.labels[~training], model=people.model)
    found = find_same_person(people, other)
    right = found.first == found.second
    assert right[: found.found].sum() >= 98
    assert found.found <= 112


def test_a_line_can_be_drawn_by_hand() -> None:
    made = split(simulate(60, 8), 5)
    people = People(made.embeddings, made.labels)
    every = find_same_person(people, least=-np.inf)
    assert every.found == (every.evidence > 0).sum() >= 5
    assert find_same_person(people, least=float(every.score[2])).found == 3


def test_too_few_identities_are_ranked_but_none_is_a_finding() -> None:
    made = simulate(6, 5)
    found = find_same_person(People(made.embeddings, made.labels))
    assert found.tail is None
    assert found.found == 0
    assert len(found.first) == 15
    assert found.threshold == float("inf")


def test_a_wrong_share_and_a_model_of_its_own_are_errors() -> None:
    made = simulate(6, 5)
    people = People(made.embeddings, made.labels)
    with pytest.raises(ValueError, match="false_share is a share"):
        find_same_person(people, false_share=0.0)
    with pytest.raises(ValueError, match="make it with People"):
        find_same_person(people, People(made.embeddings, made.labels))
