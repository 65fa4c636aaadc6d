"""What a stage minimises: a head, or a loss on mined tuples. Embeddings in, one scalar and named figures out."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from metricface.diagnostics import mining_statistics, pair_statistics
from metricface.distances import Distance
from metricface.miners import RandomMiner
from metricface.tuples import Pairs

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
        self._mined: Sequence[Tensor] | None = None
        # Where nothing is mined, d_ap and d_an are shown of random triplets, drawn without touching training's draws.
        self._sampler = RandomMiner(generator=torch.Generator().manual_seed(0))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of the mined tuples: embeddings (B, D), labels (B,), scalar; 0 where nothing was mined."""
        self._mined = None if self.miner is None else self.miner(embeddings.detach(), labels)
        loss: Tensor = self.loss(embeddings, labels, self._mined)
        return loss

    @torch.no_grad()
    def statistics(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What mining offered in the batch that `forward` saw last; where nothing mined, a sample of its triplets."""
        rows = embeddings.detach()
        seen: dict[str, Tensor] | None = getattr(self.loss, "last", None)
        if seen is not None:  # a loss that mines for itself
            return {f"mining/{name}": value for name, value in seen.items()}
        if self._mined is not None and len(self._mined) == 4:
            pairs = pair_statistics(rows, Pairs(*self._mined), distance=self.distance, normalize=self.normalize)
            return {f"mining/{name}": value for name, value in pairs.items()}
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
