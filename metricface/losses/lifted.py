"""Lifted structure losses: all negatives at once, through a smooth minimum of their distances."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metricface.choices import is_number
from metricface.identities import Identities, find_identities
from metricface.losses.anchor_sets import Exponents, Linear, SetLoss, Sets, every_set
from metricface.losses.gathering import distances_of, of_references
from metricface.losses.reduction import mean_over
from metricface.losses.segments import by_positive_pair, segment_logsumexp
from metricface.losses.streaming import Gradients, Totals, streamed
from metricface.miners.tiles import tiles
from metricface.tuples import Batch, as_triplets, check_batch


def generalized_lifted_structure(d_ap: Tensor, d_an: Tensor, *, margin: float) -> Tensor:
    """Generalised lifted structure loss of each anchor, unreduced.

    d_ap: (..., K) distances of an anchor to its positives; d_an: (..., L) to its negatives.
    Returns (...): [ln sum exp(d_ap) + ln sum exp(margin - d_an)]+, 0 where K or L is 0.
    Source: Hermans, Beyer, Leibe 2017, In Defense of the Triplet Loss, eq. 7.
    """
    return _losses(_exponents(margin).of(d_ap, d_an))


def lifted_structure(d_ap: Tensor, negatives: Tensor) -> Tensor:
    """Lifted structure loss of each positive pair, unreduced.

    d_ap: its distance; negatives: the log-sum-exp of margin - distance over the negatives of both its ends, of one
    shape. Returns 1/2 [d_ap + negatives]+^2: half of the square, so that the mean over pairs is the paper's loss.
    Source: Song et al. 2016, Deep Metric Learning via Lifted Structured Feature Embedding.
    """
    return 0.5 * (d_ap + negatives).clamp_min(0.0).square()


def _exponents(margin: float) -> Exponents:
    return Exponents(Linear(0.0, 1.0), Linear(margin, -1.0), squared=False)


def _losses(sets: Sets) -> Tensor:
    return (sets.positive + sets.negative).clamp_min(0.0)


def _checked(margin: float) -> float:
    if not is_number(margin):
        raise ValueError(f"margin must be a finite number, a distance; got {margin!r}.")
    return margin


class GeneralizedLiftedStructureLoss(SetLoss):
    """Hermans et al.'s generalised lifted structure loss, over all positives and all negatives of an anchor.

    Distance: Euclidean, not squared. Normalisation: none by definition (`normalize=True` scales embeddings to length 1
    first). Reduction: the mean over anchors that have a positive and a negative, losses of 0 included; others have no
    loss. In a P x K batch that is the paper's 1/(PK).

    pytorch-metric-learning's loss of this name normalises by default, and gives an anchor without positives the loss
    [ln sum exp(margin - d_an)]+, one without negatives [ln sum exp(d_ap)]+, and counts both.
    Source: Hermans, Beyer, Leibe 2017, In Defense of the Triplet Loss, eq. 7.
    """

    def __init__(self, margin: float = 1.0, *, normalize: bool = False) -> None:
        super().__init__()
        self.margin, self.normalize = _checked(margin), normalize

    def _exponents(self) -> Exponents:
        return _exponents(self.margin)

    def _losses(self, sets: Sets) -> Tensor:
        return _losses(sets)

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        return f"margin={self.margin}, normalize={self.normalize}"


class LiftedStructureLoss(nn.Module):
    """Song et al.'s lifted structure loss: each positive pair against the negatives of both its ends.

    Distance: Euclidean, not squared. Normalisation: none by definition (`normalize=True` scales embeddings to length 1
    first). J = d_ap + ln(sum exp(margin - d_an) + sum exp(margin - d_pn)). Reduction: the mean over positive pairs of
    1/2 [J]+^2, the paper's 1/(2|P|) sum of [J]+^2: losses of 0 are counted, pairs whose ends have no negative are not.
    With ref_emb a pair is an anchor and a reference, and both have their negatives among the references.

    pytorch-metric-learning's loss of this name normalises by default. On unnormalised rows and all pairs of a batch it
    is this one; of a miner's pairs it gives each end those listed for that end as an anchor, and with separate
    references it compares row numbers of references with those of anchors.
    Source: Song et al. 2016, Deep Metric Learning via Lifted Structured Feature Embedding.
    """

    def __init__(self, margin: float = 1.0, *, normalize: bool = False) -> None:
        super().__init__()
        self.margin, self.normalize = _checked(margin), normalize

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

        embeddings: (B, D); labels: (B,) integers; indices_tuple: a miner's 3-tuple of triplets or 4-tuple of pairs
        (joined on the anchor), what is repeated counting once: the negatives of an anchor and its positive, seen from
        both. None for every pair of the batch, or of an anchor and a reference where ref_emb (R, D) and ref_labels (R,)
        are given. self_index: as the miners take it; matters only for None. No pair at all: 0, with gradient 0. Raises
        ValueError for malformed or non-finite input.
        """
        batch = check_batch(embeddings, labels, ref_emb, ref_labels, self_index, normalize=self.normalize)
        if indices_tuple is None:
            return self._every_pair(batch)
        triplets = as_triplets(indices_tuple, batch.labels, batch.ref_labels)
        pairs = by_positive_pair(triplets, len(batch.ref_labels))
        d_an = distances_of(batch, pairs.anchor[pairs.pair], pairs.negative, "euclidean")  # (T,)
        d_pn = distances_of(of_references(batch), pairs.positive[pairs.pair], pairs.negative, "euclidean")
        exponents = self.margin - torch.cat([d_an, d_pn])
        negatives = segment_logsumexp(exponents, torch.cat([pairs.pair, pairs.pair]), len(pairs.anchor))  # (P,)
        losses = lifted_structure(distances_of(batch, pairs.anchor, pairs.positive, "euclidean"), negatives)
        return mean_over(losses.sum(), losses.new_full((), len(losses), dtype=torch.long))

    def _every_pair(self, batch: Batch) -> Tensor:
        identities, exponents = find_identities(batch), _exponents(self.margin)
        anchors = ((identities.positives > 0) & (identities.negatives > 0)).nonzero()[:, 0]
        of_anchors = every_set(batch, identities, exponents, anchors).negative  # (B,)
        of_positives = of_anchors
        if batch.embeddings is not batch.ref_emb:
            others = of_references(batch)
            wanted = torch.isin(batch.ref_labels.long(), batch.labels.long()).nonzero()[:, 0]
            of_positives = every_set(others, find_identities(others), exponents, wanted).negative  # (R,)
        number = torch.where(identities.negatives > 0, identities.positives, 0).sum()
        return mean_over(_every_positive_pair(batch, identities, of_anchors, of_positives), number)

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        return f"margin={self.margin}, normalize={self.normalize}"


