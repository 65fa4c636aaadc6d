"""Pairs and triplets of a batch as plain index tensors, exchangeable with pytorch-metric-learning's.

Anchors index `embeddings`; positives and negatives index the reference rows (`ref_emb`, or `embeddings` themselves).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metricface.distances import full_precision, unit_rows


class Triplets(NamedTuple):
    """int64 (T,) each: anchor rows, positive and negative reference rows. PML's 3-tuple."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


class Pairs(NamedTuple):
    """int64: (P,) anchors and references of the same identity, (N,) of different ones. PML's 4-tuple."""

    positive_anchor: Tensor
    positive: Tensor
    negative_anchor: Tensor
    negative: Tensor


class Batch(NamedTuple):
    """A validated batch. `self_index` is (B,): which reference row is the anchor itself, -1 for none."""

    embeddings: Tensor  # (B, D)
    labels: Tensor  # (B,)
    ref_emb: Tensor  # (R, D)
    ref_labels: Tensor  # (R,)
    self_index: Tensor  # (B,)


def check_batch(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    self_index: Tensor | None = None,
    *,
    normalize: bool = False,
) -> Batch:
    """Validate what a miner or loss was given, and fill in what was left out.

    embeddings: (B, D) floating; labels: (B,) of any integer type; tensors, not lists or NumPy arrays. Without
    `ref_emb` the references are the batch itself and every anchor is its own reference row. With `ref_emb` (R, D) and
    `ref_labels` (R,), no anchor is among the references unless `self_index` (B,) says at which row (-1: not there).
    normalize: scale rows to unit length. Half-precision embeddings become float32; where embeddings and references
    differ in type, both become the wider one. Raises ValueError for wrong shapes, types and ranges, for NaN and
    infinity, and for rows so long that squared distances overflow.
    """
    _check_rows(embeddings, labels, "embeddings", "labels")
    if (ref_emb is None) != (ref_labels is None):
        raise ValueError("ref_emb and ref_labels belong together: pass both or neither.")
    device = embeddings.device  # labels may come straight from a loader, on the CPU
    labels = labels.to(device)
    shared = ref_emb is None or ref_labels is None
    if ref_emb is None or ref_labels is None:
        ref_emb, ref_labels = embeddings, labels
        itself = torch.arange(len(labels), device=device)
    else:
        _check_rows(ref_emb, ref_labels, "ref_emb", "ref_labels")
        if ref_emb.shape[1] != embeddings.shape[1]:
            raise ValueError(f"ref_emb has {ref_emb.shape[1]} dimensions, embeddings have {embeddings.shape[1]}.")
        ref_labels = ref_labels.to(device)
        itself = torch.full((len(labels),), -1, device=device)
    if self_index is not None:
        itself = _check_self_index(self_index, labels, ref_labels)
    prepare = unit_rows if normalize else full_precision
    common = torch.promote_types(embeddings.dtype, ref_emb.dtype)
    queries = prepare(embeddings.to(common))
    references = queries if shared else prepare(ref_emb.to(common))
    return Batch(queries, labels, references, ref_labels, itself)


@torch.no_grad()
def check_values(embeddings: Tensor, name: str) -> None:
    """Raise ValueError if a row of embeddings (N, D) holds NaN or infinity, or is too long to be squared."""
    rows = full_precision(embeddings)
    limit = torch.finfo(rows.dtype).max / 64.0  # squared distances of such rows, and sums of a few, are finite
    usable = rows.square().sum(dim=1) <= limit  # False for NaN
    if not bool(usable.all()):
        bad = (~usable).nonzero()[:, 0].tolist()
        raise ValueError(
            f"{len(bad)} of {len(rows)} rows of {name} hold NaN or infinity, or are longer than {limit**0.5:.1e} "
            f"(first: row {bad[0]}). Lower the learning rate, or look for a corrupt input image."
        )


def as_triplets(indices_tuple: Sequence[Tensor], labels: Tensor, ref_labels: Tensor | None = None) -> Triplets:
    """A miner's tuple as triplets: 3-tuples as they are, 4-tuples (pairs) joined on the anchor.

    Every positive pair meets every negative pair of the same anchor, as in PML. Raises ValueError for anything
    but 3 or 4 index tensors (T,) of equal lengths (in pairs: of each half) that point into the batch.
    """
    columns = _checked_indices(indices_tuple, len(labels), len(labels if ref_labels is None else ref_labels))
    if len(columns) == 3:
        return Triplets(*columns)
    anchor_p, positive, anchor_n, negative = columns
    # Negatives sorted by anchor, so that each positive pair reads one run of them: no (P, N) table of comparisons.
    by_anchor = anchor_n.argsort(stable=True)
    runs = torch.bincount(anchor_n, minlength=len(labels))  # (B,) negative pairs of each anchor
    counts = runs[anchor_p]  # (P,)
    pair = torch.arange(len(anchor_p), device=anchor_p.device).repeat_interleave(counts)  # (T,)
    within = torch.arange(len(pair), device=pair.device) - (counts.cumsum(0) - counts)[pair]
    first = (runs.cumsum(0) - runs)[anchor_p]
    return Triplets(anchor_p[pair], positive[pair], negative[by_anchor[first[pair] + within]])


