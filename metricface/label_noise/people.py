"""A labelled set of embeddings, prepared once for everything that is looked for in it."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray

from metricface.label_noise.likeness import Likeness, fit_likeness, means_of
from metricface.miners.dataset.identities import Labels, matched
from metricface.miners.dataset.index import EmbeddingIndex, IndexOptions
from metricface.miners.dataset.other_identities import codes_of
from metricface.miners.dataset.rows import Embeddings, Rows

Index = NDArray[np.int64]
Floats = NDArray[np.float64]

ROWS_PER_BLOCK = 1 << 12
# Identities looked at closely for each query. The index searches by cosine, the evidence weighs numbers of images:
# on LFW the identity of the greatest evidence is among the first 20 for 98 of 100 images.
CANDIDATES = 20


class Nearest(NamedTuple):
    """The identities with the greatest evidence, greatest first, of each query."""

    rows: Index  # (Q, k), -1 where there are fewer
    evidence: Floats  # (Q, k) nats, -inf there


class People:
    """Embeddings and labels, with the model of likeness fitted to them and the means of the identities.

    embeddings: (N, D), array, memory map or CPU tensor of any floating type, of any length but 0; kept, not copied.
    labels: (N,) whole numbers or strings. model: of another set, whose coordinates are then used; for a test set that
        is compared with a training set. options: of the EmbeddingIndex.
    Raises ValueError for lengths that differ, rows without a direction, a set from which no model can be fitted, and
    embeddings of another width than the model's.
    Memory: the means, C x d, an index of them, blocks of rows, and once images are looked up an index of all of them.
    """

    def __init__(
        self, embeddings: Embeddings, labels: Labels, *, model: Likeness | None = None, **options: Unpack[IndexOptions]
    ) -> None:
        self.rows, self.table = matched(embeddings, labels)
        if model is not None and self.rows.shape[1] != len(model.mean):
            raise ValueError(
                f"these embeddings have {self.rows.shape[1]} columns, those of the model {len(model.mean)}: embed both "
                "sets with one network."
            )
        self.codes = codes_of(self.table)
        self.model = fit_likeness(self.rows, self.codes, self.table.counts) if model is None else model
        self.means: Rows = means_of(self.model, self.rows, self.codes, self.table.counts)
        self.options = options

    @property
    def images(self) -> Index:
        """How many images each identity has, (C,)."""
        return self.table.counts

    @cached_property
    def image_index(self) -> EmbeddingIndex:
        """An index of all images, by cosine."""
        return EmbeddingIndex(self.rows, **self.options)

    @cached_property
    def mean_index(self) -> EmbeddingIndex:
        """An index of the identities' means, scaled for search."""
        return EmbeddingIndex(self.model.for_search(self.means), **self.options)

    def nearest(self, coordinates: Rows, images: Index, k: int, *, leave_out: Index | None = None) -> Nearest:
        """The k identities that show the person of each query with the greatest evidence.

        coordinates: (Q, d) means of `images` (Q,) images each, a block of queries. leave_out: (Q,) a row of this set
        that is not looked at, such as the query's own. Candidates are the nearest 20 + k by the index.
        """
        wide = min(CANDIDATES + k, len(self.means))
        found = self.mean_index.search(self.model.for_search(coordinates), wide).indices  # (Q, m)
        out = found < 0
        if leave_out is not None:
            out |= found == leave_out[:, None]
        each = np.repeat(np.arange(len(found)), wide)  # (Q m,)
        flat = np.maximum(found, 0).ravel()
        evidence = self.model.evidence(coordinates[each], images[each], self.means[flat], self.images[flat])
        evidence = np.where(out, -np.inf, evidence.reshape(found.shape))
        order = np.argsort(-evidence, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(evidence, order, axis=1)
        rows = np.where(np.isfinite(best), np.take_along_axis(found, order, axis=1), -1)
        if rows.shape[1] < k:
            missing = ((0, 0), (0, k - rows.shape[1]))
            rows, best = np.pad(rows, missing, constant_values=-1), np.pad(best, missing, constant_values=-np.inf)
        return Nearest(rows, best)

    def blocks(self) -> Iterator[tuple[Index, Rows]]:
        """Indices and coordinates of all images, block by block."""
        for start in range(0, len(self.rows), ROWS_PER_BLOCK):
            index = np.arange(start, min(start + ROWS_PER_BLOCK, len(self.rows)))
            yield index, self.coordinates(index)

    def by_identity(self, identities: Index) -> Iterator[tuple[int, Index, Rows]]:
        """Row, image indices and coordinates (n, d) of each of the identities, which are read many at a time."""
        for group in _groups(self.images[identities]):
            members = [self.table.images_of(row).astype(np.int64) for row in identities[group]]
            coordinates = self.coordinates(np.concatenate(members))
            start = 0
            for row, index in zip(identities[group], members, strict=True):
                yield int(row), index, coordinates[start : start + len(index)]
                start += len(index)

    def coordinates(self, images: NDArray[np.integer[Any]]) -> Rows:
        """Coordinates of the images (n,): (n, d)."""
        return self.model.coordinates(self.rows.at(images))


def _groups(sizes: Index) -> Iterator[slice]:
    """Consecutive identities that together have at most a block of images, or a single one that has more."""
    start, held = 0, 0
    for at, size in enumerate(sizes):
        if at > start and held + size > ROWS_PER_BLOCK:
            yield slice(start, at)
            start, held = at, 0
        held += int(size)
    if len(sizes):
        yield slice(start, len(sizes))
