"""Losses that compare an anchor's positives, as a set, with its negatives: two log-sum-exps an anchor.

Lifted structure, multi-similarity and circle loss differ in what stands in the exponents, a function of a distance, and
in how the two sums become one loss. Without a tuple the sums run over all references, block by block: a running
maximum and a running sum. Their gradient needs that of each sum first, so the backward pass makes the blocks once more;
nothing is kept for it but the embeddings and two numbers an anchor.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metricface.distances import Distance, without_autocast
from metricface.identities import Identities, find_identities
from metricface.losses.gathering import distances_of, of_cosine
from metricface.losses.reduction import mean_over
from metricface.losses.segments import as_sets, segment_logsumexp
from metricface.losses.streaming import Gradients
from metricface.miners.tiles import Tile, tiles
from metricface.tuples import Batch, as_pairs, check_batch

# exp(-60) is below the rounding of a sum that is at least 1, and exp of less is 10 times as slow on a CPU.
LEAST_EXPONENT = -60.0


class Exponent(ABC):
    """What stands in an exponent: a function of the distance to a positive, or to a negative, elementwise."""

    @abstractmethod
    def value(self, dist: Tensor, out: Tensor) -> Tensor:
        """Write the exponents into `out` and return it. Of negatives: -inf at an infinite distance."""

    @abstractmethod
    def times_slope(self, weight: Tensor, dist: Tensor, work: Tensor) -> Tensor:
        """Multiply `weight`, in place, by the derivative, which is finite everywhere. `work` is free to use."""

    def of(self, dist: Tensor) -> Tensor:
        """The exponents as a differentiable function of finite distances, of any shape."""
        fixed = dist.detach()
        slope = self.times_slope(torch.ones_like(fixed), fixed, torch.empty_like(fixed))
        # Every exponent here is linear in the distance, but for weights that have no gradient.
        return self.value(fixed, torch.empty_like(fixed)) + slope * (dist - fixed)


class Linear(Exponent):
    """offset + slope x distance."""

    def __init__(self, offset: float, slope: float) -> None:
        self.offset, self.slope = offset, slope

    def value(self, dist: Tensor, out: Tensor) -> Tensor:
        """As in Exponent."""
        return torch.mul(dist, self.slope, out=out).add_(self.offset)

    def times_slope(self, weight: Tensor, dist: Tensor, work: Tensor) -> Tensor:
        """As in Exponent."""
        return weight.mul_(self.slope)


class Exponents(NamedTuple):
    """Those of the positives and of the negatives; squared: whether they are functions of the squared distance."""

    positive: Exponent
    negative: Exponent
    squared: bool

    def of(self, d_ap: Tensor, d_an: Tensor) -> "Sets":
        """Of one anchor's positives and negatives: (..., K) and (..., L) distances -> (...)."""
        return Sets(self.positive.of(d_ap).logsumexp(dim=-1), self.negative.of(d_an).logsumexp(dim=-1))


class Sets(NamedTuple):
    """(B,) log-sum-exp over each anchor's positives and over its negatives: -inf of none."""

    positive: Tensor
    negative: Tensor

    @property
    def has_both(self) -> Tensor:
        """(B,) bool: anchors with a positive and a negative."""
        return (self.positive > -torch.inf) & (self.negative > -torch.inf)


def every_set(batch: Batch, identities: Identities, exponents: Exponents, anchors: Tensor) -> Sets:
    """The two sums over all references, differentiable, for the anchors (A,) int64; -inf for others."""
    with without_autocast(batch.embeddings):
        sums = _EverySet.apply(  # type: ignore[no-untyped-call]
            batch, identities, exponents, anchors, batch.embeddings, batch.ref_emb
        )
    return Sets(*sums)


def listed_sets(batch: Batch, indices_tuple: Sequence[Tensor], exponents: Exponents) -> Sets:
    """The two sums over a miner's pairs, or the pairs of its triplets, each pair once."""
    number = len(batch.ref_labels)
    pairs = as_sets(as_pairs(indices_tuple, batch.labels, batch.ref_labels), number)
    distance: Distance = "squared_euclidean" if exponents.squared else "euclidean"
    sums = (
        segment_logsumexp(exponent.of(distances_of(batch, anchor, other, distance)), anchor, len(batch.labels))
        for exponent, anchor, other in (
            (exponents.positive, pairs.positive_anchor, pairs.positive),
            (exponents.negative, pairs.negative_anchor, pairs.negative),
        )
    )
    return Sets(*sums)


