"""Margins that follow the length of the embedding, taken as the quality of the image: AdaFace and MagFace."""

import torch
from torch import Tensor

from metricface.heads.base import check_number
from metricface.heads.cosine import CosineHead
from metricface.heads.target import BeyondPi, Target, angle, check_beyond_pi, lengths_of, shifted_by_rule

# How far AdaFace's lengths are let go, and what is added to their deviation.
LEAST_LENGTH, MOST_LENGTH = 0.001, 100.0
DEVIATION_EPS = 1e-3


class AdaFace(CosineHead):
    """Cross-entropy over scale * cos(theta_j), with margins that depend on the embedding's length.

    Target logit: scale * (cos(theta_y - m z) - (m + m z)), z = clip(h (length - mean) / (deviation + 0.001), -1, 1).
    Embeddings and class weights are scaled to length 1; lengths are clipped to [0.001, 100], and no gradient goes
    through them; theta - m z is kept in [0, pi]. mean and deviation (unbiased) of the lengths are moving averages over
    the training batches, buffers that start at 20 and 100 and move by `rate` before a batch uses them (rate=1: of this
    batch alone; a batch of one row leaves the deviation as it is). Outside of training they stay.
    margin: m, 0.4; h: 0.333; rate: 0.01; scale: 64. Plain attributes that a schedule may change. The released code also
    clips cosines to +-0.999, which ends the gradient below 2.6 degrees; this does not. streaming, generator, `last`: as
    in Head. Reduction: mean over the batch. pytorch-metric-learning has none.
    Source: Kim, Jain and Liu 2022, AdaFace, eq. 13 to 17, and the released head.
    """

    length_mean: Tensor
    length_deviation: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin: float = 0.4,
        h: float = 0.333,
        rate: float = 0.01,
        scale: float = 64.0,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, scale=scale, streaming=streaming, generator=generator)
        check_number("margin", margin, 0.0, 1.0)
        check_number("h", h, 0.0, torch.inf)
        check_number("rate", rate, 0.0, 1.0 + 1e-12)
        self.margin, self.h, self.rate = margin, h, rate
        self.register_buffer("length_mean", torch.tensor(20.0))
        self.register_buffer("length_deviation", torch.tensor(100.0))

    def target_cos(self, target: Target) -> Tensor:
        """cos(theta - m z) - (m + m z): (B,), z from the lengths."""
        z = self.quality(target.length)
        theta = (angle(target) - self.margin * z).clamp(0.0, torch.pi)
        return theta.cos() - (self.margin + self.margin * z)

    @torch.no_grad()
    def quality(self, lengths: Tensor) -> Tensor:
        """Z of each embedding, (B,) lengths to (B,) in [-1, 1], by the averages as they stand."""
        clipped = lengths.clamp(LEAST_LENGTH, MOST_LENGTH)
        return (self.h * (clipped - self.length_mean) / (self.length_deviation + DEVIATION_EPS)).clamp(-1.0, 1.0)

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self._observe(torch.linalg.vector_norm(x.detach(), dim=1).clamp(LEAST_LENGTH, MOST_LENGTH))
        losses = super()._losses(x, labels)
        assert self.last is not None
        self.last |= {"length_mean": self.length_mean.clone(), "length_deviation": self.length_deviation.clone()}
        return losses

    @torch.no_grad()
    def _observe(self, lengths: Tensor) -> None:
        if len(lengths):
            self.length_mean.lerp_(lengths.mean().to(self.length_mean.dtype), self.rate)
        if len(lengths) > 1:
            self.length_deviation.lerp_(lengths.std().to(self.length_deviation.dtype), self.rate)

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, margin={self.margin}, h={self.h}, rate={self.rate}"


class MagFace(CosineHead):
    """ArcFace with a margin that grows with the embedding's length, and a pull on the length.

    Loss: cross-entropy over scale * cos(theta_j), the target's being scale * cos(theta_y + m(a)), plus length_weight *
    (1 / a + a / most_length^2), a being the length clipped to [least_length, most_length] (beyond them it has no
    gradient) and m(a) rising linearly from least_margin to most_margin between the two. Gradients flow through the
    margin, too. Embeddings and class weights are scaled to length 1 for the cosine. Defaults: 10, 110, 0.45, 0.8
    radians, scale 64, length_weight 35 as in the released script (20 as in its parser's default). Plain attributes that
    a schedule may change. beyond_pi: as in ArcFace; the released code's default is "easy". `last` also has
    "length_loss" (the pull, unweighted) and "length_mean". streaming, generator: as in Head.
    Reduction: mean over the batch. pytorch-metric-learning has none.
    Source: Meng, Zhao, Huang and Zhou 2021, MagFace, eq. 2 to 4, and the released code.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        least_length: float = 10.0,
        most_length: float = 110.0,
        least_margin: float = 0.45,
        most_margin: float = 0.8,
        length_weight: float = 35.0,
        scale: float = 64.0,
        beyond_pi: BeyondPi = "easy",
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, scale=scale, streaming=streaming, generator=generator)
        check_number("least_length", least_length, 0.0, torch.inf, least_too=False)
        check_number("most_length", most_length, float(least_length), torch.inf, least_too=False)
        check_number("least_margin", least_margin, 0.0, torch.pi)
        check_number("most_margin", most_margin, float(least_margin), torch.pi)
        check_number("length_weight", length_weight, 0.0, torch.inf)
        check_beyond_pi(beyond_pi)
        self.least_length, self.most_length = least_length, most_length
        self.least_margin, self.most_margin = least_margin, most_margin
        self.length_weight = length_weight
        self.beyond_pi = beyond_pi

    def target_cos(self, target: Target) -> Tensor:
        """cos(theta + m(length)), by the rule `beyond_pi`: (B,)."""
        share = (self._clipped(target.length) - self.least_length) / (self.most_length - self.least_length)
        margin = self.least_margin + (self.most_margin - self.least_margin) * share
        return shifted_by_rule(target, margin, self.beyond_pi)

    def _clipped(self, lengths: Tensor) -> Tensor:
        return lengths.clamp(self.least_length, self.most_length)

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        losses = super()._losses(x, labels)
        a = self._clipped(lengths_of(x))
        pull = 1.0 / a + a / self.most_length**2
        assert self.last is not None
        self.last |= {"length_loss": pull.detach().mean(), "length_mean": lengths_of(x.detach()).mean()}
        return losses + self.length_weight * pull

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return (
            f"{super().extra_repr()}, lengths=({self.least_length:g}, {self.most_length:g}), "
            f"margins=({self.least_margin}, {self.most_margin}), length_weight={self.length_weight:g}, "
            f"beyond_pi={self.beyond_pi!r}"
        )
