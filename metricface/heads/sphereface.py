"""Margins that multiply the angle: L-Softmax and SphereFace (A-Softmax), with their annealing."""

import torch
from torch import Tensor

from metricface.choices import is_count
from metricface.heads.base import Head, check_number, cross_entropy
from metricface.heads.target import Target, lengths_of


def psi(cos: Tensor, margin: int) -> Tensor:
    """(-1)^k cos(m theta) - 2k for theta in [k pi / m, (k + 1) pi / m], m = margin: falling from 1 to 1 - 2 m.

    cos: cosines of theta, any shape. margin: a whole number, at least 1. Without an arc cosine: cos(m theta) is a
    polynomial in cos(theta), so the gradient is finite everywhere (margin^2 at theta = 0).
    Source: Liu et al. 2016, Large-Margin Softmax Loss, eq. 6.
    """
    before, multiple = torch.ones_like(cos), cos  # cos(0 theta), cos(theta)
    for _ in range(margin - 1):
        before, multiple = multiple, 2.0 * cos * multiple - before
    steps = torch.arange(1, margin, device=cos.device, dtype=cos.dtype) * (torch.pi / margin)
    k = (cos.detach()[..., None] < steps.cos()).sum(dim=-1).to(cos.dtype)
    return (1.0 - 2.0 * (k % 2)) * multiple - 2.0 * k


def annealed_lambda(iteration: Tensor, *, base: float, gamma: float, power: float, least: float) -> Tensor:
    """max(least, base (1 + gamma x iteration)^-power), the weight of the plain cosine at a training step.

    iteration: any shape; 1 for the first step, as in the authors' layers, which count before they use it.
    Source: the released caffe-sphereface and LargeMargin_Softmax_Loss layers.
    """
    return (base * (1.0 + gamma * iteration.double()) ** -power).clamp_min(least)


class _MultipliedAngle(Head):
    """Target logit: length x (lambda cos + psi) / (1 + lambda)."""

    iteration: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin: int,
        lambda_base: float,
        lambda_gamma: float,
        lambda_power: float,
        lambda_min: float,
        streaming: bool,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, streaming=streaming, generator=generator)
        if not is_count(margin):
            raise ValueError(f"margin multiplies the angle: it must be a whole number, at least 1; got {margin!r}.")
        for name, value in (
            ("lambda_base", lambda_base),
            ("lambda_gamma", lambda_gamma),
            ("lambda_power", lambda_power),
            ("lambda_min", lambda_min),
        ):
            check_number(name, value, 0.0, torch.inf)
        self.margin = int(margin)
        self.lambda_base, self.lambda_gamma, self.lambda_power = lambda_base, lambda_gamma, lambda_power
        self.lambda_min = lambda_min
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))

    @property
    def annealing(self) -> Tensor:
        """The weight lambda of the plain cosine at the present step: 0-dim float64."""
        return annealed_lambda(
            self.iteration.clamp_min(1),
            base=self.lambda_base,
            gamma=self.lambda_gamma,
            power=self.lambda_power,
            least=self.lambda_min,
        )

    def target_cos(self, target: Target) -> Tensor:
        """(lambda cos(theta) + psi(theta)) / (1 + lambda): (B,)."""
        weight = self.annealing.to(target.cos.dtype)
        return (weight * target.cos + psi(target.cos, self.margin)) / (1.0 + weight)

    def _queries(self, x: Tensor) -> Tensor:
        return x

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.iteration += 1
        others = self._others(x, labels)
        assert self.last is not None
        self.last["lambda"] = self.annealing
        length = lengths_of(x)
        if not self.unit_classes:
            length = length * others.own_length
        cos = torch.where(length > 0, others.own / torch.where(length > 0, length, 1.0), 0.0)
        target = self._target(cos, x, labels)
        return cross_entropy(others.reduced, length * self.target_cos(target))

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, margin={self.margin}, lambda_min={self.lambda_min}"


class LSoftmax(_MultipliedAngle):
    """Large-margin softmax: logits |x| |W_j| cos(theta_j), the target class's with psi(theta_y) for the cosine.

    Nothing is normalised, and there is no bias. psi is cos(margin x theta) made to fall all the way (`psi`); the target
    logit is |x| |W_y| (lambda cos + psi) / (1 + lambda). margin: a whole number (2 to 4 in the paper; 1 is plain
    softmax). lambda anneals with the training steps that the head has seen (a buffer, so that it is saved):
    max(lambda_min, lambda_base (1 + lambda_gamma x step)^-lambda_power); the defaults are the authors' MNIST example;
    lambda_base=0 makes it lambda_min throughout. All are plain attributes that a schedule may change. `last` also has
    "lambda" and "target_angle_deg". streaming, generator: as in Head. Reduction: mean over the batch.

    pytorch-metric-learning's LargeMarginSoftmaxLoss has no lambda. The authors' layer back-propagates a rescaled
    gradient; this is the true one.
    Source: Liu, Wen, Yu and Yang 2016, Large-Margin Softmax Loss for Convolutional Neural Networks, eq. 4 to 6.
    """

    unit_classes = False

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin: int = 4,
        lambda_base: float = 1000.0,
        lambda_gamma: float = 2.5e-5,
        lambda_power: float = 35.0,
        lambda_min: float = 0.0,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_dim,
            margin=margin,
            lambda_base=lambda_base,
            lambda_gamma=lambda_gamma,
            lambda_power=lambda_power,
            lambda_min=lambda_min,
            streaming=streaming,
            generator=generator,
        )


class SphereFace(_MultipliedAngle):
    """SphereFace, the A-Softmax loss: logits |x| cos(theta_j), the target class's with psi(theta_y) for the cosine.

    Class weights are scaled to length 1, embeddings keep theirs, and there is no bias; the rest is as in LSoftmax, with
    the paper's annealing: lambda falls from 1000 as 1 / (1 + 0.12 step) and stays at 5 from step 1,659 on. margin 1
    with any lambda is the modified softmax. Reduction: mean over the batch.

    pytorch-metric-learning's SphereFaceLoss has no lambda (it is lambda_base=0, lambda_min=0) and scales the result.
    Source: Liu et al. 2017, SphereFace, eq. 7, and the released caffe-sphereface for lambda.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin: int = 4,
        lambda_base: float = 1000.0,
        lambda_gamma: float = 0.12,
        lambda_power: float = 1.0,
        lambda_min: float = 5.0,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_dim,
            margin=margin,
            lambda_base=lambda_base,
            lambda_gamma=lambda_gamma,
            lambda_power=lambda_power,
            lambda_min=lambda_min,
            streaming=streaming,
            generator=generator,
        )
