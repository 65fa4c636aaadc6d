import numpy as np
import pytest

from metricface.label_noise.misplaced import find_misplaced
from metricface.label_noise.people import People
from tests.label_noise.simulated import flip, simulate


def test_flipped_labels_are_found_with_the_person_they_show_and_hardly_any_other() -> None:
    made, flipped = flip(simulate(200, 8), 0.05)
    found = find_misplaced(People(made.embeddings, made.labels))
    wrong = np.isin(found.images, flipped)
    assert wrong[: found.found].mean() > 0.95
    assert wrong[: found.found].sum() > 0.8 * len(flipped)
    assert (found.nearest[: found.found] == made.person[found.images[: found.found]])[wrong[: found.found]].all()
    assert found.probability.mean() == pytest.approx(0.05, abs=0.015)
    assert len(found.images) == 1600
    assert (found.alone, found.unjudged) == (0, 0)


def test_evidence_is_for_the_identity_without_the_image_itself_and_for_the_nearest_other() -> None:
    made = simulate(12, 5, within=1.0)
    people = People(made.embeddings, made.labels)
    found = find_misplaced(people)
    coordinates, one = people.coordinates(np.arange(60)), np.ones(1, dtype=np.int64)
    for place in range(0, 60, 7):
        image = int(found.images[place])
        rest = (made.labels == made.labels[image]) & (np.arange(60) != image)
        x, mean = coordinates[image : image + 1], coordinates[rest].mean(axis=0, keepdims=True)
        assert found.own[place] == pytest.approx(people.model.evidence(x, one, mean, 4 * one)[0], rel=1e-3, abs=1e-3)
        others = [
            -np.inf if c == made.labels[image] else people.model.evidence(x, one, people.means[c : c + 1], 5 * one)[0]
            for c in range(12)
        ]
        assert found.nearest[place] == np.argmax(others)
        assert found.near[place] == pytest.approx(max(others))


def test_copies_of_one_picture_for_each_identity_are_not_misplaced(recwarn: pytest.WarningsRecorder) -> None:
    made, flipped = flip(simulate(60, 5), 0.03)
    centres = simulate(60, 1).embeddings
    found = find_misplaced(People(centres[made.person], made.labels))
    assert set(found.images[: found.found].tolist()) <= set(flipped.tolist())
    plain = find_misplaced(People(centres[np.arange(300) // 5], np.arange(300) // 5))
    assert plain.found == 0
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_of_two_images_the_one_that_is_near_to_another_identity_is_the_wrong_one() -> None:
    made = simulate(300, 4)
    few = made.person % 2 == 0  # every second person has two images, of which a tenth are someone else's
    kept = np.flatnonzero(~few | (np.arange(1200) % 4 < 2))
    labels = made.labels.copy()
    flipped = np.flatnonzero(few & (np.arange(1200) % 4 == 1) & (made.person % 20 == 0))
    labels[flipped] = (labels[flipped] + 2) % 300
    strangers = np.flatnonzero(few & (np.arange(1200) % 4 == 1) & (made.person % 20 == 10))
    labels[strangers + 4] = labels[strangers]  # of people with four images, who then are near
    found = find_misplaced(People(made.embeddings[kept], labels[kept]))
    images = kept[found.images[: found.found]]
    assert np.isin(strangers + 4, images).mean() > 0.7
    assert np.isin(strangers, images).mean() < 0.1


def test_images_alone_in_their_identity_are_counted_and_not_judged() -> None:
    made = simulate(100, 5)
    labels = np.concatenate([made.labels, 1000 + np.arange(30)])
    embeddings = np.concatenate([made.embeddings, np.random.default_rng(5).normal(size=(30, 32))])
    found = find_misplaced(People(embeddings, labels))
    assert found.alone == 30
    assert found.images.max() < 500
    assert len(found.images) == 500


def test_a_few_images_are_not_judged_and_counted() -> None:
    made = simulate(8, 5)
    found = find_misplaced(People(made.embeddings, made.labels))
    assert (len(found.images), found.found, found.unjudged, found.alone) == (0, 0, 40, 0)


def test_findings_are_more_for_a_lower_probability_and_the_same_each_time() -> None:
    made, _ = flip(simulate(100, 8, within=1.0), 0.1)
    people = People(made.embeddings, made.labels)
    found = [find_misplaced(people, probability=p) for p in (0.2, 0.8, 0.8)]
    assert found[0].found > found[1].found > 0
    assert (np.diff(found[1].probability) <= 0).all()
    assert found[1].images.tolist() == found[2].images.tolist()


def test_one_identity_has_nothing_near_and_cannot_be_judged() -> None:
    made = simulate(2, 30)
    found = find_misplaced(People(made.embeddings, made.labels))
    assert len(found.images) == 60
    assert found.found <= 1


@pytest.mark.parametrize("probability", [0.0, 1.5, float("nan")])
def test_a_probability_outside_its_range_is_an_error(probability: float) -> None:
    made = simulate(8, 5)
    with pytest.raises(ValueError, match="probability must lie above 0"):
        find_misplaced(People(made.embeddings, made.labels), probability=probability)
