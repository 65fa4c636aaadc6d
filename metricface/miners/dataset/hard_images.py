"""Hard images of each image of a data set: its farthest positive, and negatives that are near but not too near."""

from collections.abc import Iterator
from typing import NamedTuple, Unpack

import numpy as np

from metricface.choices import is_count, is_number
from metricface.miners.dataset.calibration import TIE
from metricface.miners.dataset.engines import Indices
from metricface.miners.dataset.identities import Labels, check_asked, index_over, matched
from metricface.miners.dataset.index import EmbeddingIndex, IndexOptions
from metricface.miners.dataset.other_identities import codes_of, nearest_others
from metricface.miners.dataset.rows import BLOCK_NUMBERS, Embeddings, Rows, UnitRows
from samplers.groups import IdentityTable

RANKS = (1, 50)
TILE_ROWS = 1024


class HardestPositives(NamedTuple):
    """For each image the farthest image of its identity."""

    indices: Indices  # (N,) int64, -1 for the only image of an identity
    cos: Rows  # (N,) float32, NaN there


class TwinImages(NamedTuple):
    """Negatives that lie too close to their anchor: likely the same person under another label."""

    anchor: Indices  # (S,) ascending
    image: Indices  # (S,) of another identity; nearest first within an anchor
    cos: Rows  # (S,)


class HardNegatives(NamedTuple):
    """For each image the nearest images of other identities within the band asked for."""

    indices: Indices  # (N, k) int64, nearest first, -1 where the band holds fewer
    cos: Rows  # (N, k) float32, -inf there
    too_close: Indices  # (N,) how many were skipped as too close, among the ranks looked at
    twins: TwinImages  # the nearest of those, at most k an anchor


def hardest_positives(embeddings: Embeddings, labels: Labels) -> HardestPositives:
    """The farthest image of the same identity of each image: exact, identity by identity.

    embeddings: (N, D), array, memory map or CPU tensor. labels: (N,) whole numbers or strings.
    An image is never its own positive; an exact copy of it under another index may be. At equal cosine the lower index.
    Raises ValueError where lengths differ or a row has no direction. Needs no FAISS.
    """
    rows, table = matched(embeddings, labels)
    found = HardestPositives(np.full(len(rows), -1, dtype=np.int64), np.full(len(rows), np.nan, dtype=np.float32))
    for images, anchors, cos in _within_identities(rows, table):
        cos = np.where(np.isnan(cos), np.float32(np.inf), cos)
        place = cos.argmin(axis=2)
        found.indices[anchors] = np.take_along_axis(images, place, axis=1)
        found.cos[anchors] = np.take_along_axis(cos, place[:, :, None], axis=2)[:, :, 0]
    return found


def hard_negatives(
    embeddings: Embeddings,
    labels: Labels,
    k: int,
    *,
    ranks: tuple[int, int] = RANKS,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    max_cos: float | None = None,
    index: EmbeddingIndex | None = None,
    **options: Unpack[IndexOptions],
) -> HardNegatives:
    """The k nearest images of other identities of each image, within a band that leaves out what is too near.

    embeddings: (N, D), array, memory map or CPU tensor. labels: (N,) whole numbers or strings.
    ranks: (first, last), counted from 1 among all images of other identities, both included; too close ones count.
    With p the cosine of an anchor's closest positive, a negative's cosine must not exceed any of
        p - absolute_margin,
        p - relative_margin * |p|, which is (1 - relative_margin) p for p >= 0 (the rule of the source gives a limit
            above p where p < 0: a negative could lie nearer than the positive),
        max_cos, the only limit for an anchor without positive.
        The first two are taken with a tolerance of 2e-6, by which float32 cosines differ that are equal.
    What exceeds them is likely the same person under two labels: it is skipped, counted, and the nearest are returned.
    index: one over these embeddings, to save building it; else options: of the EmbeddingIndex. Its target recall is
        that of the images of other identities up to the last rank, over all anchors.
    Memory: the index and the result. Raises ValueError for wrong arguments, where lengths differ, for rows without a
    direction and for an index over other embeddings.
    Source: Moreira et al. 2024, NV-Retriever, arXiv:2407.15831, positive-aware mining (TopK-MarginPos, -PercPos).
    """
    _check_band(k, ranks, absolute_margin, relative_margin, max_cos)
    rows, table = matched(embeddings, labels)
    last = min(ranks[1], len(rows))
    index = index_over(rows, index, last, options)
    limit = _limits(_closest_positives(rows, table), absolute_margin, relative_margin, max_cos)
    found = HardNegatives(
        np.full((len(rows), k), -1, dtype=np.int64),
        np.full((len(rows), k), -np.inf, dtype=np.float32),
        np.zeros(len(rows), dtype=np.int64),
        TwinImages(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)),
    )
    twins: list[TwinImages] = []
    for near in nearest_others(index, table, codes_of(table), np.arange(len(rows)), last):
        close = near.cos > limit[near.anchors, None]  # (b, last), a run at the start of each row
        found.too_close[near.anchors] = close.sum(axis=1)
        anchor, place = np.nonzero(close[:, :k])
        twins.append(TwinImages(near.anchors[anchor], near.indices[anchor, place], near.cos[anchor, place]))
        start = np.maximum(close.sum(axis=1), ranks[0] - 1)[:, None]
        band = start + np.arange(k)  # (b, k) places in the list
        there = band < near.indices.shape[1]
        band = np.where(there, band, 0)
        found.indices[near.anchors] = np.where(there, np.take_along_axis(near.indices, band, axis=1), -1)
        found.cos[near.anchors] = np.where(there, np.take_along_axis(near.cos, band, axis=1), -np.inf)
    return found._replace(twins=_by_anchor(twins))


