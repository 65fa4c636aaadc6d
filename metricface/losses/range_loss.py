"""Range loss: shrink each identity's largest distances, and part the two identities whose means are closest."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metricface.choices import is_count, is_number
from metricface.distances import centred, paired, sq_distances
from metricface.losses.center import check_alone

# Distances that are held at a time, and images that are compared with their identities at a time.
TILE_NUMBERS = 1 << 20
TILE_ROWS = 128


def harmonic_means(sq_dist: Tensor, identity: Tensor, number: int) -> Tensor:
    """Harmonic mean of each identity's squared distances: those of T pairs of `number` = P identities.

    sq_dist: (T,) >= 0; identity: (T,) int64 in [0, P). Returns (P,), 0 for an identity without a pair. A distance of 0
    makes the mean 0, as in the limit, with gradient 0 for that pair.
    Source: Zhang et al. 2017, Range Loss for Deep Face Recognition with Long-Tailed Training Data, the intra term.
    """
    sq_dist = sq_dist.clamp_min(torch.finfo(sq_dist.dtype).tiny)
    # Reciprocals overflow; ratios to the smallest do not, and where that one stands does not change the mean.
    smallest = sq_dist.new_full((number,), torch.inf).scatter_reduce(0, identity, sq_dist.detach(), "amin")  # (P,)
    ratios = smallest.index_select(0, identity) / sq_dist  # (T,) in (0, 1]
    zeros = sq_dist.new_zeros(number)
    pairs = zeros.index_add(0, identity, torch.ones_like(sq_dist))
    some = pairs > 0
    sums = torch.where(some, zeros.index_add(0, identity, ratios), 1.0)
    return pairs * torch.where(some, smallest, 0.0) / sums


class RangeLoss(nn.Module):
    """Zhang et al.'s range loss, to stand beside a softmax head of weight 1: it has its weights in it.

    intra_weight x the sum over identities of the harmonic mean of their k largest distances in the batch,
    + inter_weight x [margin - the distance of the two closest class means of the batch]+.
    Distance: squared Euclidean, on raw embeddings. Reduction: that sum. The weights are the paper's, for batches of 16
    identities with 16 images.

    margin is a squared distance. The paper does not state it; the default of 1 is ours, for embeddings of length about
    1 (where unrelated means are up to 2 apart). For others set it by "closest_means" of `last`.
    An identity with fewer than k pairs has the harmonic mean of those it has; one with a single image has no intra
    term and is counted in `last`, but has a mean. Only the chosen pairs have an intra gradient, only the closest two
    identities an inter gradient. All four numbers are plain attributes that a schedule may change.

    The paper's printed gradients disagree with its formula in sign and scale: this is the formula's own gradient.
    gluon-face's RangeLoss takes distances unsquared and exchanges the weights; pytorch-metric-learning 2.9.0 has none.
    """

    last: dict[str, Tensor] | None = None

    def __init__(
        self, k: int = 2, *, margin: float = 1.0, intra_weight: float = 5e-5, inter_weight: float = 1e-4
    ) -> None:
        super().__init__()
        if not is_count(k):
            raise ValueError(f"k must be a whole number, at least 1, the largest distances of an identity; got {k!r}.")
        if not is_number(margin) or margin <= 0:
            raise ValueError(
                f"margin must be positive and finite, a squared distance between class means; got {margin!r}."
            )
        for name, weight in (("intra_weight", intra_weight), ("inter_weight", inter_weight)):
            if not is_number(weight) or weight < 0:
                raise ValueError(f"{name} must be 0 or more and finite; got {weight!r}.")
        self.k = k
        self.margin = margin
        self.intra_weight = intra_weight
        self.inter_weight = inter_weight

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Loss of a batch: a scalar in float32 (float64 for float64 embeddings).

        embeddings: (B, D) of any floating type; labels: (B,) integers. The other arguments are None; they are there so
        that this can stand in a sum beside other losses. Neither a pair nor a second identity: 0, with gradient 0.
        Afterwards `last` has, 0-dim: "intra" and "inter", the two terms without their weights; "closest_means", the
        squared distance of the closest two (inf of fewer); "identities_without_pair". Raises ValueError for malformed
        or non-finite input, and for a tuple or references.
        """
        batch = check_alone(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        x = batch.embeddings
        found = batch.labels.long().unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
        identity, sizes = found[1], found[2]  # (B,) in [0, P), (P,)
        means = x.new_zeros(len(sizes), x.shape[1]).index_add(0, identity, x) / sizes[:, None]  # (P, D)
        pairs = farthest_pairs(x.detach(), identity, sizes, means.detach(), self.k)
        sq_dist = paired(x.index_select(0, pairs.one), x.index_select(0, pairs.other), "squared_euclidean")  # (T,)
        intra = harmonic_means(sq_dist, pairs.identity, len(sizes)).sum()
        closest = _closest(means)
        inter = (self.margin - closest).clamp_min(0.0)
        self.last = {
            "intra": intra.detach(),
            "inter": inter.detach(),
            "closest_means": closest.detach(),
            "identities_without_pair": (sizes < 2).sum(),
        }
        return self.intra_weight * intra + self.inter_weight * inter

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        weights = f"intra_weight={self.intra_weight}, inter_weight={self.inter_weight}"
        return f"k={self.k}, margin={self.margin}, {weights}"


class IdentityPairs(NamedTuple):
    """int64 (T,) each: two rows of a batch, and the number of the identity whose images they are."""

    one: Tensor
    other: Tensor
    identity: Tensor


@torch.no_grad()
def farthest_pairs(x: Tensor, identity: Tensor, sizes: Tensor, means: Tensor, k: int) -> IdentityPairs:
    """The k unordered pairs of each identity that are farthest apart, or all it has.

    x: (B, D) in full precision; identity: (B,) int64 in [0, P); sizes: (P,) images of each, means: (P, D).
    Distances come from matrix products around the identity's own mean: which of two nearly equal ones is taken is
    decided by rounding. Images are compared within runs of rows sorted by identity, never all with all.
    """
    most = int(sizes.max()) if len(sizes) else 0
    order = identity.argsort(stable=True)
    sorted_identity = identity[order]
    moved = x[order] - means.index_select(0, sorted_identity)
    parts = [_farthest_partners(moved, sorted_identity, start, most, k) for start in _starts(len(x), most)]
    if not parts:
        nothing = identity[:0]
        return IdentityPairs(nothing, nothing, nothing)
    sq_dist, row, partner = (torch.cat(column) for column in zip(*parts, strict=True))  # (M,) each, M <= B k
    by_distance = sq_dist.argsort(descending=True, stable=True)
    ranked = by_distance[sorted_identity[row[by_distance]].argsort(stable=True)]
    of_pair = sorted_identity[row[ranked]].contiguous()
    rank = torch.arange(len(ranked), device=x.device) - torch.searchsorted(of_pair, of_pair)
    chosen = ranked[(rank < k) & (sq_dist[ranked] >= 0)]
    return IdentityPairs(order[row[chosen]], order[partner[chosen]], sorted_identity[row[chosen]])


def _starts(rows: int, most: int) -> range:
    """Where runs of sorted rows begin; no run at all where no identity has two images."""
    return range(0, rows if most > 1 else 0, _tile_rows(most))


def _tile_rows(most: int) -> int:
    return min(TILE_ROWS, max(1, TILE_NUMBERS // (TILE_ROWS + most)))


def _farthest_partners(moved: Tensor, identity: Tensor, start: int, most: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sorted row of a run its k farthest partners further on: distances (-1 for none), rows and partners."""
    stop = min(start + _tile_rows(most), len(moved))
    end = min(stop + most - 1, len(moved))  # the last row's identity ends before here
    row = torch.arange(start, stop, device=moved.device)[:, None]  # (b, 1)
    partner = torch.arange(start, end, device=moved.device)  # (c,)
    is_pair = (identity[start:end] == identity[start:stop, None]) & (partner > row)  # (b, c)
    sq_dist = torch.where(is_pair, sq_distances(moved[start:stop], moved[start:end]), -1.0)
    best, place = sq_dist.topk(min(k, most - 1, end - start), dim=1)
    return best.flatten(), row.expand_as(best).flatten(), (place + start).flatten()


def _closest(means: Tensor) -> Tensor:
    """Squared distance of the two closest of P means (P, D), 0-dim; inf of fewer than two."""
    if len(means) < 2:
        return means.new_full((), torch.inf)
    with torch.no_grad():
        moved, _ = centred(means, means)
        nearest, partner = [], []
        size = max(1, TILE_NUMBERS // len(means))
        for start in range(0, len(means), size):
            sq_dist = sq_distances(moved[start : start + size], moved)  # (b, P)
            sq_dist.diagonal(start).fill_(torch.inf)
            least = sq_dist.min(dim=1)
            nearest.append(least.values)
            partner.append(least.indices)
        one = torch.cat(nearest).argmin(keepdim=True)  # (1,)
        other = torch.cat(partner)[one]
    # Subtracted once more: the matrix product is good enough to choose, not to measure.
    return paired(means.index_select(0, one), means.index_select(0, other), "squared_euclidean")[0]
