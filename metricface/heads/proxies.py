"""Pair and triplet losses between embeddings and class vectors: NormFace's agents and the nearest-proxies triplet."""

from functools import partial

import torch
from torch import Tensor

from metricface.choices import is_count
from metricface.distances import unit_rows
from metricface.heads.base import Head, check_number
from metricface.heads.target import Target


class _ProxyHead(Head):
    """Distances between unit embeddings and unit class vectors: |z - w|^2 = 2 - 2 cos."""

    is_softmax = False

    def target_cos(self, target: Target) -> Tensor:
        """Refused with a ValueError: these losses compare distances and have no target logit."""
        raise ValueError(f"{type(self).__name__} compares distances to class vectors; it has no target logit to draw.")

    def _queries(self, x: Tensor) -> Tensor:
        return unit_rows(x)


class CContrastive(_ProxyHead):
    """NormFace's C-contrastive loss: the contrastive loss of an embedding with every class vector.

    |z - w_y|^2 + sum over j != y of [margin - |z - w_j|^2]+. Embeddings and class weights are scaled to length 1;
    distances are squared, also in the hinge; summed over classes, mean over the batch. margin: 1 in the paper, a
    squared distance, a plain attribute that a schedule may change. Zero embeddings have cosine 0, so distance 2.
    The paper's best mix is NormFace plus 0.01 times this. logits are cosines. streaming, generator, `last`: as in Head.
    pytorch-metric-learning has none.
    Source: Wang, Xiang, Cheng and Yuille 2017, NormFace, eq. 10.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin: float = 1.0,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, streaming=streaming, generator=generator)
        check_number("margin", margin, 0.0, 4.0, least_too=False)
        self.margin = margin

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        others = self._others(unit_rows(x), labels, transform=partial(_negatives, margin=self.margin), reduction="sum")
        return 2.0 - 2.0 * others.own + others.reduced

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, margin={self.margin}"


class CTriplet(_ProxyHead):
    """NormFace's C-triplet loss: the triplet loss of an embedding, its class vector, and every other class vector.

    Sum over j != y of [margin + |z - w_y|^2 - |z - w_j|^2]+. Embeddings and class weights are scaled to length 1;
    distances are squared; summed over classes, mean over the batch. margin: 0.8 in the paper, of squared distances, a
    plain attribute that a schedule may change. hardest_only: only the nearest other class (an option of the authors'
    layer): NPT with k=1, margin_cos=margin / 2. logits are cosines. streaming, generator, `last`: as in Head.
    pytorch-metric-learning has none.
    Source: Wang, Xiang, Cheng and Yuille 2017, NormFace, eq. 11.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin: float = 0.8,
        hardest_only: bool = False,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, streaming=streaming, generator=generator)
        check_number("margin", margin, 0.0, 4.0)
        self.margin = margin
        self.hardest_only = hardest_only

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        z = unit_rows(x)
        if self.hardest_only:
            return 2.0 * _nearest_hinges(self, z, labels, 1, 0.5 * self.margin)
        return self._others(z, labels, transform=partial(_triplets, margin=self.margin), reduction="sum").reduced

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, margin={self.margin}, hardest_only={self.hardest_only}"


class NPT(_ProxyHead):
    """NPT loss: triplets of an embedding, its class vector, and its k nearest other class vectors.

    Sum over the k of [|z - w_y|^2 - |z - w_j|^2 + Delta]+ with both sides of length r, which is
    2 r^2 sum [cos_j - cos_y + margin_cos]+, margin_cos = Delta / (2 r^2). Distances are squared; mean over the batch.
    k: 1 in the paper for ResNet-50, 6 for MobileFaceNet. margin_cos: 0.5 (Delta = r^2). radius: r, 1. Plain attributes
    that a schedule may change. logits are cosines. streaming changes nothing here: products are never held.
    generator, `last`: as in Head.
    The released code multiplies by 2 r, and masks the own class with 0 instead of minus infinity, so that where the
    k-th nearest other class has a negative cosine a 0 takes its place; this follows the paper. pytorch-metric-learning
    has none.
    Source: Khalid et al. 2021, NPT-Loss, arXiv 2103.03503.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin_cos: float = 0.5,
        k: int = 1,
        radius: float = 1.0,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, streaming=streaming, generator=generator)
        check_number("margin_cos", margin_cos, 0.0, 2.0)
        check_number("radius", radius, 0.0, torch.inf, least_too=False)
        if not is_count(k):
            raise ValueError(f"k must be a whole number, at least 1; got {k!r}.")
        self.margin_cos, self.k, self.radius = margin_cos, k, radius

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        return 2.0 * self.radius**2 * _nearest_hinges(self, unit_rows(x), labels, self.k, self.margin_cos)

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, margin_cos={self.margin_cos}, k={self.k}, radius={self.radius:g}"


def _negatives(cos: Tensor, _: Tensor, *, margin: float) -> Tensor:
    """[margin - |z - w_j|^2]+: (b, c) cosines -> (b, c)."""
    return (margin - 2.0 + 2.0 * cos).clamp_min(0.0)


def _triplets(cos: Tensor, own: Tensor, *, margin: float) -> Tensor:
    """[margin + |z - w_y|^2 - |z - w_j|^2]+: (b, c) cosines, (b, 1) those of the own class -> (b, c)."""
    return (margin - 2.0 * own + 2.0 * cos).clamp_min(0.0)


def _nearest_hinges(head: Head, z: Tensor, labels: Tensor, k: int, margin_cos: float) -> Tensor:
    """Sum of [cos_j - cos_y + margin]+ over the k nearest other classes, (B,); all of them, where there are fewer."""
    own, nearest = head.classes.nearest(head, z, labels, k)
    with torch.no_grad():
        right = (nearest < own[:, None]).all(dim=1)
        head.last = {"accuracy": right.to(own.dtype).mean(), "zero_embeddings": (z == 0).all(dim=1).sum()}
    return (nearest - own[:, None] + margin_cos).clamp_min(0.0).sum(dim=1)
