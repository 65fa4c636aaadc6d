"""What mining did to a batch, and what state the embeddings are in: tensors in, named 0-dim tensors out.

Nothing here waits for the device: the values may be collected every step and read when a log is written.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from metricface.choices import is_number
from metricface.distances import Distance, full_precision, paired, pairwise, unit_rows


@torch.no_grad()
def mining_statistics(
    embeddings: Tensor,
    labels: Tensor,
    triplets: Sequence[Tensor],
    *,
    margin: float | Literal["soft"],
    distance: Distance,
    normalize: bool = False,
) -> dict[str, Tensor]:
    """Statistics of the triplets that a miner formed in a batch (without separate references).

    embeddings: (B, D); labels: (B,); triplets: three (T,) index tensors. margin, distance, normalize: as in
    the loss, so that "active" means what it means there; with "soft" every triplet is active.

    Returns, all 0-dim: `triplets` (T); `hard_share` (d_an <= d_ap), `semi_hard_share` (d_ap < d_an < d_ap + margin) and
    `easy_share` (the rest), which add up to 1; `active_share` (d_an < d_ap + margin), the first two together unless the
    margin is 0, where ties are hard but not active; `d_ap_mean` and `d_an_mean`; `anchors`, how many different anchors
    are used, and `anchor_share`, their share of the rows that have another row of their identity. With T = 0 shares
    and means of triplets are NaN, as is `anchor_share` where no row has a partner. Raises ValueError for an unknown
    distance and for a margin that is neither a number nor "soft".
    """
    if margin != "soft" and not is_number(margin, infinite=True):
        raise ValueError(f"margin must be a number or the word 'soft'; got {margin!r}.")
    labels = labels.to(embeddings.device)  # maybe straight from a loader
    anchor, positive, negative = triplets
    rows = unit_rows(embeddings) if normalize else full_precision(embeddings)
    d_ap, d_an = _distances(rows, anchor, positive, distance), _distances(rows, anchor, negative, distance)
    window = torch.inf if margin == "soft" else margin
    hard = d_an <= d_ap
    active = d_an < d_ap + window
    used = torch.zeros(len(labels), device=labels.device).index_fill_(0, anchor, 1.0)
    anchors = used.sum()
    return {
        "triplets": rows.new_full((), len(anchor)),
        "active_share": active.float().mean(),
        "easy_share": (~active & ~hard).float().mean(),
        "semi_hard_share": (active & ~hard).float().mean(),
        "hard_share": hard.float().mean(),
        "d_ap_mean": d_ap.mean(),
        "d_an_mean": d_an.mean(),
        "anchors": anchors,
        "anchor_share": anchors / _with_partner(labels),
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


def _distances(rows: Tensor, anchor: Tensor, other: Tensor, distance: Distance) -> Tensor:
    """(T,) distances; from all (B, B) of them where that is smaller than copying 2 T rows."""
    if len(anchor) * rows.shape[1] > max(1 << 24, len(rows) ** 2):
        return pairwise(rows, rows, distance)[anchor, other]
    return paired(rows[anchor], rows[other], distance)


def _with_partner(labels: Tensor) -> Tensor:
    """How many rows have another row of their identity: after sorting, an equal neighbour."""
    ordered = labels.sort().values
    equal = torch.zeros(len(labels) + 1, dtype=torch.bool, device=labels.device)
    equal[1:-1] = ordered[1:] == ordered[:-1]
    return (equal[1:] | equal[:-1]).sum()
