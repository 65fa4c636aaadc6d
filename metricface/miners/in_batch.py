"""Miners that take one triplet a positive pair, or one an anchor, from a batch (or from given references)."""

from typing import Literal, get_args

import torch
from torch import Tensor

from metricface.choices import check_choice, is_number
from metricface.distances import Distance, check_distance
from metricface.identities import Identities, negative_of, positive_pairs
from metricface.miners import fixed_shape, kernels
from metricface.miners.base import Chosen, TripletMiner, check_unit, for_each_pair, picked, triplets_of
from metricface.miners.fixed_shape import FixedShapeMiner, MaskedTriplets
from metricface.miners.tiles import RUN, tiles
from metricface.tuples import Batch, Triplets

WeightedFallback = Literal["skip", "uniform"]
EasyPositiveNegative = Literal["semi_hard", "hardest"]


class BatchHardMiner(FixedShapeMiner):
    """For each anchor its farthest positive and its closest negative.

    Anchors without a positive or without a negative are left out. Exact ties take the lowest index.
    distance: with unit rows (normalize=True) all choose alike. normalize, tile_rows: as in SemiHardMiner.
    Source: Hermans, Beyer and Leibe 2017, In Defense of the Triplet Loss, section 2 (Euclidean, not normalised).
    """

    def __init__(
        self, *, distance: Distance = "euclidean", normalize: bool = True, tile_rows: int | None = None
    ) -> None:
        super().__init__(normalize=normalize, tile_rows=tile_rows)
        check_distance(distance)
        self.distance = distance

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return f"distance={self.distance!r}, normalize={self.normalize}"

    def _masked(self, prepared: fixed_shape.Masked) -> MaskedTriplets:
        return fixed_shape.hardest(prepared, self.tile_rows)

    def _choose(self, batch: Batch, identities: Identities) -> Chosen:
        has_positive, has_negative = identities.positives > 0, identities.negatives > 0
        parts = []
        for tile in tiles(batch, identities, self.distance, tile_rows=self.tile_rows):
            place = kernels.farthest(tile.sq_positive, tile.is_positive)
            positive = tile.positive.gather(1, place[:, None])[:, 0]
            parts.append(Triplets(tile.anchors, positive, kernels.nearest(tile).column))
        return Chosen(triplets_of(parts, batch), has_positive.sum(), (has_positive & ~has_negative).sum())


class EasyPositiveMiner(TripletMiner):
    """For each anchor its closest positive, with the closest negative or with the closest that is no closer than it.

    negative: "semi_hard", the closest with d_an >= d_ap (EPSHN; anchors without one are left out), or "hardest" (EPHN).
    Anchors without a positive or without a negative are left out. Exact ties take the lowest index.
    distance, normalize, tile_rows: as in BatchHardMiner. The authors' code also drops anchors whose chosen cosines are
    not above 0; that is part of their loss, not done here.
    Source: Xuan, Stylianou and Pless 2020, Improved Embeddings with Easy Positive Triplet Mining, section 3.
    """

    def __init__(
        self,
        negative: EasyPositiveNegative = "semi_hard",
        *,
        distance: Distance = "cosine",
        normalize: bool = True,
        tile_rows: int | None = None,
    ) -> None:
        super().__init__(normalize=normalize, tile_rows=tile_rows)
        check_choice("negative", negative, get_args(EasyPositiveNegative))
        check_distance(distance)
        self.negative, self.distance = negative, distance

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return f"negative={self.negative!r}, distance={self.distance!r}, normalize={self.normalize}"

    def _choose(self, batch: Batch, identities: Identities) -> Chosen:
        parts = []
        for tile in tiles(batch, identities, self.distance, tile_rows=self.tile_rows):
            place = kernels.closest(tile.sq_positive, tile.is_positive)[:, None]
            positive, sq_positive = tile.positive.gather(1, place), tile.sq_positive.gather(1, place)
            if self.negative == "hardest":
                negative, found = kernels.nearest(tile).column[:, None], torch.ones_like(positive, dtype=torch.bool)
            else:
                window = kernels.SemiHard(
                    sq_positive,
                    torch.full_like(sq_positive, torch.inf),
                    [len(positive)],
                    at_least=True,
                    rounding=tile.rounding,
                )
                for block in tile.blocks():
                    window.see(block)
                negative, found = window.column, window.found
            kept = found[:, 0]
            parts.append(Triplets(tile.anchors[kept], positive[kept, 0], negative[kept, 0]))
        triplets = triplets_of(parts, batch)
        pairs = (identities.positives > 0).sum()
        return Chosen(triplets, pairs, pairs - len(triplets.anchor))


