"""Contrastive loss: same-identity pairs are pulled together, others pushed apart up to a margin."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from metricface.choices import check_choice, is_number
from metricface.identities import find_identities
from metricface.losses.every_pair import PairSums, every_contrastive_pair
from metricface.losses.gathering import distances_of
from metricface.losses.reduction import mean_over
from metricface.tuples import Batch, as_pairs, check_batch

ContrastiveReduction = Literal["mean", "sum"]


def contrastive(dist: Tensor, same: Tensor, *, margin: float) -> Tensor:
    """Contrastive loss of each pair, unreduced.

    dist: Euclidean distances (not squared), any shape; same: bool, of that shape: one identity or two.
    Returns 1/2 dist^2 where same, 1/2 [margin - dist]+^2 elsewhere.
    Source: Hadsell, Chopra, LeCun 2006, Dimensionality Reduction by Learning an Invariant Mapping, eq. 4.
    """
    return 0.5 * torch.where(same, dist, (margin - dist).clamp_min(0.0)).square()


class ContrastiveLoss(nn.Module):
    """Hadsell's contrastive loss over pairs.

    Distance: Euclidean, squared outside the hinge, not inside. Normalisation: none by definition (`normalize=True`
    scales embeddings to length 1 first). Reduction: "mean" over all pairs given, satisfied ones included, or "sum".
    (Caffe's layer is this mean; the paper writes the sum.)

    pytorch-metric-learning's loss of this name is another function: un-squared, without the 1/2, on normalised
    embeddings, averaging positive and negative pairs apart and each over its non-zero members; and it returns 0 for
    one positive and one negative pair.
    """

    def __init__(
        self, margin: float = 1.0, *, normalize: bool = False, reduction: ContrastiveReduction = "mean"
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, get_args(ContrastiveReduction))
        if not is_number(margin) or margin <= 0:
            raise ValueError(
                f"margin must be positive and finite, the distance beyond which pairs are left alone; got {margin!r}."
            )
        self.margin = margin
        self.normalize = normalize
        self.reduction = reduction

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

        embeddings: (B, D); labels: (B,) integers; indices_tuple: a miner's 4-tuple of pairs or 3-tuple of triplets
        (each split into two pairs), None for every ordered pair (i, j), i != j, of the batch, or every pair of an
        anchor and a reference where ref_emb (R, D) and ref_labels (R,) are given. self_index: as the miners take it;
        matters only for None. No pair at all: 0, with gradient 0. Raises ValueError for malformed or non-finite input.
        """
        batch = check_batch(embeddings, labels, ref_emb, ref_labels, self_index, normalize=self.normalize)
        if indices_tuple is None:
            total, sums = self._without_tuple(batch)
            number = sums.positives + sums.negatives
        else:
            pairs = as_pairs(indices_tuple, batch.labels, batch.ref_labels)
            anchors = torch.cat([pairs.positive_anchor, pairs.negative_anchor])
            references = torch.cat([pairs.positive, pairs.negative])
            same = torch.arange(len(anchors), device=anchors.device) < len(pairs.positive)
            losses = contrastive(distances_of(batch, anchors, references, "euclidean"), same, margin=self.margin)
            total, number = losses.sum(), losses.new_full((), len(losses), dtype=torch.long)
        return total if self.reduction == "sum" else mean_over(total, number)

    def _without_tuple(self, batch: Batch) -> tuple[Tensor, PairSums]:
        """The sum of losses, and what the pairs are like."""
        return every_contrastive_pair(batch, find_identities(batch), margin=self.margin)

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        return f"margin={self.margin}, normalize={self.normalize}, reduction={self.reduction!r}"