def _every_positive_pair(batch: Batch, identities: Identities, of_anchors: Tensor, of_positives: Tensor) -> Tensor:
    """Sum over all positive pairs, with its gradient. of_anchors: (B,), of_positives: (R,) their log-sum-exps."""
    ends = torch.cat([of_anchors, of_positives])  # (B + R,)
    values = ends.detach()

    def run(gradients: Gradients) -> Totals:
        total, by_ends = batch.embeddings.new_zeros((), dtype=torch.float64), torch.zeros_like(values)
        for tile in tiles(batch, identities, "euclidean"):
            d_ap = gradients.distances(tile.sq_positive)  # (b, M)
            place = tile.positive + len(batch.labels)
            one, other = values[tile.anchors, None], torch.where(tile.is_positive, values[place], 0.0)
            both = torch.logaddexp(one, other)
            reach = torch.where(tile.is_positive, d_ap + both, 0.0).clamp_min_(0.0)
            total = total + 0.5 * reach.square().double().sum()
            gradients.add_pairs(tile, tile.positive, d_ap, reach)
            by_ends.index_add_(0, tile.anchors, (reach * (one - both).exp()).sum(dim=1))
            by_ends.index_add_(0, place.flatten(), (reach * (other - both).exp()).flatten())
        return Totals(total, by_ends, None)

    return streamed(batch, run, squared=False, extra=ends)[0]
