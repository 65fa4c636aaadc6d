"""Distances between embeddings: all pairs (Q, R) or given pairs (T,).

Everything is computed in float32 or better, whatever autocast says, because a triplet loss is a difference of nearly
equal distances. One switch of torch reaches in from outside: after torch.set_float32_matmul_precision("high") or
"medium" a GPU multiplies float32 matrices with 10 bits or less. All-pairs distances, and with them miners and losses
over every pair, then lose whatever is closer than about 1% of the rows' spread, duplicates too; leave it at "highest".

Gradients are finite everywhere: the gradient of a Euclidean distance at 0 is defined as 0.
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
    with torch.no_grad():
        nonzero = x.square().sum(dim=1, keepdim=True) > torch.finfo(x.dtype).tiny  # (N, 1)
        # Powers of two, which round nothing: the gradient passes |x|^-3, which overflows below lengths of 1e-13.
        exponent = torch.frexp(x.abs().amax(dim=1, keepdim=True)).exponent if x.shape[1] else nonzero.long()
        scale = torch.ldexp(torch.ones_like(x[:, :1]), torch.where(nonzero, -exponent, 0))
    x = x * scale
    sq_norm = x.square().sum(dim=1, keepdim=True)
    # Not x / max(norm, eps): the gradient of a norm at 0 is NaN, and that of x / eps is huge.
    return x * torch.where(nonzero, torch.where(nonzero, sq_norm, 1.0).rsqrt(), 0.0)


def safe_sqrt(sq_dist: Tensor) -> Tensor:
    """Square root whose gradient at 0 (and at the small negatives that cancellation leaves) is 0, not infinite."""
    positive = sq_dist > 0
    return torch.where(positive, torch.where(positive, sq_dist, 1.0).sqrt(), 0.0)


def centre(y: Tensor) -> Tensor:
    """A point near the mean of the rows of y (R, D), in full precision: (D,). Zeros for R = 0.

    Distances between rows stay when all are moved, but |x|^2 + |y|^2 - 2xy is rounded in proportion to the rows'
    lengths, so that a batch that is close together far from the origin would lose them. Without gradient. Rounded to a
    power of two near the spread of y, so that values on a grid (and exact ties) stay on it.
    """
    rows = y.detach()
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[1])
    mean = rows[0] + (rows - rows[0]).mean(dim=0)  # exact where all rows are equal
    spread = (rows - mean).square().mean().sqrt()
    some = spread > torch.finfo(rows.dtype).eps * mean.abs().amax()
    mantissa = torch.frexp(spread).mantissa  # in [1/2, 1)
    step = torch.where(some, spread / mantissa / 2.0, 1.0)  # spread / 2 < step <= spread
    return torch.where(some, (mean / step).round() * step, mean)


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of rows, (Q, D) and (R, D) in full precision, moved so that y's mean lies near the origin."""
    if y.numel() == 0:
        return x, y
    origin = centre(y)
    return x - origin, y - origin


def sq_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x|^2 + |y|^2 - 2xy for all rows, (Q, D) and (R, D) in full precision to (Q, R): as good as they are centred."""
    with without_autocast(x):
        sq_dist = torch.addmm(y.square().sum(dim=1), x, y.T, alpha=-2.0)  # (R,) + (Q, R)
        return (sq_dist + x.square().sum(dim=1, keepdim=True)).clamp_min(0.0)


def pairwise(x: Tensor, y: Tensor, distance: Distance) -> Tensor:
    """Distance of every row of x to every row of y.

    x: (Q, D), y: (R, D). Returns (Q, R): Euclidean, squared Euclidean, or 1 - cosine in [0, 2].
    From one matrix product of the rows, centred: distances far below the rows' distance from their mean carry its
    rounding (about 3e-4 in float32 for a mean distance of 1); `paired` does not. Raises ValueError for an unknown
    distance.
    """
    check_distance(distance)
    if distance == "cosine":
        x, y = unit_rows(x), unit_rows(y)
        return _cosine(sq_distances(*centred(x, y)), _is_zero(x)[:, None], _is_zero(y))
    sq_dist = sq_distances(*centred(full_precision(x), full_precision(y)))
    return sq_dist if distance == "squared_euclidean" else safe_sqrt(sq_dist)


def paired(x: Tensor, y: Tensor, distance: Distance) -> Tensor:
    """Distance of row i of x to row i of y.

    x, y: (T, D); T may be 0. Returns (T,), from the difference of the rows, so exact 0 for identical rows (but cosine
    distance 1 between zero rows). Raises ValueError for an unknown distance.
    """
    check_distance(distance)
    prepare = unit_rows if distance == "cosine" else full_precision
    x, y = prepare(x), prepare(y)
    sq_dist = (x - y).square().sum(dim=1)
    if distance == "cosine":
        return _cosine(sq_dist, _is_zero(x), _is_zero(y))
    return sq_dist if distance == "squared_euclidean" else safe_sqrt(sq_dist)


def _cosine(sq_dist: Tensor, x_is_zero: Tensor, y_is_zero: Tensor) -> Tensor:
    """1 - cosine from the squared distance of unit rows: accurate near 0, where 1 minus a product is rounding.

    A zero row has cosine 0 with every row.
    """
    return 0.5 * (sq_dist + x_is_zero + y_is_zero)


def _is_zero(x: Tensor) -> Tensor:
    """(N, D) -> (N,) 1.0 for rows of zeros, 0.0 for others."""
    return (x == 0).all(dim=1).to(x.dtype)
