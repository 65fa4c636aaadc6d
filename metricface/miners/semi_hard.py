"""FaceNet's semi-hard negatives."""

from typing import Literal, get_args

import torch
from torch import Tensor

from metricface.choices import check_choice, is_number
from metricface.distances import Distance, check_distance
from metricface.identities import Identities
from metricface.miners import fixed_shape, kernels
from metricface.miners.base import Chosen, Sample, check_limit, for_each_pair, picked
from metricface.miners.fixed_shape import FixedShapeMiner, MaskedTriplets
from metricface.miners.tiles import Block, Tile, tiles
from metricface.tuples import Batch, Triplets

Negative = Literal["hardest", "random", "all"]
SemiHardFallback = Literal["skip", "easiest", "hardest"]


class SemiHardMiner(FixedShapeMiner):
    """One semi-hard negative for each ordered positive pair, or all of them: d_ap < d_an < d_ap + margin, strictly.

    margin: > 0, in units of `distance`; infinite: any negative farther than the positive.
    negative: which one in the window: "hardest", the closest; "random", drawn with equal chances; or "all".
    fallback: what to do with a pair whose window is empty: "skip" it, take the "easiest" (farthest) negative of all,
    or the "hardest" (closest) of all. FaceNet does not say; tensorflow-addons is margin=inf, fallback="easiest".
    max_triplets: at most so many triplets, a uniform sample of what negative="all" allows.
    normalize: scale rows to length 1 first. generator: where draws come from, None for torch's global one.
    tile_rows: anchors worked on at a time, None to choose by size and device; it changes no result beyond rounding.
    A negative is farther than the positive if it is so beyond rounding. Exact ties take the lowest index. Time grows
    with R times the number of positive pairs.
    Source: Schroff et al. 2015, FaceNet, section 3.2.
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        negative: Negative = "hardest",
        fallback: SemiHardFallback = "skip",
        distance: Distance = "squared_euclidean",
        max_triplets: int | None = None,
        normalize: bool = True,
        generator: torch.Generator | None = None,
        tile_rows: int | None = None,
    ) -> None:
        super().__init__(normalize=normalize, tile_rows=tile_rows)
        if not is_number(margin, infinite=True) or margin <= 0:
            raise ValueError(
                f"SemiHardMiner needs a number margin > 0, the width of its window, maybe infinite; found {margin!r}."
            )
        check_choice("negative", negative, get_args(Negative))
        check_choice("fallback", fallback, get_args(SemiHardFallback))
        check_distance(distance)
        check_limit("max_triplets", max_triplets)
        self.margin, self.negative, self.fallback = margin, negative, fallback
        self.distance, self.max_triplets, self.generator = distance, max_triplets, generator

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return (
            f"margin={self.margin}, negative={self.negative!r}, fallback={self.fallback!r}, "
            f"distance={self.distance!r}, normalize={self.normalize}"
        )

    def _masked(self, prepared: fixed_shape.Masked) -> MaskedTriplets:
        if self.negative == "all":
            raise ValueError("SemiHardMiner.masked takes one negative a pair; this miner has negative='all'.")
        draws = torch.rand_like(prepared.is_positive, dtype=torch.float64) if self.negative == "random" else None
        rule = fixed_shape.semi_hard_rule(self.margin, self.distance, self.fallback, draws)
        return fixed_shape.mine(prepared, rule, self.tile_rows)

    def _choose(self, batch: Batch, identities: Identities) -> Chosen:
        draws = for_each_pair(batch, identities, self.generator) if self.negative == "random" else None
        sample = Sample(self.max_triplets, self.generator)
        in_window = identities.size.new_zeros(())
        whole_rows = self.negative != "hardest"
        for tile in tiles(batch, identities, self.distance, tile_rows=self.tile_rows, whole_rows=whole_rows):
            in_window += self._search(tile, sample, draws)
        pairs = identities.positives.sum()
        triplets = Triplets(*sample.rows(batch.self_index[:0], 3))
        return Chosen(triplets, pairs, pairs - in_window, sample.left_out)

    def _search(self, tile: Tile, sample: Sample, draws: Tensor | None) -> Tensor:
        """Add what the windows of a tile hold, or the fallback. Returns in how many windows there was something."""
        sq_upper = kernels.sq_reach(tile.sq_positive, self.margin, self.distance)
        window = kernels.SemiHard(tile.sq_positive, sq_upper, tile.depths, rounding=tile.rounding)
        other = kernels.instead(tile, self.fallback)
        for block in tile.blocks():
            if other is not None:
                other.see(block)
            if self.negative == "hardest":
                window.see(block)
        if self.negative == "all":
            return self._add_all(tile, window, block, other, sample)
        if draws is None:
            negative, found = window.column, window.found
        else:
            negative, found = _drawn(tile, window, block, draws)
        if other is None:
            wanted = tile.is_positive & found
        else:
            negative, wanted = torch.where(found, negative, other.column[:, None]), tile.is_positive
        sample.add(*picked(tile, negative, wanted))
        return (tile.is_positive & found).sum()

    def _add_all(
        self, tile: Tile, window: kernels.SemiHard, row_block: Block, other: kernels.Nearest | None, sample: Sample
    ) -> Tensor:
        in_window = tile.anchors.new_zeros(())
        found: list[tuple[Tensor, ...]] = []
        for j, rows in enumerate(tile.depths):
            is_positive = tile.is_positive[:rows, j]
            inside = window.inside(row_block, j).logical_and_(is_positive[:, None])
            some = inside.any(dim=1)
            in_window += some.sum()
            row, column = inside.nonzero(as_tuple=True)
            found.append((row, tile.positive[row, j], column))
            if other is not None:
                row = (is_positive & ~some).nonzero()[:, 0]
                found.append((row, tile.positive[row, j], other.column[row]))
        row, positive, negative = (torch.cat(part) for part in zip(*found, strict=True))
        order = row.argsort(stable=True)  # anchor by anchor, so that a sample does not depend on the tile
        sample.add(tile.anchors[row[order]], positive[order], negative[order])
        return in_window


def _drawn(tile: Tile, window: kernels.SemiHard, row_block: Block, draws: Tensor) -> tuple[Tensor, Tensor]:
    """(b, M) a negative drawn evenly from each window, and (b, M) whether it holds any."""
    negative, found = torch.zeros_like(tile.positive), torch.zeros_like(tile.is_positive)
    for j, rows in enumerate(tile.depths):
        column, found[:rows, j] = kernels.draw(window.inside(row_block, j), draws[tile.pair[:rows, j, None]])
        negative[:rows, j] = column[:, 0]
    return negative, found
