"""Images by identity: sums of theirs, and the nearest of others once an identity's own images are out."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metricface.miners.dataset.calibration import Sample, rounded_up
from metricface.miners.dataset.engines import Indices
from metricface.miners.dataset.index import EmbeddingIndex
from metricface.miners.dataset.rows import Rows
from samplers.groups import IdentityTable

NEIGHBOURS_PER_BLOCK = 1 << 20  # of a block of queries: about 50 MiB with what sorting them takes


class Others(NamedTuple):
    """For a block of anchors, their nearest images of other identities, nearest first."""

    anchors: Indices  # (b,)
    indices: Indices  # (b, m), -1 where there are fewer
    cos: Rows  # (b, m), -inf there


def codes_of(table: IdentityTable) -> NDArray[np.integer[Any]]:
    """Row of the table for each image: (N,) int32, or int64 for very many identities."""
    few = table.num_identities <= np.iinfo(np.int32).max
    codes: NDArray[np.integer[Any]] = np.empty(table.num_images, dtype=np.int32 if few else np.int64)
    codes[table.images] = np.repeat(np.arange(table.num_identities, dtype=codes.dtype), table.counts)
    return codes


def add_by_code(sums: NDArray[np.floating[Any]], codes: NDArray[np.integer[Any]], values: Rows) -> None:
    """sums[codes[i]] += values[i] for all i, sorted first: np.add.at is many times slower."""
    order = np.argsort(codes, kind="stable")
    first = np.flatnonzero(np.diff(codes[order], prepend=-1))
    sums[codes[order[first]]] += np.add.reduceat(values[order], first, axis=0)


def nearest_others(
    index: EmbeddingIndex, table: IdentityTable, codes: NDArray[np.integer[Any]], anchors: Indices, m: int
) -> Iterator[Others]:
    """The m nearest images of other identities of each anchor, block by block, anchors with few images first.

    An anchor's own images are all near it and would fill its list: it asks for m plus as many as its identity has, so
    that m of others are left (in an exact search always, unless the set has fewer). An approximate index searches as
    hard as it takes to find the target share of those m: own images, which are found easily, do not count.
    """
    if len(anchors) == 0:
        return
    effort = index.calibrated(Sample(index.rows, index.seed, codes), m).effort
    asked = rounded_up(table.counts[codes[anchors]] + m)
    order = np.argsort(asked, kind="stable")
    start = 0
    while start < len(order):
        k = int(asked[order[start]])
        stop = min(start + max(1, NEIGHBOURS_PER_BLOCK // k), int(np.searchsorted(asked[order], k, side="right")))
        part = anchors[order[start:stop]]
        near = index.nearest(index.rows.at(part), k, effort)
        own = (codes[near.indices] == codes[part, None]) | (near.indices < 0)
        cos = np.where(own, np.float32(-np.inf), near.cos)
        indices = np.where(own, -1, near.indices)
        kept = np.argsort(own, axis=1, kind="stable")[:, :m]  # others first, in their order
        yield Others(part, np.take_along_axis(indices, kept, axis=1), np.take_along_axis(cos, kept, axis=1))
        start = stop
