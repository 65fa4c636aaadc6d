"""A memory of the embeddings of earlier batches, to mine from beyond the batch."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from metricface.choices import is_count
from metricface.tuples import check_values


class References(NamedTuple):
    """What to pass to a miner or loss as ref_emb, ref_labels and self_index."""

    ref_emb: Tensor  # (R, D)
    ref_labels: Tensor  # (R,)
    self_index: Tensor  # (B,)


class EmbeddingMemory(nn.Module):
    """The last `size` embeddings, without gradient, in a ring: the oldest are overwritten first.

    memory = EmbeddingMemory(8192, embedding_dim)
    references = memory.with_batch(embeddings, labels)        # the batch itself, then the memory
    value = loss(embeddings, labels, miner(embeddings, labels, *references[:2], self_index=references.self_index),
                 *references[:2])
    memory.add(embeddings, labels)

    size, embedding_dim: at least 1. Embeddings are kept as they are given, in float32; stored rows are as old as their
    batch and drift from what the network would give now: start to use them once it changes slowly (Wang et al. wait
    for 1,000 steps or more). The whole queue, its order and its filling are in the state_dict; a row that holds no
    embedding yet is never returned, whatever its label.
    Source: Wang et al. 2020, Cross-Batch Memory for Embedding Learning. (The authors' code overwrites the end of the
    queue where a batch does not fit, and takes a full memory for an empty one where its last label is 0.)
    """

    rows: Tensor
    labels: Tensor

    def __init__(self, size: int, embedding_dim: int) -> None:
        super().__init__()
        for name, value in (("size", size), ("embedding_dim", embedding_dim)):
            if not is_count(value):
                raise ValueError(f"{name} must be a whole number, at least 1; found {value!r}.")
        self.size = size
        self.embedding_dim = embedding_dim
        self.register_buffer("rows", torch.zeros(size, embedding_dim))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.long))
        # A Python number and not a buffer: where the next row goes has to be known without asking the device.
        self.added = 0

    def get_extra_state(self) -> Tensor:
        """How many rows were ever added: part of the state_dict."""
        return torch.tensor(self.added)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from `get_extra_state()`."""
        self.added = int(state)

    def extra_repr(self) -> str:
        """Shown by print(memory)."""
        return f"size={self.size}, embedding_dim={self.embedding_dim}, filled={len(self)}"

    def __len__(self) -> int:
        return min(self.added, self.size)

    @torch.no_grad()
    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        """Store a batch: embeddings (B, D) floating, labels (B,) integers. Of more than `size` rows the last stay.

        Raises ValueError for other shapes and types, and for NaN or infinity: the memory stays as it was.
        """
        self._check(embeddings, labels)
        check_values(embeddings.to(self.rows), "embeddings")  # as they will be kept
        kept = min(len(labels), self.size)
        first = self.added + len(labels) - kept
        place = (torch.arange(kept, device=self.rows.device) + first % self.size) % self.size
        self.rows[place] = embeddings[len(labels) - kept :].detach().to(self.rows)
        self.labels[place] = labels[len(labels) - kept :].to(self.labels)
        self.added += len(labels)

    def references(self) -> tuple[Tensor, Tensor]:
        """What is stored: (R, D) and (R,), R = len(memory), in no particular order; views, not copies."""
        return self.rows[: len(self)], self.labels[: len(self)]

    def with_batch(self, embeddings: Tensor, labels: Tensor) -> References:
        """The batch itself (with its gradient), then what is stored; each anchor's own row is its place in the batch.

        embeddings: (B, D); labels: (B,). Raises ValueError for other shapes and types.
        """
        self._check(embeddings, labels)
        stored, stored_labels = self.references()
        rows = torch.cat([embeddings, stored.to(embeddings)])
        itself = torch.arange(len(labels), device=embeddings.device)
        return References(rows, torch.cat([labels.long().to(stored_labels.device), stored_labels]), itself)

    def _check(self, embeddings: Tensor, labels: Tensor) -> None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim or not embeddings.is_floating_point():
            raise ValueError(
                f"EmbeddingMemory was built for floating (batch, {self.embedding_dim}) embeddings; found "
                f"{embeddings.dtype} {tuple(embeddings.shape)}."
            )
        if labels.shape != (len(embeddings),) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"labels must be ({len(embeddings)},) integers, one per embedding; found {labels.dtype} "
                f"{tuple(labels.shape)}."
            )
