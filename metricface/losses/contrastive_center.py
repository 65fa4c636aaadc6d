"""Contrastive-center loss: near to the own class's centre, in proportion to the distances to all the others."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from metricface.choices import check_choice, is_number
from metricface.identities import Identities, find_identities
from metricface.losses.center import check_alone, check_classes, check_sizes, class_sums, set_class_means

ContrastiveCenterReduction = Literal["sum", "mean"]

# Numbers of the centres that are copied to float64 at a time.
BLOCK_NUMBERS = 1 << 20


def contrastive_center(sq_own: Tensor, sq_others: Tensor, *, delta: float) -> Tensor:
    """Contrastive-center loss of each embedding, unreduced.

    sq_own: (B,) squared Euclidean distance to the own class's centre. sq_others: (B,) sum of those to all others.
    Returns (B,): 1/2 sq_own / (sq_others + delta).
    Source: Qi and Su 2017, Contrastive-center loss for deep neural networks (read in secondary accounts only).
    """
    return 0.5 * sq_own / (sq_others + delta)


class ContrastiveCenterLoss(nn.Module):
    """Qi and Su's contrastive-center loss, to stand beside a classification head (the weight for it is not known).

    Distance: squared Euclidean, on raw embeddings. Reduction: "sum" over the batch, as defined, or "mean".

    `centers` (C, D) is a parameter, learned by gradient, from N(0, 0.01^2) at first, out of `generator` or else torch's
    global one (the sources say nothing of either). The denominator grows with C, so a centre's gradient is of the order
    of 1/C: give `centers` a learning rate of its own, without weight decay, in a loop of your own (a recipe has one
    rate for all parts of a sum). delta > 0 bounds the loss where all other centres are met.

    The sum over all other centres costs O((B + C) D) and no (B, C) tensor: with m the mean of the centres,
    sum_j |x - c_j|^2 = C |x - m|^2 + sum_j |c_j - m|^2. It is taken in float64, so that what is left after subtracting
    the own centre is exact enough where that is nearly all of it. Differentiable once.
    pytorch-metric-learning 2.9.0 has no such loss.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        delta: float = 1.0,
        reduction: ContrastiveCenterReduction = "sum",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_sizes(self, num_classes, embedding_dim)
        check_choice("reduction", reduction, get_args(ContrastiveCenterReduction))
        if not is_number(delta) or delta <= 0:
            raise ValueError(f"delta must be a finite number above 0, added to the denominator; got {delta!r}.")
        self.centers = nn.Parameter(torch.empty(num_classes, embedding_dim))
        nn.init.normal_(self.centers, std=0.01, generator=generator)
        self.delta = delta
        self.reduction = reduction

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Loss of a batch: a scalar in float32 (float64 for float64 embeddings), 0 for B = 0.

        embeddings: (B, D) of any floating type; labels: (B,) integers in [0, C). The other arguments are None; they
        are there so that this can stand in a sum beside other losses. Raises ValueError for malformed or non-finite
        input, for labels without a centre, and for a tuple or references.
        """
        batch = check_alone(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        classes = check_classes(batch, self.centers)
        sq_own, sq_others = _SqDistances.apply(  # type: ignore[no-untyped-call]
            batch.embeddings, self.centers, classes, find_identities(batch)
        )
        losses = contrastive_center(sq_own, sq_others, delta=self.delta)
        total = losses.sum() if self.reduction == "sum" else losses.sum() / max(1, len(losses))
        return total.to(batch.embeddings.dtype)

    @torch.no_grad()
    def centers_from(self, embeddings: Tensor, labels: Tensor) -> int:
        """Set centres to the means of these embeddings' classes, for a warm start, as CenterLoss does.

        embeddings: (N, D), labels: (N,) integers in [0, C). Returns how many classes have no image here: their centres
        stay as they are. Raises ValueError as a call of the loss does.
        """
        return set_class_means(self.centers, embeddings, labels)

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        classes, dim = self.centers.shape
        return f"num_classes={classes}, embedding_dim={dim}, delta={self.delta}, reduction={self.reduction!r}"


class _SqDistances(torch.autograd.Function):
    """Squared distances (B,) to the own centre, and their sum (B,) over all other centres, both in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, centers: Tensor, classes: Tensor, identities: Identities) -> tuple[Tensor, Tensor]:
        mean = x.new_zeros(x.shape[1], dtype=torch.float64)
        for block in _blocks(centers):
            mean += centers[block].double().sum(dim=0)
        mean /= len(centers)
        spread = mean.new_zeros(())
        for block in _blocks(centers):
            spread += (centers[block].double() - mean).square().sum()
        ctx.save_for_backward(x, centers, classes, mean)
        ctx.identities = identities
        sq_own = _to_own(x, centers, classes).square().sum(dim=1)
        sq_all = len(centers) * (x.double() - mean).square().sum(dim=1) + spread
        return sq_own, (sq_all - sq_own).clamp_min(0.0)

    @staticmethod
    def backward(ctx: Any, by_own: Tensor, by_others: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():  # what is computed here has no graph: a second derivative would be 0
            raise RuntimeError("ContrastiveCenterLoss can be differentiated only once; found create_graph=True.")
        x, centers, classes, mean = ctx.saved_tensors
        wants_x, wants_centers, *_ = ctx.needs_input_grad
        to_own = 2.0 * (by_own - by_others)[:, None] * _to_own(x, centers, classes)  # (B, D)
        to_all = 2.0 * by_others[:, None] * (x.double() - mean)  # (B, D)
        by_x = (to_own + len(centers) * to_all).to(x.dtype) if wants_x else None
        by_centers = None
        if wants_centers:
            # The sum over i of 2 g_i (c_j - x_i) is (sum of 2 g) (c_j - m) - the sum of 2 g_i (x_i - m), for every j.
            by_centers = torch.empty_like(centers)
            weight, shared = 2.0 * by_others.sum(), to_all.sum(dim=0)
            for block in _blocks(centers):
                by_centers[block] = (centers[block].double() - mean).mul_(weight).sub_(shared)
            # The batch's own centres in one float64 sum, whose terms may nearly cancel.
            own = (centers.index_select(0, classes).double() - mean).mul_(weight).sub_(shared)  # (B, D)
            own -= class_sums(to_own, ctx.identities)
            by_centers.index_copy_(0, classes, own.to(centers.dtype))
        return by_x, by_centers, None, None


def _to_own(x: Tensor, centers: Tensor, classes: Tensor) -> Tensor:
    """(B, D) in float64, from the own centre to the embedding."""
    return x.double() - centers.index_select(0, classes).double()


def _blocks(centers: Tensor) -> Iterator[slice]:
    """Runs of centres whose copies stay small."""
    size = max(1, BLOCK_NUMBERS // centers.shape[1])
    for start in range(0, len(centers), size):
        yield slice(start, start + size)
