"""What mining looks for in a block of distances: extremes, windows, draws.

Every distance here grows with the squared Euclidean one, so blocks stay squared and a margin is carried over to them
(`sq_reach`). No function here cares where a block comes from: the batch, a memory, candidates of a search, or blocks
that arrive one by one from elsewhere; `Nearest` and `SemiHard` keep what was best so far. Minima are found in two
steps, a plain argmin being several times slower than a vectorised minimum.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from metricface.distances import Distance
from metricface.miners.tiles import RUN, Block, Tile

# The same number of bits as an integer. Of non-negative floats these are ordered as the floats are.
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def _runs(values: Tensor) -> Tensor:
    """(b, C) -> (b, C / RUN, RUN)."""
    return values.view(len(values), values.shape[1] // RUN, RUN)


def first_min(values: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's minimum and its column, the lowest where several are equal.

    values: (b, C), C > 0 a multiple of RUN. Returns (b,) and (b,) int64. Several times faster than argmin, which is not
    vectorised.
    """
    runs = _runs(values)
    least, run = runs.amin(dim=2).min(dim=1)  # (b,), the first on ties
    inside = runs[torch.arange(len(values), device=values.device), run].argmin(dim=1)
    return least, run * RUN + inside


def first_max(values: Tensor) -> tuple[Tensor, Tensor]:
    """As first_min, the maximum."""
    runs = _runs(values)
    most, run = runs.amax(dim=2).max(dim=1)
    inside = runs[torch.arange(len(values), device=values.device), run].argmax(dim=1)
    return most, run * RUN + inside


def farthest(sq_dist: Tensor, allowed: Tensor) -> Tensor:
    """Column of each row's largest distance among the allowed, the lowest on ties. (b, N), (b, N) bool -> (b,)."""
    return sq_dist.masked_fill(~allowed, -torch.inf).argmax(dim=1)


def closest(sq_dist: Tensor, allowed: Tensor) -> Tensor:
    """Column of each row's smallest distance among the allowed, the lowest on ties. (b, N), (b, N) bool -> (b,)."""
    return sq_dist.masked_fill(~allowed, torch.inf).argmin(dim=1)


class Nearest:
    """Each anchor's closest negative so far, the lowest reference on ties, whatever the order of blocks."""

    def __init__(self, anchors: Tensor, dtype: torch.dtype) -> None:
        self.sq_dist = torch.full_like(anchors, torch.inf, dtype=dtype)  # (b,), of Farthest with the sign changed
        self.column = torch.zeros_like(anchors)  # (b,)

    def see(self, block: Block) -> None:
        """Take a block into account."""
        self._merge(*first_min(block.sq_negative), block.start)

    def _merge(self, sq_dist: Tensor, column: Tensor, start: int) -> None:
        column = column + start
        better = (sq_dist < self.sq_dist) | ((sq_dist == self.sq_dist) & (column < self.column))
        self.sq_dist = torch.where(better, sq_dist, self.sq_dist)
        self.column = torch.where(better, column, self.column)


def nearest(tile: Tile) -> Nearest:
    """The closest negative of each anchor of a tile."""
    state = Nearest(tile.anchors, tile.sq_positive.dtype)
    for block in tile.blocks():
        state.see(block)
    return state


class Farthest(Nearest):
    """Each anchor's farthest negative so far, the lowest reference on ties, whatever the order of blocks."""

    def see(self, block: Block) -> None:
        """Take a block into account."""
        values = block.sq_negative
        most, column = first_max(values.masked_fill(values == torch.inf, -torch.inf))
        self._merge(-most, column, block.start)


def instead(tile: Tile, fallback: Literal["skip", "easiest", "hardest"]) -> Nearest | None:
    """What finds the negative that a fallback takes: the farthest, the closest, or none for "skip"."""
    if fallback == "skip":
        return None
    kind = Nearest if fallback == "hardest" else Farthest
    return kind(tile.anchors, tile.sq_positive.dtype)


def sq_reach(sq_dist: Tensor, margin: float, distance: Distance) -> Tensor:
    """Square of the Euclidean distance that lies `margin` beyond, the margin being measured in `distance`."""
    if distance == "euclidean" and margin:  # the square of a root is not always the number itself
        return (sq_dist.sqrt() + margin).square()
    # Unit rows: |x - y|^2 = 2 (1 - cos).
    return sq_dist + (2.0 * margin if distance == "cosine" else margin)


