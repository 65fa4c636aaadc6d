"""NormFace: softmax over scaled cosines, without a margin, and what its scale has to be."""

import math

import torch
from torch import Tensor, nn

from metricface.choices import is_count
from metricface.heads.base import check_scale
from metricface.heads.cosine import CosineHead
from metricface.heads.target import with_slope

LEAST_SCALE = 0.01
# What `NormFace` lets a class reach at least, where no scale is given.
PROBABILITY = 0.999


class NormFace(CosineHead):
    """Cross-entropy over scale * cos(theta_j): embeddings and class weights scaled to length 1, no bias, no margin.

    scale: where it starts; None: `scale_lower_bound(num_classes)`, with which probability 0.999 can be reached, and at
    least 1. learn_scale: whether it is then learned (the paper's preference; it counts as at least 0.01) or fixed (the
    paper offers 20 to 30, and a schedule may change it). Zero embeddings have cosine 0 and gradient 0. streaming,
    generator, `last`: as in Head; "scale" is there, too. Reduction: mean over the batch. pytorch-metric-learning's
    NormalizedSoftmaxLoss is the same with a fixed scale, which it calls 1 / temperature.
    Source: Wang, Xiang, Cheng and Yuille 2017, NormFace, eq. 6.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        scale: float | None = None,
        learn_scale: bool = True,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if scale is None:
            many = is_count(num_classes) and num_classes > 1
            scale = max(1.0, scale_lower_bound(num_classes, PROBABILITY)) if many else 1.0
        super().__init__(num_classes, embedding_dim, scale=scale, streaming=streaming, generator=generator)
        if learn_scale:
            self.scale = nn.Parameter(torch.tensor(float(scale)))

    def _scale_now(self) -> float | Tensor:
        scale = super()._scale_now()
        # Not clamp_min alone, whose gradient is 0 where it acts: a scale that got there could never leave.
        return with_slope(scale.clamp_min(LEAST_SCALE), 1.0, scale) if isinstance(scale, Tensor) else scale

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        losses = super()._losses(x, labels)
        assert self.last is not None
        if isinstance(self.scale, Tensor):
            self.last["scale"] = self.scale.detach().clamp(min=LEAST_SCALE)
        return losses


class COCO(NormFace):
    """Congenerous cosine loss: cross-entropy over scale * cos of embeddings with their classes' centres.

    With class weights as centres, as its second version has them, it is NormFace (eq. 6) with a fixed scale. scale: 30
    by default; the authors' best depends on the number of classes, and `scale_lower_bound` gives what is needed.
    (Their first version took the means of the batch as centres, with a wrong gradient in the released layer.)
    Reduction: mean over the batch.
    Source: Liu, Li and Yan 2017, Rethinking Feature Discrimination and Polymerization for Large-scale Recognition.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        scale: float = 30.0,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        check_scale(scale)
        super().__init__(
            num_classes, embedding_dim, scale=scale, learn_scale=False, streaming=streaming, generator=generator
        )


def scale_lower_bound(num_classes: int, probability: float = PROBABILITY) -> float:
    """The scale below which no head on cosines can give every class that probability.

    (C - 1) / C ln((C - 1) P / (1 - P)), at the best possible arrangement of class vectors. num_classes: C > 1;
    probability: P in (0, 1). Raises ValueError for others.
    Sources: Wang et al. 2018, CosFace, section 3.3; NormFace, proposition 2, solved for the scale.
    """
    if not is_count(num_classes) or num_classes < 2 or not 0.0 < probability < 1.0:
        raise ValueError(
            f"The bound needs num_classes of 2 or more and a probability in (0, 1); got {num_classes!r}, "
            f"{probability!r}."
        )
    others = num_classes - 1
    return others / num_classes * math.log(others * probability / (1.0 - probability))


def loss_lower_bound(num_classes: int, scale: float) -> float:
    """The cross-entropy below which `NormFace` cannot fall, for balanced classes.

    ln(1 + (C - 1) exp(-C / (C - 1) scale)). num_classes: C > 1; scale > 0. Raises ValueError for others.
    Source: Wang, Xiang, Cheng and Yuille 2017, NormFace, proposition 2 (there with scale = l^2).
    """
    check_scale(scale)
    if not is_count(num_classes) or num_classes < 2:
        raise ValueError(f"The bound needs num_classes of 2 or more; got {num_classes!r}.")
    others = num_classes - 1
    return math.log1p(others * math.exp(-num_classes / others * scale))