def _limits(
    positive: Rows, absolute_margin: float | None, relative_margin: float | None, max_cos: float | None
) -> Rows:
    """The largest cosine a negative may have, for each anchor, inf where nothing limits it. positive: NaN for none."""
    limit = np.full(len(positive), np.inf if max_cos is None else max_cos, dtype=np.float32)
    if absolute_margin is not None:
        limit = np.fmin(limit, positive - np.float32(absolute_margin) + np.float32(TIE))  # fmin passes over NaN
    if relative_margin is not None:
        limit = np.fmin(limit, positive - np.float32(relative_margin) * np.abs(positive) + np.float32(TIE))
    return limit


def _closest_positives(rows: UnitRows, table: IdentityTable) -> Rows:
    """(N,) cosine of the nearest image of the same identity, NaN where there is none."""
    closest = np.full(len(rows), np.nan, dtype=np.float32)
    for _, anchors, cos in _within_identities(rows, table):
        closest[anchors] = np.where(np.isnan(cos), np.float32(-np.inf), cos).max(axis=2)
    return closest


def _within_identities(rows: UnitRows, table: IdentityTable) -> Iterator[tuple[Indices, Indices, Rows]]:
    """All cosines within identities of at least two images, many identities of one size at a time.

    Yields images (g, n) of g identities, some of them as anchors (g, a), and their cosines (g, a, n), NaN for an image
    with itself. No tile has more numbers than a block of rows, or than one of 1,024 anchors with one identity.
    """
    for count in np.unique(table.counts[table.counts > 1]).tolist():
        members = np.flatnonzero(table.counts == count)
        at_once = max(1, BLOCK_NUMBERS // (count * max(count, rows.shape[1])))
        for first in range(0, len(members), at_once):
            starts = table.offsets[members[first : first + at_once]]
            images = table.images[starts[:, None] + np.arange(count)].astype(np.int64)  # (g, n)
            unit = rows.at(images.ravel()).reshape(*images.shape, -1)  # (g, n, D)
            for begin in range(0, count, TILE_ROWS):
                part = slice(begin, min(begin + TILE_ROWS, count))
                cos = np.matmul(unit[:, part], unit.transpose(0, 2, 1)).clip(-1.0, 1.0)
                own = np.arange(part.start, part.stop)
                cos[:, own - begin, own] = np.nan
                yield images, images[:, part], cos


def _by_anchor(parts: list[TwinImages]) -> TwinImages:
    anchor, image, cos = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(anchor, kind="stable")
    return TwinImages(anchor[order], image[order], cos[order])


def _check_band(
    k: int,
    ranks: tuple[int, int],
    absolute_margin: float | None,
    relative_margin: float | None,
    max_cos: float | None,
) -> None:
    check_asked(k, max_cos)
    pair = isinstance(ranks, tuple | list) and len(ranks) == 2 and all(is_count(rank) for rank in ranks)
    if not pair or not ranks[0] + k - 1 <= ranks[1]:
        raise ValueError(
            f"ranks are (first, last), counted from 1, both included, and must hold k={k} images; found {ranks!r}."
        )
    for name, margin in (("absolute_margin", absolute_margin), ("relative_margin", relative_margin)):
        if margin is not None and not (is_number(margin) and margin >= 0.0):
            raise ValueError(f"{name} must be a number, 0 or more, or None for none; found {margin!r}.")
