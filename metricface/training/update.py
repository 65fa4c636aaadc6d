"""From a batch of images to an update of the weights, in whatever precision and however many pieces.

A batch that does not fit the device goes through the network in chunks (gradient caching): once without a graph, for
the embeddings of all of it, of which the objective mines and gives the gradient; then once more, chunk by chunk, with a
graph, into which that gradient is fed. So the objective sees the whole batch, and memory holds the activations of one
chunk. Source: Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (GradCache).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metricface.distances import full_precision
from metricface.distributed import max_over_ranks, row_counts, sum_over_ranks, world_size
from metricface.models.layers import statistics_kept
from metricface.training.ranks import average_gradients

Autocast = Callable[[], torch.autocast]


class Embedded(NamedTuple):
    """A batch in the network. finish: to be called after the backward pass of what was made of the embeddings."""

    embeddings: Tensor  # (B, D) raw, in float32 (float64 for a float64 network), with a gradient
    finish: Callable[[], None]


def embed(network: nn.Module, images: Tensor, autocast: Autocast, *, chunk: int | None = None) -> Embedded:
    """Put images (B, C, H, W) through the network, in the mode it is in.

    chunk: at most so many at once, in pieces of equal sizes; None: all. With chunks the gradient is exactly that of the
    whole batch as far as images do not influence each other: batch norms in training mode take the statistics of a
    chunk for those of the batch, which is another network, with its own exact gradient. What is drawn (dropout) is
    drawn alike both times.
    """
    # As many pieces on every rank, since ranks exchange gradients with the last one, and evenly: a piece of one or two
    # images would upset batch norms.
    pieces = 1 if chunk is None else math.ceil(max(row_counts(images)) / chunk)
    if pieces <= 1:
        with autocast():
            embeddings = network(images)
        return Embedded(full_precision(embeddings), lambda: None)
    parts = torch.tensor_split(images, pieces)
    states, found = [], []
    bare = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
    with torch.no_grad(), statistics_kept(bare):
        for part in parts:
            states.append(drawing_state(images.device))
            with autocast():
                found.append(full_precision(bare(part)))
    embeddings = torch.cat(found).requires_grad_()

    def finish() -> None:
        if embeddings.grad is None:
            return
        gradients = torch.tensor_split(embeddings.grad, pieces)
        after = drawing_state(images.device)
        for number, (part, state) in enumerate(zip(parts, states, strict=True), start=1):
            set_drawing_state(images.device, state)
            # Ranks exchange the sum of all chunks, once.
            alone = isinstance(network, nn.parallel.DistributedDataParallel) and number < len(parts)
            with network.no_sync() if alone else nullcontext():  # type: ignore[operator]
                with autocast():
                    again = network(part)
                if again.requires_grad:  # or the network is frozen
                    again.backward(gradients[number - 1].to(again.dtype))
        set_drawing_state(images.device, after)

    return Embedded(embeddings, finish)


def apply_gradient(
    loss: Tensor,
    embedded: Embedded,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    clip_norm: float | None = None,
    average: nn.Module | None = None,
    sharded: Sequence[nn.Parameter] = (),
) -> bool:
    """Backward pass and a step of the optimiser. Returns whether it was taken.

    average: whose gradient differs by rank and is averaged over ranks. sharded: of the optimiser's parameters those
    that are other ones on each rank (classes of a PartialFC).
    scaler: multiplies the loss so that gradients in float16 do not vanish, and leaves a step out where they have
    overflowed; one that is not enabled does nothing. clip_norm: largest norm of all parameters' gradient together.
    """
    optimizer.zero_grad(set_to_none=True)
    if not loss.requires_grad:  # a batch that has nothing to teach
        return True
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    embedded.finish()
    if average is not None:
        average_gradients(average, but=sharded)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not scaler.is_enabled():
        if clip_norm is not None:
            _clip(parameters, clip_norm, sharded)
        optimizer.step()
        return True
    _agree_on_overflow(sharded)
    # Not scaler.step: fused optimisers on a CPU take no notice of an overflow.
    scaler.unscale_(optimizer)
    taken = bool(torch.isfinite(_clip(parameters, torch.inf if clip_norm is None else clip_norm, sharded)))
    if taken:
        optimizer.step()
    scaler.update()
    return taken


def _agree_on_overflow(sharded: Sequence[nn.Parameter]) -> None:
    """Where gradients overflow in the classes of one rank, let them on all, so that every scaler sees it."""
    gradients = [p.grad for p in sharded if p.grad is not None]
    if not gradients or world_size() == 1:
        return
    finite = torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all()
    gradients[0].mul_(torch.where(max_over_ranks((~finite).float()) > 0, torch.inf, 1.0))


def _clip(parameters: Sequence[nn.Parameter], max_norm: float, sharded: Sequence[nn.Parameter]) -> Tensor:
    """Scale the gradient down to this norm; returns the norm it had, of the parameters of all ranks together."""
    if not sharded or world_size() == 1:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    own = set(sharded)
    alike = _sq_norm([p for p in parameters if p not in own])
    norm = (alike + sum_over_ranks(_sq_norm(sharded))).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as in clip_grad_norm_
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
    return norm


def _sq_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Of their gradient, in float32 or, where that is float64, in it; 0-dim."""
    found = [full_precision(p.grad).square().sum() for p in parameters if p.grad is not None]
    return torch.stack(found).sum() if found else torch.zeros(())


@contextmanager
def drawing_from(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Inside, torch's global generators go on from `states`, which follows them; outside, from their own."""
    own = drawing_state(device)
    set_drawing_state(device, tuple(states))
    try:
        yield
    finally:
        states[:] = drawing_state(device)
        set_drawing_state(device, own)


def drawing_state(device: torch.device) -> tuple[Tensor, ...]:
    """Where torch's global generators stand: the CPU's, and that of a GPU."""
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state(device)) if device.type == "cuda" else states


def set_drawing_state(device: torch.device, states: tuple[Tensor, ...]) -> None:
    """Let torch's global generators go on from there."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
