"""From a batch of images to an update of the weights, in whatever precision and however many pieces.

A batch that does not fit the device goes through the network in chunks (gradient caching): once without a graph, for
the embeddings of all of it, of which the objective mines and gives the gradient; then once more, chunk by chunk, with a
graph, into which that gradient is fed. So the objective sees the whole batch, and memory holds the activations of one
chunk. Source: Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (GradCache).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metricface.distances import full_precision
from metricface.models.layers import statistics_kept

Autocast = Callable[[], torch.autocast]


class Embedded(NamedTuple):
    """A batch in the network. finish: to be called after the backward pass of what was made of the embeddings."""

    embeddings: Tensor  # (B, D) raw, in float32 (float64 for a float64 network), with a gradient
    finish: Callable[[], None]


def embed(network: nn.Module, images: Tensor, autocast: Autocast, *, chunk: int | None = None) -> Embedded:
    """Put images (B, C, H, W) through the network, in the mode it is in.

    chunk: at most so many at once; None: all. With chunks the gradient is exactly that of the whole batch as far as
    images do not influence each other: batch norms in training mode take the statistics of a chunk for those of the
    batch, which is another network, with its own exact gradient. What is drawn (dropout) is drawn alike both times.
    """
    if chunk is None or len(images) <= chunk:
        with autocast():
            embeddings = network(images)
        return Embedded(full_precision(embeddings), lambda: None)
    parts = torch.split(images, chunk)
    states, found = [], []
    with torch.no_grad(), statistics_kept(network):
        for part in parts:
            states.append(_drawing_state(images.device))
            with autocast():
                found.append(full_precision(network(part)))
    embeddings = torch.cat(found).requires_grad_()

    def finish() -> None:
        if embeddings.grad is None:
            return
        after = _drawing_state(images.device)
        for part, state, gradient in zip(parts, states, torch.split(embeddings.grad, chunk), strict=True):
            _set_drawing_state(images.device, state)
            with autocast():
                again = network(part)
            if not again.requires_grad:  # the network is frozen
                break
            again.backward(gradient.to(again.dtype))
        _set_drawing_state(images.device, after)

    return Embedded(embeddings, finish)


def apply_gradient(
    loss: Tensor,
    embedded: Embedded,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    clip_norm: float | None = None,
) -> bool:
    """Backward pass and a step of the optimiser. Returns whether it was taken.

    scaler: multiplies the loss so that gradients in float16 do not vanish, and leaves a step out where they have
    overflowed; one that is not enabled does nothing. clip_norm: largest norm of all parameters' gradient together.
    """
    optimizer.zero_grad(set_to_none=True)
    if not loss.requires_grad:  # a batch that has nothing to teach
        return True
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    embedded.finish()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not scaler.is_enabled():
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        return True
    # Not scaler.step: fused optimisers on a CPU take no notice of an overflow.
    scaler.unscale_(optimizer)
    taken = bool(torch.isfinite(nn.utils.clip_grad_norm_(parameters, torch.inf if clip_norm is None else clip_norm)))
    if taken:
        optimizer.step()
    scaler.update()
    return taken


def _drawing_state(device: torch.device) -> tuple[Tensor, ...]:
    """Where the global generators that a network draws from stand."""
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state(device)) if device.type == "cuda" else states


def _set_drawing_state(device: torch.device, states: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
