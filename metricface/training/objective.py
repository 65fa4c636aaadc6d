"""What a stage minimises: a head, or a loss on mined tuples. Embeddings in, one scalar and named figures out."""

from typing import Literal

import torch
from torch import Tensor, nn

from metricface.diagnostics import mining_statistics
from metricface.distances import Distance
from metricface.miners import RandomMiner
from metricface.tuples import Triplets, as_triplets

SHARES = ("active_share", "easy_share", "semi_hard_share", "hard_share")


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

    margin: what `statistics` calls an active triplet; none where the loss does not compare the two distances.
    distance: in which it reports d_ap and d_an; normalize: of unit rows or raw ones.
    """

    def __init__(
        self,
        loss: nn.Module,
        miner: nn.Module | None,
        *,
        margin: float | Literal["soft"] | None,
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
        # Where nothing is mined, d_ap and d_an are shown of random triplets, drawn without touching training's draws.
        self._sampler = RandomMiner(generator=torch.Generator().manual_seed(0))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of the mined tuples: embeddings (B, D), labels (B,), scalar; 0 where nothing was mined."""
        mined = None if self.miner is None else self.miner(embeddings.detach(), labels)
        self._mined = None if mined is None else as_triplets(mined, labels)
        loss: Tensor = self.loss(embeddings, labels, mined)
        return loss

    @torch.no_grad()
    def statistics(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What mining offered in the batch that `forward` saw last; without a miner, a sample of its triplets."""
        rows = embeddings.detach()
        found = mining_statistics(
            rows,
            labels,
            self._sampler(rows, labels) if self._mined is None else self._mined,
            margin=0.0 if self.margin is None else self.margin,
            distance=self.distance,
            normalize=self.normalize,
        )
        told = found if self.margin is not None else {k: v for k, v in found.items() if k not in SHARES}
        kind = "random" if self._mined is None else "mining"
        return {f"{kind}/{name}": value for name, value in told.items()}


Objective = HeadObjective | MinedObjective
