"""Many processes as one run: how they come together, what they agree on, and which of them speaks.

torchrun starts them. All take the same steps on their parts of the same batches; the first rank's clock is everybody's,
and it alone prints and writes. Everything here does nothing in a process that is alone.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from metricface.distributed import rank, sum_over_ranks, world_size
from metricface.heads.reshard import sharded_names

T = TypeVar("T")


class Beat(NamedTuple):
    """What all ranks know before a step."""

    seconds: float  # of training so far, by the first rank's clock
    stop: bool  # whether any rank was asked to stop


@contextmanager
def together() -> Iterator[None]:
    """Inside, the processes that torchrun has started are the ranks of one group (gloo, and nccl on GPUs)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    dist.init_process_group()
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def speaks() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def beat(seconds: float, stop: bool) -> Beat:
    """One exchange before each step. seconds: of training by this rank's clock; stop: whether it was asked to."""
    if world_size() == 1:
        return Beat(seconds, stop)
    both = torch.tensor([seconds if speaks() else 0.0, float(stop)], dtype=torch.float64)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return Beat(float(both[0]), bool(both[1]))


def any_of(flag: bool) -> bool:
    """Whether it is so on any rank."""
    return beat(0.0, flag).stop


def raise_together(failed: Exception | None, kind: type[Exception], elsewhere: str) -> None:
    """Where a rank has failed in this way, raise on all: `failed` on those that have, kind(elsewhere) on the others."""
    if any_of(isinstance(failed, kind)):
        raise failed if failed is not None and isinstance(failed, kind) else kind(elsewhere)


def from_first(value: T) -> T:
    """The first rank's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def of_all(value: T) -> list[T]:
    """Every rank's value, in rank order."""
    if world_size() == 1:
        return [value]
    found: list[T] = [value] * world_size()
    dist.all_gather_object(found, value)
    return found


def total(number: int) -> int:
    """The sum of every rank's number."""
    return int(sum_over_ranks(torch.tensor(number)))


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of every rank's number, without gradient."""
    return sum_over_ranks(value.detach()) / world_size()


def data_parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, whose gradient is averaged over ranks in the backward pass; itself where nothing of it learns.

    Its buffers are not: see `average_statistics`.
    """
    if world_size() == 1 or not any(p.requires_grad for p in network.parameters()):
        return network
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)


@torch.no_grad()
def average_gradients(module: nn.Module, *, but: Collection[nn.Parameter] = ()) -> None:
    """Average the gradients of a module that every rank has, over ranks; one without a gradient counts as 0.

    but: parameters whose gradient is whole and stays: classes that are spread over ranks.
    """
    if world_size() == 1:
        return
    own = set(but)
    for parameter in (p for p in module.parameters() if p not in own):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad.div_(world_size())


@torch.no_grad()
def average_statistics(network: nn.Module) -> None:
    """Average over ranks what batch norms have gathered, each from its rank's part of the batch, in this step.

    So that the network is one and the same on all ranks between steps, whoever evaluates or saves it.
    """
    if world_size() > 1:
        norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
        _average([buffer for module in norms for buffer in module.buffers() if buffer.is_floating_point()])


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Average over ranks what a module keeps of its batches, where each rank has shown it others."""
    if world_size() > 1:
        _average([buffer for buffer in module.buffers() if buffer.is_floating_point()])


def _average(values: list[torch.Tensor]) -> None:
    """In one exchange, if all are of one type."""
    for dtype in sorted({value.dtype for value in values}, key=str):
        some = [value for value in values if value.dtype == dtype]
        joined = torch.cat([value.flatten() for value in some])
        dist.all_reduce(joined)
        parts = torch.split(joined.div_(world_size()), [value.numel() for value in some])
        for value, part in zip(some, parts, strict=True):
            value.copy_(part.view_as(value))


@torch.no_grad()
def take_from_first(module: nn.Module) -> None:
    """Give every rank the first one's parameters and buffers: rounding may have parted what should be alike.

    But for classes that are spread over ranks.
    """
    if world_size() > 1:
        own = set(sharded_names(module))
        for name, value in module.state_dict().items():
            if name not in own:
                dist.broadcast(value, src=0)
