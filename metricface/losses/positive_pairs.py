"""Sums over positive pairs, each of which meets all references: a run of pairs at a time, differentiated on the spot.

For losses in which the positive, too, has a place beside every negative (angular, triplet with swap), and whose cost is
therefore that of a product of all positive pairs with all references. Nothing of a run is kept but its gradient.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from metricface.identities import Identities, own_references
from metricface.losses.streaming import Gradients, Totals, streamed
from metricface.tuples import Batch

# In the tables that a run of pairs makes: 8 MiB in float32 each.
RUN_NUMBERS = 1 << 21

Found = TypeVar("Found")


class PairRun(NamedTuple):
    """Some ordered positive pairs."""

    anchor: Tensor  # (c,) int64 rows of the embeddings
    positive: Tensor  # (c,) int64 rows of the references
    own: Tensor  # (c, N) int64 references of their identity, the pair itself included; -1 for none


def pair_runs(batch: Batch, identities: Identities, width: int) -> Iterator[PairRun]:
    """Every positive pair whose anchor has a negative. width: how many numbers a pair takes, at least."""
    if not len(batch.labels) or not len(batch.ref_labels):
        return
    kept = identities.positives * (identities.negatives > 0)  # (B,)
    last = kept.cumsum(0)
    pairs, largest = torch.stack([last[-1], identities.size.amax()]).tolist()
    at_once = max(1, RUN_NUMBERS // max(width, largest, batch.embeddings.shape[1]))
    for start in range(0, pairs, at_once):
        number = torch.arange(start, min(start + at_once, pairs), device=last.device)  # (c,)
        anchor = torch.searchsorted(last, number, right=True)
        own = own_references(batch, identities, anchor, largest, largest)
        place = number - (last - kept)[anchor]
        positive = own.positive.gather(1, place[:, None])[:, 0]
        yield PairRun(anchor, positive, torch.where(own.is_same, own.same, -1))


def sum_over_pairs(
    batch: Batch,
    identities: Identities,
    part: Callable[[Tensor, Tensor, Tensor, PairRun], tuple[Tensor, Found]],
    *,
    width: int,
) -> tuple[Tensor, list[Found]]:
    """The sum of `part` over every positive pair whose anchor has a negative, 0-dim, with its gradient.

    part: (c, D) anchors, (c, D) positives, (R, D) references, the run -> its sum, differentiable, and anything else
    found. width: how many numbers `part` makes of a pair. Returns the sum and what was found in each run.
    """

    def run(gradients: Gradients) -> Totals:
        total, found = batch.embeddings.new_zeros((), dtype=torch.float64), []
        by_reference = of_references_in(gradients, batch)
        for pairs in pair_runs(batch, identities, width):
            rows = (
                batch.embeddings.index_select(0, pairs.anchor),
                batch.ref_emb.index_select(0, pairs.positive),
                batch.ref_emb,
            )
            into = (gradients.embeddings, by_reference, by_reference)
            a, p, y = leaves = [row.detach().requires_grad_(to is not None) for row, to in zip(rows, into, strict=True)]
            with torch.set_grad_enabled(any(to is not None for to in into)):
                value, seen = part(a, p, y, pairs)
            found.append(seen)
            total = total + value.detach().double()
            if not value.requires_grad:
                continue
            grads = iter(torch.autograd.grad(value, [leaf for leaf in leaves if leaf.requires_grad]))
            if gradients.embeddings is not None:
                gradients.embeddings.index_add_(0, pairs.anchor, next(grads))
            if by_reference is not None:
                by_reference.index_add_(0, pairs.positive, next(grads))
                by_reference.add_(next(grads))
        return Totals(total, None, found)

    return streamed(batch, run, squared=True)


def of_references_in(gradients: Gradients, batch: Batch) -> Tensor | None:
    """Where the references' gradient is added up; None where nobody asks for it."""
    return gradients.embeddings if batch.embeddings is batch.ref_emb else gradients.references
