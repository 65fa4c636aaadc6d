"""What every head has: a class matrix, checked input, a sum over the other classes, a logit for the own class."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metricface.choices import is_count, is_number
from metricface.distances import full_precision, unit_rows, without_autocast
from metricface.heads.target import Target, make_target
from metricface.products import Others, Reduction, Transform, inverse_lengths, nearest_others, reduce_others
from metricface.tuples import check_values

# Above it softplus(x) is x to the last bit in float64, too (by default torch stops at 20).
STRAIGHT = 40.0
# Rows of embeddings that are added up at a time for class means.
ROWS = 1 << 14


class Classes:
    """How a head reads its class matrix: here all of it is the head's own `weight`.

    Whatever a head wants of class vectors goes through this, so that `PartialFC` can put a shard in its place. labels:
    (B,) int64 classes; rows: (B,) int64 rows of the whole matrix, (C x K, D) with K vectors for each class.
    """

    def others(
        self,
        head: "Head",
        queries: Tensor,
        labels: Tensor,
        rows: Tensor,
        *,
        transform: Transform | None,
        extra: tuple[Tensor, ...],
        reduction: Reduction,
    ) -> Others:
        """As `reduce_others`, over the classes other than the labels; rows: the own class vectors."""
        return reduce_others(
            queries,
            full_precision(head.weight),
            labels[:, None],
            rows,
            unit_references=head.unit_classes,
            bias=head._bias(),
            group=head.vectors_per_class,
            transform=transform,
            extra=extra,
            reduction=reduction,
            hold=not head.streaming,
        )

    def nearest(self, head: "Head", z: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosines of unit rows z (B, D) with the own class, (B,), and with its k nearest others, (B, at most k).

        With gradient; -inf where there are fewer others.
        """
        return own_and_nearest(z, full_precision(head.weight), labels, k)

    def vectors(self, head: "Head", rows: Tensor) -> Tensor:
        """Rows of the matrix, (B, D) in full precision, without gradient."""
        return full_precision(head.weight.detach().index_select(0, rows))

    def products(self, head: "Head", queries: Tensor) -> Tensor:
        """(B, D) -> (B, C x K) products with all class vectors."""
        weight = unit_rows(head.weight) if head.unit_classes else full_precision(head.weight)
        return F.linear(queries, weight, head._bias())

    def mean_length(self, head: "Head") -> Tensor:
        """Mean length of all class vectors: 0-dim."""
        mean: Tensor = torch.linalg.vector_norm(full_precision(head.weight), dim=1).mean()
        return mean


