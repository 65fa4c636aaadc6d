"""Which identities a network confuses: for each identity its nearest others, from centroids or from images."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metricface.choices import is_count, is_number
from metricface.miners.dataset.closest_pairs import ClosestPairs, TwinIdentities
from metricface.miners.dataset.engines import Indices
from metricface.miners.dataset.index import EmbeddingIndex, IndexOptions
from metricface.miners.dataset.other_identities import add_by_code, codes_of, nearest_others
from metricface.miners.dataset.rows import Embeddings, Rows, UnitRows
from samplers.groups import IdentityTable, group_by_identity

Labels = Sequence[int] | Sequence[str] | NDArray[Any] | Tensor

MOST_TWINS = 64  # of one identity; with a network that maps all to one point every pair would be one
VANISHED = 1e-4  # length of a mean of unit rows below which its direction is rounding
NEIGHBOURS_PER_BLOCK = 1 << 20
SECOND_LOOK = 8
COMPARED = 64  # rows of an index that is given, with the embeddings it shall be over


class IdentityNeighbours(NamedTuple):
    """For each identity the nearest other identities, as rows of the table of identities."""

    rows: Indices  # (C, k) int64, nearest first, at equal cosine the lower row; -1 where fewer were found
    cos: Rows  # (C, k) float32, -inf there
    twins: TwinIdentities  # left out
    without: Indices  # (W,) identities that found no neighbour, ascending


def centroids(embeddings: Embeddings, labels: Labels) -> Rows:
    """The direction of each identity: the mean of its unit embeddings, scaled to length 1.

    embeddings: (N, D), array, memory map or CPU tensor, read once in blocks. labels: (N,) whole numbers or strings.
    Returns float32 (C, D), in the order of samplers.group_by_identity(labels).identities. An identity whose images
    cancel out (mean shorter than 1e-4) has no direction: it gets that of its first image, and a warning says how many
    there are. Raises ValueError where lengths differ or a row has no direction.
    """
    rows, table = matched(embeddings, labels)
    codes = codes_of(table)
    sums = np.zeros((table.num_identities, rows.shape[1]), dtype=np.float32)
    for start, block in rows.blocks():
        add_by_code(sums, codes[start : start + len(block)], block)
    lengths = np.sqrt(np.einsum("cd,cd->c", sums, sums, dtype=np.float64))
    vanished = np.flatnonzero(lengths < VANISHED * table.counts)
    if len(vanished):
        warnings.warn(
            f"the images of {len(vanished):,} of {table.num_identities:,} identities cancel out (first: "
            f"{table.identities[vanished[0]]!r}); the first image of each stands for it.",
            stacklevel=2,
        )
        sums[vanished] = rows.at(table.images[table.offsets[vanished]])
        lengths[vanished] = 1.0
    sums /= lengths[:, None].astype(np.float32)
    return sums


def neighbours_from_centroids(
    centroids: Embeddings,
    k: int,
    *,
    max_cos: float | None = None,
    vectors_per_class: int = 1,
    **options: Unpack[IndexOptions],
) -> IdentityNeighbours:
    """The k nearest other identities of each, by the cosine of their centroids or class weights.

    centroids: (C * V, D), of any length but 0: what `centroids` returns, or the class weights of a head.
    vectors_per_class: V; row i belongs to class i // V (sub-centres), and the best pair of vectors counts.
    max_cos: identities closer than this are left out and returned as twins; past 64 twins of one identity no further
        ones are looked for, and it may miss neighbours.
    options: of the EmbeddingIndex.
    Returns IdentityNeighbours with rows and cos (C, k). Memory: the index, the result, and a block of searches.
    Raises ValueError for wrong arguments, a number of rows that V does not divide, and rows without a direction.
    """
    check_asked(k, max_cos)
    if not is_count(vectors_per_class):
        raise ValueError(f"vectors_per_class must be a whole number, at least 1; found {vectors_per_class!r}.")
    vectors = UnitRows(centroids, "centroids")
    if len(vectors) % vectors_per_class:
        raise ValueError(
            f"{len(vectors):,} rows are not a multiple of vectors_per_class={vectors_per_class}: each class needs as "
            "many."
        )
    classes = len(vectors) // vectors_per_class
    # k + 1 nearest classes, itself among them, lie within so many vectors, whichever they are.
    wide = min((k + 1) * vectors_per_class, len(vectors))
    index = EmbeddingIndex(vectors, k=wide, **options)
    result = _empty(classes, k)
    twins = ClosestPairs(classes)
    _from_vectors(index, np.arange(classes), vectors_per_class, wide, max_cos, result, twins)
    if max_cos is not None and len(twins):
        # One vector's list may be full of twins while another's makes up the number, with farther classes.
        short = np.flatnonzero(twins.touched() & ((result.rows[:, -1] < 0) | (vectors_per_class > 1)))
        wide = min((k + 1 + MOST_TWINS) * vectors_per_class, len(vectors))
        _from_vectors(index, short, vectors_per_class, wide, max_cos, result, twins)
    return _with_twins(result, twins)


def neighbours_from_images(
    embeddings: Embeddings,
    labels: Labels,
    k: int,
    *,
    images: int | None = None,
    max_cos: float | None = None,
    index: EmbeddingIndex | None = None,
    **options: Unpack[IndexOptions],
) -> IdentityNeighbours:
    """The k nearest other identities of each, by the closest pairs of images.

    embeddings: (N, D), array, memory map or CPU tensor. labels: (N,) whole numbers or strings.
    images: for each image, so many nearest images of other identities are looked up; by default 2 k (with made-up
        faces, 10 images each and k = 20, that found all true neighbours; k found 95%, k / 2 78%). Own images would fill
        that list (they are the nearest), so each image asks for `images` plus as many as its identity has. Two
        identities are as close as the closest pair of their images that was found, by either. Identities that have
        found fewer than k others look once more, for 8 times as many; what is missing then is -1, and `without` lists
        who has none.
    max_cos: identities closer than this are left out and returned as twins.
    index: one over these embeddings, to save building it; else options: of the EmbeddingIndex.
    Returns IdentityNeighbours with rows and cos (C, k). Memory: the index, and 24 bytes for each pair of identities
    found: at most N * images of them, or 9 times as many where all look once more. Raises ValueError for wrong
    arguments, where lengths differ, and for an index over other embeddings.
    """
    check_asked(k, max_cos)
    images = 2 * k if images is None else images
    if not is_count(images):
        raise ValueError(f"images must be a whole number, at least 1; found {images!r}.")
    rows, table = matched(embeddings, labels)
    index = index_over(rows, index, images + 1, options)
    codes = codes_of(table)
    pairs = ClosestPairs(table.num_identities)
    anchors = np.arange(len(rows))
    for wanted in (images, SECOND_LOOK * images):
        for found in nearest_others(index, table, codes, anchors, wanted):
            there = found.indices >= 0
            first = np.broadcast_to(codes[found.anchors, None], there.shape)[there]
            pairs.add(first, codes[found.indices[there]], found.cos[there])
        result, twins = _from_pairs(pairs, k, max_cos)
        short = result.rows[:, min(k, table.num_identities - 1) - 1] < 0 if table.num_identities > 1 else np.zeros(1)
        anchors = np.flatnonzero(short[codes])
        if len(anchors) == 0:
            break
    return _with_twins(result, twins)


def matched(embeddings: Embeddings, labels: Labels) -> tuple[UnitRows, IdentityTable]:
    """Embeddings and labels of the same images. Raises ValueError where lengths differ."""
    rows, table = UnitRows(embeddings), group_by_identity(labels)
    if len(rows) != table.num_images:
        raise ValueError(
            f"{len(rows):,} embeddings need as many labels; found {table.num_images:,}. Give one label "
            "for each row, in the same order."
        )
    return rows, table


def index_over(rows: UnitRows, index: EmbeddingIndex | None, k: int, options: IndexOptions) -> EmbeddingIndex:
    """The index given, if it can be one over these rows, or a new one."""
    if index is None:
        return EmbeddingIndex(rows, k=k, **options)
    if index.rows.shape != rows.shape:
        raise ValueError(f"index holds {index.rows.shape} embeddings, but these are {rows.shape}: build it over these.")
    if options:
        raise ValueError(f"{', '.join(options)}: options of an index that is built here, but one was given.")
    some = np.linspace(0, len(rows) - 1, min(len(rows), COMPARED)).astype(np.int64)
    if not np.array_equal(index.rows.at(some), rows.at(some)):
        raise ValueError("index holds other embeddings than these, of the same shape: build it over these.")
    return index


def check_asked(k: int, max_cos: float | None) -> None:
    """Raise ValueError unless k is a count and max_cos a cosine or None."""
    if not is_count(k):
        raise ValueError(f"k must be a whole number, at least 1; found {k!r}.")
    if max_cos is not None and not (is_number(max_cos) and -1.0 <= max_cos <= 1.0):
        raise ValueError(f"max_cos is a cosine, -1 to 1, or None for no limit; found {max_cos!r}.")


def _from_vectors(
    index: EmbeddingIndex,
    classes: Indices,
    vectors_per_class: int,
    wide: int,
    max_cos: float | None,
    result: IdentityNeighbours,
    twins: ClosestPairs,
) -> None:
    """Look up these classes among `wide` nearest vectors, and write what is found to their rows of the result."""
    k = result.rows.shape[1]
    step = max(1, NEIGHBOURS_PER_BLOCK // (wide * vectors_per_class))
    for start in range(0, len(classes), step):
        part = classes[start : start + step]
        vectors = (part[:, None] * vectors_per_class + np.arange(vectors_per_class)).ravel()
        found = index.nearest(index.rows.at(vectors), wide)
        near = np.where(found.indices < 0, part.repeat(vectors_per_class)[:, None], found.indices // vectors_per_class)
        near, cos = _distinct(near.reshape(len(part), -1), found.cos.reshape(len(part), -1), part)
        if max_cos is not None:
            row, place = np.nonzero(cos > max_cos)
            twins.add(part[row], near[row, place], cos[row, place])
            cos = np.where(cos > max_cos, np.float32(-np.inf), cos)
        order = np.argsort(-cos, axis=1, kind="stable")[:, :k]
        cos = np.take_along_axis(cos, order, axis=1)
        near = np.where(np.isneginf(cos), -1, np.take_along_axis(near, order, axis=1))
        result.rows[part, : near.shape[1]], result.cos[part, : cos.shape[1]] = near, cos


def _distinct(near: Indices, cos: Rows, own: Indices) -> tuple[Indices, Rows]:
    """Each class once a row, ascending, at its largest cosine; its repetitions and the own class at -inf. (b, L)."""
    order = np.lexsort((-cos, near), axis=1)
    near, cos = np.take_along_axis(near, order, axis=1), np.take_along_axis(cos, order, axis=1)
    again = np.zeros(near.shape, dtype=bool)
    again[:, 1:] = near[:, 1:] == near[:, :-1]
    return near, np.where(again | (near == own[:, None]), np.float32(-np.inf), cos)


def _from_pairs(pairs: ClosestPairs, k: int, max_cos: float | None) -> tuple[IdentityNeighbours, ClosestPairs]:
    """The k nearest of each identity among the pairs found, and the pairs that are too close."""
    found, twins = pairs.all(), ClosestPairs(pairs.identities)
    close = np.zeros(len(found.cos), dtype=bool) if max_cos is None else found.cos > max_cos
    twins.add(found.first[close], found.second[close], found.cos[close])
    first, second, cos = found.first[~close], found.second[~close], found.cos[~close]
    one, other, both = np.concatenate((first, second)), np.concatenate((second, first)), np.tile(cos, 2)
    order = np.lexsort((other, -both, one))
    one, other, both = one[order], other[order], both[order]
    place = np.arange(len(one)) - np.searchsorted(one, one)  # among those of the same identity
    kept = place < k
    result = _empty(pairs.identities, k)
    result.rows[one[kept], place[kept]] = other[kept]
    result.cos[one[kept], place[kept]] = both[kept]
    return result, twins


def _empty(identities: int, k: int) -> IdentityNeighbours:
    none = np.empty(0, dtype=np.int64)
    rows, cos = np.full((identities, k), -1, dtype=np.int64), np.full((identities, k), -np.inf, dtype=np.float32)
    return IdentityNeighbours(rows, cos, TwinIdentities(none, none, np.empty(0, dtype=np.float32)), none)


def _with_twins(result: IdentityNeighbours, twins: ClosestPairs) -> IdentityNeighbours:
    return result._replace(twins=twins.all(), without=np.flatnonzero(result.rows[:, 0] < 0))
