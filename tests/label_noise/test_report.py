import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from metricface.data.images import ImageSet, MemoryImages
from metricface.label_noise.filter import apply_filter, read_filter
from metricface.label_noise.findings import Findings, Source, Thresholds, find_all
from metricface.label_noise.gallery import Panel, Picture, shortened, write_sheets
from metricface.label_noise.proposal import propose
from metricface.label_noise.report import write_report
from tests.label_noise.faces import Faces, changed, painted

PEOPLE, IMAGES = 60, 8


@pytest.fixture(scope="module")
def noisy() -> Faces:
    """A set with 12 flipped labels, people 0 to 2 under two labels, 10 and 11 under one, and 2 copies."""
    flips = {IMAGES * row + 3: row + 5 for row in range(20, 44, 2)}
    split = {IMAGES * row + place: 57 + row for row in range(3) for place in range(4, IMAGES)}
    merged = {IMAGES * 11 + place: 10 for place in range(1, IMAGES)}
    made = changed(painted(PEOPLE, IMAGES), flips | split | merged, {IMAGES * 50: 50, IMAGES * 51: 30})
    # Labels 57 to 59 are second ones, and 11 is no longer one.
    gone = np.isin(made.person, [57, 58, 59]) | (made.images.labels == 11)
    chosen = np.flatnonzero(~gone)
    return Faces(made.images.subset(chosen), made.embeddings[chosen], made.person[chosen])


@pytest.fixture(scope="module")
def findings(noisy: Faces) -> Findings:
    return find_all(Source(noisy.images, noisy.embeddings))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_the_report_has_a_table_and_pictures_of_each_kind_and_a_summary(findings: Findings, tmp_path: Path) -> None:
    summary = write_report(findings, tmp_path / "new" / "report")
    folder = tmp_path / "new" / "report"
    for name, kind in (("duplicates", 2), ("misplaced", 12), ("two_people", 1)):
        rows = table(folder / f"{name}.csv")
        assert summary[name]["found"] >= kind * 0.8
        assert len({row.get("key") if name == "misplaced" else tuple(row.values())[:3] for row in rows}) >= kind * 0.8
        sheet = cv2.imread(str(folder / "gallery" / f"{name}_1.png"))
        assert sheet is not None
        assert sheet.min() < 100  # there are pictures and text
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["misplaced"]["not_judged_alone_in_their_identity"] == 0
    assert (folder / "proposed_filter.csv").exists()
    assert not list(folder.glob("overlap*"))


def test_a_second_report_replaces_the_pictures_of_the_first(findings: Findings, tmp_path: Path) -> None:
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "misplaced_9.png").write_bytes(b"old")
    write_report(findings, tmp_path)
    assert not (tmp_path / "gallery" / "misplaced_9.png").exists()


def test_a_report_deletes_nothing_that_no_report_made(findings: Findings, tmp_path: Path) -> None:
    (tmp_path / "gallery").mkdir()
    mine = [tmp_path / "gallery" / name for name in ("mine.png", "misplaced_mine.png", "0001.png")]
    for file in mine:
        file.write_bytes(b"mine")
    write_report(findings, tmp_path)
    assert all(file.read_bytes() == b"mine" for file in mine)


def test_an_edited_filter_stays_and_one_as_it_was_is_replaced(findings: Findings, tmp_path: Path) -> None:
    edited = tmp_path / "proposed_filter.csv"
    write_report(findings, tmp_path)
    assert write_report(findings, tmp_path, confident=0.5)["proposed_filter"]["file"] == edited.name
    lines = edited.read_bytes().splitlines(keepends=True)
    edited.write_bytes(b"".join(lines[:-1]))
    for _ in range(2):  # the second one replaces the first one's
        assert write_report(findings, tmp_path)["proposed_filter"]["file"] == "proposed_filter_2.csv"
        assert edited.read_bytes() == b"".join(lines[:-1])
    assert [row["key"] for row in table(tmp_path / "proposed_filter_2.csv")] == [
        each.decision.key for each in propose(findings)
    ]
    (tmp_path / "summary.json").unlink()  # nobody knows any more who wrote it
    assert write_report(findings, tmp_path)["proposed_filter"]["file"] == "proposed_filter_3.csv"


