"""Findings as files: a table and pictures of each kind, a summary, and a proposed filter."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metricface.atomic import replacing
from metricface.data.images import ImageSet
from metricface.label_noise.duplicates import Duplicates
from metricface.label_noise.filter import COLUMNS
from metricface.label_noise.findings import Findings
from metricface.label_noise.gallery import Frame, Panel, Picture, write_sheets
from metricface.label_noise.proposal import CONFIDENT, check_confident, propose
from metricface.label_noise.same_person import SamePerson
from metricface.label_noise.tables import Cell, write_table

SUMMARY = "summary.json"
FILTER = "proposed_filter.csv"
GALLERY = "gallery"
OVERLAP = ("overlap_images", "overlap_people")
KINDS = ("duplicates", "misplaced", "two_labels", "two_people", *OVERLAP)
MOST_PANELS = 60  # of a kind in the gallery, the first ones; tables have all
MOST_PICTURES = 4  # of an identity, evenly taken

PAIR_COLUMNS = ("first", "first_identity", "second", "second_identity", "cosine", "correlation", "false_share")
PEOPLE_COLUMNS = ("first", "first_images", "second", "second_images", "score", "evidence", "false_share")
MISPLACED_COLUMNS = (
    "key",
    "identity",
    "other_images",
    "nearest_identity",
    "probability",
    "own_evidence",
    "nearest_evidence",
)
PARTED_COLUMNS = ("identity", "key", "side", "probability", "false_share", "evidence")


def write_report(findings: Findings, folder: Path, *, confident: float = CONFIDENT) -> dict[str, Any]:
    """Write everything to `folder`, which is made where it is missing; files of an earlier report are replaced.

    But not a proposed filter that somebody has edited since: the new one is then proposed_filter_2.csv, or the next
    number that is free.

    duplicates.csv, misplaced.csv, two_labels.csv (one person under two labels), two_people.csv (two people under one
    label), with a test set overlap_images.csv and overlap_people.csv: the findings, likeliest first. gallery/*.png: the
    first 60 of each. proposed_filter.csv: decisions for those that are right with at least the probability
    `confident`. summary.json: thresholds, counts, what could not be judged. Returns the summary.
    Raises ValueError for `confident` outside (0, 1], OSError where a file cannot be written, UnreadableImageError where
    an image cannot be read.
    """
    check_confident(confident)
    gallery = folder / GALLERY
    gallery.mkdir(parents=True, exist_ok=True)
    _remove_earlier(folder)
    images, test = findings.images, findings.test
    write_table(folder / "duplicates.csv", PAIR_COLUMNS, _pairs(findings.duplicates, images, images))
    write_table(folder / "misplaced.csv", MISPLACED_COLUMNS, _misplaced(findings))
    write_table(folder / "two_labels.csv", PEOPLE_COLUMNS, _people(findings.same_person, images, images))
    write_table(folder / "two_people.csv", PARTED_COLUMNS, _parted(findings))
    panels = {
        "duplicates": _pair_panels(findings.duplicates, images, images),
        "misplaced": _misplaced_panels(findings),
        "two_labels": _people_panels(findings.same_person, images, images),
        "two_people": _parted_panels(findings),
    }
    if test is not None and findings.overlap_images is not None and findings.overlap_people is not None:
        write_table(folder / "overlap_images.csv", PAIR_COLUMNS, _pairs(findings.overlap_images, images, test))
        write_table(folder / "overlap_people.csv", PEOPLE_COLUMNS, _people(findings.overlap_people, images, test))
        panels["overlap_images"] = _pair_panels(findings.overlap_images, images, test)
        panels["overlap_people"] = _people_panels(findings.overlap_people, images, test)
    for name, shown in panels.items():
        write_sheets(gallery, name, shown)
    proposed = propose(findings, confident=confident)
    rows = [(*each.decision, each.kind, each.score) for each in proposed]
    file = _unedited(folder)
    write_table(file, (*COLUMNS, "finding", "score"), rows)
    summary = summarise(findings) | {
        "proposed_filter": {
            "file": file.name,
            "sha256": _digest(file),
            "confident": confident,
            "lines": len(proposed),
        }
    }
    with replacing(folder / SUMMARY) as written:
        written.write((json.dumps(summary, indent=2, ensure_ascii=True) + "\n").encode())
    return summary


def _remove_earlier(folder: Path) -> None:
    """Delete sheets of an earlier report, and the tables that this one may not have; nothing else."""
    for kind in KINDS:
        for sheet in (folder / GALLERY).glob(f"{kind}_*.png"):
            if sheet.stem.removeprefix(f"{kind}_").isdecimal():
                sheet.unlink()
    for kind in OVERLAP:
        (folder / f"{kind}.csv").unlink(missing_ok=True)


def _unedited(folder: Path) -> Path:
    """Where a proposed filter may be written: to none that is not as the last report left it."""
    try:
        last = json.loads((folder / SUMMARY).read_text())["proposed_filter"]
        left = folder / Path(last["file"]).name
        if _digest(left) == last["sha256"]:
            return left
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no report, or none of ours
    names = itertools.chain([FILTER], (f"{Path(FILTER).stem}_{number}.csv" for number in itertools.count(2)))
    return next(folder / name for name in names if not (folder / name).exists())


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def summarise(findings: Findings) -> dict[str, Any]:
    """Thresholds, counts and what could not be judged, as plain JSON values."""
    images, duplicates, misplaced, parted = findings.images, findings.duplicates, findings.misplaced, findings.parted
    between = int((images.labels[duplicates.first] != images.labels[duplicates.second])[: duplicates.found].sum())
    summary: dict[str, Any] = {
        "images": len(images),
        "identities": len(images.identities),
        "files_left_out": [file._asdict() for file in images.skipped],
        "thresholds": vars(findings.thresholds),
        "duplicates": _of_pairs(duplicates) | {"under_two_labels": between},
        "misplaced": {
            "found": misplaced.found,
            "judged": len(misplaced.images),
            "not_judged_alone_in_their_identity": misplaced.alone,
            "not_judged_too_few_alike": misplaced.unjudged,
            "estimated_share_wrong_by_other_images": misplaced.shares,
            "estimated_share_caught_by_other_images": misplaced.caught,
        },
        "two_labels": _of_pairs(findings.same_person),
        "two_people": {
            "found": parted.found,
            "judged": len(parted.identities),
            "not_judged": parted.unjudged,
            "estimated_share": parted.share,
            "estimated_share_caught": parted.caught,
        },
    }
    if findings.test is not None and findings.overlap_images is not None and findings.overlap_people is not None:
        summary["test_images"], summary["test_identities"] = len(findings.test), len(findings.test.identities)
        summary["overlap_images"] = _of_pairs(findings.overlap_images)
        summary["overlap_people"] = _of_pairs(findings.overlap_people)
    return summary


def _of_pairs(pairs: Duplicates | SamePerson) -> dict[str, Any]:
    found: dict[str, Any] = {
        "found": pairs.found,
        "pairs_looked_at": len(pairs.first),
        "least_score": pairs.threshold if pairs.found else None,
        "too_few_to_judge": pairs.tail is None,
    }
    if isinstance(pairs, Duplicates):
        found["confirmed_by"] = "pixels" if pairs.by_pixels else "embeddings alone"
    return found


def _name(images: ImageSet, index: int) -> str:
    return images.identities[int(images.labels[index])]


def _pairs(pairs: Duplicates, one: ImageSet, two: ImageSet) -> Iterator[Sequence[Cell]]:
    for i in range(pairs.found):
        a, b = int(pairs.first[i]), int(pairs.second[i])
        correlation: Cell = float(pairs.correlation[i]) if pairs.by_pixels else ""
        figures = (float(pairs.cos[i]), correlation, float(pairs.false_share[i]))
        yield (one.keys[a], _name(one, a), two.keys[b], _name(two, b), *figures)


def _people(pairs: SamePerson, one: ImageSet, two: ImageSet) -> Iterator[Sequence[Cell]]:
    first, second = one.counts(), two.counts()
    for i in range(pairs.found):
        a, b = int(pairs.first[i]), int(pairs.second[i])
        figures = (float(pairs.score[i]), float(pairs.evidence[i]), float(pairs.false_share[i]))
        yield (one.identities[a], int(first[a]), two.identities[b], int(second[b]), *figures)


def _misplaced(findings: Findings) -> Iterator[Sequence[Cell]]:
    found, images = findings.misplaced, findings.images
    counts = images.counts()
    for i in range(found.found):
        image, near = int(found.images[i]), int(found.nearest[i])
        others = int(counts[images.labels[image]]) - 1
        figures = (float(found.probability[i]), float(found.own[i]), float(found.near[i]) if near >= 0 else "")
        yield images.keys[image], _name(images, image), others, images.identities[near] if near >= 0 else "", *figures


def _parted(findings: Findings) -> Iterator[Sequence[Cell]]:
    found, images = findings.parted, findings.images
    for i in range(found.found):
        name = images.identities[found.identities[i]]
        for side in ("larger", "smaller", "apart"):
            for image in getattr(found.sides[i], side).tolist():
                figures = (found.probability[i], found.false_share[i], found.evidence[i])
                yield name, images.keys[image], side, *(float(figure) for figure in figures)


def _pair_panels(pairs: Duplicates, one: ImageSet, two: ImageSet) -> list[Panel]:
    panels = []
    for i in range(min(pairs.found, MOST_PANELS)):
        a, b = int(pairs.first[i]), int(pairs.second[i])
        likeness = f"correlation {pairs.correlation[i]:.3f}, " if pairs.by_pixels else ""
        same = "one label" if one is two and one.labels[a] == two.labels[b] else "two labels"
        title = f"{likeness}cosine {pairs.cos[i]:.3f}, {same if one is two else 'training, test'}"
        frame: Frame = "plain" if same == "one label" else "question"
        panels.append(Panel(title, [Picture(one, a, frame), Picture(two, b, frame)]))
    return panels


def _people_panels(pairs: SamePerson, one: ImageSet, two: ImageSet) -> list[Panel]:
    panels = []
    for i in range(min(pairs.found, MOST_PANELS)):
        a, b = int(pairs.first[i]), int(pairs.second[i])
        title = f"{one.identities[a]} = {two.identities[b]}? score {pairs.score[i]:.1f}, "
        title += f"expected false up to here {pairs.false_share[i]:.1%}"
        panels.append(Panel(title, [*_of_identity(one, a, "first"), *_of_identity(two, b, "second")]))
    return panels


def _misplaced_panels(findings: Findings) -> list[Panel]:
    found, images = findings.misplaced, findings.images
    panels = []
    for i in range(min(found.found, MOST_PANELS)):
        image, near = int(found.images[i]), int(found.nearest[i])
        title = f"wrong with probability {found.probability[i]:.2f}: red is labelled {_name(images, image)} (blue)"
        own = _of_identity(images, int(images.labels[image]), "first", image)[:3]
        close = _of_identity(images, near, "second")[:4] if near >= 0 else []
        title += f"; nearest is {images.identities[near]} (orange)" if near >= 0 else ""
        panels.append(Panel(title, [Picture(images, image, "question"), *own, *close]))
    return panels


def _parted_panels(findings: Findings) -> list[Panel]:
    found, images = findings.parted, findings.images
    panels = []
    for i in range(min(found.found, MOST_PANELS)):
        sides = found.sides[i]
        title = f"{images.identities[found.identities[i]]}: two people with probability {found.probability[i]:.2f}, "
        title += f"{len(sides.larger)} (blue) and {len(sides.smaller)} (orange) images"
        one = [Picture(images, int(index), "first") for index in _evenly(sides.larger)]
        two = [Picture(images, int(index), "second") for index in _evenly(sides.smaller)]
        panels.append(Panel(title, [*one, *two]))
    return panels


def _of_identity(images: ImageSet, row: int, frame: Frame, without: int = -1) -> list[Picture]:
    members = np.flatnonzero(images.labels == row)
    return [Picture(images, int(index), frame) for index in _evenly(members[members != without])]


def _evenly(index: np.ndarray[Any, np.dtype[np.int64]]) -> list[int]:
    """At most 4 of them, from the first to the last."""
    if len(index) <= MOST_PICTURES:
        return [int(i) for i in index]
    return [int(index[i]) for i in np.linspace(0, len(index) - 1, MOST_PICTURES).round().astype(int)]