class SemiHard:
    """For each positive pair the closest negative so far with sq_positive < sq_negative < sq_upper.

    sq_positive, sq_upper: (b, M); depths: as a Tile's. at_least: sq_positive <= sq_negative will do. rounding: (b, 1),
    by how much sq_negative may be off: what lies no farther than this from sq_positive is taken for equal to it (the
    same photograph under two labels is as far from an anchor as itself). On ties the lowest reference, whatever the
    order of blocks. A few vectorised passes a positive; a sort of the row pays off only above several hundred of them.
    """

    def __init__(
        self,
        sq_positive: Tensor,
        sq_upper: Tensor,
        depths: Sequence[int],
        *,
        at_least: bool = False,
        rounding: Tensor | None = None,
    ) -> None:
        if rounding is not None:
            sq_positive = (sq_positive - rounding).clamp_min(0.0) if at_least else sq_positive + rounding
        integer = _INTEGER[sq_positive.dtype]
        lowest = torch.iinfo(integer).min
        # bits(x) - bits(d_ap) - 1 + lowest wraps around, so that what lies at or below d_ap becomes larger than all
        # above it: the smallest distance above d_ap is a plain minimum, and the window one comparison.
        self._shift = sq_positive.contiguous().view(integer) + (0 if at_least else 1) + lowest  # (b, M)
        upper = sq_upper.contiguous().view(integer) - self._shift
        self._limit = torch.where(sq_upper > sq_positive, upper, lowest)
        self._best = torch.full_like(self._shift, torch.iinfo(integer).max)
        self._depths = depths
        self._work: Tensor | None = None
        self.column = torch.zeros_like(sq_positive, dtype=torch.long)  # (b, M); means nothing where nothing was found

    @property
    def found(self) -> Tensor:
        """(b, M) bool, whether the window held any."""
        return self._best < self._limit

    def _shifted(self, block: Block, j: int, rows: int) -> Tensor:
        distances = block.sq_negative.view(self._shift.dtype)
        if self._work is None or self._work.shape != distances.shape:
            self._work = torch.empty_like(distances)
        return torch.sub(distances[:rows], self._shift[:rows, j, None], out=self._work[:rows])

    def see(self, block: Block) -> None:
        """Take a block into account."""
        for j, rows in enumerate(self._depths):
            least, column = first_min(self._shifted(block, j, rows))
            column = column + block.start
            best, chosen = self._best[:rows, j], self.column[:rows, j]
            better = (least < best) | ((least == best) & (column < chosen))
            self._best[:rows, j] = torch.where(better, least, best)
            self.column[:rows, j] = torch.where(better, column, chosen)

    def inside(self, block: Block, j: int) -> Tensor:
        """(depths[j], C) bool: the negatives of a block in the window of positive j."""
        rows = self._depths[j]
        return self._shifted(block, j, rows) < self._limit[:rows, j, None]


def distance_weights(sq_dist: Tensor, dim: int, *, cutoff: float, nonzero_loss_cutoff: float) -> Tensor:
    """Chances, up to a factor a row, with which distance-weighted sampling draws each negative. Overwrites sq_dist.

    sq_dist: (b, C) squared distances of unit rows, +inf where not a negative; dim: their dimension. Returns (b, C):
    1 / q(d), q being the density of distances between random points of the sphere, with d raised to at least `cutoff`;
    each row divided by its maximum; 0 from `nonzero_loss_cutoff` on. Rows of zeros: no negative is eligible.
    Source: Wu et al. 2017, Sampling Matters in Deep Embedding Learning, section 4.
    """
    far = torch.finfo(sq_dist.dtype).max / 4
    # 1 or 0 as a number: to multiply by it, and to add a multiple, is 20 times faster than a masked fill.
    eligible = sq_dist.clone().lt_(nonzero_loss_cutoff**2)
    # Opposite points would have an infinite weight.
    sq_dist.clamp_(cutoff**2, (2.0 - 1e-6) ** 2)
    # log 1/q = (2 - dim) log d - (dim - 3) / 2 log(1 - d^2 / 4)
    work = sq_dist.mul(-0.25).log1p_()
    log_weights = sq_dist.log_().mul_((2 - dim) / 2).add_(work, alpha=-(dim - 3) / 2)
    # Row-wise, not global, max: one near-duplicate would underflow every other anchor's weights.
    top = torch.sub(eligible, 1.0, out=work).mul_(far).add_(log_weights).amax(dim=1, keepdim=True)
    # What would underflow is raised to the smallest number that does not: a CPU takes ten times as long below it.
    smallest = math.log(torch.finfo(sq_dist.dtype).tiny) + 1.0
    return log_weights.sub_(top).clamp_(smallest, 0.0).exp_().mul_(eligible)


def draw(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw columns with chances proportional to the weights, with replacement.

    weights: (b, C) bool or >= 0; C > 0 a multiple of RUN. uniform: (b, m) in [0, 1), one number a draw.
    Returns (b, m) columns, never one of weight 0, and (b,) bool, whether the row has any weight (if not, the columns
    mean nothing). First the run is drawn, then the column in it: only (b, m, RUN) weights are added up twice.
    """
    runs = _runs(weights)
    heights = _staircase(runs.sum(dim=2, dtype=None if weights.is_floating_point() else torch.int32), dim=1)
    run, rest = _locate(heights, uniform.double() * heights[:, -1:])  # (b, m)
    rows = torch.arange(len(weights), device=weights.device)[:, None]
    inside, _ = _locate(_staircase(runs[rows, run], dim=2), rest[:, :, None])  # (b, m, RUN), (b, m, 1)
    return run * RUN + inside[:, :, 0], heights[:, -1] > 0


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
