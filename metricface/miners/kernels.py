"""Mining on tiles: a block of anchors against all references, as squared Euclidean distances.

Every distance here grows with the squared Euclidean one, so the tile stays squared and a margin is carried over to it
(`sq_reach`). References that are no negatives of an anchor (its identity, itself, padding) stand at +inf in its row:
the functions need no mask, and do not care whether references are the batch, a memory or candidates of a search.

A tile is made once and read a few times while it is in the cache. On a CPU the cost is then the matrix product plus
vectorised passes (about 0.05 ns a number, against 3.4 ns for the product at D = 128, 0.3 for a comparison, 0.6 for
argmin and 140 for a sort): so nothing is sorted, and minima are found block by block.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metricface.distances import Distance, centred, unit_rows, without_autocast
from metricface.identities import Identities
from metricface.tuples import Batch

# A tile's columns are padded to whole blocks.
BLOCK = 64

# Numbers in a tile: 2 MiB in float32 for a CPU's caches, 256 MiB to fill a GPU.
CPU_TILE = 1 << 19
GPU_TILE = 1 << 26
# Fewer rows than this make the matrix product slow, however many columns there are.
FEWEST_ROWS = 64

# The same number of bits as an integer. Of non-negative floats these are ordered as the floats are.
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


class Tile(NamedTuple):
    """Distances of b anchors to all references; the anchors with most references of their identity come first.

    `same` lists the columns of an anchor's identity, ascending; M is the size of the largest identity in the tile, and
    smaller ones are filled up with other columns, where `is_positive` is False, as it is at the anchor itself.
    """

    anchors: Tensor  # (b,) int64 rows of the embeddings, each with a positive and a negative
    same: Tensor  # (b, M) int64 rows of the references
    depths: list[int]  # M numbers: how many anchors, from the first on, have a reference in that column of `same`
    is_positive: Tensor  # (b, M) bool
    pair: Tensor  # (b, M) int64, the positive pair's number in row order; any valid number where there is none
    sq_positive: Tensor  # (b, M) squared distances to `same`
    sq_negative: Tensor  # (b, R') squared distances to all references, +inf where not a negative. Free to overwrite.


def default_tile_rows(references: int, device: torch.device) -> int:
    """Anchors in a tile: as many as fit the cache, or as many as keep a GPU busy."""
    return max(FEWEST_ROWS, (CPU_TILE if device.type == "cpu" else GPU_TILE) // max(1, references))


def tiles(batch: Batch, identities: Identities, distance: Distance, *, tile_rows: int | None = None) -> Iterator[Tile]:
    """Distances of the anchors that have a positive and a negative, `tile_rows` at a time.

    From the largest identity to the smallest, else in order: one identity that is much larger than the others makes
    work for its own anchors only. The large tensor of a tile is used again for the next one: take what is needed
    before going on.
    """
    mined = ((identities.positives > 0) & (identities.negatives > 0)).nonzero()[:, 0]
    mined = mined[identities.size[mined].argsort(descending=True, stable=True)]
    sizes = identities.size[mined].tolist()
    if not sizes:
        return
    queries, references = batch.embeddings, batch.ref_emb
    if distance == "cosine":
        queries, references = unit_rows(queries), unit_rows(references)
    queries, references = centred(queries, references)
    num_references = len(references)
    rows_at_once = tile_rows or default_tile_rows(num_references, queries.device)
    padded = -(-num_references // BLOCK) * BLOCK
    buffer = queries.new_empty(min(rows_at_once, len(sizes)), padded)
    sq_norms, ref_sq_norms = queries.square().sum(dim=1, keepdim=True), references.square().sum(dim=1)
    for start in range(0, len(sizes), rows_at_once):
        anchors = mined[start : start + rows_at_once]
        tile = buffer[: len(anchors)]
        tile[:, num_references:] = torch.inf
        sq_dist = tile[:, :num_references]
        with without_autocast(queries):
            torch.mm(queries[anchors] * -2.0, references.T, out=sq_dist)
        sq_dist.add_(ref_sq_norms).add_(sq_norms[anchors]).clamp_min_(0.0)
        yield _divide(tile, anchors, _depths(sizes[start : start + rows_at_once]), batch, identities)


def _depths(sizes: Sequence[int]) -> list[int]:
    """For each number below the first size, how many sizes exceed it. sizes: descending."""
    depths, rows = [], len(sizes)
    for number in range(sizes[0]):
        while sizes[rows - 1] <= number:
            rows -= 1
        depths.append(rows)
    return depths


def _divide(tile: Tensor, anchors: Tensor, depths: list[int], batch: Batch, identities: Identities) -> Tile:
    """Take the distances to the anchors' own identities out of the tile and leave +inf in their place."""
    offset = torch.arange(len(depths), device=tile.device)
    # Modulo, not clamp: the columns of a row must all differ, or the scatter below would write one of them twice.
    place = (identities.first[anchors, None] + offset) % len(identities.by_label)  # (b, 1) + (M,)
    same = identities.by_label[place]
    is_same = offset < identities.size[anchors, None]  # (M,) < (b, 1)
    is_positive = is_same & (same != batch.self_index[anchors, None])
    pair = identities.first_pair[anchors, None] + is_positive.cumsum(dim=1) - 1
    sq_positive = tile.gather(1, same)
    tile.scatter_(1, same, sq_positive.masked_fill(is_same, torch.inf))
    return Tile(anchors, same, depths, is_positive, pair.clamp_(0, identities.pairs - 1), sq_positive, tile)


