"""The classes of a head that one rank holds, read together with those of the other ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from metricface.distances import full_precision, unit_rows
from metricface.distributed import (
    gather,
    gather_plain,
    logsumexp_over_ranks,
    max_over_ranks,
    sum_over_ranks,
    summed_gradient,
)
from metricface.heads.base import Classes, Head, own_and_nearest
from metricface.heads.target import lengths_of
from metricface.products import Others, Reduction, Transform, reduce_others

# Parameters of heads that have a row for each class, or several.
PER_CLASS = ("weight", "bias")


def shard_of(num_classes: int, rank: int, world_size: int) -> range:
    """The classes of a rank: runs of classes in rank order, whose lengths differ by 1 at most."""
    return range(num_classes * rank // world_size, num_classes * (rank + 1) // world_size)


class Shard(Classes):
    """Some classes of a head, or a sample of them, read together with those of the other ranks.

    Queries, labels and rows are those of the joined batch, the same on every rank, and so is what is returned.
    """

    def __init__(self, held: range) -> None:
        self.held = held
        self.sample: Tensor | None = None  # (S,) classes in order, counted from the first one held
        self.is_open = False

    @contextmanager
    def read(self, sample: Tensor | None) -> Iterator[None]:
        """While PartialFC asks, with the joined batch; at any other time reading raises ValueError."""
        self.sample, self.is_open = sample, True
        try:
            yield
        finally:
            self.sample, self.is_open = None, False

    def others(
        self,
        head: Head,
        queries: Tensor,
        labels: Tensor,
        rows: Tensor,
        *,
        transform: Transform | None,
        extra: tuple[Tensor, ...],
        reduction: Reduction,
    ) -> Others:
        """The sums of all ranks, joined."""
        weight, bias = self._matrix(head)
        place = self._place(labels)
        own_row = torch.where(place >= 0, place * head.vectors_per_class + rows % head.vectors_per_class, -1)
        queries = summed_gradient(queries)
        reduce = partial(
            reduce_others,
            queries,
            weight,
            place[:, None],
            unit_references=head.unit_classes,
            bias=bias,
            group=head.vectors_per_class,
            transform=transform,
            extra=tuple(summed_gradient(tensor) for tensor in extra),
            reduction=reduction,
            hold=not head.streaming,
        )
        if transform is None:
            here = reduce(own_row)
            own, own_length = sum_over_ranks(torch.stack([here.own, here.own_length])).unbind()
        else:  # it may look at the own products, which other ranks have
            own, own_length = _own(head, queries, weight, bias, own_row)
            here = reduce(None, own=summed_gradient(own))
        joined = sum_over_ranks(here.reduced) if reduction == "sum" else logsumexp_over_ranks(here.reduced)
        return Others(joined, own, own_length, max_over_ranks(here.best))

    def nearest(self, head: Head, z: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of every rank's k nearest."""
        weight, _ = self._matrix(head)
        own, nearest = own_and_nearest(summed_gradient(z), weight, self._place(labels), k)
        candidates = gather(nearest.T, averaged=False).T  # (B, at most ranks x k)
        return sum_over_ranks(own), candidates.topk(min(k, candidates.shape[1]), dim=1).values

    def vectors(self, head: Head, rows: Tensor) -> Tensor:
        """Each from the rank that holds it, sampled or not."""
        self._check_open()
        local = rows - self.held.start * head.vectors_per_class
        here = ((local >= 0) & (local < len(head.weight))).nonzero()[:, 0]
        mine = super().vectors(head, local[here])
        return sum_over_ranks(mine.new_zeros(len(rows), mine.shape[1]).index_copy(0, here, mine))

    def products(self, head: Head, queries: Tensor) -> Tensor:
        """Those of all ranks side by side, without gradient."""
        self._check_open()
        return gather_plain(super().products(head, queries).T).T

    def mean_length(self, head: Head) -> Tensor:
        """Over the classes of all ranks."""
        self._check_open()
        lengths = torch.linalg.vector_norm(full_precision(head.weight), dim=1)
        total, count = sum_over_ranks(torch.stack([lengths.sum(), lengths.new_tensor(len(lengths))])).unbind()
        return total / count

    def _matrix(self, head: Head) -> tuple[Tensor, Tensor | None]:
        """The class vectors that count, and their biases."""
        self._check_open()
        weight, bias = head.weight, head._bias()
        if self.sample is None:
            return full_precision(weight), bias
        members = torch.arange(head.vectors_per_class, device=weight.device)
        rows = (self.sample[:, None] * head.vectors_per_class + members).flatten()
        return full_precision(weight.index_select(0, rows)), None if bias is None else bias.index_select(0, self.sample)

    def _place(self, labels: Tensor) -> Tensor:
        """(B,) where the labels lie among the classes that count, -1 for those of another rank."""
        local = labels - self.held.start
        here = (local >= 0) & (local < len(self.held))
        return torch.where(here, local if self.sample is None else torch.searchsorted(self.sample, local), -1)

    def _check_open(self) -> None:
        if not self.is_open:
            raise ValueError(
                "This head is inside a PartialFC and holds some of its classes; call the PartialFC, not its head. "
                "For a head with all classes load what reshard(states, 1) has under 'head.' into a new one."
            )


def _own(head: Head, queries: Tensor, weight: Tensor, bias: Tensor | None, own_row: Tensor) -> tuple[Tensor, Tensor]:
    """Products with the own class vectors, and these vectors' lengths, (B,) each, from the ranks that hold them.

    own_row: (B,) rows of weight, -1 for those of another rank.
    """
    here = (own_row >= 0).nonzero()[:, 0]
    vectors = weight.index_select(0, own_row[here])
    products = (queries.index_select(0, here) * (unit_rows(vectors) if head.unit_classes else vectors)).sum(dim=1)
    if bias is not None:
        products = products + bias.index_select(0, own_row[here])
    both = torch.stack([products, lengths_of(vectors)])
    own, length = sum_over_ranks(both.new_zeros(2, len(own_row)).index_copy(1, here, both)).unbind()
    return own, length
