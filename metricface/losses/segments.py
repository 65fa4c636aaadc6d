"""Log-sum-exp of runs of a list, and the sets and triplets that such runs stand for."""

from typing import NamedTuple

import torch
from torch import Tensor

from metricface.tuples import Pairs, Triplets


def segment_logsumexp(values: Tensor, segment: Tensor, number: int) -> Tensor:
    """Log-sum-exp of the values of each segment, differentiable.

    values: (P,) finite; segment: (P,) int64 in [0, number). Returns (number,): -inf, without gradient, for an empty
    segment. The gradient is finite everywhere.
    """
    with torch.no_grad():
        top = values.new_full((number,), -torch.inf).scatter_reduce(0, segment, values, "amax")
        some = top > -torch.inf
        origin = torch.where(some, top, 0.0)
    total = torch.zeros_like(origin).index_add(0, segment, (values - origin[segment]).exp())
    return torch.where(some, torch.where(some, total, 1.0).log() + origin, -torch.inf)


def as_sets(pairs: Pairs, references: int) -> Pairs:
    """Pairs of which each stands once, sorted by anchor and reference. references: R, how many rows they point into."""
    positive, negative = (
        torch.unique(anchor * references + other)
        for anchor, other in ((pairs.positive_anchor, pairs.positive), (pairs.negative_anchor, pairs.negative))
    )
    columns = (_split(codes, references) for codes in (positive, negative))
    return Pairs(*(column for pair in columns for column in pair))


class PairsWithNegatives(NamedTuple):
    """int64: (P,) positive pairs, each once; and (T,) the negatives of each, `pair` saying whose, each once."""

    anchor: Tensor
    positive: Tensor
    pair: Tensor
    negative: Tensor


def by_positive_pair(triplets: Triplets, references: int) -> PairsWithNegatives:
    """Triplets sorted by positive pair, repetitions dropped. references: R, how many rows they point into."""
    codes, pair = torch.unique(triplets.anchor * references + triplets.positive, return_inverse=True)
    pair, negative = _split(torch.unique(pair * references + triplets.negative), references)
    return PairsWithNegatives(*_split(codes, references), pair, negative)


def _split(codes: Tensor, references: int) -> tuple[Tensor, Tensor]:
    width = max(1, references)
    return torch.div(codes, width, rounding_mode="floor"), codes % width