class _EverySet(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        batch: Batch,
        identities: Identities,
        exponents: Exponents,
        anchors: Tensor,
        embeddings: Tensor,
        ref_emb: Tensor,
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (embeddings.new_full((len(embeddings),), -torch.inf) for _ in range(2))
        gradients = Gradients(batch, squared=exponents.squared, wanted=(False, False))
        for tile in tiles(batch, identities, "euclidean", anchors):
            positive[tile.anchors] = _of_positives(gradients, tile, exponents.positive)[0].logsumexp(dim=1)
            has_negative = identities.negatives[tile.anchors] > 0
            sums = _over_negatives(gradients, tile, exponents.negative)
            negative[tile.anchors] = torch.where(has_negative, sums, -torch.inf)
        ctx.save_for_backward(embeddings, ref_emb, positive, negative)
        ctx.batch, ctx.identities, ctx.exponents, ctx.anchors = batch, identities, exponents, anchors
        return positive, negative

    @staticmethod
    def backward(ctx: Any, by_positive: Tensor, by_negative: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # what is computed here has no graph: a second derivative would be 0
            raise RuntimeError(
                "A loss over every pair can be differentiated only once; found create_graph=True. Use a miner and a "
                "loss on its tuples, which can be differentiated twice."
            )
        embeddings, ref_emb, positive, negative = ctx.saved_tensors
        shared = ctx.batch.embeddings is ctx.batch.ref_emb
        batch = ctx.batch._replace(embeddings=embeddings, ref_emb=embeddings if shared else ref_emb)
        exponents: Exponents = ctx.exponents
        gradients = Gradients(batch, squared=exponents.squared, wanted=ctx.needs_input_grad[-2:])
        # An empty set has no gradient; its -inf must not meet another.
        by_positive, by_negative = (
            torch.where(total > -torch.inf, by, 0.0) for total, by in ((positive, by_positive), (negative, by_negative))
        )
        positive, negative = (torch.where(total > -torch.inf, total, 0.0) for total in (positive, negative))
        with without_autocast(embeddings):
            for tile in tiles(batch, ctx.identities, "euclidean", ctx.anchors):
                rows = tile.anchors
                _add_positives(gradients, tile, exponents.positive, positive[rows], by_positive[rows])
                _add_negatives(gradients, tile, exponents.negative, negative[rows], by_negative[rows])
        return None, None, None, None, *gradients.result()


def _of_positives(gradients: Gradients, tile: Tile, exponent: Exponent) -> tuple[Tensor, Tensor]:
    """(b, M) exponents, -inf where there is no positive, and distances."""
    dist = gradients.distances(tile.sq_positive)
    return torch.where(tile.is_positive, exponent.value(dist, torch.empty_like(dist)), -torch.inf), dist


def _over_negatives(gradients: Gradients, tile: Tile, exponent: Exponent) -> Tensor:
    """(b,) log-sum-exp over negatives; means nothing where there is none."""
    # The lowest number and not -inf, so that blocks without a negative are scaled and not NaN.
    least = torch.finfo(tile.sq_positive.dtype).min
    top = tile.sq_positive.new_full((len(tile.anchors),), least)
    total = torch.zeros_like(top)
    for block in gradients.blocks(tile):
        values = exponent.value(block.dist, block.work)
        before, top = top, torch.maximum(top, values.amax(dim=1))
        some = values.sub_(top[:, None]).clamp_min_(LEAST_EXPONENT).exp_().sum(dim=1)
        total = total * (before - top).exp() + some
    return top + total.log()


def _add_positives(gradients: Gradients, tile: Tile, exponent: Exponent, total: Tensor, by_total: Tensor) -> None:
    """total: (b,) the log-sum-exp; by_total: (b,) derivative of the loss with respect to it."""
    values, dist = _of_positives(gradients, tile, exponent)
    weight = (values - total[:, None]).exp() * by_total[:, None]  # (b, M)
    gradients.add_pairs(tile, tile.positive, dist, exponent.times_slope(weight, dist, torch.empty_like(dist)))


def _add_negatives(gradients: Gradients, tile: Tile, exponent: Exponent, total: Tensor, by_total: Tensor) -> None:
    for block in gradients.blocks(tile):
        weight = exponent.value(block.dist, block.by_dist).sub_(total[:, None]).clamp_min_(LEAST_EXPONENT).exp_()
        exponent.times_slope(weight.mul_(by_total[:, None]), block.dist, block.work)


class SetLoss(nn.Module, ABC):
    """A loss of each anchor, made of the log-sum-exp over its positives and that over its negatives.

    cosine: exponents are functions of 1 - cosine; otherwise of the Euclidean distance. normalize: scale rows to length
    1 first. needs_both: an anchor without a positive or without a negative has no loss and is not counted; otherwise
    the mean is over all B.
    """

    cosine = False
    normalize = False
    needs_both = True

    @abstractmethod
    def _exponents(self) -> Exponents:
        """What the sums are over."""

    @abstractmethod
    def _losses(self, sets: Sets) -> Tensor:
        """(B,), 0 for anchors that have none, also in their gradient."""

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

        embeddings: (B, D); labels: (B,) integers; indices_tuple: a miner's 4-tuple of pairs or 3-tuple of triplets,
        taken as sets of pairs (what is repeated counts once), None for every pair of the batch, or of an anchor and a
        reference where ref_emb (R, D) and ref_labels (R,) are given. self_index: as the miners take it; matters only
        for None. No pair at all: 0, with gradient 0. Raises ValueError for malformed or non-finite input.
        """
        batch = check_batch(embeddings, labels, ref_emb, ref_labels, self_index, normalize=self.normalize)
        if self.cosine:
            batch = of_cosine(batch)
        if indices_tuple is None:
            identities = find_identities(batch)
            positives, negatives = identities.positives > 0, identities.negatives > 0
            anchors = (positives & negatives if self.needs_both else positives | negatives).nonzero()[:, 0]
            sets = every_set(batch, identities, self._exponents(), anchors)
        else:
            sets = listed_sets(batch, indices_tuple, self._exponents())
        losses = self._losses(sets)
        number = sets.has_both.sum() if self.needs_both else losses.new_full((), len(losses), dtype=torch.long)
        return mean_over(losses.sum(), number)
