"""Lists of pairs in text files, matched with the images of a set."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, get_args

import numpy as np

from metricface.data.images import ImageSet
from metricface.evaluation.pairs import PairList, contiguous_folds

Missing = Literal["error", "skip"]

FOLDS_OF_ONE_BLOCK = 10


class _Line(NamedTuple):
    """A pair as a file has it. first, second: what the list calls the two images. fold: None where it names none."""

    number: int
    first: str
    second: str
    same: bool
    fold: int | None


def read_pairs(file: str | PathLike[str], image_set: ImageSet, *, missing: Missing = "error") -> PairList:
    """Read a list of pairs and find its images in a set.

    Two kinds of file are known by their first line:

    - LFW's pairs.txt, pairsDevTrain.txt, pairsDevTest.txt. The first line holds numbers: [folds] pairs-per-class. Then,
      for each fold, the genuine pairs, `NAME i j`, and the impostor pairs, `NAME1 i NAME2 j`, separated by tabs or
      spaces. Image i of NAME is the file NAME_000i, with any extension, in a folder NAME at any depth.
    - Otherwise: `PATH_A PATH_B 0/1`, separated by tabs, commas or spaces, 1 for a genuine pair; the paths are keys of
      the set (relative to its root). A first line of column names is passed over.

    Pairs keep the order of the file. Where the list has folds they are kept; otherwise each class is cut into ten
    equal parts in file order (fewer where a class has fewer pairs than ten).

    missing: what to do about pairs of images that the set does not have: "error", or "skip" to leave them out and
        count them in `PairList.missing`, for instance to use the part of a list that lies within held-out people.

    Raises FileNotFoundError, and ValueError naming the line for what cannot be understood, an image paired with itself,
    images that are not there, or a list of which nothing is left.
    """
    if missing not in get_args(Missing):
        raise ValueError(f"missing must be one of {', '.join(get_args(Missing))}; got {missing!r}.")
    path = Path(file)
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path} has no lines. Give a list of pairs, such as LFW's pairs.txt.")
    if all(field.isdecimal() for field in rows[0][1]):
        lines = _lfw_lines(path, rows)
        find = _finder_by_folder_and_stem(image_set)
    else:
        lines = _keyed_lines(path, rows)
        find = {key: index for index, key in enumerate(image_set.keys)}.get
    return _matched(path, lines, find, missing)


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, fields) of each line that is not blank."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}. Give a list of pairs as text.") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            separator = next((mark for mark in "\t," if mark in line), None)
            rows.append((number, [field.strip() for field in line.strip().split(separator)]))
    return rows


def _lfw_lines(path: Path, rows: list[tuple[int, list[str]]]) -> list[_Line]:
    header = [int(field) for field in rows[0][1]]
    if len(header) > 2 or 0 in header:
        raise ValueError(f"{path}, line {rows[0][0]}: the first line must be `[folds] pairs-per-class`; got {header}.")
    folds, per_class = header if len(header) == 2 else (1, header[0])
    if len(rows) - 1 != folds * 2 * per_class:
        raise ValueError(
            f"{path} announces {folds} x (2 x {per_class}) = {folds * 2 * per_class:,} pairs and has {len(rows) - 1:,} "
            "lines of them. Get the whole file, or correct its first line."
        )
    lines = []
    for place, (number, fields) in enumerate(rows[1:]):
        fold, within = divmod(place, 2 * per_class)
        same = within < per_class
        images = _lfw_images(fields, same)
        if images is None:
            wanted = "NAME i j (a genuine pair)" if same else "NAME1 i NAME2 j (an impostor pair of two people)"
            raise ValueError(f"{path}, line {number}: wanted {wanted}; found {' '.join(fields)!r}.")
        lines.append(_Line(number, *images, same, fold if folds > 1 else None))
    return lines


def _lfw_images(fields: list[str], same: bool) -> tuple[str, str] | None:
    """Return NAME/NAME_000i of both images, or None where the fields do not fit the class."""
    match fields:
        case [name, i, j] if same and i.isdecimal() and j.isdecimal():
            return f"{name}/{name}_{int(i):04d}", f"{name}/{name}_{int(j):04d}"
        case [one, i, other, j] if not same and one != other and i.isdecimal() and j.isdecimal():
            return f"{one}/{one}_{int(i):04d}", f"{other}/{other}_{int(j):04d}"
        case _:
            return None


def _keyed_lines(path: Path, rows: list[tuple[int, list[str]]]) -> list[_Line]:
    # Column names: a last field that is a word. Anything else that is not 0 or 1 is a mistake to report.
    has_names = len(rows[0][1]) == 3 and rows[0][1][2].isidentifier()
    lines = []
    for number, fields in rows[1:] if has_names else rows:
        if len(fields) != 3 or fields[2] not in ("0", "1"):
            raise ValueError(
                f"{path}, line {number}: wanted PATH_A PATH_B 0/1; found {' '.join(fields)!r}. Paths with spaces need "
                "tabs or commas between the fields; LFW's lists need their first line, the number of pairs."
            )
        first, second = (str(PurePosixPath(field)) for field in fields[:2])  # drops a leading ./
        lines.append(_Line(number, first, second, fields[2] == "1", None))
    return lines


def _finder_by_folder_and_stem(image_set: ImageSet) -> Callable[[str], int | None]:
    """Find images by FOLDER/FILE without extension, whatever folders lie above."""
    found: dict[str, int] = {}
    double: dict[str, str] = {}
    for index, key in enumerate(image_set.keys):
        path = PurePosixPath(key)
        name = f"{path.parent.name}/{path.stem}"
        if found.setdefault(name, index) != index:
            double[name] = f"{image_set.keys[found[name]]} and {key}"

    def find(name: str) -> int | None:
        if name in double:
            raise ValueError(f"the list means one image by {name}, and there are two: {double[name]}. Remove one.")
        return found.get(name)

    return find


def _matched(path: Path, lines: list[_Line], find: Callable[[str], int | None], missing: Missing) -> PairList:
    indices = [(find(line.first), find(line.second)) for line in lines]
    absent: dict[str, int] = {}  # image -> the first line that names it
    kept: list[tuple[int, int, _Line]] = []
    for line, (first, second) in zip(lines, indices, strict=True):
        if line.first == line.second:
            raise ValueError(f"{path}, line {line.number}: {line.first} is paired with itself.")
        for name, index in ((line.first, first), (line.second, second)):
            if index is None:
                absent.setdefault(name, line.number)
        if first is not None and second is not None:
            kept.append((first, second, line))
    left_out = len(lines) - len(kept)
    if left_out and (missing == "error" or not kept):
        shown = ", ".join(f"{name} (line {number})" for name, number in list(absent.items())[:3])
        advice = 'Check the folder, or pass missing="skip" to leave these pairs out.'
        if not kept:
            advice = "Is this the list of another set?"
        raise ValueError(
            f"{path} names {len(absent):,} images that are not in the set, in {left_out:,} of its {len(lines):,} "
            f"pairs: {shown}{' and more' if len(absent) > 3 else ''}. {advice}"
        )
    if not kept:
        raise ValueError(f"{path} has no pairs.")
    same = np.array([line.same for _, _, line in kept])
    fold = np.array([-1 if line.fold is None else line.fold for _, _, line in kept], dtype=np.int64)
    if kept[0][2].fold is None:
        smaller = int(min(same.sum(), (~same).sum()))
        for of_class in (same, ~same):
            fold[of_class] = contiguous_folds(int(of_class.sum()), max(1, min(FOLDS_OF_ONE_BLOCK, smaller)))
    first_of, second_of = (np.array([pair[side] for pair in kept], dtype=np.int64) for side in (0, 1))
    return PairList(first_of, second_of, same, fold, left_out)
