"""CurricularFace: hard negative classes weigh little at first, and more as training goes on."""

import math
from functools import partial

import torch
from torch import Tensor

from metricface.distances import unit_rows
from metricface.heads.base import check_number, cross_entropy
from metricface.heads.cosine import CosineHead
from metricface.heads.target import Target, shifted_by_rule


class CurricularFace(CosineHead):
    """ArcFace whose hard negative classes, cos(theta_j) > cos(theta_y + m), have logits scale * cos (t + cos).

    Target class: scale * cos(theta_y + margin_rad), beyond pi as ArcFace's "monotone". Embeddings and class weights are
    scaled to length 1. t is a moving average of the target cosines: t <- rate * mean + (1 - rate) t before a training
    batch uses it, a buffer that starts at 0, without gradient; outside of training it stays. The comparison is with
    cos(theta_y + m) as it is, and has no gradient. margin_rad: 0.5; scale: 64; rate: 0.01. Plain attributes that a
    schedule may change. `last` also has "t". streaming, generator: as in Head. Reduction: mean over the batch.
    pytorch-metric-learning has none.
    Source: Huang et al. 2020, CurricularFace, eq. 6 to 12, and the released head.
    """

    t: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin_rad: float = 0.5,
        rate: float = 0.01,
        scale: float = 64.0,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, scale=scale, streaming=streaming, generator=generator)
        check_number("margin_rad", margin_rad, 0.0, torch.pi)
        check_number("rate", rate, 0.0, 1.0 + 1e-12)
        self.margin_rad, self.rate = margin_rad, rate
        self.register_buffer("t", torch.zeros(()))

    def target_cos(self, target: Target) -> Tensor:
        """cos(theta + margin_rad), cos(theta) - m sin(m) where theta + m > pi: (B,)."""
        return shifted_by_rule(target, self.margin_rad, "monotone")

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self._observe(x, labels)
        # The values of now: the backward pass comes back to them, maybe after another batch or a schedule moved them.
        hardened = partial(_hardened, t=self.t.to(x.dtype, copy=True), margin_rad=self.margin_rad, scale=self.scale)
        others = self._others(unit_rows(x), labels, transform=hardened)
        target = self._target(others.own, x, labels)
        assert self.last is not None
        self.last["t"] = self.t.clone()
        return cross_entropy(others.reduced, self.scale * self.target_cos(target))

    @torch.no_grad()
    def _observe(self, x: Tensor, labels: Tensor) -> None:
        if len(labels):
            cos = (unit_rows(x) * unit_rows(self.classes.vectors(self, labels))).sum(dim=1)
            self.t.lerp_(cos.mean().to(self.t.dtype), self.rate)

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, margin_rad={self.margin_rad}, rate={self.rate}"


def _hardened(cos: Tensor, own: Tensor, *, t: Tensor, margin_rad: float, scale: float | Tensor) -> Tensor:
    """Logits of the other classes: (b, c) cosines, (b, 1) those of the own class -> (b, c)."""
    own = own.detach()
    harder = own * math.cos(margin_rad) - (1.0 - own.square()).clamp_min(0.0).sqrt() * math.sin(margin_rad)
    return scale * torch.where(cos > harder, cos * (t + cos), cos)
