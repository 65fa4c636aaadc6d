"""Retrieval: each image in turn asks which of all the others are of its identity.

The figures are those of pytorch-metric-learning's AccuracyCalculator, and tests hold them to it. Its code is not used
here, for three reasons: it compares all identities with all images at once (identities x images bytes, several times),
it keeps the labels of every query's neighbours (images x largest identity), and it casts labels to float32, which
merges those above 2^24. With neighbours at hand the figures themselves are a few lines.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from metricface.evaluation.pairs import IntArray

FloatArray = NDArray[np.float64]

TILE_ELEMENTS = 1 << 24  # of a tile queries x images in float64: 128 MiB, and about three times that at work


@dataclass(frozen=True)
class RetrievalReport:
    """Figures averaged over queries, all in [0, 1].

    recall_at_1: share of queries whose nearest other image is of their identity.
    r_precision: mean over queries of (same identity among the R nearest) / R, R = other images of the query's identity.
    map_at_r: mean over queries of (1 / R) * sum over i <= R of (precision at i, where the i-th is of the identity).
    queries: images that were asked about. single_images: images that were not, as they are the only one of their
        identity and have nothing to find; they stay among those searched.
    identities: of the queries.
    """

    recall_at_1: float
    r_precision: float
    map_at_r: float
    queries: int
    single_images: int
    identities: int

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, of types that JSON knows."""
        return asdict(self)


def evaluate(embeddings: ArrayLike, labels: ArrayLike) -> RetrievalReport:
    """Recall@1, R-precision and MAP@R of every image against all others.

    embeddings: (N, D), finite; neighbours are by Euclidean distance, which for unit rows orders as cosine does.
    labels: (N,) whole numbers of any size.

    An image never finds itself. At equal distance the lower index comes first. Distances are computed in float64, tile
    by tile: memory does not grow with N squared.
    Raises ValueError for NaN or infinite embeddings, shapes that do not fit, or where every identity has one image.
    Sources: Musgrave et al. 2020, A Metric Learning Reality Check (R-precision, MAP@R).
    """
    table, dense = _checked(embeddings, labels)
    others = np.bincount(dense)[dense] - 1  # R of each image
    queries = np.flatnonzero(others > 0)
    if len(queries) == 0:
        raise ValueError(
            f"each of the {len(dense):,} images is the only one of its identity, so there is nothing to retrieve. "
            "Evaluate on identities with at least two images."
        )
    hit = np.empty(len(queries))
    precision = np.empty(len(queries))
    average = np.empty(len(queries))
    squares = (table * table).sum(dim=1)
    rows = max(1, TILE_ELEMENTS // len(table))
    for start in range(0, len(queries), rows):
        part = queries[start : start + rows]
        nearest = _nearest(table, squares, part, int(others[part].max()))
        relevant = dense[nearest] == dense[part, None]  # (rows, k)
        to = start + len(part)
        hit[start:to] = relevant[:, 0]
        precision[start:to], average[start:to] = _within_r(relevant, others[part])
    return RetrievalReport(
        recall_at_1=float(hit.mean()),
        r_precision=float(precision.mean()),
        map_at_r=float(average.mean()),
        queries=len(queries),
        single_images=len(dense) - len(queries),
        identities=len(np.unique(dense[queries])),
    )


def _within_r(relevant: NDArray[np.bool_], r: IntArray) -> tuple[FloatArray, FloatArray]:
    """R-precision and average precision at R of each query. relevant: (Q, k) nearest first, k >= r.max(); r: (Q,)."""
    rank = np.arange(1, relevant.shape[1] + 1)
    counted = relevant & (rank <= r[:, None])
    found = np.cumsum(counted, axis=1)
    return found[:, -1] / r, (counted * found / rank).sum(axis=1) / r


def _nearest(table: Tensor, squares: Tensor, queries: IntArray, k: int) -> IntArray:
    """(Q, k) indices of the k nearest others of each query, nearest first, the lower index first where equal.

    table: (N, D) float64. squares: (N,) squared norms. 1 <= k <= N - 1.
    """
    index = torch.from_numpy(queries)
    # The squared distance less the query's own square, which changes no order.
    dist = torch.addmm(squares, table[index], table.T, beta=1.0, alpha=-2.0)  # (Q, N)
    dist[torch.arange(len(index)), index] = torch.inf
    values, found = dist.topk(k, dim=1, largest=False)
    # topk promises no order among equals: sort by index first, then stably by distance.
    found, by_index = found.sort(dim=1)
    _, by_value = values.gather(1, by_index).sort(dim=1, stable=True)
    nearest = found.gather(1, by_value)
    # Where the k-th distance also occurs outside the k, topk chose among equals as it liked: sort those rows whole.
    last = values.amax(dim=1, keepdim=True)
    cut_tie = ((dist == last).sum(dim=1) > (values == last).sum(dim=1)).nonzero()[:, 0]
    if len(cut_tie):
        nearest[cut_tie] = dist[cut_tie].sort(dim=1, stable=True).indices[:, :k]
    return nearest.numpy()


def _checked(embeddings: ArrayLike, labels: ArrayLike) -> tuple[Tensor, IntArray]:
    """Embeddings as float64 (N, D); labels renumbered from 0 without gaps."""
    table, names = np.asarray(embeddings, dtype=np.float64), np.asarray(labels)
    if table.ndim != 2 or names.shape != table.shape[:1] or len(table) < 2:
        raise ValueError(
            f"retrieval needs embeddings (N, D) and labels (N,), N at least 2; got {table.shape} and {names.shape}."
        )
    if names.dtype.kind not in "iu":
        raise ValueError(f"labels must be whole numbers; got {names.dtype}.")
    wrong = int((~np.isfinite(table)).any(axis=1).sum())
    if wrong:
        raise ValueError(f"{wrong:,} of {len(table):,} embeddings hold NaN or infinity: training may have diverged.")
    dense = np.unique(names, return_inverse=True)[1].astype(np.int64)
    return torch.from_numpy(table), dense
