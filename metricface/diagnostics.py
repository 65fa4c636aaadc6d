"""What mining did to a batch, and what state the embeddings are in: tensors in, named 0-dim tensors out.

Nothing here waits for the device: the values may be collected every step and read when a log is written.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metricface.choices import is_number
from metricface.distances import Distance, full_precision, paired, unit_rows
from metricface.tuples import Pairs

# In a copy of rows.
NUMBERS_AT_ONCE = 1 << 22


class TripletSums(NamedTuple):
    """Of the triplets formed so far, 0-dim: how many, of what kind, and the sums of their distances. Sums add up.

    triplets, active, hard, semi_hard: int64; a triplet is hard where d_an <= d_ap, active where d_an < d_ap + margin,
    semi-hard where it is active and not hard. anchors: how many different anchors are used.
    """

    triplets: Tensor
    active: Tensor
    hard: Tensor
    semi_hard: Tensor
    d_ap: Tensor
    d_an: Tensor
    anchors: Tensor

    def plus(self, other: "TripletSums") -> "TripletSums":
        """Those of two sets of triplets that share no anchor."""
        return TripletSums(*(a + b for a, b in zip(self, other, strict=True)))

    def statistics(self, anchors_with_positive: Tensor) -> dict[str, Tensor]:
        """Named scalars, 0-dim, as `mining_statistics` describes them."""
        triplets = self.triplets.to(self.d_ap.dtype)
        return {
            "triplets": triplets,
            "active_share": self.active / triplets,
            "easy_share": (self.triplets - self.active.maximum(self.hard)) / triplets,
            "semi_hard_share": self.semi_hard / triplets,
            "hard_share": self.hard / triplets,
            "d_ap_mean": self.d_ap / triplets,
            "d_an_mean": self.d_an / triplets,
            "anchors": self.anchors.to(self.d_ap.dtype),
            "anchor_share": self.anchors / anchors_with_positive,
        }


def triplet_sums(
    d_ap: Tensor, d_an: Tensor, anchors: Tensor, *, margin: float | Literal["soft"], counted: Tensor | None = None
) -> TripletSums:
    """Sums over triplets given by their distances, of any one shape. anchors: 0-dim; counted: bool, those that are."""
    if counted is None:
        counted = torch.ones_like(d_ap, dtype=torch.bool)
    hard = (d_an <= d_ap) & counted
    active = (d_an < d_ap + (torch.inf if margin == "soft" else margin)) & counted
    return TripletSums(
        triplets=counted.sum(),
        active=active.sum(),
        hard=hard.sum(),
        semi_hard=(active & ~hard).sum(),
        d_ap=torch.where(counted, d_ap, 0.0).sum(),
        d_an=torch.where(counted, d_an, 0.0).sum(),
        anchors=anchors.long(),
    )


@torch.no_grad()
def mining_statistics(
    embeddings: Tensor,
    labels: Tensor,
    triplets: Sequence[Tensor],
    *,
    margin: float | Literal["soft"],
    distance: Distance,
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """Statistics of the triplets that a miner formed.

    embeddings: (B, D); labels: (B,); triplets: three (T,) index tensors. margin, distance, normalize: as in
    the loss, so that "active" means what it means there; with "soft" every triplet is active. ref_emb (R, D),
    ref_labels (R,): what positives and negatives index, the batch itself if left out.

    Returns, all 0-dim: `triplets` (T); `hard_share` (d_an <= d_ap), `semi_hard_share` (d_ap < d_an < d_ap + margin) and
    `easy_share` (the rest), which add up to 1; `active_share` (d_an < d_ap + margin), the first two together unless the
    margin is 0, where ties are hard but not active; `d_ap_mean` and `d_an_mean`; `anchors`, how many different anchors
    are used, and `anchor_share`, their share of the rows that have another row of their identity (with ref_emb: any
    reference of it). With T = 0 shares
    and means of triplets are NaN, as is `anchor_share` where no row has a partner. Raises ValueError for an unknown
    distance and for a margin that is neither a number nor "soft".
    """
    if margin != "soft" and not is_number(margin, infinite=True):
        raise ValueError(f"margin must be a number or the word 'soft'; got {margin!r}.")
    labels = labels.to(embeddings.device)  # maybe straight from a loader
    anchor, positive, negative = triplets
    prepare = unit_rows if normalize else full_precision
    rows = prepare(embeddings)
    others = rows if ref_emb is None else prepare(ref_emb)
    d_ap, d_an = (_distances(rows, others, anchor, other, distance) for other in (positive, negative))
    used = torch.zeros(len(labels), device=labels.device).index_fill_(0, anchor, 1.0)
    partners = _with_partner(labels) if ref_labels is None else torch.isin(labels, ref_labels.to(labels.device)).sum()
    return triplet_sums(d_ap, d_an, used.sum(), margin=margin).statistics(partners)


@torch.no_grad()
def pair_statistics(
    embeddings: Tensor,
    pairs: Pairs,
    *,
    distance: Distance,
    normalize: bool = False,
    ref_emb: Tensor | None = None,
) -> dict[str, Tensor]:
    """Statistics of the pairs that a miner chose.

    embeddings: (B, D); ref_emb: (R, D), the batch itself if left out. Returns, all 0-dim: `positive_pairs` and
    `negative_pairs`, how many; `d_ap_mean` and `d_an_mean`, NaN of none; `anchors`, how many different ones are used.
    Raises ValueError for an unknown distance.
    """
    prepare = unit_rows if normalize else full_precision
    rows = prepare(embeddings)
    others = rows if ref_emb is None else prepare(ref_emb)
    used = torch.zeros(len(rows), device=rows.device)
    used.index_fill_(0, pairs.positive_anchor, 1.0).index_fill_(0, pairs.negative_anchor, 1.0)
    return {
        "positive_pairs": rows.new_full((), len(pairs.positive)),
        "negative_pairs": rows.new_full((), len(pairs.negative)),
        "d_ap_mean": _distances(rows, others, pairs.positive_anchor, pairs.positive, distance).mean(),
        "d_an_mean": _distances(rows, others, pairs.negative_anchor, pairs.negative, distance).mean(),
        "anchors": used.sum(),
    }


@torch.no_grad()
def embedding_statistics(embeddings: Tensor) -> dict[str, Tensor]:
    """State of a batch of raw embeddings (B, D), for watching a collapse.

    Returns, all 0-dim: `norm_mean` and `norm_std` (divided by B); of the rows scaled to length 1: `spread`, 1 - length
    of their mean (0: all rows equal, near 1: they point everywhere); `mean_cosine` over different rows (NaN for
    B < 2); and `effective_dimensions`, (sum of variances)^2 / sum of squared principal variances: between 1 and
    min(D, B - 1), NaN where the rows are all equal. With B = 0 everything is NaN.
    """
    rows = full_precision(embeddings)
    norms = rows.square().sum(dim=1).sqrt()
    unit = unit_rows(rows)
    count = len(unit)
    mean = unit.mean(dim=0)
    centred = unit - mean
    # The same non-zero eigenvalues either way; the smaller product is the cheaper one.
    moments = centred.T @ centred if centred.shape[1] < count else centred @ centred.T
    variance = moments.diagonal().sum()
    # Rows that are equal leave rounding here, whose dimensions would mean nothing.
    variance = torch.where(variance > 1e-9 * count, variance, torch.nan)
    # Sum over i != j of u_i u_j = |sum u|^2 - sum |u_i|^2: no (B, B) matrix of cosines.
    cosines = (unit.sum(dim=0).square().sum() - unit.square().sum()) / (count * (count - 1) or torch.nan)
    return {
        "norm_mean": norms.mean(),
        "norm_std": (norms - norms.mean()).square().mean().sqrt(),
        "spread": 1.0 - mean.square().sum().sqrt(),
        "mean_cosine": cosines,
        "effective_dimensions": variance.square() / moments.square().sum(),
    }


def _distances(rows: Tensor, others: Tensor, anchor: Tensor, other: Tensor, distance: Distance) -> Tensor:
    """(T,) distances, a slice at a time: copies of 2 T rows may be large."""
    size = max(1, NUMBERS_AT_ONCE // max(1, rows.shape[1]))
    parts = [
        paired(rows[anchor[some]], others[other[some]], distance)
        for some in (slice(start, start + size) for start in range(0, max(1, len(anchor)), size))
    ]
    return torch.cat(parts)


def _with_partner(labels: Tensor) -> Tensor:
    """How many rows have another row of their identity: after sorting, an equal neighbour."""
    ordered = labels.sort().values
    equal = torch.zeros(len(labels) + 1, dtype=torch.bool, device=labels.device)
    equal[1:-1] = ordered[1:] == ordered[:-1]
    return (equal[1:] | equal[:-1]).sum()
