"""Angular loss: the angle at the negative of the triangle that it forms with a positive pair."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metricface.choices import is_number
from metricface.distances import full_precision
from metricface.identities import find_identities
from metricface.losses.gathering import of_references, products_of
from metricface.losses.positive_pairs import PairRun, sum_over_pairs
from metricface.losses.reduction import mean_over
from metricface.losses.segments import by_positive_pair, segment_logsumexp
from metricface.products import others_logsumexp
from metricface.tuples import Batch, as_triplets, check_batch


def angular(dot_ap: Tensor, dot_an: Tensor, dot_pn: Tensor, *, alpha_deg: float) -> Tensor:
    """The exponent f of each triplet: 4 tan^2(alpha) (a + p).n - 2 (1 + tan^2(alpha)) a.p.

    dot_ap, dot_an, dot_pn: dot products of unit rows, of shapes that broadcast. alpha_deg: degrees.
    The loss of a positive pair is ln(1 + sum_n exp f). For unit rows f is the argument of the hinge
    (`angular_hinge`), less 2 - 6 tan^2(alpha).
    Source: Wang et al. 2017, Deep Metric Learning with Angular Loss.
    """
    sq_tan = math.tan(math.radians(alpha_deg)) ** 2
    return 4.0 * sq_tan * (dot_an + dot_pn) - 2.0 * (1.0 + sq_tan) * dot_ap


def angular_hinge(anchors: Tensor, positives: Tensor, negatives: Tensor, *, alpha_deg: float) -> Tensor:
    """Angular loss of each triplet as a hinge, unreduced: [|a - p|^2 - 4 tan^2(alpha) |n - (a + p) / 2|^2]+.

    anchors, positives, negatives: (T, D) rows, not normalised here. alpha_deg: degrees. Returns (T,).
    Source: Wang et al. 2017, Deep Metric Learning with Angular Loss.
    """
    a, p, n = (full_precision(rows) for rows in (anchors, positives, negatives))
    sq_tan = math.tan(math.radians(alpha_deg)) ** 2
    to_centre = (n - 0.5 * (a + p)).square().sum(dim=1)
    return ((a - p).square().sum(dim=1) - 4.0 * sq_tan * to_centre).clamp_min(0.0)


class AngularLoss(nn.Module):
    """Wang et al.'s angular loss in its N-pair form, over all positive pairs and all negatives of their anchors.

    alpha_deg: the angle in degrees below which the negative should see the pair, in (0, 90).
    Similarity: dot products of rows scaled to length 1, always and all of them, negatives too; a zero row stays zero.
    Reduction: the mean over ordered positive pairs (a, p) of ln(1 + sum_n exp f), n all references of other identities
    and f as in `angular`; pairs without a negative are not counted. With N anchors of N identities as embeddings and
    one positive of each as ref_emb this is the paper's batch form. Without a tuple it costs a product of every positive
    pair with all references.

    pytorch-metric-learning's loss of this name has 40 degrees, and leaves negatives at the length they come in, so that
    its value depends on it; on rows of length 1 it is this one. The paper adds it to the N-pair loss.
    Source: Wang et al. 2017, Deep Metric Learning with Angular Loss.
    """

    def __init__(self, alpha_deg: float = 45.0) -> None:
        super().__init__()
        if not is_number(alpha_deg) or not 0 < alpha_deg < 90:
            raise ValueError(f"alpha_deg must lie in (0, 90), an angle in degrees; got {alpha_deg!r}.")
        self.alpha_deg = alpha_deg

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
        (joined on the anchor), what is repeated counting once; None for every triplet, with positives and negatives
        from ref_emb (R, D) and ref_labels (R,) where given. self_index: as the miners take it; matters only for None.
        No triplet at all: 0, with gradient 0. Raises ValueError for malformed or non-finite input.
        """
        batch = check_batch(embeddings, labels, ref_emb, ref_labels, self_index, normalize=True)
        if indices_tuple is None:
            return self._every_triplet(batch)
        triplets = by_positive_pair(as_triplets(indices_tuple, batch.labels, batch.ref_labels), len(batch.ref_labels))
        dot_an = products_of(batch, triplets.anchor[triplets.pair], triplets.negative)  # (T,)
        dot_pn = products_of(of_references(batch), triplets.positive[triplets.pair], triplets.negative)  # (T,)
        dot_ap = products_of(batch, triplets.anchor, triplets.positive).index_select(0, triplets.pair)  # (T,)
        exponents = angular(dot_ap, dot_an, dot_pn, alpha_deg=self.alpha_deg)
        losses = F.softplus(segment_logsumexp(exponents, triplets.pair, len(triplets.anchor)))  # (P,)
        return mean_over(losses.sum(), losses.new_full((), len(losses), dtype=torch.long))

    def _every_triplet(self, batch: Batch) -> Tensor:
        identities = find_identities(batch)
        sq_tan = math.tan(math.radians(self.alpha_deg)) ** 2

        def part(anchors: Tensor, positives: Tensor, references: Tensor, run: PairRun) -> tuple[Tensor, None]:
            of_negatives = others_logsumexp(4.0 * sq_tan * (anchors + positives), references, run.own)  # (c,)
            of_pair = 2.0 * (1.0 + sq_tan) * (anchors * positives).sum(dim=1)
            return F.softplus(of_negatives - of_pair).double().sum(), None

        total, _ = sum_over_pairs(batch, identities, part, width=batch.embeddings.shape[1])
        return mean_over(total, torch.where(identities.negatives > 0, identities.positives, 0).sum())

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        return f"alpha_deg={self.alpha_deg}"
