"""The distances that an index tuple names, exact where rows coincide and without one row copy per triplet too many."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metricface.distances import Distance, centred, paired, pairwise, safe_sqrt, sq_distances
from metricface.losses.streaming import CLOSE
from metricface.tuples import Batch

# Row copies up to this many numbers (64 MB in float32) are made without looking for something smaller.
SMALL = 1 << 24
# Distances of a few anchors that are held at a time where row copies are larger.
TILE_NUMBERS = 1 << 21
# Numbers in a row copy of pairs that are too close together for a matrix product.
CLOSE_NUMBERS = 1 << 21


def distances_of(batch: Batch, anchors: Tensor, references: Tensor, distance: Distance) -> Tensor:
    """Distance of the named rows: `anchors` (T,) of the embeddings, `references` (T,) of the references. Returns (T,).

    Identical rows are at distance exactly 0, with gradient 0. T may be 0: the result still belongs to the graph.
    """
    num_anchors, dim = batch.embeddings.shape
    # A tuple of every triplet names each pair many times: two (T, D) copies would then be larger than all distances.
    if len(anchors) * dim > max(SMALL, num_anchors * len(batch.ref_emb)):
        return _from_tiles(batch, anchors, references, distance)
    # index_select and not [...]: its backward pass is index_add, several times faster on a CPU than index_put.
    return paired(batch.embeddings.index_select(0, anchors), batch.ref_emb.index_select(0, references), distance)


def _from_tiles(batch: Batch, anchors: Tensor, references: Tensor, distance: Distance) -> Tensor:
    """(T,) distances, picked from all those of a few anchors at a time, which are made once more for the gradient."""

    def part(x: Tensor, y: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return distance_matrix(x, y, distance)[row, column]

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