class DistanceWeightedMiner(FixedShapeMiner):
    """Each ordered positive pair once, with one negative drawn so that all distances get their turn.

    A negative at distance d is drawn with chances 1 / q(d), q being the density of distances between random points of
    the sphere in as many dimensions as the embeddings have; with replacement where an anchor has several positives.
    cutoff: distances below count as this one, which bounds the chances of the closest. nonzero_loss_cutoff: negatives
    this far or farther are never drawn. fallback: where an anchor has negatives, but none closer than that: "skip" its
    pairs or draw with equal chances from all of its negatives ("uniform").
    normalize: scale rows to length 1 first; with False they must be of length 1 already, within 1%. generator,
    tile_rows: as in SemiHardMiner; draws do not depend on tile_rows.
    Source: Wu et al. 2017, Sampling Matters in Deep Embedding Learning, section 4.
    """

    def __init__(
        self,
        *,
        cutoff: float = 0.5,
        nonzero_loss_cutoff: float = 1.4,
        fallback: WeightedFallback = "skip",
        normalize: bool = True,
        generator: torch.Generator | None = None,
        tile_rows: int | None = None,
    ) -> None:
        super().__init__(normalize=normalize, tile_rows=tile_rows)
        numbers = is_number(cutoff) and is_number(nonzero_loss_cutoff, infinite=True)
        if not numbers or not 0 < cutoff < min(nonzero_loss_cutoff, 2.0):
            raise ValueError(
                "DistanceWeightedMiner needs 0 < cutoff < nonzero_loss_cutoff and cutoff < 2 (unit rows); "
                f"found cutoff={cutoff!r}, nonzero_loss_cutoff={nonzero_loss_cutoff!r}."
            )
        check_choice("fallback", fallback, get_args(WeightedFallback))
        self.distance = "euclidean"
        self.cutoff, self.nonzero_loss_cutoff = cutoff, nonzero_loss_cutoff
        self.fallback, self.generator = fallback, generator

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        cutoffs = f"cutoff={self.cutoff}, nonzero_loss_cutoff={self.nonzero_loss_cutoff}"
        return f"{cutoffs}, fallback={self.fallback!r}, normalize={self.normalize}"

    def _masked(self, prepared: fixed_shape.Masked) -> MaskedTriplets:
        draws = torch.rand_like(prepared.is_positive, dtype=torch.float64)
        dim = prepared.batch.embeddings.shape[1]
        rule = fixed_shape.weighted_rule(dim, self.cutoff, self.nonzero_loss_cutoff, self.fallback, draws)
        return fixed_shape.mine(prepared, rule, self.tile_rows)

    def _choose(self, batch: Batch, identities: Identities) -> Chosen:
        if not self.normalize:
            check_unit(batch)
        draws = for_each_pair(batch, identities, self.generator)
        parts, with_eligible = [], identities.size.new_zeros(())
        for tile in tiles(batch, identities, self.distance, tile_rows=self.tile_rows, whole_rows=True):
            (block,) = tile.blocks()
            weights, eligible = self._weights(block.sq_negative, batch.ref_emb.shape[1])
            of_pairs, negative = draws[tile.pair], torch.zeros_like(tile.positive)
            # As many draws at a time as make their runs no larger than the block.
            at_once = weights.shape[1] // RUN
            for first in range(0, len(tile.depths), at_once):
                rows, columns = tile.depths[first], slice(first, first + at_once)
                negative[:rows, columns], _ = kernels.draw(weights[:rows], of_pairs[:rows, columns])
            wanted = tile.is_positive & eligible[:, None]
            with_eligible += wanted.sum()
            parts.append(picked(tile, negative, tile.is_positive if self.fallback == "uniform" else wanted))
        pairs = identities.positives.sum()
        return Chosen(triplets_of(parts, batch), pairs, pairs - with_eligible)

    def _weights(self, sq_negative: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Weights (b, C) of the negatives, by distance or, if the fallback asks for it, equal; (b,) by distance."""
        negative = sq_negative.isfinite() if self.fallback == "uniform" else None
        weights = kernels.distance_weights(
            sq_negative, dim, cutoff=self.cutoff, nonzero_loss_cutoff=self.nonzero_loss_cutoff
        )
        eligible = weights.amax(dim=1) > 0
        if negative is not None:
            weights = torch.where(eligible[:, None], weights, negative.to(weights.dtype))
        return weights, eligible


class RandomHardMiner(TripletMiner):
    """Each ordered positive pair once, with a negative drawn evenly from those that violate: d_an < d_ap + margin.

    Softer than the hardest negative, and harder than a semi-hard one: what lies closer than the positive takes part.
    margin: >= 0, in units of `distance`, which is FaceNet's squared one by default. Pairs that no negative violates are
    left out. distance, normalize, generator, tile_rows: as in SemiHardMiner.
    Source: Parkhi, Vedaldi and Zisserman 2015, Deep Face Recognition, section 4.
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        distance: Distance = "squared_euclidean",
        normalize: bool = True,
        generator: torch.Generator | None = None,
        tile_rows: int | None = None,
    ) -> None:
        super().__init__(normalize=normalize, tile_rows=tile_rows)
        if not is_number(margin) or margin < 0:
            raise ValueError(f"RandomHardMiner needs a finite margin, 0 or more; found {margin!r}.")
        check_distance(distance)
        self.margin, self.distance, self.generator = margin, distance, generator

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return f"margin={self.margin}, distance={self.distance!r}, normalize={self.normalize}"

    def _choose(self, batch: Batch, identities: Identities) -> Chosen:
        draws = for_each_pair(batch, identities, self.generator)
        parts = []
        for tile in tiles(batch, identities, self.distance, tile_rows=self.tile_rows, whole_rows=True):
            (block,) = tile.blocks()
            sq_upper = kernels.sq_reach(tile.sq_positive, self.margin, self.distance)
            negative, found = torch.zeros_like(tile.positive), torch.zeros_like(tile.is_positive)
            for j, rows in enumerate(tile.depths):
                violating = block.sq_negative[:rows] < sq_upper[:rows, j, None]
                column, found[:rows, j] = kernels.draw(violating, draws[tile.pair[:rows, j, None]])
                negative[:rows, j] = column[:, 0]
            parts.append(picked(tile, negative, tile.is_positive & found))
        triplets = triplets_of(parts, batch)
        pairs = identities.positives.sum()
        return Chosen(triplets, pairs, pairs - len(triplets.anchor))


class RandomMiner(TripletMiner):
    """Each ordered positive pair once, with a negative drawn with equal chances: what mining is to be measured against.

    generator: where draws come from, None for torch's global one.
    """

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        super().__init__(normalize=False)
        self.generator = generator

    def _choose(self, batch: Batch, identities: Identities) -> Chosen:
        anchor, positive = positive_pairs(batch, identities)
        negatives = identities.negatives[anchor]
        rank = (for_each_pair(batch, identities, self.generator) * negatives).long().clamp_max(negatives - 1)
        kept = negatives > 0
        anchor, positive, rank = anchor[kept], positive[kept], rank[kept]
        triplets = Triplets(anchor, positive, negative_of(identities, anchor, rank))
        return Chosen(triplets, identities.positives.sum(), (~kept).sum())
