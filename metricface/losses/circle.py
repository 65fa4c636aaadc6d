"""Circle loss: each cosine is weighed by how far it is from where it should be."""

import torch
from torch import Tensor
from torch.nn import functional as F

from metricface.choices import is_number
from metricface.losses.anchor_sets import Exponent, Exponents, SetLoss, Sets

# Where a negative's weight is 0. Not 0 itself: with the -inf of what is no negative that would be NaN.
NO_WEIGHT = 1e-20


def circle(cos_ap: Tensor, cos_an: Tensor, *, margin: float, gamma: float) -> Tensor:
    """Circle loss of each anchor, unreduced.

    cos_ap: (..., K) cosines of an anchor with its positives; cos_an: (..., L) with its negatives, K, L > 0.
    Returns (...): softplus(lse(gamma a_n (cos_an - margin)) + lse(-gamma a_p (cos_ap - 1 + margin))), where the weights
    a_p = [1 + margin - cos_ap]+ and a_n = [cos_an + margin]+ have no gradient. One loss of all pairs of a batch, as in
    a widely copied repository, is this function of two vectors.
    Source: Sun et al. 2020, Circle Loss; the gradient is that of its eq. 9 and 10.
    """
    return _losses(_exponents(margin, gamma).of(1.0 - cos_ap, 1.0 - cos_an))


class _Weighed(Exponent):
    def __init__(self, margin: float, gamma: float) -> None:
        self.margin, self.gamma = margin, gamma


class _Positive(_Weighed):
    """gamma (margin + d) (d - margin), d = 1 - cosine, the first two factors being a weight."""

    def value(self, dist: Tensor, out: Tensor) -> Tensor:
        """As in Exponent."""
        return torch.sub(dist, self.margin, out=out).mul_((dist + self.margin).mul_(self.gamma))

    def times_slope(self, weight: Tensor, dist: Tensor, work: Tensor) -> Tensor:
        """As in Exponent."""
        return weight.mul_(torch.add(dist, self.margin, out=work).mul_(self.gamma))


class _Negative(_Weighed):
    """gamma [1 + margin - d]+ (1 - margin - d), the first two factors being a weight."""

    def value(self, dist: Tensor, out: Tensor) -> Tensor:
        """As in Exponent."""
        weight = (1.0 + self.margin - dist).clamp_min_(NO_WEIGHT).mul_(self.gamma)
        return torch.neg(dist, out=out).add_(1.0 - self.margin).mul_(weight)

    def times_slope(self, weight: Tensor, dist: Tensor, work: Tensor) -> Tensor:
        """As in Exponent."""
        slope = torch.neg(dist, out=work).add_(1.0 + self.margin).clamp_min_(NO_WEIGHT)
        return weight.mul_(slope.mul_(-self.gamma))


def _exponents(margin: float, gamma: float) -> Exponents:
    return Exponents(_Positive(margin, gamma), _Negative(margin, gamma), squared=True)


def _losses(sets: Sets) -> Tensor:
    return F.softplus(sets.positive + sets.negative)


class CircleLoss(SetLoss):
    """Sun et al.'s circle loss on pairs.

    margin, gamma: 0.25 and 256 in the paper for faces, 0.25 and 128 for re-identification, 0.4 and 80 for fine-grained
    retrieval. Similarity: cosine; rows are scaled to length 1, a zero row has cosine 0 with all. The weights of the
    pairs have no gradient. Reduction: one loss for each anchor with its positives and negatives, as the paper defines
    it for one sample, then (our reading) the mean over anchors that have both; others have no loss.

    pytorch-metric-learning's loss of this name has margin 0.4 and gamma 80, and averages over anchors whose loss is not
    0. The most copied repository has one loss over all pairs of a batch: `circle` of two vectors, another loss.
    Source: Sun et al. 2020, Circle Loss: A Unified Perspective of Pair Similarity Optimization.
    """

    cosine = True

    def __init__(self, margin: float = 0.25, gamma: float = 256.0) -> None:
        super().__init__()
        if not is_number(margin) or not 0 <= margin < 1:
            raise ValueError(f"margin must lie in [0, 1), a relaxation of cosines; got {margin!r}.")
        if not is_number(gamma) or gamma <= 0:
            raise ValueError(f"gamma must be above 0 and finite, the scale of the exponents; got {gamma!r}.")
        self.margin, self.gamma = margin, gamma

    def _exponents(self) -> Exponents:
        return _exponents(self.margin, self.gamma)

    def _losses(self, sets: Sets) -> Tensor:
        return _losses(sets)

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        return f"margin={self.margin}, gamma={self.gamma}"
