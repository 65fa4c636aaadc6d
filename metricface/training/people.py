"""The three sets of people of a run: trained on, chosen on (validation), and scored only (test)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metricface.data.folders import FolderImages
from metricface.data.images import ImageSet, Preprocessing, SkippedFile
from metricface.data.pair_lists import read_pairs
from metricface.data.splits import split_identities
from metricface.data.synthetic import SyntheticFaces
from metricface.evaluation.pairs import PairList
from metricface.label_noise.filter import FilterCounts, apply_filter, read_filter
from metricface.training.recipe import Data

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class People:
    """Images of disjoint sets of identities; `listed` are the recipe's own pairs among the test images.

    skipped: files left out, and why; overlap: identities that stood in both folders and were left out of training.
    filtered: what the recipe's filter did to training and validation people; None without one.
    """

    training: ImageSet
    validation: ImageSet
    test: ImageSet
    listed: PairList | None
    skipped: tuple[SkippedFile, ...]
    overlap: tuple[str, ...]
    in_memory: bool
    filtered: FilterCounts | None = None

    def describe(self) -> list[str]:
        """Lines for the start of a run and its report."""
        lines = [f"{name:<10} {images.describe()}" for name, images in self.by_name().items()]
        if self.skipped:
            shown = ", ".join(f"{file.key} ({file.reason})" for file in self.skipped[:3])
            lines.append(f"left out   {len(self.skipped):,} files: {shown}{', ...' if len(self.skipped) > 3 else ''}")
        if self.overlap:
            lines.append(f"left out   {len(self.overlap):,} training identities that are also among the test people")
        if self.filtered is not None:
            lines.append(f"filter     {self.filtered.describe()}")
        return lines

    def digest(self) -> str:
        """Changes when any image, its name, side or, by a filter, identity does; pixels are not looked at."""
        found = hashlib.sha256()
        for name, images in self.by_name().items():
            found.update(f"{name} {images.preprocessing} {len(images)}\n".encode())
            for index, key in enumerate(images.keys):
                # Without a filter the key says whom an image shows.
                shows = "" if self.filtered is None else f" {images.identities[images.labels[index]]}"
                found.update(f"{key}{shows}\n".encode(errors="surrogateescape"))
        return found.hexdigest()

    def by_name(self) -> dict[str, ImageSet]:
        """The three sets by the names that reports use."""
        return {"training": self.training, "validation": self.validation, "test": self.test}


def gather(data: Data, seed: int) -> People:
    """Read the recipe's images and part them by identity (or group).

    The split depends on the names of the identities, `data` and `seed` alone. Raises ValueError, saying what to change,
    where a set would be empty or could not be scored.

    The recipe's filter acts after test people are held out, and not on them: a test set cleaned with the help of a
    network like those it is to judge would flatter them, and figures with and without the filter are of the same
    images. Images that the filter gives to a test person leave training.
    """
    preprocessing = Preprocessing(data.height, data.width, data.channels, data.crop)
    source = _source(data.train, data, preprocessing, seed)
    skipped = list(source.skipped)
    overlap: tuple[str, ...] = ()
    if data.test is None:
        known, held_out = split_identities(
            source.identities, data.test_share, seed=seed, group=data.group, order=data.test_split
        )
        test = source.select(held_out)
    else:
        test = _source(data.test, data, preprocessing, seed)
        skipped += test.skipped
        known, overlap = _apart(source.identities, test.identities, data)
    rest, filtered = source.select(known), None
    if data.filter is not None:
        rest, filtered = apply_filter(rest, read_filter(data.filter), held_out=test)
    kept, validating = split_identities(rest.identities, data.validation_share, seed=seed + 1, group=data.group)
    people = People(
        training=rest.select(kept),
        validation=rest.select(validating),
        test=test,
        listed=None if data.pairs is None else read_pairs(data.pairs, test, missing=data.missing_pairs),
        skipped=tuple(skipped),
        overlap=overlap,
        in_memory=_fits(source, data),
        filtered=filtered,
    )
    _check_usable(people)
    return people


def _source(name: str, data: Data, preprocessing: Preprocessing, seed: int) -> ImageSet:
    if name == SYNTHETIC:
        images: ImageSet = SyntheticFaces(data.synthetic_identities, data.synthetic_images, preprocessing, seed=seed)
    else:
        images = FolderImages(Path(name), preprocessing)
    return images.in_memory() if _fits(images, data) else images.verified()


def _fits(images: ImageSet, data: Data) -> bool:
    return images.nbytes <= data.memory_mib * 2**20


def _apart(training: Sequence[str], test: Sequence[str], data: Data) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of the training identities that are not among the test identities, and the names of the others."""
    scored = set(test)
    overlap = tuple(name for name in training if name in scored)
    if len(overlap) == len(training):
        raise ValueError(
            f"All {len(training):,} identities of data.train={data.train!r} are also in data.test={data.test!r}; "
            "people trained on cannot be scored as strangers. Give different folders, or leave data.test out and "
            "people are held out of data.train."
        )
    return np.array([label for label, name in enumerate(training) if name not in scored]), overlap


def _check_usable(people: People) -> None:
    for name in ("validation", "test"):
        images = people.by_name()[name]
        if len(images.identities) < 2 or images.num_genuine_pairs < 2:
            share = "" if name == "test" and len(images.identities) > 1 else f", or raise data.{name}_share"
            raise ValueError(
                f"The {name} people cannot be scored: {images.describe()}, {images.num_genuine_pairs} genuine pairs. "
                "Verification needs two identities and two genuine pairs, so people with several images: add images"
                f"{share}."
            )
    if len(people.training.identities) < 2:
        raise ValueError(f"Training needs at least two identities; found {people.training.describe()}.")
