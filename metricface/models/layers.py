"""A network from its input to its embedding: which layers learn, how fast, and what they keep for the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from metricface.models import bare


def layers(network: nn.Module) -> list[nn.Module]:
    """The layers of a network of metricface.models, from the input on; the last one makes the embedding.

    A layer is a convolution with its norm and activation, a residual unit, or a stage of the small networks.
    """
    found: list[nn.Module] = []
    for child in bare(network).children():
        found += list(child.children()) if isinstance(child, nn.Sequential) else [child]
    return found


def freeze_statistics(part: nn.Module) -> None:
    """Let batch norms normalise by the statistics they have, and keep these; their weights go on learning."""
    for module in part.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """What passes through the network inside leaves no trace in the running statistics of its batch norms."""
    buffers = [
        buffer
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.training
        for buffer in module.buffers()
    ]
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)


def recompute_activations(network: nn.Module) -> None:
    """From now on keep the inputs of layers alone, and compute what is inside them once more in the backward pass.

    Memory for activations falls to that of one layer and all inputs; a step takes about a third longer. Values and
    gradients are the same, and batch norms see each batch once.
    """
    for layer in layers(network)[:-1]:
        forward: Callable[..., Any] = layer.forward
        layer.forward = partial(checkpoint, forward, use_reentrant=False, context_fn=partial(_contexts, layer))


def _contexts(layer: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the forward pass and of its repetition."""
    return nullcontext(), statistics_kept(layer)