def test_a_misplaced_image_goes_to_the_identity_that_its_nearest_one_is_merged_into(findings: Findings) -> None:
    images = findings.images.select([20, 21, 22])
    one, small, large = images.identities
    images = images.subset([*range(len(images))[: -IMAGES - 3], *range(len(images))[-IMAGES:]])  # small has the fewest
    merged = findings.same_person._replace(first=np.array([1]), second=np.array([2]), false_share=np.zeros(1), found=1)
    made = replace(
        findings,
        images=images,
        same_person=merged,
        parted=findings.parted._replace(found=0),
        duplicates=findings.duplicates._replace(found=0),
    )

    def decided(image: int, nearest: int) -> dict[str, str]:
        misplaced = findings.misplaced._replace(
            images=np.array([image]),
            nearest=np.array([nearest]),
            near=np.array([9.0]),
            own=np.zeros(1),
            probability=np.ones(1),
            found=1,
        )
        proposed = propose(replace(made, misplaced=misplaced))
        return {each.decision.key: each.decision.identity for each in proposed}

    everyone = {key: large for key, row in zip(images.keys, images.labels, strict=True) if row == 1}
    assert decided(0, nearest=1) == everyone | {images.keys[0]: large}
    # Misplaced between two labels of one person: merging them has settled it.
    of_small, of_large = (int(np.flatnonzero(images.labels == row)[0]) for row in (1, 2))
    assert decided(of_small, nearest=2) == decided(of_large, nearest=1) == everyone
    assert (one, small) == images.identities[:2]


@pytest.mark.parametrize("confident", [0.0, 5.0, float("nan"), "0.9"])
def test_confident_is_a_probability(findings: Findings, tmp_path: Path, confident: Any) -> None:
    with pytest.raises(ValueError, match="confident is a probability"):
        write_report(findings, tmp_path / "new", confident=confident)
    assert not (tmp_path / "new").exists()


def test_the_proposed_filter_can_be_read_and_mends_labels(noisy: Faces, findings: Findings, tmp_path: Path) -> None:
    write_report(findings, tmp_path, confident=0.5)
    cleaned = apply_filter(noisy.images, read_filter(tmp_path / "proposed_filter.csv"))
    assert cleaned.counts.unknown == ()
    assert cleaned.counts.dropped >= 2
    person = dict(zip(noisy.images.keys, noisy.person.tolist(), strict=True))

    def wrong(images: ImageSet) -> int:
        """Images whose identity most often shows another person."""
        shown = np.array([person[key] for key in images.keys])
        labels = images.labels
        return sum(
            int((shown[labels == row] != np.bincount(shown[labels == row]).argmax()).sum())
            for row in set(labels.tolist())
        )

    assert wrong(cleaned.images) < 0.3 * wrong(noisy.images)


def test_one_copy_of_each_picture_stays(findings: Findings) -> None:
    dropped = {each.decision.key for each in propose(findings) if each.kind == "duplicate"}
    pairs = findings.duplicates
    keys = findings.images.keys
    for a, b in zip(pairs.first[: pairs.found], pairs.second, strict=False):
        assert len({keys[a], keys[b]} & dropped) == 1


def test_of_three_copies_under_two_labels_one_stays_whichever_fits_least(findings: Findings) -> None:
    images = findings.images.subset([0, 1, 8])  # two of one label
    pairs = findings.duplicates._replace(
        first=np.array([0, 0, 1]), second=np.array([1, 2, 2]), false_share=np.zeros(3), found=3
    )
    doubts = findings.misplaced._replace(
        images=np.arange(3), near=np.array([9.0, 1.0, 5.0]), own=np.zeros(3), probability=np.zeros(3), found=0
    )
    made = replace(
        findings,
        images=images,
        duplicates=pairs,
        misplaced=doubts,
        parted=findings.parted._replace(found=0),
        same_person=findings.same_person._replace(found=0),
    )
    kinds = [each for each in propose(made) if each.kind == "duplicate"]
    assert [each.decision.key for each in kinds] == [images.keys[0], images.keys[1]]


