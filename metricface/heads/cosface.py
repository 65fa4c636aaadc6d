"""CosFace, also called AM-Softmax: a margin on the cosine of the target class."""

import torch
from torch import Tensor

from metricface.heads.base import check_number
from metricface.heads.cosine import CosineHead
from metricface.heads.target import Target


class CosFace(CosineHead):
    """Cross-entropy over scale * cos(theta_j), the target class's being scale * (cos(theta_y) - margin_cos).

    Embeddings and class weights are both scaled to length 1; zero embeddings have cosine 0 and gradient 0. No bias.
    margin_cos: 0.35 in both papers (CosFace also 0.40); scale: 64 in CosFace, 30 in AM-Softmax. margin_cos=0 is
    NormFace with a fixed scale. Both are plain attributes that a schedule may change. streaming, generator, `last`: as
    in Head. Reduction: mean over the batch. pytorch-metric-learning's CosFaceLoss is the same.
    Sources: Wang et al. 2018, CosFace, eq. 4; Wang et al. 2018, Additive Margin Softmax, eq. 7.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin_cos: float = 0.35,
        scale: float = 64.0,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, scale=scale, streaming=streaming, generator=generator)
        check_number("margin_cos", margin_cos, 0.0, 2.0)
        self.margin_cos = margin_cos

    def target_cos(self, target: Target) -> Tensor:
        """cos(theta) - margin_cos: (B,)."""
        return target.cos - self.margin_cos

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, margin_cos={self.margin_cos}"
