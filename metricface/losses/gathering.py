"""The distances that an index tuple names, exact where rows coincide and without one row copy per triplet too many."""

import torch
from torch import Tensor

from metricface.distances import Distance, paired, pairwise, safe_sqrt
from metricface.tuples import Batch

# Row copies up to this many numbers (64 MB in float32) are made without looking for something smaller.
SMALL = 1 << 24


def distances_of(batch: Batch, anchors: Tensor, references: Tensor, distance: Distance) -> Tensor:
    """Distance of the named rows: `anchors` (T,) of the embeddings, `references` (T,) of the references. Returns (T,).

    Identical rows are at distance exactly 0, with gradient 0. T may be 0: the result still belongs to the graph.
    """
    num_anchors, dim = batch.embeddings.shape
    # Batch-all tuples name each pair many times: two (T, D) copies would then be larger than all (B, R) distances.
    if len(anchors) * dim > max(SMALL, num_anchors * len(batch.ref_emb)):
        return distance_matrix(batch.embeddings, batch.ref_emb, distance)[anchors, references]
    # index_select and not [...]: its backward pass is index_add, several times faster on a CPU than index_put.
    return paired(batch.embeddings.index_select(0, anchors), batch.ref_emb.index_select(0, references), distance)


def distance_matrix(x: Tensor, y: Tensor, distance: Distance) -> Tensor:
    """Distance of every row of x (Q, D) to every row of y (R, D), fit for a loss. Returns (Q, R).

    As `pairwise`, but accurate when a batch lies close together far from the origin, and exactly 0 with gradient 0 for
    identical rows; distances below about 0.2% (float32) of the rows' distance from their centre count as 0 too.
    """
    if distance == "cosine":
        return pairwise(x, y, distance)
    # Distances do not depend on the origin, but the rounding of |x|^2 + |y|^2 - 2xy does.
    centre = y.detach().mean(dim=0) if len(y) else 0.0
    x, y = x - centre, y - centre
    sq_dist = pairwise(x, y, "squared_euclidean")
    with torch.no_grad():
        sq_norms = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1)  # (Q, 1) + (R,)
        rounding = sq_norms.mul_(16 * torch.finfo(sq_dist.dtype).eps)
        coincide = sq_dist <= rounding
    sq_dist = sq_dist.masked_fill(coincide, 0.0)
    return sq_dist if distance == "squared_euclidean" else safe_sqrt(sq_dist)
