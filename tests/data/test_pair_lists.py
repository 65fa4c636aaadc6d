from pathlib import Path

import numpy as np
import pytest

from metricface.data.folders import FolderImages
from metricface.data.images import ImageSet, MemoryImages, Preprocessing
from metricface.data.pair_lists import read_pairs
from metricface.data.splits import split_identities
from metricface.evaluation.pairs import PairList

ANN = [f"Ann_Lee/Ann_Lee_{i:04d}.jpg" for i in range(1, 4)]
BOB = [f"Bob/Bob_{i:04d}.PNG" for i in range(1, 4)]
CID = ["Cid/Cid_0012.jpg"]


def images(keys: list[str]) -> ImageSet:
    names = sorted({key.rsplit("/", 1)[0] for key in keys})
    labels = [names.index(key.rsplit("/", 1)[0]) for key in keys]
    return MemoryImages(np.zeros((len(keys), 2, 2, 3), np.uint8), names, labels, keys, Preprocessing(2, 2))


FACES = images(ANN + BOB + CID)


def write(folder: Path, text: str) -> Path:
    path = folder / "pairs.txt"
    path.write_text(text, encoding="utf-8")
    return path


def named(pairs: PairList, image_set: ImageSet) -> list[tuple[str, str, bool, int]]:
    keys = image_set.keys
    return [
        (keys[i], keys[j], bool(same), int(fold))
        for i, j, same, fold in zip(pairs.first, pairs.second, pairs.same, pairs.fold, strict=True)
    ]


LFW = "2\t1\nAnn_Lee\t1\t3\nAnn_Lee\t2\tCid\t12\nBob\t2\t1\nBob\t3\tAnn_Lee\t1\n"


@pytest.mark.parametrize("text", [LFW, LFW.replace("\t", "  "), LFW.replace("\n", "\r\n"), "\ufeff" + LFW + "\n\n"])
def test_lfw_folds_hold_genuine_then_impostor_pairs(tmp_path: Path, text: str) -> None:
    pairs = read_pairs(write(tmp_path, text), FACES)
    assert named(pairs, FACES) == [
        (ANN[0], ANN[2], True, 0),
        (ANN[1], CID[0], False, 0),
        (BOB[1], BOB[0], True, 1),
        (BOB[2], ANN[0], False, 1),
    ]
    assert pairs.missing == 0


def test_names_with_spaces_are_read_between_tabs(tmp_path: Path) -> None:
    faces = images(["Ann Lee/Ann Lee_0001.jpg", "Ann Lee/Ann Lee_0002.jpg", "Bob/Bob_0001.jpg"])
    pairs = read_pairs(write(tmp_path, "1\nAnn Lee\t1\t2\nAnn Lee\t1\tBob\t1\n"), faces)
    assert pairs.same.tolist() == [True, False]


def test_images_are_found_whatever_folders_lie_above(tmp_path: Path) -> None:
    faces = images([f"lfw/part/{key}" for key in ANN + BOB + CID])
    assert (
        read_pairs(write(tmp_path, LFW), faces).first.tolist() == read_pairs(write(tmp_path, LFW), FACES).first.tolist()
    )


def test_one_block_is_cut_into_ten_folds_of_each_class_in_file_order(tmp_path: Path) -> None:
    faces = images([f"{name}/{name}_{i:04d}.jpg" for name in "AB" for i in range(1, 27)])
    genuine = "".join(f"A\t{i}\t{i + 1}\n" for i in range(1, 26))
    impostor = "".join(f"A\t{i}\tB\t{i}\n" for i in range(1, 26))
    pairs = read_pairs(write(tmp_path, f"25\n{genuine}{impostor}"), faces)
    for of_class in (pairs.same, ~pairs.same):
        assert np.bincount(pairs.fold[of_class]).tolist() == [3, 3, 3, 3, 3, 2, 2, 2, 2, 2]
        assert (np.diff(pairs.fold[of_class]) >= 0).all()


@pytest.mark.parametrize("mark", ["\t", ",", " ", ", "])
@pytest.mark.parametrize("names", ["", "path_a{0}path_b{0}same\n"])
def test_a_plain_list_names_keys_and_says_0_or_1(tmp_path: Path, mark: str, names: str) -> None:
    lines = [mark.join((ANN[0], f"./{ANN[1]}", "1")), mark.join((ANN[0], BOB[1], "0"))]
    pairs = read_pairs(write(tmp_path, names.format(mark) + "\n".join(lines)), FACES)
    assert named(pairs, FACES) == [(ANN[0], ANN[1], True, 0), (ANN[0], BOB[1], False, 0)]


