"""What a stage minimises: a head, or a loss on mined tuples. Embeddings in, one scalar and named figures out."""

from typing import Literal

import torch
from torch import Tensor, nn

from metricface.diagnostics import mining_statistics
from metricface.distances import Distance
from metricface.tuples import Triplets, as_triplets


class HeadObjective(nn.Module):
    """A classification head on raw embeddings."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The head's loss: embeddings (B, D), labels (B,), scalar."""
        loss: Tensor = self.head(embeddings, labels)
        return loss

    @torch.no_grad()
    def statistics(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Share of the batch that the head classifies rightly, without its margin."""
        logits: Tensor = self.head.logits(embeddings)  # type: ignore[operator]
        return {"head/accuracy": (logits.argmax(dim=1) == labels).float().mean()}


class MinedObjective(nn.Module):
    """A pair or triplet loss on what a miner picks from the batch; without a miner, on all of it.

    margin, distance: what `statistics` calls active, and in which distance it reports d_ap and d_an.
    """

    def __init__(
        self,
        loss: nn.Module,
        miner: nn.Module | None,
        *,
        margin: float | Literal["soft"],
        distance: Distance,
        normalize: bool,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.miner = miner
        self.margin = margin
        self.distance = distance
        self.normalize = normalize
        self._mined: Triplets | None = None

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of the mined tuples: embeddings (B, D), labels (B,), scalar; 0 where nothing was mined."""
        mined = None if self.miner is None else self.miner(embeddings.detach(), labels)
        self._mined = None if mined is None else as_triplets(mined, labels)
        loss: Tensor = self.loss(embeddings, labels, mined)
        return loss

    @torch.no_grad()
    def statistics(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What mining offered in the batch that `forward` saw last."""
        if self._mined is None:
            return {}
        found = mining_statistics(
            embeddings.detach(),
            labels,
            self._mined,
            margin=self.margin,
            distance=self.distance,
            normalize=self.normalize,
        )
        return {f"mining/{name}": value for name, value in found.items()}


Objective = HeadObjective | MinedObjective
