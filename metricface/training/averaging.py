"""A running average of the weights, which is often better than the weights themselves at a high learning rate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of a network's parameters and of its floating buffers (batch-norm statistics).

    It begins at the weights as they are; update t = 1, 2, ... moves it by 1 - d towards them, d = min(decay,
    (1 + t) / (10 + t)): an average of few steps forgets faster. Kept in the network's own types and on its device, in
    as much memory again. Source: TensorFlow's ExponentialMovingAverage as Sandberg's facenet uses it (decay .9999).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"the decay of a weight average lies between 0 and 1; got {decay}.")
        self.decay = decay
        self.updates = 0
        self._values = [value.detach().clone() for value in _averaged(model).values()]
        self._names = list(_averaged(model))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the weights of `model`, after a step of the optimiser."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._values, list(_averaged(model).values()), 1.0 - decay)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` has the averaged weights; afterwards its own again."""
        kept = [value.detach().clone() for value in _averaged(model).values()]
        self.copy_to(model)
        try:
            yield
        finally:
            _copy(kept, model)

    def copy_to(self, model: nn.Module) -> None:
        """Give `model` the averaged weights."""
        _copy(self._values, model)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {"updates": self.updates, "values": dict(zip(self._names, self._values, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()` of an average of the same network."""
        self.updates = int(state["updates"])
        with torch.no_grad():
            for name, value in zip(self._names, self._values, strict=True):
                value.copy_(state["values"][name])


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """What has an average: everything of the state but counters."""
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


@torch.no_grad()
def _copy(values: list[Tensor], model: nn.Module) -> None:
    for to, value in zip(_averaged(model).values(), values, strict=True):
        to.copy_(value)
