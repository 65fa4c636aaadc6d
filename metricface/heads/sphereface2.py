"""SphereFace2: one binary classification for each class instead of one choice among all."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metricface.distances import full_precision, unit_rows
from metricface.heads.base import STRAIGHT, check_number
from metricface.heads.cosine import CosineHead
from metricface.heads.target import Target, with_slope


class SphereFace2(CosineHead):
    """SphereFace2-C: a logistic loss of every class, the own one against all others, on cosines with a bias.

    Loss of a row: w / r softplus(-(r (g(cos_y) - m) + b)) + (1 - w) / r sum over j != y of
    softplus(r (g(cos_j) + m) + b), with g(c) = 2 ((c + 1) / 2)^t - 1; the sum over classes, the mean over the batch,
    times loss_weight. Embeddings and class weights are scaled to length 1. scale: r, 40 (64 for MS1M); margin_cos: m,
    0.4 (0.5); positive_weight: w, 0.7 (0.8); t: 3; loss_weight: 50 in the authors' code, here 1. Plain attributes that
    a schedule may change. The bias b is one learned number, started where positives and negatives balance at cosine
    0, for the numbers it is built with: a schedule does not start it anew.
    detach_margin: the gradient takes g for the cosine itself, as in the authors' code; otherwise g's own slope.
    logits are r cos, without b. streaming, generator, `last`: as in Head. pytorch-metric-learning has none.
    Source: Wen et al. 2022, SphereFace2, eq. 6 and 8, and the released opensphere head.
    """

    is_softmax = False

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin_cos: float = 0.4,
        scale: float = 40.0,
        positive_weight: float = 0.7,
        t: float = 3.0,
        loss_weight: float = 1.0,
        detach_margin: bool = False,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, scale=scale, streaming=streaming, generator=generator)
        check_number("margin_cos", margin_cos, 0.0, 2.0)
        check_number("positive_weight", positive_weight, 0.0, 1.0, least_too=False)
        check_number("t", t, 1.0, torch.inf)
        check_number("loss_weight", loss_weight, 0.0, torch.inf, least_too=False)
        self.margin_cos, self.positive_weight, self.t, self.loss_weight = margin_cos, positive_weight, t, loss_weight
        self.detach_margin = detach_margin
        self.offset = nn.Parameter(torch.tensor(balanced_offset(num_classes, positive_weight, margin_cos, scale, t)))

    def target_cos(self, target: Target) -> Tensor:
        """g(cos(theta)) - margin_cos: (B,)."""
        return _g(target.cos, self.t, self.detach_margin) - self.margin_cos

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        offset = full_precision(self.offset)
        negatives = partial(
            _negatives, margin_cos=self.margin_cos, scale=self.scale, t=self.t, detach_margin=self.detach_margin
        )
        others = self._others(unit_rows(x), labels, transform=negatives, extra=(offset,), reduction="sum")
        positive = self.scale * self.target_cos(self._target(others.own, x, labels)) + offset
        positive = F.softplus(-positive, threshold=STRAIGHT)
        both = self.positive_weight * positive + (1.0 - self.positive_weight) * others.reduced
        return both * (self.loss_weight / self.scale)

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return (
            f"{super().extra_repr()}, margin_cos={self.margin_cos}, positive_weight={self.positive_weight}, "
            f"t={self.t:g}, loss_weight={self.loss_weight:g}"
        )


def _g(cos: Tensor, t: float, detach: bool) -> Tensor:
    # A cosine that rounding carries below -1 has no fractional power.
    value = 2.0 * (0.5 * (cos + 1.0)).clamp_min(0.0).pow(t) - 1.0
    return with_slope(value, 1.0, cos) if detach else value


def _negatives(
    cos: Tensor, _: Tensor, offset: Tensor, *, margin_cos: float, scale: float | Tensor, t: float, detach_margin: bool
) -> Tensor:
    """(b, c) cosines with other classes, () -> (b, c) losses."""
    return F.softplus(scale * (_g(cos, t, detach_margin) + margin_cos) + offset, threshold=STRAIGHT)


def balanced_offset(num_classes: int, weight: float, margin_cos: float, scale: float, t: float) -> float:
    """The bias with which positives and negatives pull equally at cosine 0; 0 for one class, which has no negatives.

    weight x the logistic slope of the one positive = (1 - weight) x the sum of those of the C - 1 negatives. Exact
    where the released closed form subtracts nearly equal numbers (for C = 3 it is off by 2e-5).
    """
    if num_classes < 2:
        return 0.0
    # With u = e^b, p = e^(r (g + m)), q = e^(-2 r m): weight / (1 + u p q) = (1 - weight) (C - 1) u p / (1 + u p),
    # a quadratic in u p with one positive root.
    z = weight / ((1.0 - weight) * (num_classes - 1))
    q = math.exp(-2.0 * scale * margin_cos)
    root = math.sqrt((1.0 - z) ** 2 + 4.0 * z * q)
    if z > 1.0:  # as a logarithm: q itself may be too small to divide by
        positive = math.log(root - (1.0 - z)) - math.log(2.0) + 2.0 * scale * margin_cos
    else:
        gap = 1.0 - z + root
        # z = 1 leaves 2 sqrt(q), of which the same is true
        positive = math.log(2.0 * z) - (math.log(gap) if gap > 0.0 else math.log(2.0) - scale * margin_cos)
    return positive - scale * (float(2.0 * 0.5**t) - 1.0 + margin_cos)