class Head(nn.Module, ABC):
    """A class matrix `weight` (C, D) under a cross-entropy; subclasses say what the logits are.

    The cross-entropy is softplus(N - t), N the log-sum-exp of the logits of the other classes and t the logit of the
    label's: a margin touches B numbers. Initialised from N(0, 0.01^2), from `generator` or else from torch's global
    one. Where a head normalises its weights only their direction counts; their length then sets how far a first step
    of the optimiser turns them. Logits and loss are computed in float32 (float64 for a float64 head) whatever autocast
    says, and the weight keeps its own type.

    streaming: never hold the B x C logits, but compute them a block at a time, twice: for the value and for the
    gradient. Same value and gradient; the loss can be differentiated once, in either form, and not by torch.func.

    `last`, after each call, holds 0-dim tensors: "accuracy", the share of rows whose label has the largest logit,
    margins aside (a tie is wrong); "zero_embeddings", rows of zeros, or where they are scaled to length 1 rows shorter
    than 1e-19 (they have no direction: cosine 0 with every class, gradient 0). NaN of no rows.
    """

    unit_classes: bool = True  # whether the class vectors are divided by their lengths
    vectors_per_class: int = 1
    is_softmax: bool = True  # whether a sample of the other classes makes the same kind of loss
    classes: Classes = Classes()
    last: dict[str, Tensor] | None = None

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not is_count(num_classes) or not is_count(embedding_dim):
            raise ValueError(
                f"{type(self).__name__} needs at least 1 class and 1 dimension; "
                f"got num_classes={num_classes!r}, embedding_dim={embedding_dim!r}."
            )
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.streaming = streaming
        self.weight = nn.Parameter(torch.empty(num_classes * self.vectors_per_class, embedding_dim))
        nn.init.normal_(self.weight, std=0.01, generator=generator)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch, the mean over its B rows: a scalar in float32 (float64 for a float64 head), 0 for B = 0.

        embeddings: (B, D) raw, of any floating type; labels: (B,) integers in [0, C).
        Raises ValueError for other shapes, types and ranges, and for NaN, infinite or overflowing embeddings.
        """
        return self.losses(embeddings, labels).sum() / max(1, len(labels))

    def losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of each row, (B,): `forward` before the mean, and otherwise as it."""
        self._check_embeddings(embeddings)
        labels = self._check_labels(labels, len(embeddings)).to(embeddings.device)  # from a loader: on the CPU
        with without_autocast(embeddings):
            return self._losses(self._prepare(embeddings), labels)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Logits without any margin, for class predictions. embeddings: (B, D). Returns (B, C)."""
        self._check_embeddings(embeddings)
        with without_autocast(embeddings):
            products = self.classes.products(self, self._queries(self._prepare(embeddings)))
            return products if self.vectors_per_class == 1 else self._grouped(products).amax(dim=2)

    @torch.no_grad()
    def class_weights_from(self, embeddings: Tensor, labels: Tensor) -> int:
        """Set each class's weights to the mean of its embeddings, for a warm start of the head on a trained network.

        embeddings: (N, D) as the network gives them, on any device; labels: (N,) integers in [0, C). Heads that divide
        by lengths average directions: the mean of unit rows, scaled to the length that the weights have had on average,
        or to 1 where that was less.
        Returns how many classes have no embedding (or a mean of zero); their weights stay. Raises ValueError as
        `forward` does.
        """
        self._check_embeddings(embeddings)
        return int((~self._start_from(embeddings, self._check_labels(labels, len(embeddings)))).sum())

    def _start_from(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(C,) which classes had a mean to start from."""
        means, found = self._class_means(embeddings, labels)
        self._set_classes(means, found, embeddings, labels)
        return found

    def _class_means(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(C, D) means in full precision and (C,) whether there is one."""
        weight = full_precision(self.weight)
        classes = len(weight) // self.vectors_per_class
        sums = weight.new_zeros(classes, self.embedding_dim)
        for start in range(0, len(labels), ROWS):
            some = embeddings[start : start + ROWS].to(weight.device, weight.dtype)
            sums.index_add_(0, labels[start : start + ROWS].to(weight.device), self._rows_for_means(some))
        counts = torch.bincount(labels.to(weight.device), minlength=classes)
        means = sums.div_(counts.clamp_min(1)[:, None])
        found = counts > 0
        if self.unit_classes:
            inverse = inverse_lengths(means)
            length = self.classes.mean_length(self)
            length = length.clamp_min(1.0)  # a step turns vectors as short as new ones the farther, at any rate
            means, found = means.mul_(inverse[:, None] * length), found & (inverse > 0)
        return means, found

    def _rows_for_means(self, rows: Tensor) -> Tensor:
        return unit_rows(rows) if self.unit_classes else rows

    def _set_classes(self, means: Tensor, found: Tensor, embeddings: Tensor, labels: Tensor) -> None:
        """means: (C, D), found: (C,) which of them to use."""
        self.weight[found] = fitting(means[found], self.weight)

    def target_cos(self, target: Target) -> Tensor:
        """What stands for the cosine of the own class, margin and all: (B,) -> (B,). Drawn by `target_curve`."""
        return target.cos

    @abstractmethod
    def _queries(self, x: Tensor) -> Tensor:
        """(B, D) in full precision -> (B, D), whose products with the class vectors are the logits."""

    @abstractmethod
    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """(B, D) in full precision -> (B,)."""

    def _others(
        self,
        queries: Tensor,
        labels: Tensor,
        *,
        rows: Tensor | None = None,
        transform: Transform | None = None,
        extra: tuple[Tensor, ...] = (),
        reduction: Reduction = "logsumexp",
    ) -> Others:
        """What the classes other than the labels come to; rows: (B,) the own class vectors where classes have some."""
        rows = labels if rows is None else rows
        others = self.classes.others(self, queries, labels, rows, transform=transform, extra=extra, reduction=reduction)
        with torch.no_grad():
            right = (others.own > others.best).to(queries.dtype)
            self.last = {"accuracy": right.mean(), "zero_embeddings": (queries == 0).all(dim=1).sum()}
        return others

    def _bias(self) -> Tensor | None:
        """(C,) in full precision, added to the products, or none."""
        return None

    def _target(self, cos: Tensor, x: Tensor, rows: Tensor) -> Target:
        """cos: (B,) with gradient; x: (B, D) raw; rows: (B,) own class vectors. Notes the mean angle in `last`."""
        target = make_target(cos, x, self.classes.vectors(self, rows))
        with torch.no_grad():
            assert self.last is not None
            self.last["target_angle_deg"] = torch.atan2(target.sin, target.cos).rad2deg().mean()
        return target

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Head":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():  # a moving average of half precision would stop moving
            if buffer is not None:
                self._buffers[name] = full_precision(buffer)
        return self

    def _grouped(self, products: Tensor) -> Tensor:
        """(B, C x K) -> (B, C, K)."""
        return products.view(len(products), -1, self.vectors_per_class)

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
        check_values(self._prepare(embeddings), "embeddings")  # as they are used

    def _check_labels(self, labels: Tensor, rows: int) -> Tensor:
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels must be an integer tensor; found {type(labels).__name__}.")
        if labels.shape != (rows,):
            raise ValueError(f"labels must be ({rows},), one per embedding; found {tuple(labels.shape)}.")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers, each a class of the head; found {labels.dtype}.")
        labels = labels.long()  # unsigned types have no minimum
        if rows and (int(labels.min()) < 0 or int(labels.max()) >= self.num_classes):
            raise ValueError(
                f"labels must lie in [0, {self.num_classes}); found {int(labels.min())} to {int(labels.max())}. "
                "Build the head with the training set's number of identities, and number those from 0."
            )
        return labels

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        streaming = ", streaming=True" if self.streaming else ""
        return f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}{streaming}"


def own_and_nearest(z: Tensor, weight: Tensor, own: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines of unit rows with one class vector each and with the k nearest of the others, with gradient.

    z: (B, D); weight: (C, D), C > 0; own: (B,) int64 rows of it, -1 for none (cosine 0, and no class is left out).
    Returns (B,) and (B, min(k, C)), -inf where fewer are left.
    """
    nearest = nearest_others(z.detach(), weight.detach(), own[:, None], k, unit_references=True)  # (B, k)
    rows = torch.cat([own[:, None], nearest], dim=1)
    vectors = unit_rows(weight.index_select(0, rows.clamp_min(0).flatten())).view(*rows.shape, z.shape[1])
    cos = (z[:, None] * vectors).sum(dim=2)  # (B, 1 + k)
    return torch.where(own >= 0, cos[:, 0], 0.0), torch.where(nearest >= 0, cos[:, 1:], -torch.inf)


def fitting(values: Tensor, like: Tensor) -> Tensor:
    """The values in the type of `like`; ValueError where it cannot hold them."""
    made = values.to(like.dtype)
    if not bool(torch.isfinite(made).all()):
        raise ValueError(f"class means do not fit into {like.dtype}; scale the embeddings down or keep the head wider.")
    return made


def cross_entropy(others: Tensor, own: Tensor) -> Tensor:
    """Cross-entropy of each row: log(exp(others) + exp(own)) - own.

    others: (B,) log-sum-exp of the other classes' logits, -inf where there is none; own: (B,). Returns (B,) >= 0.
    """
    return F.softplus(others - own, threshold=STRAIGHT)


def check_number(name: str, value: object, least: float, most: float, *, least_too: bool = True) -> None:
    """Raise ValueError unless `value` is a number in [least, most), or (least, most)."""
    if not is_number(value) or value < least or value >= most or (value == least and not least_too):  # type: ignore[operator]
        raise ValueError(f"{name} must lie in {'[' if least_too else '('}{least:g}, {most:g}); got {value!r}.")


def check_scale(scale: object, name: str = "scale") -> None:
    """Raise ValueError unless it is a finite number above 0."""
    if not is_number(scale) or not 1e-6 <= scale <= 1e6:  # type: ignore[operator]
        raise ValueError(f"{name} must be a finite number above 0, from 1e-6 to 1e6; got {scale!r}.")
