"""Losses that mine for themselves: mining, loss and gradient in one pass, without a list of triplets or pairs.

BatchAllTripletLoss(margin=0.2)(embeddings, labels) is BatchAllMiner and TripletLoss together, and so on: the same
value, in a few times the time of the matrix product and in memory that does not grow with the number of triplets (see
examples/guides/mining.md for figures). At a hinge that is exactly 0 the derivative is taken as 0. Each takes ref_emb,
ref_labels and self_index as the miners do, with gradients for both sides, so a memory or other ranks' embeddings may be
mined too. None has a `swap`: what is mined is chosen around the anchor. After a call `last` says what mining saw: named
0-dim tensors, as in metricface.diagnostics, collected without waiting for the device.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from metricface.choices import check_choice, is_number
from metricface.diagnostics import TripletSums, triplet_sums
from metricface.distances import Distance
from metricface.identities import Identities, find_identities
from metricface.losses.contrastive import ContrastiveLoss, ContrastiveReduction
from metricface.losses.every_pair import PairSums, every_contrastive_pair, every_margin_based_pair
from metricface.losses.every_triplet import Margin, every_triplet, nothing
from metricface.losses.margin_based import MarginBasedLoss
from metricface.losses.streaming import Gradients, Totals, streamed
from metricface.losses.triplet import TripletLoss, TripletReduction, triplet
from metricface.miners import kernels
from metricface.miners.semi_hard import SemiHardFallback
from metricface.miners.tiles import Tile, check_tile_rows, tiles
from metricface.tuples import Batch


class _Mining(nn.Module):
    """Before a loss in the order of bases: it mines for itself, and says what it saw."""

    last: dict[str, Tensor] | None = None

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        self_index: Tensor | None = None,
    ) -> Tensor:
        """Loss of a batch: a scalar in float32 (float64 for float64 embeddings).

        embeddings: (B, D); labels: (B,) integers; ref_emb (R, D), ref_labels (R,), self_index (B,): as the miners take
        them. indices_tuple: None; it is there so that pytorch-metric-learning's MultipleLosses can call this. No
        triplet or pair at all: 0, with gradient 0. Raises ValueError for malformed or non-finite input and for a tuple.
        """
        if indices_tuple is not None:
            raise ValueError(
                f"{type(self).__name__} mines for itself and takes no miner's tuple; found one of {len(indices_tuple)} "
                "tensors. Leave the miner out, or use TripletLoss, ContrastiveLoss or MarginBasedLoss with it."
            )
        value: Tensor = super().forward(embeddings, labels, None, ref_emb, ref_labels, self_index=self_index)
        return value


class _MinedTripletLoss(_Mining, TripletLoss):
    """A triplet loss that chooses its triplets itself."""

    def __init__(
        self,
        margin: Margin = 0.2,
        *,
        distance: Distance = "squared_euclidean",
        normalize: bool = True,
        reduction: TripletReduction = "mean",
        tile_rows: int | None = None,
    ) -> None:
        super().__init__(margin, distance=distance, normalize=normalize, reduction=reduction)
        check_tile_rows(tile_rows)
        self.tile_rows = tile_rows

    def _without_tuple(self, batch: Batch) -> tuple[Tensor, TripletSums]:
        identities = find_identities(batch)
        total, sums = self._mine(batch, identities)
        self.last = sums.statistics((identities.positives > 0).sum()) | _without_partner(identities)
        self.last |= {
            "anchors_dropped": ((identities.positives > 0) & (identities.negatives > 0)).sum() - sums.anchors,
        }
        return total, sums

    @abstractmethod
    def _mine(self, batch: Batch, identities: Identities) -> tuple[Tensor, TripletSums]:
        """The sum of losses, differentiable, and what the triplets are like."""


class BatchAllTripletLoss(_MinedTripletLoss):
    """The triplet loss over every triplet of a batch, by default averaged over those with a loss.

    margin, distance, normalize, reduction: as in TripletLoss, whose indices_tuple=None this is, with reduction="active"
    as Hermans et al. recommend (the mean over all triplets vanishes as training goes on); theirs is
    distance="euclidean", normalize=False. tile_rows: anchors worked on at a time, None to choose by size and device.
    Source: Hermans, Beyer and Leibe 2017, In Defense of the Triplet Loss, section 2.
    """

    def __init__(
        self,
        margin: Margin = 0.2,
        *,
        distance: Distance = "squared_euclidean",
        normalize: bool = True,
        reduction: TripletReduction = "active",
        tile_rows: int | None = None,
    ) -> None:
        super().__init__(margin, distance=distance, normalize=normalize, reduction=reduction, tile_rows=tile_rows)

    def _mine(self, batch: Batch, identities: Identities) -> tuple[Tensor, TripletSums]:
        return every_triplet(batch, identities, margin=self.margin, squared=self._squared, tile_rows=self.tile_rows)


class _Choice(NamedTuple):
    """Triplets of a tile: the place of each in `positive`, its negative, and whether it counts. (b, m) each."""

    place: Tensor
    negative: Tensor
    counted: Tensor


class _ChoosingTripletLoss(_MinedTripletLoss):
    """A triplet loss on at most one triplet for each positive pair."""

    def _mine(self, batch: Batch, identities: Identities) -> tuple[Tensor, TripletSums]:
        def run(gradients: Gradients) -> Totals:
            total, sums = batch.embeddings.new_zeros((), dtype=torch.float64), nothing(batch)
            for tile in tiles(batch, identities, self._euclidean, tile_rows=self.tile_rows):
                part, seen = self._of_tile(gradients, tile)
                total, sums = total + part, sums.plus(seen)
            return Totals(total, None, sums)

        return streamed(batch, run, squared=self._squared)

    def _of_tile(self, gradients: Gradients, tile: Tile) -> tuple[Tensor, TripletSums]:
        place, negative, counted = self._choose(tile)
        # Both distances of rows subtracted: the value and the gradient of a miner and a loss, to the bit or nearly.
        d_ap = gradients.distances(tile.sq_positive.gather(1, place))
        d_an = gradients.distances(tile.sq_distances(negative))
        losses = triplet(d_ap, d_an, margin=self.margin) * counted
        slope = counted * (torch.sigmoid(d_ap - d_an) if self.margin == "soft" else (losses > 0).to(d_ap.dtype))
        gradients.add_pairs(tile, tile.positive.gather(1, place), d_ap, slope)
        gradients.add_pairs(tile, negative, d_an, -slope)
        sums = triplet_sums(d_ap, d_an, counted.any(dim=1).sum(), margin=self.margin, counted=counted)
        sums = sums._replace(d_ap=sums.d_ap.double(), d_an=sums.d_an.double())
        if self.margin != "soft":  # as the reduction counts
            sums = sums._replace(active=(losses > 0).sum())
        return losses.double().sum(), sums

    @abstractmethod
    def _choose(self, tile: Tile) -> _Choice:
        """The triplets of a tile."""


class BatchHardTripletLoss(_ChoosingTripletLoss):
    """The triplet loss of each anchor with its farthest positive and its closest negative.

    margin, distance, normalize, reduction: as in TripletLoss; Hermans et al. have margin="soft", distance="euclidean",
    normalize=False, and the mean over anchors. Same value as BatchHardMiner and TripletLoss. tile_rows: anchors worked
    on at a time, None to choose by size and device.
    Source: Hermans, Beyer and Leibe 2017, In Defense of the Triplet Loss, section 2.
    """

    def _choose(self, tile: Tile) -> _Choice:
        place = kernels.farthest(tile.sq_positive, tile.is_positive)[:, None]
        negative = kernels.nearest(tile).column[:, None]
        return _Choice(place, negative, torch.ones_like(negative, dtype=torch.bool))


class SemiHardTripletLoss(_ChoosingTripletLoss):
    """The triplet loss of each ordered positive pair with its closest semi-hard negative.

    margin, distance, normalize, reduction: as in TripletLoss. window: how far beyond the positive a negative may lie,
    in the loss's distance; by default the margin, and no limit for margin="soft". fallback: as in SemiHardMiner. Same
    value as SemiHardMiner(window, fallback=..., distance=...) and TripletLoss. tile_rows: anchors worked on at a time.
    Source: Schroff et al. 2015, FaceNet, section 3.2.
    """

    def __init__(
        self,
        margin: Margin = 0.2,
        *,
        window: float | None = None,
        fallback: SemiHardFallback = "skip",
        distance: Distance = "squared_euclidean",
        normalize: bool = True,
        reduction: TripletReduction = "mean",
        tile_rows: int | None = None,
    ) -> None:
        super().__init__(margin, distance=distance, normalize=normalize, reduction=reduction, tile_rows=tile_rows)
        check_choice("fallback", fallback, get_args(SemiHardFallback))
        self.window, self.fallback = window, fallback
        reach = self._reach
        if not is_number(reach, infinite=True) or reach <= 0:
            raise ValueError(
                f"SemiHardTripletLoss needs a window > 0, maybe infinite; found {reach!r} (by default the margin)."
            )

    @property
    def _reach(self) -> float:
        """The window; without one of its own the margin as it is now, which a schedule may have changed."""
        if self.window is not None:
            return self.window
        return torch.inf if self.margin == "soft" else self.margin

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        return f"{super().extra_repr()}, window={self.window}, fallback={self.fallback!r}"

    def _choose(self, tile: Tile) -> _Choice:
        sq_upper = kernels.sq_reach(tile.sq_positive, self._reach, self._euclidean)
        state = kernels.SemiHard(tile.sq_positive, sq_upper, tile.depths, rounding=tile.rounding)
        instead = kernels.instead(tile, self.fallback)
        for block in tile.blocks():
            state.see(block)
            if instead is not None:
                instead.see(block)
        place = torch.arange(tile.positive.shape[1], device=tile.positive.device).expand_as(tile.positive)
        if instead is None:
            return _Choice(place, state.column, tile.is_positive & state.found)
        return _Choice(place, torch.where(state.found, state.column, instead.column[:, None]), tile.is_positive)


class AllPairsContrastiveLoss(_Mining, ContrastiveLoss):
    """The contrastive loss over every ordered pair of a batch: ContrastiveLoss without a tuple, and `last`.

    margin, normalize, reduction: as there. tile_rows: anchors worked on at a time, None to choose by size and device.
    Source: Hadsell, Chopra, LeCun 2006, Dimensionality Reduction by Learning an Invariant Mapping, eq. 4.
    """

    def __init__(
        self,
        margin: float = 1.0,
        *,
        normalize: bool = False,
        reduction: ContrastiveReduction = "mean",
        tile_rows: int | None = None,
    ) -> None:
        super().__init__(margin, normalize=normalize, reduction=reduction)
        check_tile_rows(tile_rows)
        self.tile_rows = tile_rows

    def _without_tuple(self, batch: Batch) -> tuple[Tensor, PairSums]:
        identities = find_identities(batch)
        total, sums = every_contrastive_pair(batch, identities, margin=self.margin, tile_rows=self.tile_rows)
        self.last = sums.statistics() | _without_partner(identities)
        return total, sums


class AllPairsMarginBasedLoss(_Mining, MarginBasedLoss):
    """The margin-based loss over every ordered pair of a batch, each once.

    (sum of [alpha + d_ap - beta]+ over positive pairs + sum of [alpha + beta - d_an]+ over negative pairs + nu x sum
    of beta over positive pairs) / (pairs with a loss). MarginBasedLoss without a tuple counts a pair once for each
    triplet it is in: positive pairs then weigh more. num_classes, alpha, beta, nu, learn_beta: as there. tile_rows:
    anchors worked on at a time, None to choose by size and device.
    Source: Wu et al. 2017, Sampling Matters in Deep Embedding Learning, eq. 4, without their sampling.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        alpha: float = 0.2,
        beta: float = 1.2,
        nu: float = 0.0,
        learn_beta: bool = True,
        tile_rows: int | None = None,
    ) -> None:
        super().__init__(num_classes, alpha=alpha, beta=beta, nu=nu, learn_beta=learn_beta)
        check_tile_rows(tile_rows)
        self.tile_rows = tile_rows

    def _without_tuple(self, batch: Batch, beta: Tensor) -> tuple[Tensor, PairSums]:
        identities, once = find_identities(batch), torch.ones_like(batch.self_index)
        total, sums = every_margin_based_pair(
            batch, identities, beta, once, once, alpha=self.alpha, nu=self.nu, tile_rows=self.tile_rows
        )
        self.last = sums.statistics() | _without_partner(identities)
        return total, sums


def _without_partner(identities: Identities) -> dict[str, Tensor]:
    return {
        "anchors_without_positive": (identities.positives == 0).sum(),
        "anchors_without_negative": (identities.negatives == 0).sum(),
    }
