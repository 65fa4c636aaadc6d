"""How close training comes to the network itself: images/s of a bare forward and backward pass on the same batch."""

import copy
import time

import torch
from torch import nn

from metricface.training.assemble import autocast

PASSES = 7


def bare_images_per_second(
    model: nn.Module, batch_size: int, shape: tuple[int, int, int], device: torch.device, precision: torch.dtype
) -> float:
    """Images/s of forward and backward of a copy of `model`, nothing else: no data, loss, mining or optimiser.

    shape: (C, H, W). precision: as in training. Takes the median of a few passes after one to warm up; the model
    itself is untouched.
    """
    twin = copy.deepcopy(model).requires_grad_(True).train()
    images = torch.randn(batch_size, *shape, device=device).contiguous(memory_format=torch.channels_last)
    seconds = []
    for _ in range(1 + PASSES):
        _wait(device)
        since = time.perf_counter()
        with autocast(precision, device):
            embeddings = twin(images)
        embeddings.backward(torch.ones_like(embeddings))
        _wait(device)
        seconds.append(time.perf_counter() - since)
        twin.zero_grad(set_to_none=True)
    return batch_size / sorted(seconds[1:])[PASSES // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
