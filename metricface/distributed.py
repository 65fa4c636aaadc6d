"""What one rank needs of the others: their rows, joined, and sums over all ranks, with the right gradients.

The ranks are those of torch.distributed's default process group (gloo for CPUs, nccl for GPUs); without a group there
is one, and everything here is the identity. All ranks must make the same calls in the same order.

Two kinds of gradient:
- Replicated. After `gather` every rank holds the rows of all ranks and computes the same whole loss, so each has the
  whole gradient of the joined rows already; its own rows' is a slice of it, and nothing is sent. Mining over all ranks.
- Summed. Where ranks compute different parts of one loss (classes spread over ranks), `summed_gradient` opens the part
  that differs and `sum_over_ranks`, or `logsumexp_over_ranks`, closes it. The first adds up gradients in the backward
  pass, the second values in the forward pass; before and after the two everything is replicated.

And one factor: DistributedDataParallel averages the network's gradients over ranks, where one process with the joined
batch adds up those of all rows. `gather(rows, averaged=True)` multiplies by the number of ranks to make up for it.

Source: the pair of sums is Megatron-LM's f and g (Shoeybi et al. 2019, section 3).
"""

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def rank() -> int:
    """The number of this process among the ranks: 0 without a process group."""
    return dist.get_rank() if _has_group() else 0


def world_size() -> int:
    """How many ranks there are: 1 without a process group."""
    return dist.get_world_size() if _has_group() else 1


def gather(rows: Tensor, *, averaged: bool) -> Tensor:
    """The rows of all ranks, joined in rank order, with the replicated gradient: the slice of this rank's own rows.

    rows: (B_r, ...) floating, on the device of the process group; B_r may differ by rank and be 0. averaged: whether
    the gradients of what made the rows are averaged over ranks afterwards, as DistributedDataParallel does: the slice
    is then multiplied by the number of ranks. Returns (sum of B_r, ...). It can be differentiated once. Where the rows
    of any rank need a gradient the joined rows do on all of them, or their backward passes would differ.
    Raises ValueError, on every rank, where the rows of two ranks differ in size or type; for integers, where they are.
    """
    if not rows.is_floating_point():
        raise ValueError(f"gather takes floating rows, which have a gradient; found {rows.dtype}. Use gather_plain.")
    if world_size() == 1:
        return rows
    counts, needs_grad = _agree(rows)
    if needs_grad and not rows.requires_grad:
        rows = rows.detach().requires_grad_()
    joined: Tensor = _Gather.apply(rows, counts, world_size() if averaged else 1)  # type: ignore[no-untyped-call]
    return joined


def gather_plain(rows: Tensor) -> Tensor:
    """The rows of all ranks, joined in rank order, without gradient: (B_r, ...) of any type -> (sum of B_r, ...).

    For labels, scores and indices. B_r may differ by rank and be 0. Raises ValueError as `gather` does.
    """
    rows = rows.detach()
    return rows if world_size() == 1 else _joined(rows, _agree(rows)[0])


def gather_to_first(rows: Tensor) -> Tensor:
    """The rows of all ranks, joined in rank order, on rank 0, and none on the others: (B_r, ...) -> (B or 0, ...).

    Without gradient, of any type; B_r may differ by rank and be 0. Raises ValueError as `gather` does.
    """
    rows = rows.detach()
    return rows if world_size() == 1 else _joined(rows, _agree(rows)[0], everywhere=False)


def row_counts(rows: Tensor) -> list[int]:
    """How many rows each rank has, in rank order."""
    return [len(rows)] if world_size() == 1 else _agree(rows)[0]


def own_rows(counts: list[int]) -> slice:
    """Where this rank's rows lie among the joined ones. counts: as `row_counts` gives them."""
    start = sum(counts[: rank()])
    return slice(start, start + counts[rank()])


