"""Which references share an anchor's identity: found by sorting labels, without a table of all pairs."""

from typing import NamedTuple

import torch
from torch import Tensor

from metricface.tuples import Batch


class Identities(NamedTuple):
    """Where each anchor's identity lies among the references, and what follows for its pairs."""

    by_label: Tensor  # (R,) reference rows sorted by label, in order within one
    first: Tensor  # (B,) place in by_label where the anchor's identity begins
    size: Tensor  # (B,) references of that identity, the anchor itself included
    positives: Tensor  # (B,) without the anchor itself
    negatives: Tensor  # (B,)
    first_pair: Tensor  # (B,) number of the anchor's first positive pair, all pairs counted in row order

    @property
    def pairs(self) -> int:
        """How many positive pairs there are. Waits for the device."""
        return int(self.positives.sum())


class Own(NamedTuple):
    """Some anchors' own identity, and their positives in it, ascending; filled up with other references."""

    same: Tensor  # (b, N) int64 reference rows, the anchor itself included
    is_same: Tensor  # (b, N) bool
    positive: Tensor  # (b, M) int64 reference rows
    is_positive: Tensor  # (b, M) bool


def find_identities(batch: Batch) -> Identities:
    """Sort the references by identity and find each anchor's, without waiting for the device."""
    labels, ref_labels = batch.labels.long().contiguous(), batch.ref_labels.long()
    by_label = ref_labels.argsort(stable=True)
    sorted_labels = ref_labels[by_label]
    first = torch.searchsorted(sorted_labels, labels)
    size = torch.searchsorted(sorted_labels, labels, right=True) - first
    positives = size - (batch.self_index >= 0).long()
    first_pair = positives.cumsum(0) - positives
    return Identities(by_label, first, size, positives, len(ref_labels) - size, first_pair)


def own_references(batch: Batch, identities: Identities, anchors: Tensor, references: int, positives: int) -> Own:
    """The first N = `references` of each anchor's identity, and its first M = `positives` < N + 1 positives.

    anchors: (b,) int64 rows of the embeddings. There is at least one reference.
    """
    offset = torch.arange(references, device=anchors.device)
    size, itself = identities.size[anchors, None], batch.self_index[anchors, None]  # (b, 1)
    place = (identities.first[anchors, None] + offset) % len(identities.by_label)  # (b, 1) + (N,)
    same = identities.by_label[place]
    is_same = offset < size  # (N,) < (b, 1)
    # From the anchor itself on, the next one.
    passed = (is_same & (same == itself)).long().cumsum(dim=1)[:, :positives]  # (b, M)
    number = offset[:positives] + passed
    positive = same.gather(1, number.clamp_max(max(0, references - 1)))
    return Own(same, is_same, positive, number < size)


def positive_pairs(batch: Batch, identities: Identities) -> tuple[Tensor, Tensor]:
    """Every ordered positive pair in row order: int64 (P,) anchors and (P,) references."""
    anchor = torch.arange(len(batch.labels), device=batch.labels.device).repeat_interleave(identities.size)
    first_of_anchor = (identities.size.cumsum(0) - identities.size)[anchor]
    place = torch.arange(len(anchor), device=anchor.device) - first_of_anchor + identities.first[anchor]
    reference = identities.by_label[place]
    kept = reference != batch.self_index[anchor]
    return anchor[kept], reference[kept]


def negative_of(identities: Identities, anchor: Tensor, rank: Tensor) -> Tensor:
    """The reference row of each anchor's negative number `rank`: negatives sorted by label. (T,), (T,) -> (T,) int64.

    All references sorted by label, except one run of the anchor's own identity, which is stepped over.
    """
    step = torch.where(rank >= identities.first[anchor], identities.size[anchor], 0)
    return identities.by_label[rank + step]
