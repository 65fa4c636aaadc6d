"""DeepID2: identification and verification together, a classifier and the contrastive loss on pairs of images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metricface.choices import is_number
from metricface.heads import Softmax
from metricface.identities import find_identities
from metricface.losses.contrastive import contrastive
from metricface.losses.every_pair import every_contrastive_pair
from metricface.losses.gathering import distances_of
from metricface.losses.reduction import mean_over
from metricface.tuples import Batch, as_pairs, check_batch


class DeepID2Loss(nn.Module):
    """DeepID2's joint loss of a pair of images: both are classified, and their distance is that of one person or two.

    For each pair: identification of i + identification of j + verification_weight x verification, the cross-entropy of
    a linear layer (`identification`: metricface.heads.Softmax over num_classes, with a bias or without) and the
    contrastive loss, 1/2 d^2 of one identity, 1/2 [margin - d]+^2 of two. Distance: Euclidean, not squared inside the
    hinge. Normalisation: none. Reduction: the mean over pairs, so that an image's cross-entropy counts once for each
    pair it is in.

    verification_weight: 0.05 is said to be the paper's, which was not at hand. margin: the paper does not learn it but
    resets it, every so many pairs, to the distance that parts them best: it is a plain attribute. streaming, generator:
    as in the head. pytorch-metric-learning has no such loss, and its ContrastiveLoss is another function.
    Source: Sun et al. 2014, Deep Learning Face Representation by Joint Identification-Verification.
    """

    normalize = False

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        verification_weight: float = 0.05,
        margin: float = 1.0,
        bias: bool = True,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not is_number(verification_weight) or verification_weight < 0:
            raise ValueError(f"verification_weight must be 0 or more and finite; got {verification_weight!r}.")
        if not is_number(margin) or margin <= 0:
            raise ValueError(
                f"margin must be positive and finite, the distance beyond which pairs are left alone; got {margin!r}."
            )
        self.identification = Softmax(num_classes, embedding_dim, bias=bias, streaming=streaming, generator=generator)
        self.verification_weight, self.margin = verification_weight, margin

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
        """Loss of a batch: a scalar in float32 (float64 for float64 embeddings or a float64 head).

        embeddings: (B, D); labels: (B,) integers in [0, num_classes); indices_tuple: a miner's 4-tuple of pairs or
        3-tuple of triplets (each split into two pairs), None for every ordered pair (i, j), i != j, of the batch, or
        every pair of an anchor and a reference where ref_emb (R, D) and ref_labels (R,), in that range too, are given.
        self_index: as the miners take it; matters only for None. No pair at all: 0, with gradient 0. Raises ValueError
        for malformed or non-finite input.
        """
        batch = check_batch(embeddings, labels, ref_emb, ref_labels, self_index)
        if indices_tuple is None:
            identities = find_identities(batch)
            verification, sums = every_contrastive_pair(batch, identities, margin=self.margin)
            of_anchors = identities.positives + identities.negatives  # (B,) pairs that each anchor is in
            itself = (batch.self_index >= 0).long()
            met = torch.zeros_like(batch.ref_labels, dtype=torch.long)
            met = met.index_add_(0, batch.self_index.clamp_min(0), itself) if len(met) else met
            of_references = len(batch.labels) - met  # (R,)
            number = sums.positives + sums.negatives
        else:
            pairs = as_pairs(indices_tuple, batch.labels, batch.ref_labels)
            anchors = torch.cat([pairs.positive_anchor, pairs.negative_anchor])
            references = torch.cat([pairs.positive, pairs.negative])
            same = torch.arange(len(anchors), device=anchors.device) < len(pairs.positive)
            dist = distances_of(batch, anchors, references, "euclidean")
            verification = contrastive(dist, same, margin=self.margin).sum()
            of_anchors = torch.bincount(anchors, minlength=len(batch.labels))
            of_references = torch.bincount(references, minlength=len(batch.ref_labels))
            number = dist.new_full((), len(dist), dtype=torch.long)
        total = self._identified(batch, of_anchors, of_references) + self.verification_weight * verification
        return mean_over(total, number)

    def _identified(self, batch: Batch, of_anchors: Tensor, of_references: Tensor) -> Tensor:
        """The sum of cross-entropies, each image's as often as said: (B,) and (R,) int64."""
        losses = self.identification.losses
        if batch.embeddings is batch.ref_emb:
            return (losses(batch.embeddings, batch.labels) * (of_anchors + of_references)).sum()
        of_batch = (losses(batch.embeddings, batch.labels) * of_anchors).sum()
        return of_batch + (losses(batch.ref_emb, batch.ref_labels) * of_references).sum()

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        return f"verification_weight={self.verification_weight}, margin={self.margin}"