def summed_gradient(x: Tensor) -> Tensor:
    """The same tensor, whose gradient is the sum of those of all ranks. x: the same on every rank, any shape.

    To stand before what each rank computes differently. The sum in the backward pass waits for every rank.
    """
    if world_size() == 1:
        return x
    found: Tensor = _SummedGradient.apply(x)  # type: ignore[no-untyped-call]
    return found


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's tensor, of one shape; the gradient of each is that of the sum.

    To stand after what each rank computes differently, before a loss that all compute alike.
    """
    if world_size() == 1:
        return x
    found: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return found


@torch.no_grad()
def max_over_ranks(x: Tensor) -> Tensor:
    """The largest of every rank's numbers, place by place, without gradient. x: of one shape on every rank."""
    x = x.detach()
    return x if world_size() == 1 else _reduced(x, dist.ReduceOp.MAX)


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """Log of the sum of exp(x) over ranks, place by place, with the gradient of `sum_over_ranks`.

    x: of one shape on every rank; -inf where a rank has nothing to add. -inf, without gradient, where none has.
    """
    if world_size() == 1:
        return x
    top = max_over_ranks(x)
    origin = torch.where(top != -torch.inf, top, 0.0)
    total = sum_over_ranks((x - origin).exp())
    some = total != 0  # not ">": a NaN is no empty sum
    return torch.where(some, origin + torch.where(some, total, 1.0).log(), -torch.inf)


def raise_on_all_ranks(error: ValueError | None, device: torch.device) -> None:
    """Raise this rank's error, or where only others have one a ValueError that names the first of them.

    device: one that the process group can send from. Without this the other ranks would wait for the failed one, in
    their next exchange, until that times out.
    """
    ranks = world_size()
    first = ranks - int(max_over_ranks(torch.tensor(0 if error is None else ranks - rank(), device=device)))
    if error is not None:
        raise error
    if first < ranks:
        raise ValueError(f"Rank {first} refused its batch, so the joined batch is refused; its own message says why.")


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _agree(rows: Tensor) -> tuple[list[int], bool]:
    """How many rows each rank has, and whether any needs a gradient; ValueError where rows differ in size or type."""
    if rows.ndim == 0:
        raise ValueError("a tensor without dimensions has no rows to gather; pass x[None].")
    kind = zlib.crc32(f"{tuple(rows.shape[1:])} {rows.dtype}".encode())
    mine = torch.tensor([len(rows), kind, rows.requires_grad and torch.is_grad_enabled()], device=rows.device)
    found = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(found, mine)
    counts, kinds, needs_grad = torch.stack(found, dim=1).tolist()
    if len(set(kinds)) > 1:
        raise ValueError(
            f"gather joins rows of one size and type; this rank's are {tuple(rows.shape[1:])} {rows.dtype}, and "
            "another's are not. Use the same network and precision on every rank."
        )
    return counts, any(needs_grad)


def _joined(rows: Tensor, counts: list[int], *, everywhere: bool = True) -> Tensor:
    """As bytes, of which every backend can send all types, and padded: gloo sends tensors of one size.

    everywhere: on all ranks, or on the first alone, where the others get no rows.
    """
    if not max(counts):
        return rows.clone()
    flat = rows.reshape(len(rows), rows.shape[1:].numel()).contiguous().view(torch.uint8)  # (B_r, bytes)
    padded = flat.new_zeros(max(counts), flat.shape[1])
    padded[: len(rows)] = flat
    gets = everywhere or rank() == 0
    found = [torch.empty_like(padded) for _ in counts] if gets else []
    if everywhere:
        dist.all_gather(found, padded)
    else:
        dist.gather(padded, found if gets else None)
    if not gets:
        return rows[:0]
    joined = torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])
    return joined.view(rows.dtype).view(sum(counts), *rows.shape[1:])


def _reduced(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    found = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(found, op=operation)
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], factor: int) -> Tensor:
        ctx.own, ctx.factor = own_rows(counts), factor
        return _joined(rows, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_joined: Tensor) -> tuple[Tensor, None, None]:
        return by_joined[ctx.own] * ctx.factor, None, None


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_x: Tensor) -> Tensor:
        return _reduced(by_x, dist.ReduceOp.SUM)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _reduced(x, dist.ReduceOp.SUM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_sum: Tensor) -> Tensor:
        return by_sum
