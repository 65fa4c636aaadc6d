"""Triplet loss, with a hinge or with the soft margin, on squared, plain or cosine distances."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metricface.choices import check_choice, is_number
from metricface.diagnostics import TripletSums
from metricface.distances import Distance, check_distance
from metricface.identities import find_identities
from metricface.losses.every_triplet import Margin, every_swapped_triplet, every_triplet
from metricface.losses.gathering import distances_of, of_cosine, of_references, on_anchors_side
from metricface.losses.reduction import mean_over
from metricface.tuples import Batch, as_triplets, check_batch

TripletReduction = Literal["mean", "active", "sum"]


def triplet(d_ap: Tensor, d_an: Tensor, *, margin: Margin) -> Tensor:
    """Triplet loss of each triplet, unreduced.

    d_ap, d_an: distances of the anchor to its positive and to its negative, of shapes that broadcast.
    Returns [d_ap - d_an + margin]+, or softplus(d_ap - d_an), which has no margin, for "soft".
    Sources: Schroff et al. 2015, FaceNet, eq. 3; Hermans, Beyer, Leibe 2017, In Defense of the Triplet Loss.
    """
    violation = d_ap - d_an
    # softplus, not log(1 + exp(x)), which overflows in float16 from x = 11.
    return F.softplus(violation) if margin == "soft" else (violation + margin).clamp_min(0.0)


class TripletLoss(nn.Module):
    """Triplet loss. The defaults are FaceNet's: margin 0.2 on squared distances of unit embeddings.

    Hermans et al.: TripletLoss("soft", distance="euclidean", normalize=False), or a margin in place of "soft".
    distance: "squared_euclidean", "euclidean", or "cosine", 1 - cosine in [0, 2], half the squared distance of unit
    rows: embeddings are then scaled to length 1 whatever `normalize` says, and a zero row has cosine 0 with all.
    swap: take the positive for the anchor where it is closer to the negative: d_an becomes min(d_an, d_pn) (Balntas et
    al. 2016). With ref_emb both the positive and the negative are references. Without a tuple it costs a product of
    every positive pair, not only of every anchor, with all references.
    Reduction: "mean" over all triplets given; "active" over those with loss > 0 (under "soft" that is every triplet;
    for batch-all mining Hermans et al. need it, since the mean over all of them vanishes as training goes on); "sum".

    pytorch-metric-learning's TripletMarginLoss differs in its defaults: margin 0.05, plain distances of unit
    embeddings, mean over active triplets; its smooth_loss adds its margin inside the softplus; its swap looks up
    positives among the anchors, so that with separate references it takes another distance or fails (its issue 748).
    Its CrossBatchMemory and SelfSupervisedLoss refuse this class, as they refuse every name but those they list.
    Sources: Schroff et al. 2015, FaceNet, eq. 3; Hermans, Beyer, Leibe 2017, In Defense of the Triplet Loss; Balntas et
    al. 2016, Learning Local Feature Descriptors with Triplets and Shallow Convolutional Neural Networks (swap).
    """

    def __init__(
        self,
        margin: Margin = 0.2,
        *,
        distance: Distance = "squared_euclidean",
        swap: bool = False,
        normalize: bool = True,
        reduction: TripletReduction = "mean",
    ) -> None:
        super().__init__()
        check_distance(distance)
        check_choice("reduction", reduction, get_args(TripletReduction))
        if margin != "soft" and (not is_number(margin) or margin < 0):
            raise ValueError(f"margin must be a finite number, 0 or more, or the word 'soft'; got {margin!r}.")
        self.margin = margin
        self.distance = distance
        self.swap = swap
        self.normalize = normalize
        self.reduction = reduction

    @property
    def _euclidean(self) -> Distance:
        """The distance of the batch that `forward` makes: of cosines one whose squared distances they are."""
        return "euclidean" if self.distance == "euclidean" else "squared_euclidean"

    @property
    def _squared(self) -> bool:
        return self._euclidean == "squared_euclidean"

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
        (joined on the anchor), None for every triplet, with positives and negatives from ref_emb (R, D) and ref_labels
        (R,) where given. self_index: as the miners take it; matters only for None. No triplet at all: 0, with
        gradient 0. Raises ValueError for malformed or non-finite input.
        """
        cosine = self.distance == "cosine"
        normalize = self.normalize and not cosine  # not twice
        batch = check_batch(embeddings, labels, ref_emb, ref_labels, self_index, normalize=normalize)
        if cosine:
            batch = of_cosine(batch)
        if indices_tuple is None:
            total, sums = self._without_tuple(batch)
            return self._reduced(total, sums.active, sums.triplets)
        losses = self._given(batch, as_triplets(indices_tuple, batch.labels, batch.ref_labels))
        return self._reduced(losses.sum(), (losses > 0).sum(), losses.new_full((), len(losses), dtype=torch.long))

    def _without_tuple(self, batch: Batch) -> tuple[Tensor, TripletSums]:
        """The sum of losses, and what the triplets are like."""
        identities = find_identities(batch)
        if self.swap:
            cosine = self.distance == "cosine"
            return every_swapped_triplet(batch, identities, margin=self.margin, squared=self._squared, cosine=cosine)
        return every_triplet(batch, identities, margin=self.margin, squared=self._squared)

    def _reduced(self, total: Tensor, active: Tensor, triplets: Tensor) -> Tensor:
        if self.reduction == "sum":
            return total
        # A softplus far below 0 rounds to 0 and is no less active for that.
        return mean_over(total, active if self.reduction == "active" and self.margin != "soft" else triplets)

    def _given(self, batch: Batch, triplets: Sequence[Tensor]) -> Tensor:
        anchor, positive, negative = triplets
        d_ap = distances_of(batch, anchor, positive, self._euclidean)  # (T,)
        d_an = distances_of(batch, anchor, negative, self._euclidean)  # (T,)
        if self.swap:
            among = of_references(batch)
            if self.distance == "cosine":
                among = among._replace(embeddings=on_anchors_side(among.embeddings))
            d_pn = distances_of(among, positive, negative, self._euclidean)  # (T,)
            d_an = torch.where(d_pn < d_an, d_pn, d_an)
        return triplet(d_ap, d_an, margin=self.margin)

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        return (
            f"margin={self.margin!r}, distance={self.distance!r}, normalize={self.normalize}, "
            f"reduction={self.reduction!r}" + (", swap=True" if self.swap else "")
        )
