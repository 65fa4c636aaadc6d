"""CosFace, also called AM-Softmax: a margin on the cosine of the target class."""

import torch
from torch import Tensor

from metricface.choices import is_number
from metricface.distances import unit_rows
from metricface.heads.base import Head


class CosFace(Head):
    """Cross-entropy over scale * cos(theta_j), the target class's being scale * (cos(theta_y) - margin_cos).

    Embeddings and class weights are both scaled to length 1; zero embeddings have cosine 0 and gradient 0. No bias.
    margin_cos: 0.35 in both papers (CosFace also 0.40); scale: 64 in CosFace, 30 in AM-Softmax. margin_cos=0 is
    NormFace with a fixed scale. Both are plain attributes that a schedule may change.
    Sources: Wang et al. 2018, CosFace, eq. 4; Wang et al. 2018, Additive Margin Softmax, eq. 7.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin_cos: float = 0.35,
        scale: float = 64.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, generator=generator)
        if not is_number(margin_cos) or not 0 <= margin_cos < 2:
            raise ValueError(f"margin_cos must lie in [0, 2); got {margin_cos!r}.")
        if not is_number(scale) or scale <= 0:
            raise ValueError(f"scale must be a finite number above 0; got {scale!r}.")
        self.margin_cos = margin_cos
        self.scale = scale

    def _plain_logits(self, embeddings: Tensor) -> Tensor:
        # The scale on the (B, D) side: no second (B, C) tensor.
        return (unit_rows(embeddings) * self.scale) @ unit_rows(self.weight).T

    def _training_logits(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        logits = self._plain_logits(embeddings)
        margin = logits.new_full((len(labels), 1), -self.scale * self.margin_cos)
        # In place: a matrix product does not need its result for its gradient.
        return logits.scatter_add_(1, labels[:, None], margin)

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, margin_cos={self.margin_cos}, scale={self.scale}"
