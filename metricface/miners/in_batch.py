"""Miners that choose among the images of a batch (or among given references), one triplet a pair or an anchor."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from metricface.choices import check_choice, is_count, is_number
from metricface.distances import Distance, check_distance
from metricface.identities import Identities, find_identities, positive_pairs
from metricface.miners import kernels
from metricface.miners.kernels import Tile
from metricface.tuples import Batch, Triplets, check_batch

Negative = Literal["hardest", "random"]
SemiHardFallback = Literal["skip", "easiest", "hardest"]
WeightedFallback = Literal["skip", "uniform"]


class MiningCounts(NamedTuple):
    """What a miner found in its last batch, and what it left out and why: 0-dim int64 tensors on the batch's device.

    "Pairs" are the positive pairs for which a negative was looked for: all ordered ones, or one an anchor (batch-hard).
    triplets = pairs - pairs_without_candidate, plus those that a fallback found.
    """

    anchors: Tensor  # rows of the batch
    anchors_without_positive: Tensor
    anchors_without_negative: Tensor
    pairs: Tensor
    pairs_without_candidate: Tensor  # no negative at all, or none that the miner's rule allows
    triplets: Tensor


class Chosen(NamedTuple):
    """What a miner chose: triplets, pairs it looked at, and pairs that its rule left without a negative (0-dim)."""

    triplets: Triplets
    pairs: Tensor
    pairs_without_candidate: Tensor


class _Miner(nn.Module, ABC):
    """What the miners share: checking the batch, its identities, and counts. No gradient is kept."""

    def __init__(self, *, normalize: bool, tile_rows: int | None = None) -> None:
        super().__init__()
        if tile_rows is not None and not is_count(tile_rows):
            raise ValueError(
                "tile_rows must be a whole number, at least 1, or None to choose by size and device; "
                f"found {tile_rows!r}."
            )
        self.normalize = normalize
        self.tile_rows = tile_rows
        self.last: MiningCounts | None = None

    @torch.no_grad()
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        self_index: Tensor | None = None,
    ) -> Triplets:
        """Choose triplets.

        embeddings: (B, D) floating; labels: (B,) integers of any type and value. Positives and negatives come from
        the batch itself or, where given, from ref_emb (R, D) with ref_labels (R,). self_index: (B,) which reference
        row is the anchor itself (-1: none), so that it is not its own positive; without references it is known. This
        also holds where ref_emb is the batch once more: miner(E, l, E, l) takes an anchor as its own positive.
        (pytorch-metric-learning leaves it out if ref_labels is the very object labels, and takes it in a clone.)
        Returns Triplets, int64 (T,) each, anchors ascending; T may be 0. `self.last` then has the MiningCounts.
        Raises ValueError for wrong shapes, types and ranges, and for NaN or infinity in embeddings.
        """
        batch = check_batch(embeddings, labels, ref_emb, ref_labels, self_index, normalize=self.normalize)
        identities = find_identities(batch)
        chosen = self._choose(batch, identities)
        self.last = MiningCounts(
            anchors=identities.size.new_full((), len(batch.labels)),
            anchors_without_positive=(identities.positives == 0).sum(),
            anchors_without_negative=(identities.negatives == 0).sum(),
            pairs=chosen.pairs,
            pairs_without_candidate=chosen.pairs_without_candidate,
            triplets=identities.size.new_full((), len(chosen.triplets.anchor)),
        )
        return chosen.triplets

    @abstractmethod
    def _choose(self, batch: Batch, identities: Identities) -> Chosen:
        """Choose triplets from a checked batch."""


class SemiHardMiner(_Miner):
    """One semi-hard negative for each ordered positive pair: d_ap < d_an < d_ap + margin, both strictly.

    margin: > 0, in units of `distance`; infinite: any negative farther than the positive.
    negative: which one in the window: "hardest", the closest, or "random", drawn with equal chances.
    fallback: what to do with a pair whose window is empty: "skip" it, take the "easiest" (farthest) negative of all,
    or the "hardest" (closest) of all. FaceNet does not say; tensorflow-addons is margin=inf, fallback="easiest".
    normalize: scale rows to length 1 first. generator: where draws come from, None for torch's global one.
    tile_rows: anchors worked on at a time, None to choose by size and device; it changes no result beyond rounding.
    Exact ties take the lowest index. Time grows with R times the number of positive pairs.
    Source: Schroff et al. 2015, FaceNet, section 3.2.
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        negative: Negative = "hardest",
        fallback: SemiHardFallback = "skip",
        distance: Distance = "squared_euclidean",
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
        self.margin, self.negative, self.fallback = margin, negative, fallback
        self.distance, self.generator = distance, generator

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return (
            f"margin={self.margin}, negative={self.negative!r}, fallback={self.fallback!r}, "
            f"distance={self.distance!r}, normalize={self.normalize}"
        )

    def _choose(self, batch: Batch, identities: Identities) -> Chosen:
        uniform = _uniform(identities.pairs, batch, self.generator) if self.negative == "random" else None
        parts, in_window = [], identities.size.new_zeros(())
        for tile in kernels.tiles(batch, identities, self.distance, tile_rows=self.tile_rows):
            sq_upper = kernels.sq_reach(tile.sq_positive, self.margin, self.distance)
            draws = None if uniform is None else uniform[tile.pair]
            negative, found = kernels.semi_hard(tile.sq_positive, sq_upper, tile.sq_negative, draws, depths=tile.depths)
            wanted = tile.is_positive & found
            in_window += wanted.sum()
            if self.fallback != "skip":
                negative = torch.where(found, negative, self._instead(tile)[:, None])
                wanted = tile.is_positive
            parts.append(_pick(tile, negative, wanted))
        pairs = identities.positives.sum()
        return Chosen(_joined(parts, batch), pairs, pairs - in_window)

    def _instead(self, tile: Tile) -> Tensor:
        if self.fallback == "hardest":
            return kernels.first_min(tile.sq_negative)
        return kernels.farthest(tile.sq_negative, tile.sq_negative.isfinite())