def test_each_image_is_decided_on_once(findings: Findings) -> None:
    keys = [each.decision.key for each in propose(findings, confident=0.3)]
    assert len(keys) == len(set(keys)) > 0


def test_with_a_test_set_the_report_has_what_they_share(noisy: Faces, tmp_path: Path) -> None:
    more = painted(12, 14, seed=8, first=25)
    others = np.flatnonzero(np.arange(168) % 14 >= IMAGES)  # pictures of these people that are not in the set
    test = Faces(more.images.subset(others), more.embeddings[others], more.person[others])
    taken = np.array([30, 31])
    pixels = np.concatenate([test.images.read(range(72)), noisy.images.read(taken)])
    labels = np.concatenate([test.images.labels, [0, 1]])
    keys = [f"test {i}.png" for i in range(len(pixels))]
    images = MemoryImages(pixels, test.images.identities, labels, keys, test.images.preprocessing)
    embeddings = np.concatenate([test.embeddings, noisy.embeddings[taken]])
    found = find_all(Source(noisy.images, noisy.embeddings), Source(images, embeddings))
    summary = write_report(found, tmp_path)
    assert summary["overlap_images"]["found"] == 2
    assert {row["second"] for row in table(tmp_path / "overlap_images.csv")} == {"test 72.png", "test 73.png"}
    assert summary["overlap_people"]["found"] >= 6  # of 12, some of whom have wrong labels
    dropped = {row["key"] for row in table(tmp_path / "proposed_filter.csv") if row["finding"] == "in test set"}
    assert dropped == {noisy.images.keys[i] for i in taken}
    write_report(replace(found, test=None, overlap_images=None, overlap_people=None), tmp_path)
    assert not list(tmp_path.glob("overlap*"))
    assert not list((tmp_path / "gallery").glob("overlap*"))


def test_nothing_found_is_a_report_too(tmp_path: Path) -> None:
    made = painted(5, 4)
    summary = write_report(find_all(Source(made.images, made.embeddings)), tmp_path)
    assert all(summary[name]["found"] == 0 for name in ("duplicates", "misplaced", "two_labels", "two_people"))
    assert summary["misplaced"]["not_judged_too_few_alike"] == 20
    assert summary["two_labels"]["too_few_to_judge"]
    assert table(tmp_path / "misplaced.csv") == []
    assert not list((tmp_path / "gallery").iterdir())


@pytest.mark.parametrize("wrong", [{"false_share": 0.0}, {"probability": 2.0}])
def test_thresholds_outside_their_range_are_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Thresholds(**wrong)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("short.jpg", "short.jpg"),
        ("George_Washington_Carver_0001.jpg", "George…er_0001.jpg"),
        ("a\udce9b\nc\td", "a?b?c?d"),
    ],
)
def test_long_names_keep_their_beginning_and_end(text: str, short: str) -> None:
    assert shortened(text, 18) == short
    assert len(shortened(text, 18)) <= 18


def test_panels_flow_into_rows_and_sheets(tmp_path: Path) -> None:
    made = painted(4, 4)
    panels = [
        Panel(f"$x^2$ of Zoë, number {i}", [Picture(made.images, i % 16), Picture(made.images, 3)]) for i in range(70)
    ]
    files = write_sheets(tmp_path, "some", panels)
    assert [file.name for file in files] == ["some_1.png", "some_2.png", "some_3.png"]
    sizes = [cv2.imread(str(file)).shape for file in files]  # type: ignore[union-attr]
    assert max(height for height, _, _ in sizes) <= 1560
    assert {width for _, width, _ in sizes} == {3 * (2 * 148 + 20)}
    assert write_sheets(tmp_path, "none", []) == []
