"""Softmax classification on raw embeddings, and on embeddings of a fixed length."""

import math

import torch
from torch import Tensor, nn

from metricface.choices import is_count
from metricface.distances import full_precision, unit_rows
from metricface.heads.base import Head, check_scale, cross_entropy, fitting


class Softmax(Head):
    """Linear layer and cross-entropy on raw embeddings; nothing is normalised.

    weight: (C, D) from N(0, 0.01^2); bias: (C,) zeros, or none. The first loss is therefore close to ln C.
    class_weights_from makes it the nearest-mean classifier: weights are the class means m, biases -|m|^2 / 2 (of
    classes without an image: unchanged). streaming, generator, `last`: as in Head. Reduction: mean over the batch.
    """

    unit_classes = False
    bias: Tensor | None

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        bias: bool = True,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, streaming=streaming, generator=generator)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_classes)) if bias else None)

    def _queries(self, x: Tensor) -> Tensor:
        return x

    def _bias(self) -> Tensor | None:
        return None if self.bias is None else full_precision(self.bias)

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        others = self._others(self._queries(x), labels)
        return cross_entropy(others.reduced, others.own)

    def _set_classes(self, means: Tensor, found: Tensor, embeddings: Tensor, labels: Tensor) -> None:
        super()._set_classes(means, found, embeddings, labels)
        if self.bias is not None:
            self.bias[found] = fitting((-0.5 * means.square().sum(dim=1))[found], self.bias)

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, bias={self.bias is not None}"


class L2Softmax(Softmax):
    """L2-constrained softmax: a linear layer with bias on embeddings scaled to the length `alpha`.

    Embeddings are normalised and multiplied with alpha; class weights are not normalised, and the bias is kept.
    alpha: a number (16 to 40 in the paper; `alpha_lower_bound` says below which it cannot work), or learned from there
    on with learn_alpha=True. A zero embedding stays zero, with gradient 0. bias, streaming, generator, `last`: as in
    Softmax. Reduction: mean over the batch. pytorch-metric-learning has none; gluon-face's loss of this name multiplies
    the logits, bias and all, which is another function.
    Source: Ranjan, Castillo and Chellappa 2017, L2-constrained Softmax Loss for Discriminative Face Verification.
    """

    alpha: float | Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        alpha: float = 16.0,
        learn_alpha: bool = False,
        bias: bool = True,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, bias=bias, streaming=streaming, generator=generator)
        check_scale(alpha, "alpha")
        self.alpha = nn.Parameter(torch.tensor(float(alpha))) if learn_alpha else alpha

    def _queries(self, x: Tensor) -> Tensor:
        alpha = full_precision(self.alpha) if isinstance(self.alpha, Tensor) else self.alpha
        return unit_rows(x) * alpha

    def _rows_for_means(self, rows: Tensor) -> Tensor:
        return self._queries(rows)

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, alpha={float(self.alpha):g}"


def alpha_lower_bound(num_classes: int, probability: float = 0.9) -> float:
    """The length of embeddings below which L2Softmax cannot reach that probability for an average class.

    ln(p (C - 2) / (1 - p)). num_classes: C > 2; probability: p in (0, 1). Raises ValueError for others.
    Source: Ranjan, Castillo and Chellappa 2017, eq. 6.
    """
    if not is_count(num_classes) or num_classes < 3 or not 0.0 < probability < 1.0:
        raise ValueError(
            f"The bound needs num_classes of 3 or more and a probability in (0, 1); got {num_classes!r}, "
            f"{probability!r}."
        )
    return math.log(probability * (num_classes - 2) / (1.0 - probability))
