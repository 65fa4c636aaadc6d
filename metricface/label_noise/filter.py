"""What a person decided about the images of a set: a CSV of images to drop and images to relabel, and its effect.

    key,action,identity
    Ann/Ann_0001.jpg,drop,
    Ann/Ann_0002.jpg,relabel,Beth

An identity is merged with another by relabelling all its images, and parted by relabelling some to a new name.
"""

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from metricface.choices import check_choice
from metricface.data.images import ImageSet, Indices, IntArray, Pixels
from metricface.label_noise.tables import read_table

Action = Literal["drop", "relabel"]
COLUMNS = ("key", "action", "identity")


class Decision(NamedTuple):
    """One line of a filter. key: of an image, as `ImageSet.keys`; identity: its new one, empty where it is dropped."""

    key: str
    action: Action
    identity: str = ""


class FilterCounts(NamedTuple):
    """What a filter did to a set.

    unknown: keys of lines that named no image; the lines did nothing.
    dropped, relabelled: images. unchanged: images relabelled to the identity they had.
    held_out: lines on images that are held out for scoring; they did nothing.
    shows_held_out: images dropped since their new identity is held out for scoring.
    new, gone: identities that came to be, and that have no image left.
    """

    dropped: int
    relabelled: int
    unchanged: int
    held_out: int
    shows_held_out: int
    unknown: tuple[str, ...]
    new: tuple[str, ...]
    gone: tuple[str, ...]

    def describe(self) -> str:
        """One line for a report."""
        text = f"{self.dropped:,} images dropped, {self.relabelled:,} relabelled"
        text += f", {self.shows_held_out:,} dropped as showing held-out people" if self.shows_held_out else ""
        text += f"; identities: {len(self.gone):,} gone" + (f", {len(self.new):,} new" if self.new else "")
        text += f"; {self.held_out:,} lines on held-out images not applied" if self.held_out else ""
        if self.unknown:
            shown = ", ".join(map(_shown, self.unknown[:3])) + (", ..." if len(self.unknown) > 3 else "")
            text += f"; {len(self.unknown):,} lines name no image: {shown}"
        return text


class Filtered(NamedTuple):
    """A set after a filter."""

    images: ImageSet
    counts: FilterCounts


def read_filter(path: str | PathLike[str]) -> list[Decision]:
    """Read a filter. Further columns (reasons, scores) are passed over.

    Raises ValueError, with the line, for an unknown action, a relabelling to no identity, a drop with one, and two
    lines that decide differently about one image; OSError where the file cannot be read.
    """
    decisions: dict[str, Decision] = {}
    lines: dict[str, int] = {}
    for line, cells in read_table(Path(path), COLUMNS):
        decision = _decision(f"{path}, line {line}", **cells)
        before = decisions.setdefault(decision.key, decision)
        if before != decision:
            raise ValueError(
                f"{path}, line {line}: {decision.key} is to be {_words(decision)}, but line {lines[decision.key]} has "
                f"it {_words(before)}. Keep one of the two lines."
            )
        lines.setdefault(decision.key, line)
    return list(decisions.values())


def apply_filter(images: ImageSet, decisions: Iterable[Decision], *, held_out: ImageSet | None = None) -> Filtered:
    """Drop and relabel images of a set, and count.

    decisions: at most one for each key. held_out: images that are scored and stay as they are: lines on them do
    nothing, and an image that is relabelled to one of their identities is dropped, for nobody may be on both sides.
    Identities of the result are sorted by name; images keep their order, `skipped` stays. Without any effect the very
    set is returned. Raises ValueError where keys are not distinct, no image would be left, a decision is none or
    one of two on one key, or none of them names an image: the filter is of another set then.
    """
    places = {key: index for index, key in enumerate(images.keys)}
    if len(places) != len(images.keys):
        raise ValueError("the keys of a set must be distinct to be filtered by; some images share one.")
    scored = set() if held_out is None else set(held_out.keys)
    strangers = set() if held_out is None else set(held_out.identities)
    names = [images.identities[label] for label in images.labels]
    stays = np.ones(len(images), dtype=bool)
    unknown: list[str] = []
    counts = dict.fromkeys(("dropped", "relabelled", "unchanged", "held_out", "shows_held_out"), 0)
    decisions = list(decisions)
    if len({decision.key for decision in decisions}) != len(decisions):
        raise ValueError("a filter decides once about each image; found several decisions on one key.")
    for decision in decisions:
        check_choice("action", decision.action, get_args(Action))
        if (decision.action == "relabel") != bool(decision.identity):
            raise ValueError(f"a relabelling names an identity, and a drop none; found {decision!r}.")
        at = places.get(decision.key)
        if at is None and decision.key not in scored:
            unknown.append(decision.key)
            continue
        what = "held_out" if at is None else _effect(decision, names[at], strangers)
        counts[what] += 1
        if at is not None:
            stays[at] = what not in ("dropped", "shows_held_out")
            names[at] = decision.identity if what == "relabelled" else names[at]
    if unknown and len(unknown) == len(decisions):
        raise ValueError(
            f"none of the {len(unknown):,} lines of the filter names an image of this set (first: "
            f"{_shown(unknown[0])}; an image here: {_shown(images.keys[0])}). Give the filter of this folder."
        )
    index = np.flatnonzero(stays).astype(np.int64)
    if not len(index):
        raise ValueError(f"the filter drops all {len(images):,} images of the set; take lines out of it.")
    left = [names[i] for i in index]
    found = FilterCounts(
        **counts,
        unknown=tuple(unknown),
        new=tuple(sorted(set(left) - set(images.identities))),
        gone=tuple(sorted(set(images.identities) - set(left))),
    )
    changed = counts["dropped"] + counts["relabelled"] + counts["shows_held_out"]
    return Filtered(Relabelled(images, index, left) if changed else images, found)


class Relabelled(ImageSet):
    """Images of another set, by index, under names of their own; pixels are the other set's."""

    def __init__(self, source: ImageSet, index: IntArray, names: Sequence[str]) -> None:
        identities, labels = np.unique(np.array(names, dtype=object), return_inverse=True)
        self._source, self._index = source, index
        keys = [source.keys[i] for i in index]
        super().__init__(list(identities), labels, keys, source.preprocessing, source.skipped)

    def read(self, indices: Indices) -> Pixels:
        """Pixels of the images at `indices`, as the source reads them."""
        return self._source.read(self._index[np.asarray(indices, dtype=np.int64)])


def _shown(key: str) -> str:
    """A key as any terminal can print it: names of files may be no UTF-8."""
    return key.encode("utf-8", "replace").decode()


def _effect(decision: Decision, name: str, strangers: set[str]) -> str:
    if decision.action == "drop":
        return "dropped"
    if decision.identity in strangers:
        return "shows_held_out"
    return "unchanged" if decision.identity == name else "relabelled"


def _decision(where: str, key: str, action: str, identity: str) -> Decision:
    action = action.strip()
    if not key:
        raise ValueError(f"{where}: the cell of the key is empty; it names the image.")
    if action == "drop" and not identity:
        return Decision(key, "drop")
    if action == "relabel" and identity:
        return Decision(key, "relabel", identity)
    if action == "drop":
        raise ValueError(f"{where}: drop takes no identity, found {identity!r}. Empty the cell, or write relabel.")
    if action == "relabel":
        raise ValueError(f"{where}: relabel needs the identity that {key} is to have. Fill the cell, or write drop.")
    raise ValueError(f"{where}: action {action!r} is unknown; use drop or relabel.")


def _words(decision: Decision) -> str:
    return "dropped" if decision.action == "drop" else f"relabelled to {decision.identity}"
