"""Heads on cosines: embeddings and class vectors both scaled to length 1, logits scale x cos(theta)."""

import torch
from torch import Tensor

from metricface.distances import full_precision, unit_rows
from metricface.heads.base import Head, check_scale, cross_entropy


class CosineHead(Head):
    """Cross-entropy over scale x cos(theta_j), but for the own class scale x `target_cos`.

    A zero embedding has cosine 0 with every class and gradient 0. No bias. scale is a plain attribute that a schedule
    may change, as margins are. `last` also has "target_angle_deg", the mean angle between embeddings and their class.
    """

    scale: float | Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        scale: float,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, streaming=streaming, generator=generator)
        check_scale(scale)
        self.scale = scale

    def _queries(self, x: Tensor) -> Tensor:
        # The scale on the (B, D) side: no second (B, C) tensor.
        return unit_rows(x) * self._scale_now()

    def _scale_now(self) -> float | Tensor:
        return full_precision(self.scale) if isinstance(self.scale, Tensor) else self.scale

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        scale = self._scale_now()
        others = self._others(self._queries(x), labels)
        target = self._target(others.own / scale, x, labels)
        return cross_entropy(others.reduced, scale * self.target_cos(target))

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, scale={float(self.scale):g}"