def test_images_that_are_not_there_are_counted_and_the_first_named_with_their_lines(tmp_path: Path) -> None:
    text = "3\nAnn_Lee\t1\t9\nAnn_Lee 1 2\nEve\t1\t2\nBob 1 Ann_Lee 9\nBob 1 Eve 3\nBob 1 Cid 12\n"
    with pytest.raises(ValueError, match="names 4 images that are not in the set, in 4 of its 6 pairs") as error:
        read_pairs(write(tmp_path, text), FACES)
    for part in ("Ann_Lee/Ann_Lee_0009 (line 2)", "Eve/Eve_0001 (line 4)", 'missing="skip"'):
        assert part in str(error.value)


def test_pairs_of_missing_images_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    text = "2\t1\nAnn_Lee\t1\t9\nAnn_Lee\t2\tCid\t12\nBob\t2\t1\nBob\t3\tEve\t1\n"
    pairs = read_pairs(write(tmp_path, text), FACES, missing="skip")
    assert named(pairs, FACES) == [(ANN[1], CID[0], False, 0), (BOB[1], BOB[0], True, 1)]
    assert pairs.missing == 2


def test_a_list_of_another_set_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the list of another set"):
        read_pairs(write(tmp_path, "1\nEve 1 2\nEve 1 Bob 1\n"), FACES, missing="skip")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no lines"),
        ("2\nAnn_Lee 1 2\nAnn_Lee 1 Bob 1\n", r"announces 1 x \(2 x 2\) = 4 pairs and has 2"),
        ("1 2 3\n", "first line must be"),
        ("0\n", "first line must be"),
        ("1\nAnn_Lee 1 Bob 1\nAnn_Lee 1 2\n", "line 2: wanted NAME i j"),
        ("1\nAnn_Lee 1 2\nAnn_Lee 1 Bob one\n", "line 3: wanted NAME1 i NAME2 j"),
        ("1\nAnn_Lee 1 2\nBob 1 Bob 2\n", "line 3: wanted NAME1 i NAME2 j"),
        ("1\nAnn_Lee 2 2\nAnn_Lee 1 Bob 1\n", "line 2: Ann_Lee/Ann_Lee_0002 is paired with itself"),
        ("a.jpg b.jpg\n", "line 1: wanted PATH_A PATH_B 0/1"),
        ("a.jpg b.jpg 1\na.jpg c.jpg 2\n", "line 2: wanted PATH_A PATH_B 0/1"),
        ("a.jpg b.jpg 2\n", "line 1: wanted PATH_A PATH_B 0/1"),
        ("first,second,same\n", "has no pairs"),
    ],
)
def test_what_cannot_be_understood_is_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path, text), FACES)


def test_one_name_for_two_files_is_refused_where_the_list_uses_it(tmp_path: Path) -> None:
    faces = images([*ANN, *BOB, *CID, "Bob/Bob_0001.jpg"])
    with pytest.raises(ValueError, match=r"Bob/Bob_0001, and there are two: Bob/Bob_0001\.PNG and Bob/Bob_0001\.jpg"):
        read_pairs(write(tmp_path, LFW), faces)
    assert len(read_pairs(write(tmp_path, "1\nAnn_Lee 1 2\nAnn_Lee 1 Cid 12\n"), faces).same) == 2


def test_a_binary_file_and_a_wrong_choice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"\x80\x02\xff")
    with pytest.raises(ValueError, match="not a text file"):
        read_pairs(path, FACES)
    with pytest.raises(ValueError, match="error, skip"):
        read_pairs(path, FACES, missing="ignore")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "nowhere.txt", FACES)


@pytest.mark.slow
def test_lfw_development_training_pairs_are_all_there_and_its_test_pairs_are_not(lfw: Path, lfw_lists: Path) -> None:
    faces = FolderImages(lfw, Preprocessing(8, 8))
    pairs = read_pairs(lfw_lists / "pairsDevTrain.txt", faces)
    assert len(pairs.same) == 2200
    assert np.array_equal(faces.labels[pairs.first] == faces.labels[pairs.second], pairs.same)
    assert np.bincount(pairs.fold).tolist() == [220] * 10
    with pytest.raises(ValueError, match="in 1,000 of its 1,000 pairs"):
        read_pairs(lfw_lists / "pairsDevTest.txt", faces)
    held_out = faces.select(split_identities(faces.identities, 0.2, order="last").held_out)
    inside = read_pairs(lfw_lists / "pairsDevTrain.txt", held_out, missing="skip")
    assert len(inside.same) + inside.missing == 2200
    assert np.array_equal(held_out.labels[inside.first] == held_out.labels[inside.second], inside.same)
