"""The distances and dot products that an index tuple names, without one row copy per triplet too many.

Distances are exact where rows coincide.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metricface.distances import Distance, centred, paired, pairwise, safe_sqrt, sq_distances, without_autocast
from metricface.losses.streaming import CLOSE
from metricface.miners.tiles import for_cosine
from metricface.tuples import Batch

# Row copies up to this many numbers (64 MB in float32) are made without looking for something smaller.
SMALL = 1 << 24
# Distances of a few anchors that are held at a time where row copies are larger.
TILE_NUMBERS = 1 << 21
# Numbers in a row copy of pairs that are too close together for a matrix product.
CLOSE_NUMBERS = 1 << 21


def of_cosine(batch: Batch) -> Batch:
    """The batch whose squared Euclidean distances are this one's cosine distances, 1 - cosine, differentiable.

    Unit rows divided by the root of 2, with two columns more, in which a zero row is told from others: (B, D + 2),
    (R, D + 2). Whatever runs on squared distances runs on cosines then, exact where rows coincide.
    """
    x, y = for_cosine(batch.embeddings, batch.ref_emb)
    return batch._replace(embeddings=x * 0.5**0.5, ref_emb=y * 0.5**0.5)


def on_anchors_side(rows: Tensor) -> Tensor:
    """References of a batch made by `of_cosine` (R, D + 2) as if they were anchors: a zero row is told the other way.

    Two zero rows have cosine 0; on the same side they would coincide.
    """
    return torch.cat([rows[:, :-2], rows[:, -2:].flip(1)], dim=1)


def of_references(batch: Batch) -> Batch:
    """The references among themselves: each is an anchor, and its own reference row."""
    itself = torch.arange(len(batch.ref_labels), device=batch.ref_labels.device)
    return Batch(batch.ref_emb, batch.ref_labels, batch.ref_emb, batch.ref_labels, itself)


def distances_of(batch: Batch, anchors: Tensor, references: Tensor, distance: Distance) -> Tensor:
    """Distance of the named rows: `anchors` (T,) of the embeddings, `references` (T,) of the references. Returns (T,).

    Identical rows are at distance exactly 0, with gradient 0. T may be 0: the result still belongs to the graph.
    """
    return _named(
        batch, anchors, references, lambda x, y: paired(x, y, distance), lambda x, y: distance_matrix(x, y, distance)
    )


def products_of(batch: Batch, anchors: Tensor, references: Tensor) -> Tensor:
    """Dot product of the named rows, as `distances_of` names them. Returns (T,)."""
    return _named(batch, anchors, references, lambda x, y: (x * y).sum(dim=1), _products)


def _products(x: Tensor, y: Tensor) -> Tensor:
    with without_autocast(x):
        return x @ y.T


def _named(
    batch: Batch,
    anchors: Tensor,
    references: Tensor,
    of_rows: Callable[[Tensor, Tensor], Tensor],
    of_all: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """of_rows: (T, D), (T, D) -> (T,), row by row; of_all: (Q, D), (R, D) -> (Q, R), the same for all rows."""
    num_anchors, dim = batch.embeddings.shape
    # A tuple of every triplet names each pair many times: two (T, D) copies would then be larger than all distances.
    if len(anchors) * dim > max(SMALL, num_anchors * len(batch.ref_emb)):
        return _from_tiles(batch, anchors, references, of_all)
    # index_select and not [...]: its backward pass is index_add, several times faster on a CPU than index_put.
    return of_rows(batch.embeddings.index_select(0, anchors), batch.ref_emb.index_select(0, references))


def _from_tiles(
    batch: Batch, anchors: Tensor, references: Tensor, of_all: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """(T,) numbers, picked from all those of a few anchors at a time, which are made once more for the gradient."""

    def part(x: Tensor, y: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return of_all(x, y)[row, column]

    order = anchors.argsort(stable=True)
    ordered, columns = anchors[order], references[order]
    size = max(1, TILE_NUMBERS // len(batch.ref_emb))
    starts = range(0, len(batch.embeddings), size)
    ends = torch.searchsorted(ordered, torch.tensor([*starts[1:], len(batch.embeddings)], device=ordered.device))
    parts, begin = [], 0
    for start, end in zip(starts, ends.tolist(), strict=True):
        row, column, x = ordered[begin:end] - start, columns[begin:end], batch.embeddings[start : start + size]
        parts.append(checkpoint(part, x, batch.ref_emb, row, column, use_reentrant=False, preserve_rng_state=False))
        begin = end
    return torch.cat(parts)[order.argsort()]


def distance_matrix(x: Tensor, y: Tensor, distance: Distance) -> Tensor:
    """Distance of every row of x (Q, D) to every row of y (R, D), fit for a loss. Returns (Q, R).

    As `pairwise`, but rows so close together that the matrix product rounds their distance by more than about 1% are
    subtracted instead: exactly 0, with gradient 0, for identical rows only.
    """
    if distance == "cosine":
        return pairwise(x, y, distance)
    moved_x, moved_y = centred(x, y)
    sq_dist = sq_distances(moved_x, moved_y)
    with torch.no_grad():
        sq_norms = moved_x.square().sum(dim=1, keepdim=True) + moved_y.square().sum(dim=1)  # (Q, 1) + (R,)
        # Where both rows are the centre itself, as in a batch of equal rows, the product is exact: 0.
        close = (sq_dist <= sq_norms.mul_(CLOSE * torch.finfo(sq_dist.dtype).eps)) & (sq_norms > 0)
        rows, columns = close.nonzero(as_tuple=True)
    sq_dist = sq_dist.index_put((rows, columns), _subtracted(x, y, rows, columns))
    return sq_dist if distance == "squared_euclidean" else safe_sqrt(sq_dist)


def _subtracted(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(T,) squared distances of the named rows, in slices: in a collapsed batch they are most of all pairs."""

    def part(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return paired(x.index_select(0, rows), y.index_select(0, columns), "squared_euclidean")

    size = max(1, CLOSE_NUMBERS // max(1, x.shape[1]))
    if len(rows) <= size:
        return part(x, y, rows, columns)
    # Checkpoints: the row copies of one slice at a time, also for the gradient.
    slices = [slice(start, start + size) for start in range(0, len(rows), size)]
    return torch.cat(
        [checkpoint(part, x, y, rows[s], columns[s], use_reentrant=False, preserve_rng_state=False) for s in slices]
    )
