"""The study of planted noise: what is planted is as it says, and is counted as it is."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from metricface.data.folders import FolderImages
from metricface.data.images import Preprocessing
from metricface.label_noise.findings import Source, find_all
from tests.examples.test_loops import example

study = example("planted_noise")
SIZE = Preprocessing(48, 48)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    study.write_synthetic(folder / "source", people=60, images=6)
    study.prepared(str(folder / "source"), folder, 0, study.Amounts(0.05, 0.03, split=6, merged=3, tested=8))
    return folder


def test_as_much_is_planted_as_is_asked_for_and_each_image_is_once_there(planted: Path) -> None:
    truth = study.prepared("", planted, 0)
    training, test = FolderImages(planted / "training", SIZE), FolderImages(planted / "test", SIZE)
    assert {*training.keys, *test.keys} == set(truth.person)
    inside = [pair for pair in truth.copies if pair[1] in training.keys]
    originals = 360 - (len(test) - (len(truth.copies) - len(inside)))
    assert len(training) == originals + len(inside)
    assert len(inside) == round(0.03 * originals)
    wrong = [key for key in training.keys if truth.wrong(key)]
    flipped = round(0.05 * originals)
    assert flipped <= len(wrong) <= flipped + len(inside)
    assert (len(truth.split), len(truth.merged), len(truth.leaked)) == (6, 3, 4)
    assert not any(key.rpartition("/")[2] == "truth.json" for key in training.keys)


def test_copies_are_alike_and_as_they_are_said_to_be(planted: Path) -> None:
    truth = study.prepared("", planted, 0)
    assert {how for _, _, how in truth.copies} == set(study.COPIES)
    for original, copy, how in truth.copies:
        inside = planted / "training" / copy
        path = inside if inside.exists() else planted / "test" / copy
        one, two = cv2.imread(str(planted / "training" / original)), cv2.imread(str(path))
        assert one is not None
        assert two is not None
        assert (how == "exact") == np.array_equal(one, two)
        assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.8


def test_scores_count_what_was_planted(planted: Path) -> None:
    truth = study.prepared("", planted, 0)
    images, test = (
        FolderImages(planted / "training", SIZE).in_memory(),
        FolderImages(planted / "test", SIZE).in_memory(),
    )
    centres = {
        name: np.random.default_rng(i).normal(size=24) for i, name in enumerate(sorted(set(truth.person.values())))
    }
    generator = np.random.default_rng(0)
    sources = [
        Source(each, np.array([centres[truth.person[key]] + 0.4 * generator.normal(size=24) for key in each.keys]))
        for each in (images, test)
    ]
    found = {score.kind: score for score in study.scores(find_all(*sources), truth)}
    assert all(score.right[: score.found].sum() <= score.detectable <= score.planted for score in found.values())
    misplaced = found["misplaced, by 1 other image"]
    assert misplaced.planted == sum(truth.wrong(key) for key in images.keys)
    assert misplaced.right[: misplaced.found].mean() > 0.8
    assert found["duplicates"].planted == sum(pair[1] in images.keys for pair in truth.copies)
    assert found["one person, two labels"].planted >= 6
    assert found["test people in training"].planted >= 3


def test_a_row_has_precision_recall_and_average_precision() -> None:
    score = study.Score("kind", 4, 2, 2, np.array([True, False, True, False]))
    assert score.row() == "| kind | 4 | 2 | 2 | 0.500 | 0.250 | 0.500 | 0.833 |  |"
    none = study.Score("kind", 0, 0, 0, np.zeros(0, dtype=bool))
    assert none.row() == "| kind | 0 | 0 | 0 | - | - | - | 0.000 |  |"


def test_halves_part_the_identities(planted: Path, tmp_path: Path) -> None:
    one, two = study.halves(planted / "training", tmp_path, 0)
    names = Counter(path.name for half in (one, two) for path in half.iterdir())
    assert set(names.values()) == {1}
    assert set(names) == {path.name for path in (planted / "training").iterdir()}
    assert len(FolderImages(one, SIZE)) + len(FolderImages(two, SIZE)) == len(FolderImages(planted / "training", SIZE))
