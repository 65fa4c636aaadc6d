"""Plain softmax classification: the stage that precedes triplet training, and the simplest baseline."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metricface.distances import full_precision
from metricface.heads.base import Head


class Softmax(Head):
    """Linear layer and cross-entropy on raw embeddings; nothing is normalised.

    weight: (C, D) from N(0, 0.01^2); bias: (C,) zeros, or none. The first loss is therefore close to ln C.
    """

    bias: Tensor | None

    def __init__(
        self, num_classes: int, embedding_dim: int, *, bias: bool = True, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(num_classes, embedding_dim, generator=generator)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_classes)) if bias else None)

    def _plain_logits(self, embeddings: Tensor) -> Tensor:
        bias = None if self.bias is None else full_precision(self.bias)
        return F.linear(embeddings, full_precision(self.weight), bias)

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, bias={self.bias is not None}"