def as_pairs(indices_tuple: Sequence[Tensor], labels: Tensor, ref_labels: Tensor | None = None) -> Pairs:
    """A miner's tuple as pairs: 4-tuples as they are, triplets split in two (repetitions kept, as in PML)."""
    columns = _checked_indices(indices_tuple, len(labels), len(labels if ref_labels is None else ref_labels))
    if len(columns) == 4:
        return Pairs(*columns)
    anchor, positive, negative = columns
    return Pairs(anchor, positive, anchor, negative)


def _check_rows(embeddings: Tensor, labels: Tensor, emb_name: str, label_name: str) -> None:
    for tensor, name in ((embeddings, emb_name), (labels, label_name)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor; found {type(tensor).__name__}. torch.as_tensor makes one.")
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"{emb_name} must be floating (rows, dimensions); found {embeddings.dtype} {tuple(embeddings.shape)}."
        )
    if labels.ndim != 1 or len(labels) != len(embeddings):
        raise ValueError(
            f"{label_name} must be ({len(embeddings)},), one per row of {emb_name}; found {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"{label_name} must be integers (float labels merge identities above 2^24); found {labels.dtype}."
        )
    check_values(embeddings, emb_name)


def _check_self_index(self_index: Tensor, labels: Tensor, ref_labels: Tensor) -> Tensor:
    anchors, references = len(labels), len(ref_labels)
    if not isinstance(self_index, Tensor):
        raise ValueError(f"self_index must be a tensor; found {type(self_index).__name__}.")
    self_index = self_index.to(labels.device)
    if self_index.shape != (anchors,) or self_index.is_floating_point() or self_index.dtype == torch.bool:
        raise ValueError(
            f"self_index must be ({anchors},) integers, one per anchor; "
            f"found {self_index.dtype} {tuple(self_index.shape)}."
        )
    self_index = self_index.long()
    if anchors and (int(self_index.min()) < -1 or int(self_index.max()) >= references):
        raise ValueError(
            f"self_index must lie in [-1, {references}): -1, or the anchor's own row among the references."
        )
    listed = (self_index >= 0).nonzero()[:, 0]
    wrong = listed[labels[listed].long() != ref_labels[self_index[listed]].long()]
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"self_index names another identity for {len(wrong)} of {anchors} anchors (first: row {row}, "
            f"label {int(labels[row])}, reference {int(self_index[row])}). Pass the row where the same image stands."
        )
    return self_index


def _checked_indices(indices_tuple: Sequence[Tensor], anchors: int, references: int) -> list[Tensor]:
    """The tuple's tensors as int64, or ValueError."""
    if len(indices_tuple) not in (3, 4):
        raise ValueError(
            f"indices_tuple must hold 3 (triplets) or 4 (pairs) index tensors; found {len(indices_tuple)}."
        )
    for place, indices in enumerate(indices_tuple):
        if not isinstance(indices, Tensor):
            raise ValueError(f"indices_tuple[{place}] must be an int64 tensor; found {type(indices).__name__}.")
        if indices.ndim != 1 or indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"indices_tuple[{place}] must be (T,) int64 or int32; found {indices.dtype} {tuple(indices.shape)}."
            )
    lengths = [len(indices) for indices in indices_tuple]
    groups = (lengths,) if len(lengths) == 3 else (lengths[:2], lengths[2:])
    if any(len(set(group)) > 1 for group in groups):
        raise ValueError(
            "indices_tuple must hold as many positives and negatives as anchors, for triplets (a, p, n) and in each "
            f"half of pairs (a, p, a, n); found lengths {lengths}."
        )
    anchor_places = (0,) if len(indices_tuple) == 3 else (0, 2)
    for place, indices in enumerate(indices_tuple):
        limit = anchors if place in anchor_places else references
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= limit):
            raise ValueError(
                f"indices_tuple[{place}] must lie in [0, {limit}); found {int(indices.min())} to {int(indices.max())}. "
                "Pass the loss the same embeddings and references that the miner saw."
            )
    return [indices.long() for indices in indices_tuple]
