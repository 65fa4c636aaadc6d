import numpy as np
import pytest

from metricface.data.images import MemoryImages
from metricface.label_noise.duplicates import Duplicates, find_duplicates
from metricface.label_noise.people import People
from tests.label_noise.faces import Faces, changed, painted

COPIES = {3: 0, 40: 12, 100: 16, 200: 33}  # two under their own label


def noisy() -> tuple[Faces, People]:
    made = changed(painted(), {}, COPIES)
    return made, People(made.embeddings, made.images.labels)


def pairs(found: Duplicates) -> set[tuple[int, int]]:
    return set(zip(found.first[: found.found].tolist(), found.second[: found.found].tolist(), strict=True))


PLANTED = {(image, 240 + number) for number, image in enumerate(COPIES)}


def test_copies_are_found_by_their_pixels_and_nothing_else_is() -> None:
    made, people = noisy()
    found = find_duplicates(people, made.images)
    assert pairs(found) == PLANTED
    assert found.by_pixels
    assert found.correlation[:4].min() > 0.9
    assert found.threshold == found.correlation[3]
    assert len(found.first) == len(made.images)  # so many pairs were compared
    assert (np.diff(found.false_share) >= 0).all()


def test_copies_are_found_by_their_embeddings_where_there_are_no_pixels() -> None:
    _, people = noisy()
    found = find_duplicates(people)
    assert pairs(found) >= PLANTED
    assert found.found <= 6  # a few images of one person lie as close
    assert not found.by_pixels
    assert np.isnan(found.correlation).all()
    assert found.cos[:4].min() > 0.99


def test_each_pair_is_listed_once_also_among_many_copies_of_one_image() -> None:
    made = painted()
    embeddings = made.embeddings.copy()
    embeddings[[5, 50, 150]] = embeddings[0]
    found = find_duplicates(People(embeddings, made.images.labels))
    listed = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert len(set(listed)) == len(listed)
    assert set(listed[:6]) == {(0, 5), (0, 50), (0, 150), (5, 50), (5, 150), (50, 150)}
    assert (found.first < found.second).all()


def test_images_of_a_test_set_are_found_in_the_training_set() -> None:
    made, people = noisy()
    strangers = painted(20, 6, seed=5, first=100)
    taken = [7, 77, 177]
    pixels = np.concatenate([strangers.images.read(range(120)), made.images.read(taken)])
    labels = np.concatenate([strangers.images.labels, [0, 1, 2]])
    images = MemoryImages(
        pixels, strangers.images.identities, labels, [str(i) for i in range(123)], made.images.preprocessing
    )
    other = People(np.concatenate([strangers.embeddings, made.embeddings[taken]]), labels, model=people.model)
    for shown in ((made.images, images), (None, None)):
        found = find_duplicates(people, shown[0], other, shown[1])
        assert pairs(found) == {(7, 120), (77, 121), (177, 122)}


def test_a_line_can_be_drawn_by_hand() -> None:
    made, people = noisy()
    assert find_duplicates(people, made.images, least=-1.0).found == len(made.images)
    assert find_duplicates(people, least=0.999999).found == 0


def test_a_set_of_a_few_images_is_ranked_and_nothing_is_found() -> None:
    made = painted(2, 3)
    found = find_duplicates(People(made.embeddings, made.images.labels))
    assert found.tail is None
    assert found.found == 0
    assert found.threshold == float("inf")


def test_wrong_arguments_are_errors() -> None:
    made, people = noisy()
    with pytest.raises(ValueError, match="false_share is a share"):
        find_duplicates(people, false_share=1.0)
    with pytest.raises(ValueError, match="10 images of the set for 244 embeddings"):
        find_duplicates(people, made.images.subset(range(10)))
    with pytest.raises(ValueError, match="pixels of one set only"):
        find_duplicates(people, made.images, people)
