"""Margin-based loss: positive pairs inside, negative pairs outside a boundary beta that may be learned."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metricface.choices import is_count, is_number
from metricface.identities import find_identities
from metricface.losses.every_pair import PairSums, every_margin_based_pair
from metricface.losses.gathering import distances_of
from metricface.losses.reduction import mean_over
from metricface.tuples import Batch, Triplets, as_triplets, check_batch


def margin_based(d_ap: Tensor, d_an: Tensor, beta: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """Margin-based loss of each triplet's positive and negative pair, unreduced.

    d_ap, d_an: (T,) Euclidean distances (not squared) between unit embeddings, in [0, 2].
    beta: the boundary of each anchor, (T,) or of a shape that broadcasts.
    Returns [alpha + d_ap - beta]+ and [alpha + beta - d_an]+, apart because each counts its own active pairs.
    Source: Wu et al. 2017, Sampling Matters in Deep Embedding Learning, eq. 4.
    """
    return (alpha + d_ap - beta).clamp_min(0.0), (alpha + beta - d_an).clamp_min(0.0)


class MarginBasedLoss(nn.Module):
    """Wu et al.'s margin-based loss over triplets, each a positive and a negative pair of one anchor.

    Distance: Euclidean, not squared, between embeddings scaled to length 1 (always).
    Reduction: (sum of positive losses + sum of negative losses + nu x sum of beta over the sampled anchors, an anchor
    counted once for each of its triplets) / (active positive pairs + active negative pairs); 0 where none is active.

    num_classes: None for one beta, or C for one per class, looked up by the anchor's label in [0, C).
    beta: the initial boundary. learn_beta: whether it is a parameter (give it its own learning rate; the paper's code
    uses SGD, 0.1 / batch size, momentum 0.9) or fixed; it is in the state_dict either way. nu > 0 pulls beta down.

    pytorch-metric-learning's MarginLoss is the same at nu = 0. There, with one beta for all classes, nu x beta is
    added once and undivided, and a fixed beta is missing from the state_dict.
    Its CrossBatchMemory and SelfSupervisedLoss refuse this class, as they refuse every name but those they list.
    """

    beta: Tensor

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        alpha: float = 0.2,
        beta: float = 1.2,
        nu: float = 0.0,
        learn_beta: bool = True,
    ) -> None:
        super().__init__()
        if num_classes is not None and not is_count(num_classes):
            raise ValueError(
                f"num_classes must be a whole number, at least 1, or None for one beta for all; got {num_classes!r}."
            )
        for name, value, meaning in (
            ("alpha", alpha, "half the gap between the two kinds of pair"),
            ("beta", beta, "a distance, the boundary between them"),
            ("nu", nu, "the weight of the sum of beta"),
        ):
            if not is_number(value) or value < 0:
                raise ValueError(f"{name} must be 0 or more and finite, {meaning}; got {value!r}.")
        initial = torch.full(() if num_classes is None else (num_classes,), float(beta))
        if learn_beta:
            self.beta = nn.Parameter(initial)
        else:
            self.register_buffer("beta", initial)
        self.alpha = alpha
        self.nu = nu

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
        (R,) where given. self_index: as the miners take it; matters only for None. Nothing active: 0, with gradient 0.
        Raises ValueError for malformed or non-finite input and for labels without a beta.
        """
        batch = check_batch(embeddings, labels, ref_emb, ref_labels, self_index, normalize=True)
        beta = self._beta_of(batch.labels).to(batch.embeddings.dtype)  # (B,)
        if indices_tuple is None:
            total, sums = self._without_tuple(batch, beta)
            return mean_over(total, sums.active_positives + sums.active_negatives)
        return mean_over(*self._given(batch, beta, as_triplets(indices_tuple, batch.labels, batch.ref_labels)))

    def _without_tuple(self, batch: Batch, beta: Tensor) -> tuple[Tensor, PairSums]:
        """The sum of losses, and what the pairs are like. beta: (B,)."""
        identities = find_identities(batch)
        # A positive pair is in one triplet for each negative of its anchor, a negative pair the reverse.
        return every_margin_based_pair(
            batch, identities, beta, identities.negatives, identities.positives, alpha=self.alpha, nu=self.nu
        )

    def _beta_of(self, labels: Tensor) -> Tensor:
        if self.beta.ndim == 0:
            return self.beta.expand(len(labels))
        labels = labels.long()  # unsigned types have no minimum
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= len(self.beta)):
            raise ValueError(
                f"labels must lie in [0, {len(self.beta)}), one beta per class; found {int(labels.min())} to "
                f"{int(labels.max())}. Raise num_classes, or pass num_classes=None for one beta for all."
            )
        return self.beta.index_select(0, labels)

    def _given(self, batch: Batch, beta: Tensor, triplets: Triplets) -> tuple[Tensor, Tensor]:
        """The sum of losses, and how many pairs have one."""
        beta = beta.index_select(0, triplets.anchor)  # (T,)
        d_ap = distances_of(batch, triplets.anchor, triplets.positive, "euclidean")
        d_an = distances_of(batch, triplets.anchor, triplets.negative, "euclidean")
        pos, neg = margin_based(d_ap, d_an, beta, alpha=self.alpha)
        # Two sums and not (pos > 0) + (neg > 0), which on booleans is "or" and counts such a triplet once.
        return pos.sum() + neg.sum() + self.nu * beta.sum(), (pos > 0).sum() + (neg > 0).sum()

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        learned = isinstance(self.beta, nn.Parameter)
        return f"betas={self.beta.numel()}, alpha={self.alpha}, nu={self.nu}, learn_beta={learned}"
