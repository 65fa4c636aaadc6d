"""Distances between embeddings: all pairs (Q, R) or given pairs (T,).

Everything is computed in float32 or better, whatever autocast says, because a triplet loss is a difference of nearly
equal distances. Gradients are finite everywhere: the gradient of a Euclidean distance at 0 is defined as 0.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from metricface.choices import check_choice

Distance = Literal["euclidean", "squared_euclidean", "cosine"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)


def check_distance(distance: str) -> None:
    """Raise ValueError, listing the right names, unless `distance` is one of them."""
    check_choice("distance", distance, DISTANCES)


def without_autocast(x: Tensor) -> torch.autocast:
    """Context in which products of tensors on x's device keep their operands' precision."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def full_precision(x: Tensor) -> Tensor:
    """Half-precision values as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to Euclidean length 1, in full precision.

    x: (N, D) of any floating type. Returns (N, D); a zero row stays zero, with gradient 0.
    """
    x = full_precision(x)
    sq_norm = x.square().sum(dim=1, keepdim=True)  # (N, 1)
    nonzero = sq_norm > torch.finfo(x.dtype).tiny
    # Not x / max(norm, eps): the gradient of a norm at 0 is NaN, and that of x / eps is huge.
    return x * torch.where(nonzero, torch.where(nonzero, sq_norm, 1.0).rsqrt(), 0.0)


def safe_sqrt(sq_dist: Tensor) -> Tensor:
    """Square root whose gradient at 0 (and at the small negatives that cancellation leaves) is 0, not infinite."""
    positive = sq_dist > 0
    return torch.where(positive, torch.where(positive, sq_dist, 1.0).sqrt(), 0.0)


def pairwise(x: Tensor, y: Tensor, distance: Distance) -> Tensor:
    """Distance of every row of x to every row of y.

    x: (Q, D), y: (R, D). Returns (Q, R): Euclidean, squared Euclidean, or 1 - cosine in [0, 2].
    Uses |x|^2 + |y|^2 - 2xy, one matrix product: distances far below |x| carry its rounding (about 3e-4 in float32 for
    unit rows); `paired` does not. Raises ValueError for an unknown distance.
    """
    check_distance(distance)
    with without_autocast(x):
        if distance == "cosine":
            return 1.0 - unit_rows(x) @ unit_rows(y).T
        x, y = full_precision(x), full_precision(y)
        sq_dist = torch.addmm(y.square().sum(dim=1), x, y.T, alpha=-2.0)  # (R,) + (Q, R)
        sq_dist = (sq_dist + x.square().sum(dim=1, keepdim=True)).clamp_min(0.0)
    return sq_dist if distance == "squared_euclidean" else safe_sqrt(sq_dist)


def paired(x: Tensor, y: Tensor, distance: Distance) -> Tensor:
    """Distance of row i of x to row i of y.

    x, y: (T, D); T may be 0. Returns (T,), from the difference of the rows, so exact 0 for identical rows.
    Raises ValueError for an unknown distance.
    """
    check_distance(distance)
    if distance == "cosine":
        return 1.0 - (unit_rows(x) * unit_rows(y)).sum(dim=1)
    sq_dist = (full_precision(x) - full_precision(y)).square().sum(dim=1)
    return sq_dist if distance == "squared_euclidean" else safe_sqrt(sq_dist)
