"""From one miner to another over the steps of training."""

import torch
from torch import Tensor, nn

from metricface.choices import is_count
from metricface.miners.base import joined, uniform
from metricface.tuples import Triplets, as_triplets


class CurriculumMiner(nn.Module):
    """First one miner, later another; in between each anchor is given to either by chance.

    first, then: miners, for instance SemiHardMiner() and BatchHardMiner(), ours or pytorch-metric-learning's.
    start, end: steps, 0 <= start <= end: up to `start` every anchor goes to `first`, from `end` on every anchor to
    `then`; between them the chance for `then` rises in a line.
    Each call in training mode is a step. How many have passed is in the state_dict, so that a resumed run goes on where
    it was. generator: where the choice of anchors comes from, None for torch's global one.
    Counts stand in `first.last` and `then.last`, each over all anchors that its miner looked at.
    """

    def __init__(
        self, first: nn.Module, then: nn.Module, *, start: int, end: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if not all(value == 0 or is_count(value) for value in (start, end)) or start > end:
            raise ValueError(
                f"CurriculumMiner needs whole steps 0 <= start <= end; found start={start!r}, end={end!r}."
            )
        for name, miner in (("first", first), ("then", then)):
            if not isinstance(miner, nn.Module):
                raise ValueError(f"{name} must be a miner, such as SemiHardMiner(); found {miner!r}.")
        self.first, self.then = first, then
        self.start, self.end, self.generator = start, end, generator
        self.steps = 0

    def get_extra_state(self) -> Tensor:
        """How many steps have passed: part of the state_dict."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from `get_extra_state()`."""
        self.steps = int(state)

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return f"start={self.start}, end={self.end}"

    @property
    def share(self) -> float:
        """The chance of an anchor of the next step to go to `then`, in [0, 1]."""
        if self.steps >= self.end:
            return 1.0
        return 0.0 if self.steps <= self.start else (self.steps - self.start) / (self.end - self.start)

    @torch.no_grad()
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        self_index: Tensor | None = None,
    ) -> Triplets:
        """Choose triplets; arguments, result and errors as of the miners in metricface.miners."""
        named = {} if self_index is None else {"self_index": self_index}  # PML's miners do not know it
        share = self.share
        self.steps += int(self.training)

        def mined(miner: nn.Module) -> Triplets:
            return as_triplets(miner(embeddings, labels, ref_emb, ref_labels, **named), labels, ref_labels)

        if share in (0.0, 1.0):
            return mined(self.then if share else self.first)
        goes_on = uniform(len(labels), embeddings.device, self.generator) < share  # (B,)
        first, then = mined(self.first), mined(self.then)
        left, right = ~goes_on[first.anchor], goes_on[then.anchor]
        return Triplets(*joined([[column[left] for column in first], [column[right] for column in then]]))
