"""The losses as loops over NumPy float64, written from the papers' formulas and from nothing in the package."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]
TripletList = list[tuple[int, int, int]]


def unit(rows: Rows) -> Rows:
    return np.array([row / np.sqrt(sum(value**2 for value in row)) for row in rows])


def dist(x: Rows, y: Rows) -> float:
    return float(np.sqrt(((x - y) ** 2).sum()))


def all_triplets(labels: Sequence[int], ref_labels: Sequence[int] | None = None) -> TripletList:
    refs = labels if ref_labels is None else ref_labels
    return [
        (a, p, n)
        for a in range(len(labels))
        for p in range(len(refs))
        for n in range(len(refs))
        if labels[a] == refs[p] and labels[a] != refs[n] and not (ref_labels is None and a == p)
    ]


def all_unordered_pairs(labels: Sequence[int]) -> list[tuple[int, int]]:
    return [(i, j) for i in range(len(labels)) for j in range(i + 1, len(labels))]


def contrastive_terms(x: Rows, labels: Sequence[int], pairs: Iterable[tuple[int, int]], margin: float) -> list[float]:
    terms = []
    for i, j in pairs:
        d = dist(x[i], x[j])
        terms.append(0.5 * d * d if labels[i] == labels[j] else 0.5 * max(0.0, margin - d) ** 2)
    return terms


def triplet_terms(
    x: Rows, refs: Rows, triplets: TripletList, margin: float | None, squared: bool
) -> list[float]:  # margin None: soft
    terms = []
    for a, p, n in triplets:
        d_ap, d_an = dist(x[a], refs[p]), dist(x[a], refs[n])
        gap = d_ap**2 - d_an**2 if squared else d_ap - d_an
        terms.append(float(np.log1p(np.exp(gap))) if margin is None else max(0.0, gap + margin))
    return terms


def margin_based(
    x: Rows, refs: Rows, labels: Sequence[int], triplets: TripletList, alpha: float, beta: Sequence[float], nu: float
) -> float:
    total, active = 0.0, 0
    for a, p, n in triplets:
        b = beta[labels[a]]
        pos = max(0.0, alpha + dist(x[a], refs[p]) - b)
        neg = max(0.0, alpha - dist(x[a], refs[n]) + b)
        total += pos + neg + nu * b
        active += int(pos > 0) + int(neg > 0)
    return total / active if active else 0.0
