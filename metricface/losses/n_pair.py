"""N-pair loss: a positive pair against all negatives, by dot products."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metricface.choices import is_number
from metricface.identities import Identities, Own, find_identities, own_references
from metricface.losses.gathering import products_of
from metricface.losses.positive_pairs import RUN_NUMBERS, of_references_in
from metricface.losses.reduction import mean_over
from metricface.losses.segments import as_sets, segment_logsumexp
from metricface.losses.streaming import Gradients, Totals, streamed
from metricface.products import others_logsumexp
from metricface.tuples import Batch, as_pairs, check_batch

# Fewer anchors than this make a matrix product slow.
FEWEST_ROWS = 64


def n_pair(dot_ap: Tensor, negatives: Tensor) -> Tensor:
    """N-pair loss of each positive pair, unreduced.

    dot_ap: its dot product; negatives: the log-sum-exp of the anchor's dot products with its negatives, of shapes that
    broadcast. Returns ln(1 + sum exp(dot_an - dot_ap)).
    Source: Sohn 2016, Improved Deep Metric Learning with Multi-class N-pair Loss Objective.
    """
    return F.softplus(negatives - dot_ap)


class NPairLoss(nn.Module):
    """Sohn's multi-class N-pair loss, over all positive pairs and all negatives of their anchors.

    Similarity: dot products of the embeddings as they are; nothing is normalised. l2_weight: the paper penalises long
    embeddings instead (its weight was not found): this times the mean squared length of a row is added, over the rows
    of embeddings and, where given, of ref_emb together. Reduction: the mean over ordered positive pairs (a, p) of
    ln(1 + sum_n exp(a.n - a.p)), n all references of other identities; pairs without a negative are not counted. With
    N anchors of N identities as embeddings and one positive of each as ref_emb this is the paper's N-pair-mc.

    pytorch-metric-learning's NPairsLoss normalises by default, takes one pair of each identity, its positive a negative
    of the others, and refuses separate references.
    Source: Sohn 2016, Improved Deep Metric Learning with Multi-class N-pair Loss Objective.
    """

    normalize = False

    def __init__(self, l2_weight: float = 0.0) -> None:
        super().__init__()
        if not is_number(l2_weight) or l2_weight < 0:
            raise ValueError(f"l2_weight must be 0 or more and finite, times a mean squared length; got {l2_weight!r}.")
        self.l2_weight = l2_weight

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        self_index: Tensor | None = None,
    ) -> Tensor:
        """Loss of a batch: a scalar in float32 (float64 for float64 embeddings).

        embeddings: (B, D); labels: (B,) integers; indices_tuple: a miner's 4-tuple of pairs or 3-tuple of triplets,
        taken as sets of pairs (what is repeated counts once), None for every pair of the batch, or of an anchor and a
        reference where ref_emb (R, D) and ref_labels (R,) are given. self_index: as the miners take it; matters only
        for None. No pair at all: 0 (and the penalty), with gradient 0. Raises ValueError for malformed or non-finite
        input.
        """
        batch = check_batch(embeddings, labels, ref_emb, ref_labels, self_index)
        value = self._every_pair(batch) if indices_tuple is None else self._given(batch, indices_tuple)
        return value + self.l2_weight * _mean_sq_length(batch) if self.l2_weight else value

    def _every_pair(self, batch: Batch) -> Tensor:
        identities = find_identities(batch)
        number = torch.where(identities.negatives > 0, identities.positives, 0).sum()
        return mean_over(every_n_pair(batch, identities), number)

    def _given(self, batch: Batch, indices_tuple: Sequence[Tensor]) -> Tensor:
        pairs = as_sets(as_pairs(indices_tuple, batch.labels, batch.ref_labels), len(batch.ref_labels))
        dot_an = products_of(batch, pairs.negative_anchor, pairs.negative)
        negatives = segment_logsumexp(dot_an, pairs.negative_anchor, len(batch.labels))  # (B,)
        of_pair = negatives.index_select(0, pairs.positive_anchor)  # (P,)
        losses = n_pair(products_of(batch, pairs.positive_anchor, pairs.positive), of_pair)
        return mean_over(losses.sum(), (of_pair > -torch.inf).sum())

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        return f"l2_weight={self.l2_weight}"


def _mean_sq_length(batch: Batch) -> Tensor:
    rows = [batch.embeddings] if batch.embeddings is batch.ref_emb else [batch.embeddings, batch.ref_emb]
    total = torch.stack([part.square().sum() for part in rows]).sum()
    return total / max(1, sum(len(part) for part in rows))


def every_n_pair(batch: Batch, identities: Identities) -> Tensor:
    """Sum of the N-pair loss over every ordered positive pair whose anchor has a negative, with its gradient."""

    def run(gradients: Gradients) -> Totals:
        total = batch.embeddings.new_zeros((), dtype=torch.float64)
        by_reference = of_references_in(gradients, batch)
        for anchors, own in _anchors(batch, identities):
            left_out = torch.where(own.is_same, own.same, -1)
            x = batch.embeddings.index_select(0, anchors).requires_grad_(gradients.embeddings is not None)
            y = batch.ref_emb.detach().requires_grad_(by_reference is not None)
            leaves = [leaf for leaf in (x, y) if leaf.requires_grad]
            with torch.set_grad_enabled(bool(leaves)):
                negatives = others_logsumexp(x, y, left_out)  # (b,)
            fixed = negatives.detach()[:, None]
            dot_ap = _products(x.detach(), batch.ref_emb, own.positive)  # (b, M)
            total = total + torch.where(own.is_positive, n_pair(dot_ap, fixed), 0.0).double().sum()
            if not leaves:
                continue
            slope = torch.sigmoid(fixed - dot_ap) * own.is_positive  # (b, M) by the negatives; by dot_ap the reverse
            grads = iter(torch.autograd.grad(negatives, leaves, slope.sum(dim=1)))
            if gradients.embeddings is not None:
                gradients.embeddings.index_add_(0, anchors, next(grads))
            if by_reference is not None:
                by_reference.add_(next(grads))
            _subtract_products(batch, anchors, own.positive, slope, gradients.embeddings, by_reference)
        return Totals(total, None, None)

    return streamed(batch, run, squared=True)[0]


def _anchors(batch: Batch, identities: Identities) -> Iterator[tuple[Tensor, Own]]:
    """The anchors that have a positive and a negative, some at a time, with their own identity."""
    anchors = ((identities.positives > 0) & (identities.negatives > 0)).nonzero()[:, 0]
    if not len(anchors):
        return
    largest = int(identities.size[anchors].amax())
    at_once = max(FEWEST_ROWS, RUN_NUMBERS // max(largest, batch.embeddings.shape[1]))
    for start in range(0, len(anchors), at_once):
        some = anchors[start : start + at_once]
        yield some, own_references(batch, identities, some, largest, largest)


def _columns(x: Tensor, columns: Tensor) -> Iterator[slice]:
    """Slices of columns (b, M) of which copies of rows stay small."""
    at_once = max(1, RUN_NUMBERS // max(1, x.numel()))
    return (slice(start, start + at_once) for start in range(0, columns.shape[1], at_once))


def _products(x: Tensor, y: Tensor, columns: Tensor) -> Tensor:
    """Dot products of x's rows (b, D) with the rows `columns` (b, M) of y (R, D): (b, M)."""
    products = x.new_empty(columns.shape)
    for some in _columns(x, columns):
        others = y.index_select(0, columns[:, some].flatten()).view(len(x), -1, x.shape[1])
        products[:, some] = others.mul_(x[:, None]).sum(dim=2)
    return products


def _subtract_products(
    batch: Batch,
    anchors: Tensor,
    columns: Tensor,
    weight: Tensor,
    by_embedding: Tensor | None,
    by_reference: Tensor | None,
) -> None:
    """Subtract the gradient of products of anchors (b,) with references `columns` (b, M) times `weight` (b, M)."""
    x = batch.embeddings.index_select(0, anchors)
    for some in _columns(x, columns):
        flat, scale = columns[:, some].flatten(), weight[:, some, None]  # (b x m,), (b, m, 1)
        if by_embedding is not None:
            others = batch.ref_emb.index_select(0, flat).view(len(x), -1, x.shape[1])
            by_embedding.index_add_(0, anchors, others.mul_(scale).sum(dim=1), alpha=-1)
        if by_reference is not None:
            by_reference.index_add_(0, flat, (x[:, None] * scale).flatten(0, 1), alpha=-1)