class BatchHardMiner(_Miner):
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

    def _choose(self, batch: Batch, identities: Identities) -> Chosen:
        has_positive, has_negative = identities.positives > 0, identities.negatives > 0
        parts = []
        for tile in kernels.tiles(batch, identities, self.distance, tile_rows=self.tile_rows):
            place = kernels.farthest(tile.sq_positive, tile.is_positive)
            positive = tile.same.gather(1, place[:, None])[:, 0]
            parts.append(Triplets(tile.anchors, positive, kernels.first_min(tile.sq_negative)))
        return Chosen(_joined(parts, batch), has_positive.sum(), (has_positive & ~has_negative).sum())


class DistanceWeightedMiner(_Miner):
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
        self.cutoff, self.nonzero_loss_cutoff = cutoff, nonzero_loss_cutoff
        self.fallback, self.generator = fallback, generator

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        cutoffs = f"cutoff={self.cutoff}, nonzero_loss_cutoff={self.nonzero_loss_cutoff}"
        return f"{cutoffs}, fallback={self.fallback!r}, normalize={self.normalize}"

    def _choose(self, batch: Batch, identities: Identities) -> Chosen:
        if not self.normalize:
            _check_unit(batch)
        uniform = _uniform(identities.pairs, batch, self.generator)
        parts, with_eligible = [], identities.size.new_zeros(())
        for tile in kernels.tiles(batch, identities, "euclidean", tile_rows=self.tile_rows):
            weights, eligible = self._weights(tile, batch.ref_emb.shape[1])
            draws, negative = uniform[tile.pair], torch.zeros_like(tile.same)
            # As many draws at a time as make their blocks no larger than the tile.
            at_once = weights.shape[1] // kernels.BLOCK
            for first in range(0, len(tile.depths), at_once):
                rows, columns = tile.depths[first], slice(first, first + at_once)
                negative[:rows, columns], _ = kernels.draw(weights[:rows], draws[:rows, columns])
            wanted = tile.is_positive & eligible[:, None]
            with_eligible += wanted.sum()
            parts.append(_pick(tile, negative, tile.is_positive if self.fallback == "uniform" else wanted))
        pairs = identities.positives.sum()
        return Chosen(_joined(parts, batch), pairs, pairs - with_eligible)

    def _weights(self, tile: Tile, dim: int) -> tuple[Tensor, Tensor]:
        """Weights (b, R') of the negatives, by distance or, if the fallback asks for it, equal; (b,) by distance."""
        negative = tile.sq_negative.isfinite() if self.fallback == "uniform" else None
        weights = kernels.distance_weights(
            tile.sq_negative, dim, cutoff=self.cutoff, nonzero_loss_cutoff=self.nonzero_loss_cutoff
        )
        eligible = weights.amax(dim=1) > 0
        if negative is not None:
            weights = torch.where(eligible[:, None], weights, negative.to(weights.dtype))
        return weights, eligible


