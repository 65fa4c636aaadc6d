"""The losses as loops over NumPy float64, written from the papers' formulas and from nothing in the package."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]
TripletList = list[tuple[int, int, int]]


def unit(rows: Rows) -> Rows:
    """Rows of length 1; zero rows as they are."""
    return np.array([row / (np.sqrt(sum(value**2 for value in row)) or 1.0) for row in rows])


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


def cos(x: Rows, y: Rows) -> float:
    lengths = float(np.sqrt((x * x).sum()) * np.sqrt((y * y).sum()))
    return float((x * y).sum()) / lengths if lengths else 0.0


def distance_of(x: Rows, y: Rows, distance: str) -> float:
    return {"euclidean": dist(x, y), "squared_euclidean": dist(x, y) ** 2, "cosine": 1.0 - cos(x, y)}[distance]


def triplet_terms(
    x: Rows, refs: Rows, triplets: TripletList, margin: float | None, distance: str, *, swap: bool = False
) -> list[float]:  # margin None: soft
    terms = []
    for a, p, n in triplets:
        d_an = distance_of(x[a], refs[n], distance)
        if swap:
            d_an = min(d_an, distance_of(refs[p], refs[n], distance))
        gap = distance_of(x[a], refs[p], distance) - d_an
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


class Partners(NamedTuple):
    """Of each anchor, the reference rows of its own identity, without itself, and those of others."""

    positives: list[list[int]]
    negatives: list[list[int]]


def partners(labels: Sequence[int], ref_labels: Sequence[int], self_index: Sequence[int]) -> Partners:
    rows, refs = range(len(labels)), range(len(ref_labels))
    return Partners(
        [[j for j in refs if ref_labels[j] == labels[i] and j != self_index[i]] for i in rows],
        [[j for j in refs if ref_labels[j] != labels[i]] for i in rows],
    )


def generalized_lifted(x: Rows, refs: Rows, of: Partners, margin: float) -> float:
    terms = []
    for i, (near, far) in enumerate(zip(*of, strict=True)):
        if near and far:
            inner = np.log(sum(np.exp(dist(x[i], refs[j])) for j in near))
            terms.append(max(0.0, inner + np.log(sum(np.exp(margin - dist(x[i], refs[j])) for j in far))))
    return float(np.mean(terms))


def lifted(x: Rows, refs: Rows, of: Partners, margin: float) -> float:
    terms = []
    for i, (near, far) in enumerate(zip(*of, strict=True)):
        for j in near if far else []:
            total = sum(np.exp(margin - dist(x[i], refs[n])) + np.exp(margin - dist(refs[j], refs[n])) for n in far)
            terms.append(max(0.0, np.log(total) + dist(x[i], refs[j])) ** 2 / 2)
    return float(np.mean(terms))


def multi_similarity(x: Rows, refs: Rows, of: Partners, alpha: float, beta: float, base: float) -> float:
    total = 0.0
    for i, (near, far) in enumerate(zip(*of, strict=True)):
        total += np.log(1 + sum(np.exp(-alpha * (cos(x[i], refs[j]) - base)) for j in near)) / alpha
        total += np.log(1 + sum(np.exp(beta * (cos(x[i], refs[j]) - base)) for j in far)) / beta
    return float(total / len(x))


def circle(x: Rows, refs: Rows, of: Partners, margin: float, gamma: float) -> float:
    terms = []
    for i, (near, far) in enumerate(zip(*of, strict=True)):
        if near and far:
            s_p, s_n = [cos(x[i], refs[j]) for j in near], [cos(x[i], refs[j]) for j in far]
            of_near = sum(np.exp(-gamma * max(0.0, 1 + margin - s) * (s - 1 + margin)) for s in s_p)
            of_far = sum(np.exp(gamma * max(0.0, s + margin) * (s - margin)) for s in s_n)
            terms.append(np.log(1 + of_near * of_far))
    return float(np.mean(terms))


def n_pair(x: Rows, refs: Rows, of: Partners) -> float:
    terms = [
        np.log(1 + sum(np.exp(x[i] @ refs[n] - x[i] @ refs[j]) for n in far))
        for i, (near, far) in enumerate(zip(*of, strict=True))
        for j in near
        if far
    ]
    return float(np.mean(terms))


def angular(x: Rows, refs: Rows, of: Partners, alpha_deg: float) -> float:
    x, refs, t = unit(x), unit(refs), np.tan(np.deg2rad(alpha_deg)) ** 2
    terms = []
    for i, (near, far) in enumerate(zip(*of, strict=True)):
        for j in near if far else []:
            a, p = x[i], refs[j]
            total = sum(np.exp(4 * t * (a + p) @ refs[n] - 2 * (1 + t) * (a @ p)) for n in far)
            terms.append(np.log(1 + total))
    return float(np.mean(terms))


def cross_entropies(x: Rows, labels: Sequence[int], weight: Rows, bias: Rows) -> list[float]:
    logits = [[float(row @ w) + float(b) for w, b in zip(weight, bias, strict=True)] for row in x]
    return [float(np.log(sum(np.exp(row)))) - row[label] for row, label in zip(logits, labels, strict=True)]
