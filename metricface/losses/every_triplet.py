"""The triplet loss over every triplet of a batch, none of them listed: one pass over the distances."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metricface.diagnostics import TripletSums, triplet_sums
from metricface.distances import Distance, paired
from metricface.identities import Identities
from metricface.losses.gathering import distance_matrix, on_anchors_side
from metricface.losses.positive_pairs import PairRun, sum_over_pairs
from metricface.losses.streaming import Distances, Gradients, Totals, streamed
from metricface.miners.tiles import Tile, tiles
from metricface.tuples import Batch

Margin = float | Literal["soft"]


def every_triplet(
    batch: Batch, identities: Identities, *, margin: Margin, squared: bool, tile_rows: int | None = None
) -> tuple[Tensor, TripletSums]:
    """Sum of the triplet loss over every (anchor, positive, negative), with its gradient, and what they are like.

    Cost beyond three products of a tile with the references: a few vectorised passes a positive.
    """

    def run(gradients: Gradients) -> Totals:
        total, sums = batch.embeddings.new_zeros((), dtype=torch.float64), nothing(batch)
        for tile in tiles(batch, identities, "euclidean", tile_rows=tile_rows):
            part, seen = _of_tile(gradients, tile, identities.negatives[tile.anchors], margin)
            total, sums = total + part, sums.plus(seen)
        return Totals(total, None, sums)

    return streamed(batch, run, squared=squared)


def every_swapped_triplet(
    batch: Batch, identities: Identities, *, margin: Margin, squared: bool, cosine: bool = False
) -> tuple[Tensor, TripletSums]:
    """As every_triplet, the negative's distance being that to the anchor or to the positive, whichever is smaller.

    cosine: whether the batch was made by `of_cosine`. Cost: products of every positive pair's two rows with the
    references.
    """
    distance: Distance = "squared_euclidean" if squared else "euclidean"

    def part(anchors: Tensor, positives: Tensor, references: Tensor, run: PairRun) -> tuple[Tensor, TripletSums]:
        d_ap = paired(anchors, positives, distance)[:, None]  # (c, 1)
        d_an = distance_matrix(anchors, references, distance)  # (c, R)
        d_pn = distance_matrix(on_anchors_side(positives) if cosine else positives, references, distance)
        d_an = torch.where(d_pn < d_an, d_pn, d_an)
        own = run.own.clamp_min(0)
        counted = torch.ones_like(d_an).scatter_reduce_(1, own, (run.own < 0).to(d_an.dtype), "amin") > 0
        violation = d_ap - d_an
        losses = F.softplus(violation) if margin == "soft" else (violation + margin).clamp_min(0.0)
        losses = torch.where(counted, losses, 0.0)
        seen = triplet_sums(
            d_ap.detach().expand_as(d_an), d_an.detach(), run.anchor.new_zeros(()), margin=margin, counted=counted
        )
        active = seen.active if margin == "soft" else (losses > 0).sum()
        return losses.sum(dim=1).double().sum(), seen._replace(active=active)

    total, runs = sum_over_pairs(batch, identities, part, width=len(batch.ref_labels))
    sums = nothing(batch)
    for seen in runs:
        sums = sums.plus(seen)
    return total, sums._replace(anchors=((identities.positives > 0) & (identities.negatives > 0)).sum())


def nothing(batch: Batch) -> TripletSums:
    """The sums over no triplet."""
    count, total = batch.self_index.new_zeros(()), batch.embeddings.new_zeros((), dtype=torch.float64)
    return TripletSums(count, count, count, count, total, total, count)


def _of_tile(gradients: Gradients, tile: Tile, negatives: Tensor, margin: Margin) -> tuple[Tensor, TripletSums]:
    """negatives: (b,), how many each anchor has, at least one."""
    d_ap = gradients.distances(tile.sq_positive)  # (b, M)
    # -inf where there is no positive: no triplet then has a loss, or is hard.
    least = torch.where(tile.is_positive, d_ap, -torch.inf)
    as_far = torch.where(tile.is_positive, gradients.distances(tile.sq_positive + tile.rounding), -torch.inf)
    losses, by_d_ap, hard = (torch.zeros_like(d_ap) for _ in range(3))  # (b, M) sums over negatives
    d_an = torch.zeros_like(d_ap[:, 0])  # (b,)
    for block in gradients.blocks(tile):
        d_an += block.sum_of_negatives(tile)
        block.by_dist.zero_()
        step = _soft if margin == "soft" else _hinge
        for j, rows in enumerate(tile.depths):
            place = slice(0, rows), j
            loss, slope = step(block, least[place], 0.0 if margin == "soft" else margin)
            losses[place] += loss
            by_d_ap[place] += slope
            hard[place] += torch.le(block.dist[:rows], as_far[place][:, None], out=block.work[:rows]).sum(dim=1)
    gradients.add_pairs(tile, tile.positive, d_ap, by_d_ap)
    formed = tile.is_positive * negatives[:, None]  # (b, M) triplets of each pair
    active = formed if margin == "soft" else by_d_ap.long()  # a hinge's derivative counts
    hard = hard.long()
    sums = TripletSums(
        triplets=formed.sum(),
        active=active.sum(),
        hard=hard.sum(),
        semi_hard=(active - hard).clamp_min(0).sum(),
        d_ap=(formed * d_ap.double()).sum(),
        d_an=(tile.is_positive.sum(dim=1) * d_an.double()).sum(),
        anchors=tile.anchors.new_full((), len(tile.anchors)),
    )
    return losses.double().sum(), sums


def _hinge(block: Distances, d_ap: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Of one positive of each anchor (rows,): the sum of losses and how many exceed 0, over a block's negatives."""
    rows = len(d_ap)
    work = torch.sub((d_ap + margin)[:, None], block.dist[:rows], out=block.work[:rows]).clamp_min_(0.0)
    losses = work.sum(dim=1)
    active = work.sign_()
    block.by_dist[:rows] -= active
    return losses, active.sum(dim=1)


def _soft(block: Distances, d_ap: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """As _hinge, with the soft margin: the sum of losses and of their derivatives."""
    rows = len(d_ap)
    work = torch.sub(d_ap[:, None], block.dist[:rows], out=block.work[:rows])
    losses = F.softplus(work).sum(dim=1)
    slope = work.sigmoid_()
    block.by_dist[:rows] -= slope
    return losses, slope.sum(dim=1)
