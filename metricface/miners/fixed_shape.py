"""Mining whose result has the same shape for every batch: for torch.compile(fullgraph=True), CUDA graphs and the like.

A miner's usual result is as long as what it found, and finding out how long makes the device wait. Here every anchor
gets its fixed number of places, and a mask says which of them hold a triplet. Nothing is checked, since a check waits
too: embeddings with NaN give triplets that mean nothing.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metricface.choices import is_count
from metricface.distances import Distance, centred, full_precision, sq_distances, unit_rows
from metricface.identities import find_identities, own_references
from metricface.miners import kernels
from metricface.miners.base import TripletMiner
from metricface.miners.tiles import RUN, block_shape, for_cosine, rounding_of
from metricface.tuples import Batch, Triplets

# A tile's negatives -> for each of its positives a negative and whether there is one, (b, M) each.
Rule = Callable[["Rows"], tuple[Tensor, Tensor]]


class MaskedTriplets(NamedTuple):
    """Triplets of fixed number, T; those where `valid` is False hold indices that mean nothing, within bounds.

    A loss on them: (triplet(d_ap, d_an, margin=0.2) * valid).sum() / valid.sum(). No indices_tuple: 3 tensors would be
    taken for triplets and 4 for pairs, so these are nested, and a loss that is given them says so.
    """

    triplets: Triplets  # (T,) int64 each
    valid: Tensor  # (T,) bool
    left_out: Tensor  # 0-dim int64: positive pairs beyond max_positives


class Rows(NamedTuple):
    """Some anchors against all references."""

    first: int  # the first anchor's row
    sq_positive: Tensor  # (b, M)
    is_positive: Tensor  # (b, M)
    sq_negative: Tensor  # (b, C), C a multiple of RUN, +inf where not a negative
    rounding: Tensor  # (b, 1), as a Tile's


class Masked(NamedTuple):
    """A batch that was not checked, and each anchor's first M positives."""

    batch: Batch
    positive: Tensor  # (B, M) reference rows
    is_positive: Tensor  # (B, M)
    left_out: Tensor  # 0-dim


class FixedShapeMiner(TripletMiner):
    """A miner of triplets whose result can also be had in a fixed shape."""

    distance: Distance
    generator: torch.Generator | None = None

    @torch.no_grad()
    def masked(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        self_index: Tensor | None = None,
        max_positives: int,
    ) -> MaskedTriplets:
        """The triplets in a fixed shape: one place an anchor, T = B, where the miner takes one triplet an anchor, else
        one for each of an anchor's positives, T = B x max_positives.

        For torch.compile(fullgraph=True): no synchronisation with the device, and so no check of values. Arguments as
        of forward. max_positives: of an anchor with more positives the first so many take part, by the order of their
        rows; how many pairs that leaves out is in the result. Draws come from torch's global generator. Raises
        ValueError for a generator of the miner's own, which torch.compile cannot trace, and for a miner that may form
        several triplets a pair.
        """
        if self.generator is not None:
            raise ValueError(
                f"{type(self).__name__}.masked draws from torch's global generator; this miner has its own generator. "
                "Leave it out."
            )
        return self._masked(
            prepare(
                embeddings,
                labels,
                ref_emb,
                ref_labels,
                self_index,
                max_positives=max_positives,
                normalize=self.normalize,
                distance=self.distance,
            )
        )

    @abstractmethod
    def _masked(self, prepared: Masked) -> MaskedTriplets:
        """Choose triplets in a fixed shape."""


def prepare(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    self_index: Tensor | None,
    *,
    max_positives: int,
    normalize: bool,
    distance: Distance,
) -> Masked:
    """Find each anchor's first `max_positives` positives, in the order of their rows.

    Raises ValueError for a `max_positives` that is no count, for references without labels, and for none.
    """
    if not is_count(max_positives):
        raise ValueError(f"max_positives must be a whole number, at least 1; found {max_positives!r}.")
    if (ref_emb is None) != (ref_labels is None):
        raise ValueError("ref_emb and ref_labels belong together: pass both or neither.")
    rows = unit_rows if normalize else full_precision
    device = embeddings.device
    common = embeddings.dtype if ref_emb is None else torch.promote_types(embeddings.dtype, ref_emb.dtype)
    queries, labels = rows(embeddings.to(common)), labels.to(device).long()
    if ref_emb is None or ref_labels is None:
        references, ref_labels = queries, labels
        itself = torch.arange(len(labels), device=device)
    else:
        references, ref_labels = rows(ref_emb.to(common)), ref_labels.to(device).long()
        itself = torch.full_like(labels, -1)
    if self_index is not None:
        itself = self_index.to(device).long()
    if not len(references):
        raise ValueError("The fixed-shape form needs at least one reference; found none.")
    if distance == "cosine":
        queries, references = for_cosine(queries, references)
    batch = Batch(queries, labels, references, ref_labels, itself)
    identities = find_identities(batch)
    anchors = torch.arange(len(labels), device=device)
    own = own_references(batch, identities, anchors, max_positives + 1, max_positives)
    left_out = (identities.positives - max_positives).clamp_min(0).sum()
    return Masked(batch, own.positive, own.is_positive, left_out)


