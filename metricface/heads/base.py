"""What every head has: a class matrix, checked input, full-precision logits, and cross-entropy."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metricface.choices import is_count
from metricface.distances import full_precision, without_autocast
from metricface.tuples import check_values


class Head(nn.Module, ABC):
    """A class matrix `weight` (C, D) under a cross-entropy; subclasses say what the logits are.

    Initialised from N(0, 0.01^2), from `generator` or else from torch's global one. Where a head normalises its
    weights only their direction counts; their length then sets how far a first step of the optimiser turns them.
    Logits and loss are computed in float32 (float64 for a float64 head) whatever autocast says, and the weight keeps
    its own type.
    """

    def __init__(self, num_classes: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not is_count(num_classes) or not is_count(embedding_dim):
            raise ValueError(
                f"{type(self).__name__} needs at least 1 class and 1 dimension; "
                f"got num_classes={num_classes!r}, embedding_dim={embedding_dim!r}."
            )
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim))
        nn.init.normal_(self.weight, std=0.01, generator=generator)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of a batch, the mean over its B rows: a scalar in float32 (float64 for a float64
        head), 0 for B = 0.

        embeddings: (B, D) raw, of any floating type; labels: (B,) integers in [0, C).
        Raises ValueError for other shapes, types and ranges, and for NaN, infinite or overflowing embeddings.
        """
        self._check_embeddings(embeddings)
        labels = self._check_labels(labels, len(embeddings)).to(embeddings.device)  # from a loader: on the CPU
        with without_autocast(embeddings):
            logits = self._training_logits(self._prepare(embeddings), labels)
            return F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))

    def logits(self, embeddings: Tensor) -> Tensor:
        """Logits without any margin, for class predictions. embeddings: (B, D). Returns (B, C)."""
        self._check_embeddings(embeddings)
        with without_autocast(embeddings):
            return self._plain_logits(self._prepare(embeddings))

    @abstractmethod
    def _plain_logits(self, embeddings: Tensor) -> Tensor:
        """(B, D) in full precision -> a fresh (B, C), outside autocast."""

    def _training_logits(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """As the plain ones, with the margin applied at the labels. A margin changes B of the B x C in place."""
        return self._plain_logits(embeddings)

    def _prepare(self, embeddings: Tensor) -> Tensor:
        return embeddings.to(full_precision(self.weight).dtype)

    def _check_embeddings(self, embeddings: Tensor) -> None:
        if not isinstance(embeddings, Tensor):
            raise ValueError(f"{type(self).__name__} takes tensors; found embeddings as {type(embeddings).__name__}.")
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim or not embeddings.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} was built for floating (batch, {self.embedding_dim}) embeddings; "
                f"found {embeddings.dtype} {tuple(embeddings.shape)}."
            )
        check_values(embeddings, "embeddings")

    def _check_labels(self, labels: Tensor, rows: int) -> Tensor:
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels must be an integer tensor; found {type(labels).__name__}.")
        if labels.shape != (rows,):
            raise ValueError(f"labels must be ({rows},), one per embedding; found {tuple(labels.shape)}.")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers, each a class of the head; found {labels.dtype}.")
        if rows and (int(labels.min()) < 0 or int(labels.max()) >= self.num_classes):
            raise ValueError(
                f"labels must lie in [0, {self.num_classes}); found {int(labels.min())} to {int(labels.max())}. "
                "Build the head with the training set's number of identities, and number those from 0."
            )
        return labels.long()

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}"
