from pathlib import Path

import numpy as np
import pytest

from metricface.data.images import ImageSet, Indices, Pixels, Preprocessing, SkippedFile
from metricface.label_noise.filter import Decision, apply_filter, read_filter

SIZE = Preprocessing(2, 3)


class Named(ImageSet):
    """Image i is filled with i; keys are NAME/i."""

    def __init__(self, names: list[str]) -> None:
        identities = sorted(set(names))
        keys = [f"{name}/{i}" for i, name in enumerate(names)]
        skipped = [SkippedFile("x.txt", "no image")]
        super().__init__(identities, [identities.index(name) for name in names], keys, SIZE, skipped)

    def read(self, indices: Indices) -> Pixels:
        return np.tile(np.asarray(indices, dtype=np.uint8)[:, None, None, None], (1, 2, 3, 3))


def shown(images: ImageSet) -> list[tuple[str, str, int]]:
    """Key, identity and pixel value of each image."""
    values = images.read(range(len(images)))[:, 0, 0, 0]
    return [
        (key, images.identities[label], int(value))
        for key, label, value in zip(images.keys, images.labels, values, strict=True)
    ]


PEOPLE = Named(["Ann", "Ann", "Beth", "Cleo", "Cleo"])


def test_images_are_dropped_and_relabelled_and_all_else_stays() -> None:
    found = apply_filter(PEOPLE, [Decision("Ann/1", "drop"), Decision("Cleo/3", "relabel", "Beth")])
    assert shown(found.images) == [
        ("Ann/0", "Ann", 0),
        ("Beth/2", "Beth", 2),
        ("Cleo/3", "Beth", 3),
        ("Cleo/4", "Cleo", 4),
    ]
    assert (found.counts.dropped, found.counts.relabelled, found.counts.unknown) == (1, 1, ())
    assert found.images.skipped == PEOPLE.skipped
    assert found.images.preprocessing == SIZE


def test_an_identity_is_merged_by_relabelling_its_images_and_parted_by_a_new_name() -> None:
    merged = apply_filter(PEOPLE, [Decision("Cleo/3", "relabel", "Ann"), Decision("Cleo/4", "relabel", "Ann")])
    assert merged.images.identities == ("Ann", "Beth")
    assert merged.counts.gone == ("Cleo",)
    parted = apply_filter(PEOPLE, [Decision("Cleo/3", "relabel", "Cleo_2")])
    assert parted.images.identities == ("Ann", "Beth", "Cleo", "Cleo_2")
    assert parted.counts.new == ("Cleo_2",)


def test_a_subset_of_what_is_left_reads_the_right_pixels() -> None:
    found = apply_filter(PEOPLE, [Decision("Ann/0", "drop"), Decision("Beth/2", "relabel", "Cleo")])
    chosen = found.images.select([list(found.images.identities).index("Cleo")])
    assert [row[2] for row in shown(chosen)] == [2, 3, 4]
    assert [row[2] for row in shown(found.images.in_memory())] == [1, 2, 3, 4]


def test_lines_that_name_no_image_or_change_nothing_are_counted() -> None:
    lines = [Decision("Dora/9", "drop"), Decision("Eve\udcff/1", "relabel", "Ann"), Decision("Ann/0", "relabel", "Ann")]
    found = apply_filter(PEOPLE, lines)
    assert found.images is PEOPLE
    assert found.counts.unknown == ("Dora/9", "Eve\udcff/1")
    assert found.counts.unchanged == 1
    assert "2 lines name no image: Dora/9, Eve?/1" in found.counts.describe()


def test_held_out_images_stay_and_images_that_show_held_out_people_go() -> None:
    held_out = PEOPLE.select([0])  # Ann
    rest = PEOPLE.select([1, 2])
    lines = [Decision("Ann/0", "drop"), Decision("Ann/1", "relabel", "Beth"), Decision("Beth/2", "relabel", "Ann")]
    found = apply_filter(rest, lines, held_out=held_out)
    assert [row[0] for row in shown(found.images)] == ["Cleo/3", "Cleo/4"]
    counts = found.counts
    assert (counts.held_out, counts.shows_held_out, counts.dropped, counts.relabelled) == (2, 1, 0, 0)
    assert counts.unknown == ()


def test_a_filter_of_another_folder_is_an_error() -> None:
    lines = [Decision("people/Ann/0", "drop"), Decision("people/Ann/1", "drop")]
    with pytest.raises(ValueError, match=r"none of the 2 lines .* \(first: people/Ann/0; an image here: Ann/0\)"):
        apply_filter(PEOPLE, lines)
    assert apply_filter(PEOPLE, []).images is PEOPLE


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([Decision("Ann/0", "drop"), Decision("Ann/0", "relabel", "Beth")], "several decisions on one key"),
        ([Decision("Ann/0", "relabel")], "a relabelling names an identity"),
        ([Decision("Ann/0", "drop", "Beth")], "and a drop none"),
    ],
)
def test_decisions_that_cannot_be_meant_are_errors(lines: list[Decision], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        apply_filter(PEOPLE, lines)


def test_a_filter_of_everything_is_an_error() -> None:
    with pytest.raises(ValueError, match="drops all 5 images"):
        apply_filter(PEOPLE, [Decision(key, "drop") for key in PEOPLE.keys])


def test_an_unknown_action_lists_the_right_ones() -> None:
    with pytest.raises(ValueError, match="'drop', 'relabel'"):
        apply_filter(PEOPLE, [Decision("Ann/0", "merge", "Beth")])  # type: ignore[arg-type]


def test_a_filter_is_read_with_its_further_columns_passed_over(tmp_path: Path) -> None:
    lines = ["reason,key,action,identity", "far,Ann/1,drop,", "near,Cleo/3,relabel,'=Beth", "twice,Ann/1,drop,"]
    (tmp_path / "f.csv").write_text("\n".join(lines))
    assert read_filter(tmp_path / "f.csv") == [Decision("Ann/1", "drop"), Decision("Cleo/3", "relabel", "=Beth")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("Ann/1,remove,", "line 3: action 'remove' is unknown"),
        (",drop,", "line 3: the cell of the key is empty"),
        ("Ann/1,relabel,", "line 3: relabel needs the identity that Ann/1"),
        ("Ann/1,drop,Beth", "line 3: drop takes no identity, found 'Beth'"),
        ("Ann/0,relabel,Beth", "line 3: Ann/0 is to be relabelled to Beth, but line 2 has it dropped"),
    ],
)
def test_a_line_that_cannot_be_meant_is_an_error_that_names_it(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "f.csv").write_text(f"key,action,identity\nAnn/0,drop,\n{line}\n")
    with pytest.raises(ValueError, match=says):
        read_filter(tmp_path / "f.csv")