def mine(masked: Masked, rule: Rule, tile_rows: int | None) -> MaskedTriplets:
    """Apply a rule to rows of anchors; one triplet for each place of a positive, in row order: T = B x M."""
    batch, positive, is_positive, left_out = masked
    number, places = positive.shape
    queries, references = batch.embeddings, batch.ref_emb
    x, y = centred(queries, references)
    longest = y.square().sum(dim=1).amax()
    at_once, _ = block_shape(len(y), x.device, tile_rows, whole_rows=True)
    padding = -len(y) % RUN
    negatives, found = [], []
    for first in range(0, max(1, number), at_once):  # once for no anchor, too: the result has its shape all the same
        some = slice(first, first + at_once)
        same = batch.labels[some, None] == batch.ref_labels  # (b, 1) == (R,)
        sq_negative = torch.where(same, torch.inf, sq_distances(x[some], y))
        sq_negative = torch.nn.functional.pad(sq_negative, (0, padding), value=torch.inf)
        sq_positive = (queries[some, None] - references[positive[some]]).square().sum(dim=2)
        rounding = rounding_of(x[some].square().sum(dim=1, keepdim=True) + longest)
        negative, some_found = rule(Rows(first, sq_positive, is_positive[some], sq_negative, rounding))
        negatives.append(negative)
        found.append(some_found)
    anchor = torch.arange(number, device=x.device)[:, None].expand(number, places)
    # A place without a triplet may have drawn from the padding.
    columns = [anchor, positive, torch.cat(negatives).clamp_max(len(y) - 1)]
    valid = torch.cat(found) & is_positive
    return MaskedTriplets(Triplets(*(column.reshape(-1) for column in columns)), valid.reshape(-1), left_out)


def hardest(masked: Masked, tile_rows: int | None) -> MaskedTriplets:
    """Of each anchor the farthest positive and the closest negative: T = B."""

    def rule(rows: Rows) -> tuple[Tensor, Tensor]:
        least, column = rows.sq_negative.min(dim=1, keepdim=True)
        place = rows.sq_positive.masked_fill(~rows.is_positive, -torch.inf).argmax(dim=1, keepdim=True)
        chosen = torch.zeros_like(rows.is_positive).scatter(1, place, True)
        return column.expand_as(chosen), chosen & (least < torch.inf)

    found = mine(masked, rule, tile_rows)
    number, places = masked.positive.shape
    place = found.valid.view(number, places).int().argmax(dim=1)  # (B,)
    chosen = torch.arange(number, device=place.device) * places + place
    triplets = Triplets(*(column[chosen] for column in found.triplets))
    return MaskedTriplets(triplets, found.valid[chosen], found.left_out)


def semi_hard_rule(margin: float, distance: Distance, fallback: str, draws: Tensor | None) -> Rule:
    """The closest negative of each window, or one drawn by draws (B, M) in [0, 1), or the fallback's."""

    def rule(rows: Rows) -> tuple[Tensor, Tensor]:
        lower = rows.sq_positive + rows.rounding
        upper = kernels.sq_reach(rows.sq_positive, margin, distance)
        finite = rows.sq_negative < torch.inf
        least, nearest = rows.sq_negative.min(dim=1)
        farthest = rows.sq_negative.masked_fill(~finite, -torch.inf).argmax(dim=1)
        other = {"skip": nearest, "hardest": nearest, "easiest": farthest}[fallback]
        any_negative = least < torch.inf
        negatives, found = [], []
        for j in range(rows.sq_positive.shape[1]):
            inside = (rows.sq_negative > lower[:, j, None]) & (rows.sq_negative < upper[:, j, None])
            some = inside.any(dim=1)
            if draws is None:
                column = torch.where(inside, rows.sq_negative, torch.inf).argmin(dim=1)
            else:
                column = kernels.draw(inside, draws[rows.first : rows.first + len(inside), j, None])[0][:, 0]
            negatives.append(torch.where(some, column, other))
            found.append(some if fallback == "skip" else any_negative)
        return torch.stack(negatives, dim=1), torch.stack(found, dim=1)

    return rule


def weighted_rule(dim: int, cutoff: float, nonzero_loss_cutoff: float, fallback: str, draws: Tensor) -> Rule:
    """Negatives drawn by distance, by draws (B, M) in [0, 1)."""

    def rule(rows: Rows) -> tuple[Tensor, Tensor]:
        finite = (rows.sq_negative < torch.inf).to(rows.sq_negative.dtype)
        weights = kernels.distance_weights(
            rows.sq_negative, dim, cutoff=cutoff, nonzero_loss_cutoff=nonzero_loss_cutoff
        )
        if fallback == "uniform":
            weights = torch.where(weights.amax(dim=1, keepdim=True) > 0, weights, finite)
        column, some = kernels.draw(weights, draws[rows.first : rows.first + len(weights)])
        return column, some[:, None].expand_as(column)

    return rule