def _blocks(values: Tensor) -> Tensor:
    """(b, R') -> (b, R' / BLOCK, BLOCK)."""
    return values.view(len(values), values.shape[1] // BLOCK, BLOCK)


def first_min(values: Tensor) -> Tensor:
    """Column of each row's minimum, the lowest where several are equal.

    values: (b, R'), R' > 0 a multiple of BLOCK. Returns (b,) int64. Several times faster than argmin, which is not
    vectorised.
    """
    blocks = _blocks(values)
    block = blocks.amin(dim=2).argmin(dim=1)  # (b,)
    inside = blocks[torch.arange(len(values), device=values.device), block].argmin(dim=1)
    column: Tensor = block * BLOCK + inside
    return column


def farthest(sq_dist: Tensor, allowed: Tensor) -> Tensor:
    """Column of each row's largest distance among the allowed, the lowest on ties. (b, N), (b, N) bool -> (b,)."""
    return sq_dist.masked_fill(~allowed, -torch.inf).argmax(dim=1)


def sq_reach(sq_dist: Tensor, margin: float, distance: Distance) -> Tensor:
    """Square of the Euclidean distance that lies `margin` beyond, the margin being measured in `distance`."""
    if distance == "euclidean":
        return (sq_dist.sqrt() + margin).square()
    # Unit rows: |x - y|^2 = 2 (1 - cos).
    return sq_dist + (2.0 * margin if distance == "cosine" else margin)


def semi_hard(
    sq_positive: Tensor,
    sq_upper: Tensor,
    sq_negative: Tensor,
    uniform: Tensor | None = None,
    *,
    depths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """A negative with sq_positive < sq_negative < sq_upper for each positive pair.

    sq_positive, sq_upper: (b, M); sq_negative: (b, R'), +inf where not a negative. With `uniform` (b, M) in [0, 1) the
    negative is drawn with equal chances from the window, else it is the closest one, the lowest index on ties. depths:
    M numbers, in how many rows, from the first on, to look at all (default: all); the others find nothing.
    Returns (b, M) columns and (b, M) bool, whether the window held any (if not, the column means nothing).
    A few vectorised passes a positive; a sort of the row pays off only above several hundred positives.
    """
    integer = _INTEGER[sq_negative.dtype]
    lowest = torch.iinfo(integer).min
    # bits(x) - bits(d_ap) - 1 + lowest wraps around, so that what lies at or below d_ap becomes larger than all above
    # it: the smallest distance above d_ap is a plain minimum, and the window one comparison.
    shift = sq_positive.view(integer) + 1 + lowest  # (b, M)
    limit = torch.where(sq_upper > sq_positive, sq_upper.contiguous().view(integer) - shift, lowest)
    distances = sq_negative.view(integer)
    shifted = torch.empty_like(distances)
    negatives, found = torch.zeros_like(sq_positive, dtype=torch.long), torch.zeros_like(sq_positive, dtype=torch.bool)
    for j, rows in enumerate(depths or [len(sq_positive)] * sq_positive.shape[1]):
        below, top = shift[:rows, j, None], limit[:rows, j]
        torch.sub(distances[:rows], below, out=shifted[:rows])
        if uniform is None:
            column = first_min(shifted[:rows])
            found[:rows, j] = shifted[:rows].gather(1, column[:, None])[:, 0] < top
            negatives[:rows, j] = column
        else:
            column, some = draw(shifted[:rows] < top[:, None], uniform[:rows, j, None])
            negatives[:rows, j], found[:rows, j] = column[:, 0], some
    return negatives, found


def distance_weights(sq_dist: Tensor, dim: int, *, cutoff: float, nonzero_loss_cutoff: float) -> Tensor:
    """Chances, up to a factor a row, with which distance-weighted sampling draws each negative. Overwrites sq_dist.

    sq_dist: (b, R') squared distances of unit rows, +inf where not a negative; dim: their dimension. Returns (b, R'):
    1 / q(d), q being the density of distances between random points of the sphere, with d raised to at least `cutoff`;
    each row divided by its maximum; 0 from `nonzero_loss_cutoff` on. Rows of zeros: no negative is eligible.
    Source: Wu et al. 2017, Sampling Matters in Deep Embedding Learning, section 4.
    """
    ineligible = sq_dist >= nonzero_loss_cutoff**2
    # Opposite points would have an infinite weight.
    sq_dist.clamp_(cutoff**2, (2.0 - 1e-6) ** 2)
    # log 1/q = (2 - dim) log d - (dim - 3) / 2 log(1 - d^2 / 4)
    near_two = sq_dist.mul(-0.25).log1p_()
    log_weights = sq_dist.log_().mul_((2 - dim) / 2).add_(near_two, alpha=-(dim - 3) / 2)
    log_weights.masked_fill_(ineligible, -torch.inf)
    # Row-wise, not global, max: one near-duplicate would underflow every other anchor's weights.
    top = log_weights.amax(dim=1, keepdim=True)
    return log_weights.sub_(torch.where(top.isfinite(), top, 0.0)).exp_()


def draw(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw columns with chances proportional to the weights, with replacement.

    weights: (b, R') bool or >= 0; R' > 0 a multiple of BLOCK. uniform: (b, m) in [0, 1), one number a draw.
    Returns (b, m) columns, never one of weight 0, and (b,) bool, whether the row has any weight (if not, the columns
    mean nothing). First the block is drawn, then the column in it: only (b, m, BLOCK) weights are added up twice.
    """
    blocks = _blocks(weights)
    heights = _staircase(blocks.sum(dim=2, dtype=None if weights.is_floating_point() else torch.int32), dim=1)
    block, rest = _locate(heights, uniform.double() * heights[:, -1:])  # (b, m)
    rows = torch.arange(len(weights), device=weights.device)[:, None]
    inside, _ = _locate(_staircase(blocks[rows, block], dim=2), rest[:, :, None])  # (b, m, BLOCK), (b, m, 1)
    return block * BLOCK + inside[:, :, 0], heights[:, -1] > 0


def _staircase(values: Tensor, dim: int) -> Tensor:
    """Cumulative sums in float64; of bools and integers as integers, which GPUs add up alike every time."""
    return values.double().cumsum(dim) if values.is_floating_point() else values.long().cumsum(dim).double()


def _locate(heights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The step of a staircase that each target falls on, and how far above the step's foot.

    heights: (..., N) cumulative sums; target: (..., m) >= 0. A target at or above the top (by rounding) is lowered to
    just below it, so that the step found has a height above 0.
    """
    top = heights[..., -1:]
    target = torch.minimum(target, top.nextafter(torch.zeros_like(top)))
    step = torch.searchsorted(heights, target, right=True).clamp_max(heights.shape[-1] - 1)
    foot = torch.where(step > 0, heights.gather(-1, (step - 1).clamp_min(0)), 0.0)
    return step, (target - foot).clamp_min(0.0)
