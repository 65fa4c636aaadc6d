"""Center loss: each embedding is pulled to a centre of its class, which follows by a rule of its own."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from metricface.choices import check_choice, is_count, is_number
from metricface.identities import Identities, find_identities
from metricface.tuples import Batch, check_batch

CenterReduction = Literal["mean", "sum"]


def center(embeddings: Tensor, centers: Tensor) -> Tensor:
    """Center loss of each embedding, unreduced.

    embeddings: (B, D); centers: (B, D), each one's own. Returns (B,): half their squared Euclidean distance.
    Source: Wen et al. 2016, A Discriminative Feature Learning Approach for Deep Face Recognition, eq. 2.
    """
    return 0.5 * (embeddings - centers).square().sum(dim=1)


class CenterLoss(nn.Module):
    """Wen et al.'s center loss, to stand beside a classification head (their weight for it: 0.003).

    Distance: squared Euclidean, halved, on raw embeddings. Reduction: "mean" over the batch, as in the authors' Caffe
    layer, or "sum", the paper's eq. 2 (a gradient B times as large). Only the embeddings have a gradient.

    `centers` (C, D) is a buffer, zeros at first (as in Sandberg's facenet; the Caffe layer takes any filler):
    `centers_from` sets it to class means. In training mode every call with gradients on moves the centres of the
    classes in the batch, after the loss has read them, by the paper's eq. 4, which is not the gradient of the loss:
    c_j -= alpha x sum over the class's images of (c_j - x_i) / (1 + their number). Neither evaluation mode nor
    torch.no_grad() moves any. A step costs O(B D), however many classes there are. On a GPU its rounding depends on
    the order of additions unless torch.use_deterministic_algorithms(True). Each process of several moves its own copy.
    alpha: 0 (fixed centres) to 1, the paper's being 0.5; a plain attribute that a schedule may change.

    Other implementations are other functions: Sandberg's facenet takes the mean over B x D without the 1/2, and its
    centres move (1 - alfa) times the sum over the images, undivided; many take centres as parameters.
    pytorch-metric-learning 2.9.0 has no center loss.
    """

    centers: Tensor
    last: dict[str, Tensor] | None = None

    def __init__(
        self, num_classes: int, embedding_dim: int, *, alpha: float = 0.5, reduction: CenterReduction = "mean"
    ) -> None:
        super().__init__()
        check_sizes(self, num_classes, embedding_dim)
        check_choice("reduction", reduction, get_args(CenterReduction))
        if not is_number(alpha) or not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], the share of a step that a centre moves; got {alpha!r}.")
        self.register_buffer("centers", torch.zeros(num_classes, embedding_dim))
        self.alpha = alpha
        self.reduction = reduction

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Loss of a batch: a scalar in float32 (float64 for float64 embeddings), 0 for B = 0.

        embeddings: (B, D) of any floating type; labels: (B,) integers in [0, C). The other arguments are None; they
        are there so that this can stand in a sum beside other losses. Afterwards `last` has "center_distance", the mean
        Euclidean distance to the own centre before it moved (0-dim; NaN for B = 0). Raises ValueError for malformed or
        non-finite input, for labels without a centre, and for a tuple or references.
        """
        batch = check_alone(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        classes = check_classes(batch, self.centers)
        own = self.centers.index_select(0, classes)  # (B, D), a copy: moving the centres leaves it alone
        losses = center(batch.embeddings, own)
        self.last = {"center_distance": (2.0 * losses.detach()).sqrt().mean()}
        if self.training and torch.is_grad_enabled():
            self._move(batch, classes, own)
        total = losses.sum() if self.reduction == "sum" else losses.sum() / max(1, len(losses))
        return total.to(batch.embeddings.dtype)

    @torch.no_grad()
    def centers_from(self, embeddings: Tensor, labels: Tensor) -> int:
        """Set centres to the means of these embeddings' classes, for a warm start.

        embeddings: (N, D), labels: (N,) integers in [0, C), of the whole training set or a part of it; a few (N, D)
        copies are made. Returns how many classes have no image here: their centres stay as they are. Raises ValueError
        as a call of the loss does.
        """
        return set_class_means(self.centers, embeddings, labels)

    @torch.no_grad()
    def _move(self, batch: Batch, classes: Tensor, own: Tensor) -> None:
        identities = find_identities(batch)
        steps = class_sums(batch.embeddings - own, identities) / (1 + identities.size)[:, None]  # (B, D)
        # Images of one class write one and the same row, so their order does not matter.
        self.centers.index_copy_(0, classes, (own + self.alpha * steps).to(self.centers.dtype))

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        classes, dim = self.centers.shape
        return f"num_classes={classes}, embedding_dim={dim}, alpha={self.alpha}, reduction={self.reduction!r}"


def set_class_means(centers: Tensor, embeddings: Tensor, labels: Tensor) -> int:
    """Set rows of the centres (C, D), in place, to the means of their classes; returns how many have no image."""
    batch = check_batch(embeddings, labels)
    classes = check_classes(batch, centers)
    identities = find_identities(batch)
    means = class_sums(batch.embeddings, identities) / identities.size[:, None]
    centers.index_copy_(0, classes, means.to(centers.dtype))
    absent = torch.ones(len(centers), dtype=torch.bool, device=classes.device)
    absent[classes] = False
    return int(absent.sum())


def class_sums(rows: Tensor, identities: Identities) -> Tensor:
    """For each row (B, D) of a batch the sum over its class's rows there: (B, D), the same for rows of one class."""
    first = identities.first  # the same number for rows of one class, below B: no table of C rows
    return torch.zeros_like(rows).index_add_(0, first, rows).index_select(0, first)


def check_sizes(loss: nn.Module, num_classes: object, embedding_dim: object) -> None:
    """Raise ValueError unless both are whole numbers of 1 or more."""
    if not is_count(num_classes) or not is_count(embedding_dim):
        raise ValueError(
            f"{type(loss).__name__} needs at least 1 class and 1 dimension; "
            f"got num_classes={num_classes!r}, embedding_dim={embedding_dim!r}."
        )


def check_alone(
    loss: nn.Module,
    embeddings: Tensor,
    labels: Tensor,
    indices_tuple: Sequence[Tensor] | None,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
) -> Batch:
    """The batch, checked; ValueError also for a tuple or references, which such a loss has no use for."""
    if indices_tuple is not None:
        raise ValueError(
            f"{type(loss).__name__} looks at every embedding and takes no miner's tuple; found one of "
            f"{len(indices_tuple)} tensors. Leave the miner out (indices_tuple=None), or give it to a loss beside this."
        )
    if ref_emb is not None or ref_labels is not None:
        name = "ref_emb" if ref_emb is not None else "ref_labels"
        raise ValueError(
            f"{type(loss).__name__} compares a batch with nothing outside of it; found {name}. "
            "Pass ref_emb=None and ref_labels=None, and references to the losses beside it."
        )
    return check_batch(embeddings, labels)


def check_classes(batch: Batch, centers: Tensor) -> Tensor:
    """The labels as int64 rows of the centres (C, D); ValueError for labels, or a dimension, that they do not have."""
    classes, dim = centers.shape
    if batch.embeddings.shape[1] != dim:
        raise ValueError(
            f"embeddings have {batch.embeddings.shape[1]} dimensions, the centres {dim}. "
            "Build the loss with the embedder's number of dimensions."
        )
    labels = batch.labels.long()
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(
            f"labels must lie in [0, {classes}); found {int(labels.min())} to {int(labels.max())}. "
            "Build the loss with the training set's number of identities, and number those from 0."
        )
    return labels
