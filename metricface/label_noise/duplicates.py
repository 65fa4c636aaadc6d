"""Pairs of images that are likely one picture: within a set, or across a training and a test set."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metricface.data.images import ImageSet
from metricface.label_noise.chances import FEWEST, FalseAlarms, fit_false_alarms
from metricface.label_noise.people import Floats, Index, People
from metricface.label_noise.pixels import pixel_likeness
from metricface.label_noise.same_person import DEFAULT_FALSE_SHARE

NEIGHBOURS = 3  # of each image that are looked at: the copies of a picture are one another's neighbours
LEAST_APART = 1e-6  # chords and 1 - correlations below this are rounding


class Duplicates(NamedTuple):
    """Pairs of images, the likeliest copies first; the first `found` of them are findings."""

    first: Index  # (P,) images of the set; across sets, of the first one
    second: Index  # (P,) likewise; within a set first < second; across sets, of the second one
    cos: Floats  # (P,) of their embeddings
    correlation: Floats  # (P,) of their pixels (`pixel_likeness`); NaN where only embeddings were compared
    false_share: Floats  # (P,) expected share of different pictures among the pairs up to this one
    found: int
    threshold: float  # of the findings: least correlation, or least cosine; infinite where there is none
    by_pixels: bool
    tail: FalseAlarms | None  # how different pictures score; None where there are too few to say


def find_duplicates(
    people: People,
    pixels: ImageSet | None = None,
    other: People | None = None,
    other_pixels: ImageSet | None = None,
    *,
    false_share: float = DEFAULT_FALSE_SHARE,
    least: float | None = None,
) -> Duplicates:
    """Compare each image with its nearest ones; where pixels are given, these decide.

    pixels: the images of the set, in order. Then the closest pairs by embedding, as many as there are images, are
    compared by `pixel_likeness`. Without pixels a pair is judged by its embeddings, which also finds different pictures
    of one moment. other, other_pixels: a second set, each of whose images is compared with those of the first.
    false_share: findings are the pairs up to which at most this share is expected to be different pictures. What to
    expect is taken from the closest pairs within `people`: distances of nearest neighbours have a power law as lower
    tail. least: draws the line at this correlation (or cosine, without pixels) instead.
    Returns Duplicates. Raises ValueError for a share outside (0, 1), sets of images that do not fit the embeddings, or
    pixels of one set only; UnreadableImageError where an image cannot be read.
    """
    if not 0.0 < false_share < 1.0:
        raise ValueError(f"false_share is a share of the findings, above 0 and below 1; found {false_share}.")
    _check_pixels(people, pixels, "the set")
    if other is not None:
        _check_pixels(other, other_pixels, "the other set")
        if (pixels is None) != (other_pixels is None):
            raise ValueError("pixels of one set only: give those of both, or of neither.")
    within = _compare(people, people, pixels, pixels)
    sample = _closest_of_each(within) if pixels is None else within.score
    tail = fit_false_alarms(sample, share=false_share) if len(sample) >= FEWEST else None
    pairs = within if other is None else _compare(people, other, pixels, other_pixels)
    # By pixels each compared pair is a trial; by embeddings each image's nearest one, and those near are so both ways.
    by_embeddings = len(people.rows) // 2 if other is None else len(other.rows)
    trials = len(pairs.score) if pixels is not None else by_embeddings
    shares = np.ones(len(pairs.score)) if tail is None else tail.shares(pairs.score, trials)
    value = pairs.cos if pixels is None else pairs.correlation
    order = np.lexsort((pairs.second, pairs.first, -pairs.cos, -value))
    beyond = shares[order] <= false_share if least is None else value[order] >= least
    found = int(beyond.sum())
    return Duplicates(
        first=pairs.first[order],
        second=pairs.second[order],
        cos=pairs.cos[order],
        correlation=pairs.correlation[order],
        false_share=shares[order],
        found=found,
        threshold=float(value[order[found - 1]]) if found else float("inf"),
        by_pixels=pixels is not None,
        tail=tail,
    )


class _Compared(NamedTuple):
    first: Index
    second: Index
    cos: Floats
    correlation: Floats
    score: Floats  # minus the logarithm of how far apart they are


def _compare(people: People, other: People, pixels: ImageSet | None, other_pixels: ImageSet | None) -> _Compared:
    """The closest pairs of an image of each, with their score; within a set each pair once."""
    first, second, cos = _neighbours(people, other)
    if pixels is None or other_pixels is None:
        chord = np.sqrt(np.maximum(2.0 - 2.0 * cos, LEAST_APART**2))
        return _Compared(first, second, cos, np.full(len(cos), np.nan), -np.log(chord))
    closest = np.sort(np.argsort(-cos, kind="stable")[: len(other.rows)])
    first, second, cos = first[closest], second[closest], cos[closest]
    correlation = pixel_likeness(pixels, first, other_pixels, second)
    return _Compared(first, second, cos, correlation, -np.log(np.maximum(1.0 - correlation, LEAST_APART)))


def _neighbours(people: People, other: People) -> tuple[Index, Index, Floats]:
    """Pairs of an image of `people` and one of `other`, by the nearest of each of the latter."""
    same = other is people
    k = min(NEIGHBOURS + same, len(people.rows))
    near = people.image_index.search(other.rows, k)
    query = np.repeat(np.arange(len(other.rows)), k)
    first, cos = near.indices.ravel(), near.cos.ravel().astype(np.float64)
    there = first >= 0
    if same:
        there &= first != query
        first, query = np.minimum(first, query), np.maximum(first, query)
    first, query, cos = first[there], query[there], cos[there]
    _, once = np.unique(first * len(other.rows) + query, return_index=True)
    return first[once], query[once], cos[once]


def _closest_of_each(pairs: _Compared) -> Floats:
    """The score of each image's nearest neighbour."""
    images, scores = np.concatenate([pairs.first, pairs.second]), np.tile(pairs.score, 2)
    order = np.lexsort((-scores, images))
    found: NDArray[np.float64] = scores[order[np.flatnonzero(np.diff(images[order], prepend=-1))]]
    return found


def _check_pixels(people: People, pixels: ImageSet | None, name: str) -> None:
    if pixels is not None and len(pixels) != len(people.rows):
        raise ValueError(
            f"{len(pixels):,} images of {name} for {len(people.rows):,} embeddings; give the set they were made from."
        )