class RandomMiner(_Miner):
    """Each ordered positive pair once, with a negative drawn with equal chances: what mining is to be measured against.

    generator: where draws come from, None for torch's global one.
    """

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        super().__init__(normalize=False)
        self.generator = generator

    def _choose(self, batch: Batch, identities: Identities) -> Chosen:
        anchor, positive = positive_pairs(batch, identities)
        negatives = identities.negatives[anchor]
        drawn = (_uniform(len(anchor), batch, self.generator) * negatives).long().clamp_max(negatives - 1)
        # Negatives are all references sorted by label except a run of the anchor's own identity: step over it.
        drawn += torch.where(drawn >= identities.first[anchor], identities.size[anchor], 0)
        kept = negatives > 0
        triplets = Triplets(anchor[kept], positive[kept], identities.by_label[drawn[kept]])
        return Chosen(triplets, identities.positives.sum(), (~kept).sum())


def _check_unit(batch: Batch) -> None:
    for rows, name in ((batch.embeddings, "embeddings"), (batch.ref_emb, "ref_emb")):
        lengths = rows.square().sum(dim=1).sqrt()
        wrong = ((lengths - 1.0).abs() > 0.01).nonzero()[:, 0]  # bfloat16 rounds a length by up to 0.4%
        if len(wrong):
            raise ValueError(
                f"{len(wrong)} of {len(rows)} rows of {name} are not of length 1 (first: row {int(wrong[0])}, length "
                f"{float(lengths[wrong[0]]):.3g}). Pass unit rows, or leave normalize=True."
            )


def _uniform(number: int, batch: Batch, generator: torch.Generator | None) -> Tensor:
    """(number,) float64 in [0, 1): one for each positive pair in row order, so that tiles do not change the draws."""
    device = batch.labels.device if generator is None else generator.device
    return torch.rand(number, dtype=torch.float64, device=device, generator=generator).to(batch.labels.device)


def _pick(tile: Tile, negative: Tensor, wanted: Tensor) -> Triplets:
    """Triplets of the pairs of a tile that are wanted. negative, wanted: (b, M)."""
    row, place = wanted.nonzero(as_tuple=True)
    return Triplets(tile.anchors[row], tile.same[row, place], negative[row, place])


def _joined(parts: list[Triplets], batch: Batch) -> Triplets:
    """The triplets of all tiles, anchors ascending."""
    nothing = batch.labels.new_empty(0, dtype=torch.long)
    columns = [torch.cat([nothing, *(part[i] for part in parts)]) for i in range(3)]
    order = columns[0].argsort(stable=True)  # positives of an anchor stay ascending
    return Triplets(*(column[order] for column in columns))
