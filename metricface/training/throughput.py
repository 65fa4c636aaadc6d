"""Where the time of a step goes: what training makes of the network's own speed, and how long it waits for images."""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from metricface.training import ranks
from metricface.training.assemble import autocast
from metricface.training.interrupt import StoppedError, never

PASSES = 7  # or as many as begin within ENOUGH seconds
ENOUGH = 10.0
SLOW = 1.0  # seconds after which it is worth asking whether to stop


class Waiting:
    """The share of training time that was spent waiting for the next batch: `with waiting: batch = next(loader)`.

    elapsed: training seconds before it, by the stage's clock.
    """

    def __init__(self, elapsed: float = 0.0) -> None:
        self._waited = self._since = 0.0
        self._counted_from = elapsed

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._since

    def share(self, elapsed: float) -> float:
        """Since it was asked for last. elapsed: training seconds so far, by the stage's clock."""
        passed = elapsed - self._counted_from
        found = self._waited / passed if passed > 0 else 0.0
        self._waited, self._counted_from = 0.0, elapsed
        return found


def bare_images_per_second(
    model: nn.Module,
    batch_size: int,
    shape: tuple[int, int, int],
    device: torch.device,
    precision: torch.dtype,
    stopped: Callable[[], bool] = never,
) -> float:
    """Images/s of forward and backward of a copy of `model`, nothing else: no data, loss, mining or optimiser.

    shape: (C, H, W). precision: as in training. Takes the median of a few passes after one to warm up, at least one
    where they are slow; the model itself is untouched. All ranks must call it. Raises StoppedError where `stopped()`
    says so between slow passes.
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
        passed = ranks.beat(sum(seconds), False).seconds
        if passed > SLOW and ranks.any_of(stopped()):
            raise StoppedError
        if passed > ENOUGH and len(seconds) > 1:
            break
    return batch_size / statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
