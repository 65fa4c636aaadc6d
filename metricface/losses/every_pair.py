"""The contrastive and the margin-based loss over every pair of a batch, in one pass, none of them listed."""

from typing import NamedTuple

import torch
from torch import Tensor

from metricface.identities import Identities
from metricface.losses.streaming import Gradients, Totals, streamed
from metricface.miners.tiles import Tile, tiles
from metricface.tuples import Batch


class PairSums(NamedTuple):
    """Of the pairs looked at, 0-dim: how many there are, how many have a loss, and the sums of their distances.

    positives, negatives: int64, ordered pairs. active_positives, active_negatives: int64, each pair counted as often as
    the loss counts it. d_ap, d_an: float64 sums over pairs.
    """

    positives: Tensor
    negatives: Tensor
    active_positives: Tensor
    active_negatives: Tensor
    d_ap: Tensor
    d_an: Tensor

    def statistics(self) -> dict[str, Tensor]:
        """Named scalars, 0-dim: numbers of pairs, mean distances, and the share of pairs with a loss; NaN of none."""
        return {
            "positive_pairs": self.positives.double(),
            "negative_pairs": self.negatives.double(),
            "active_positive_share": self.active_positives / self.positives,
            "active_negative_share": self.active_negatives / self.negatives,
            "d_ap_mean": self.d_ap / self.positives,
            "d_an_mean": self.d_an / self.negatives,
        }


class _Part(NamedTuple):
    total: Tensor  # 0-dim
    sums: PairSums
    by_beta: Tensor | None = None  # (b,)


def every_contrastive_pair(
    batch: Batch, identities: Identities, *, margin: float, tile_rows: int | None = None
) -> tuple[Tensor, PairSums]:
    """Sum of the contrastive loss over every ordered pair, on Euclidean distances, with its gradient."""

    def run(gradients: Gradients) -> Totals:
        anchors = ((identities.positives > 0) | (identities.negatives > 0)).nonzero()[:, 0]
        total, sums = batch.embeddings.new_zeros((), dtype=torch.float64), _nothing(batch)
        for tile in tiles(batch, identities, "euclidean", anchors, tile_rows=tile_rows):
            part = _contrastive(gradients, tile, margin)
            total, sums = total + part.total, _plus(sums, part.sums)
        every = sums._replace(positives=identities.positives.sum(), negatives=identities.negatives.sum())
        return Totals(total, None, every)

    return streamed(batch, run, squared=False)


def _contrastive(gradients: Gradients, tile: Tile, margin: float) -> _Part:
    sums = _nothing_of(tile)
    total = sums.d_ap
    for block in gradients.blocks(tile):
        d_an = block.sum_of_negatives(tile).double().sum()
        short = torch.neg(block.dist, out=block.work).add_(margin).clamp_min_(0.0)
        torch.neg(short, out=block.by_dist)
        total = total + 0.5 * short.square().sum(dim=1).double().sum()
        active = short.sign_().sum(dim=1).long().sum()
        sums = sums._replace(d_an=sums.d_an + d_an, active_negatives=sums.active_negatives + active)
    d_ap = torch.where(tile.is_positive, gradients.distances(tile.sq_positive), 0.0)  # (b, M)
    gradients.add_pairs(tile, tile.positive, d_ap, d_ap)
    total = total + 0.5 * d_ap.square().double().sum()
    sums = sums._replace(d_ap=d_ap.double().sum(), active_positives=(d_ap > 0).sum())
    return _Part(total, sums)


def every_margin_based_pair(
    batch: Batch,
    identities: Identities,
    beta: Tensor,
    of_positive: Tensor,
    of_negative: Tensor,
    *,
    alpha: float,
    nu: float,
    tile_rows: int | None = None,
) -> tuple[Tensor, PairSums]:
    """Sum of the margin-based loss over every ordered pair, on Euclidean distances, with its gradient.

    beta: (B,) the boundary of each anchor, with gradient. of_positive, of_negative: (B,) int64, how often each positive
    pair and each negative pair of an anchor counts. nu x beta is added for each anchor as often as its positive pairs
    count, all together.
    """
    regularised = nu * (of_positive * identities.positives).to(beta.dtype)  # (B,)
    extra = beta.detach()

    def run(gradients: Gradients) -> Totals:
        anchors = ((identities.positives * of_positive > 0) | (identities.negatives * of_negative > 0)).nonzero()[:, 0]
        total, sums = (regularised * extra).double().sum(), _nothing(batch)
        by_beta = regularised.clone()
        for tile in tiles(batch, identities, "euclidean", anchors, tile_rows=tile_rows):
            rows = tile.anchors
            part = _margin_based(gradients, tile, extra[rows], of_positive[rows], of_negative[rows], alpha)
            total, sums = total + part.total, _plus(sums, part.sums)
            assert part.by_beta is not None
            by_beta.index_add_(0, rows, part.by_beta)
        every = sums._replace(positives=identities.positives.sum(), negatives=identities.negatives.sum())
        return Totals(total, by_beta, every)

    return streamed(batch, run, squared=False, extra=beta)


def _margin_based(
    gradients: Gradients, tile: Tile, beta: Tensor, of_positive: Tensor, of_negative: Tensor, alpha: float
) -> _Part:
    sums = _nothing_of(tile)
    total = sums.d_ap
    reach = (alpha + beta)[:, None]  # (b, 1)
    weight = of_negative.to(beta.dtype)[:, None]
    by_beta = torch.zeros_like(beta)
    for block in gradients.blocks(tile):
        d_an = block.sum_of_negatives(tile).double().sum()
        short = torch.sub(reach, block.dist, out=block.work).clamp_min_(0.0)
        total = total + (short.sum(dim=1).double() * of_negative).sum()
        active = short.sign_().sum(dim=1)  # (b,)
        torch.mul(short, -weight, out=block.by_dist)
        by_beta += active * of_negative
        counted = (active.long() * of_negative).sum()
        sums = sums._replace(d_an=sums.d_an + d_an, active_negatives=sums.active_negatives + counted)
    d_ap = torch.where(tile.is_positive, gradients.distances(tile.sq_positive), 0.0)  # (b, M)
    over = torch.where(tile.is_positive, alpha + d_ap - beta[:, None], 0.0).clamp_min(0.0)
    counts = (over > 0) * of_positive[:, None]  # (b, M) int64
    gradients.add_pairs(tile, tile.positive, d_ap, counts.to(d_ap.dtype))
    total = total + (over.sum(dim=1).double() * of_positive).sum()
    sums = sums._replace(d_ap=d_ap.double().sum(), active_positives=counts.sum())
    return _Part(total, sums, by_beta - counts.sum(dim=1))


def _nothing(batch: Batch) -> PairSums:
    count, total = batch.self_index.new_zeros(()), batch.embeddings.new_zeros((), dtype=torch.float64)
    return PairSums(count, count, count, count, total, total)


def _nothing_of(tile: Tile) -> PairSums:
    count, total = tile.anchors.new_zeros(()), tile.sq_positive.new_zeros((), dtype=torch.float64)
    return PairSums(count, count, count, count, total, total)


def _plus(one: PairSums, other: PairSums) -> PairSums:
    return PairSums(*(a + b for a, b in zip(one, other, strict=True)))
