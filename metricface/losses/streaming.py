"""Sums over every pair or triplet of a batch, with their gradient, in memory that does not grow with their number.

The sum is made chunk by chunk. While a chunk's distances are at hand its gradient is taken too and added up, so nothing
is kept for the backward pass and nothing is computed twice (checkpointing would compute each chunk's loss once more).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from metricface.distances import Distance, paired, without_autocast
from metricface.identities import find_identities, positive_pairs
from metricface.losses.gathering import distance_matrix
from metricface.tuples import Batch

# Numbers in the largest tensor of a chunk: 4 MB in float32. Measured at B = 4096, D = 128: a loss takes 65 to 115 MB
# beyond its input; twice this chunk takes twice that and saves no time.
CHUNK_NUMBERS = 1 << 20

Chunk = TypeVar("Chunk")


class Sum(NamedTuple):
    """A sum of losses and over how many it runs, both 0-dim; only `total` has a gradient."""

    total: Tensor
    number: Tensor  # int64


def streamed(contribution: Callable[..., Sum], chunks: Sequence[Chunk], *tensors: Tensor) -> Sum:
    """Add up contribution(chunk, *tensors) over the chunks. Gradients (first order) flow to `tensors`."""
    # Asked here because inside a Function gradients are always off.
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    # The gradient's products, too, run inside the forward pass here, where autocast would round them.
    with without_autocast(tensors[0]):
        total, number = _Streamed.apply(contribution, chunks, wanted, *tensors)  # type: ignore[no-untyped-call]
    return Sum(total, number)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, contribution: Callable[..., Sum], chunks: Sequence[Any], wanted: list[bool], *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs = [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
        leaves = [tensor for tensor in inputs if tensor.requires_grad]
        grads = [torch.zeros_like(leaf) for leaf in leaves]
        total = tensors[0].new_zeros(())
        number = torch.zeros((), dtype=torch.long, device=total.device)
        for chunk in chunks:
            with torch.set_grad_enabled(bool(leaves)):
                part = contribution(chunk, *inputs)
            if leaves:
                found = torch.autograd.grad(part.total, leaves, allow_unused=True)
                for grad, share in zip(grads, found, strict=True):
                    if share is not None:
                        grad += share
            total += part.total.detach()
            number += part.number
        ctx.wanted = wanted
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(number)
        return total, number

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        return None, None, None, *(next(saved) * grad_total if want else None for want in ctx.wanted)


def anchor_chunks(batch: Batch) -> list[slice]:
    """Runs of anchors whose distances to all references fit into a chunk."""
    rows = max(1, CHUNK_NUMBERS // max(1, len(batch.ref_labels)))
    return [slice(start, start + rows) for start in range(0, len(batch.labels), rows)]


class TripletSums(NamedTuple):
    """Of every triplet of a batch, 0-dim: the sum of losses, how many losses exceed 0, how many triplets there are."""

    total: Tensor
    active: Tensor
    triplets: Tensor


def every_triplet(batch: Batch, distance: Distance, loss: Callable[[Tensor, Tensor], Tensor]) -> TripletSums:
    """Sum loss(d_ap, d_an) over every (anchor, positive, negative) of a batch.

    loss: elementwise and broadcasting; 0 with gradient 0 where d_an is infinite. Triplets are never listed: a chunk
    holds (positive pairs, R) losses.
    """
    identities = find_identities(batch)
    anchors, positives = positive_pairs(batch, identities)

    def contribution(chunk: slice, embeddings: Tensor, ref_emb: Tensor) -> Sum:
        anchor, positive = anchors[chunk], positives[chunk]
        rows, row_of_pair = torch.unique_consecutive(anchor, return_inverse=True)
        d_ap = paired(embeddings.index_select(0, anchor), ref_emb.index_select(0, positive), distance)  # (p,)
        d_an = distance_matrix(embeddings.index_select(0, rows), ref_emb, distance)  # (rows, R)
        d_an = d_an.masked_fill(batch.labels[rows, None] == batch.ref_labels, torch.inf)
        losses = loss(d_ap[:, None], d_an.index_select(0, row_of_pair))  # (p, 1), (p, R) -> (p, R)
        return Sum(losses.sum(), (losses > 0).sum())

    size = max(1, CHUNK_NUMBERS // max(1, *batch.ref_emb.shape))
    chunks = [slice(start, start + size) for start in range(0, len(anchors), size)]
    total, active = streamed(contribution, chunks, batch.embeddings, batch.ref_emb)
    return TripletSums(total, active, identities.negatives[anchors].sum())
