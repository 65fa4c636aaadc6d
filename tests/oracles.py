"""What the fast code must agree with: definitions written out as loops over float64 NumPy arrays.

Anchors are rows of x, references rows of y; `self_index[i]` is the reference that is anchor i itself, -1 for none.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]
Labels = NDArray[Any]
Triplet = tuple[int, int, int]


def unit(x: Rows) -> Rows:
    """Rows of length 1; zero rows as they are."""
    rows = [row / length if (length := float(np.sqrt((row * row).sum()))) > 0 else row for row in x]
    return np.array(rows).reshape(x.shape)


def distances(x: Rows, y: Rows, distance: str) -> Rows:
    """(Q, R) distances from differences of rows."""
    out = np.zeros((len(x), len(y)))
    for i in range(len(x)):
        for j in range(len(y)):
            a, b = (x[i], y[j]) if distance != "cosine" else (unit(x[i : i + 1])[0], unit(y[j : j + 1])[0])
            square = float(((a - b) ** 2).sum())
            if distance == "cosine":
                out[i, j] = 1.0 - float((a * b).sum())
            else:
                out[i, j] = square if distance == "squared_euclidean" else np.sqrt(square)
    return out


def positives(i: int, labels: Labels, ref_labels: Labels, self_index: Labels) -> list[int]:
    """References of anchor i's identity, without itself."""
    return [j for j in range(len(ref_labels)) if int(ref_labels[j]) == int(labels[i]) and j != int(self_index[i])]


def negatives(i: int, labels: Labels, ref_labels: Labels) -> list[int]:
    """References of other identities."""
    return [j for j in range(len(ref_labels)) if int(ref_labels[j]) != int(labels[i])]


def batch_hard(dist: Rows, labels: Labels, ref_labels: Labels, self_index: Labels) -> list[Triplet]:
    """Farthest positive and closest negative of each anchor that has both; the lowest index on ties."""
    chosen = []
    for i in range(len(labels)):
        near, far = positives(i, labels, ref_labels, self_index), negatives(i, labels, ref_labels)
        if near and far:
            chosen.append((i, max(near, key=lambda j: (dist[i, j], -j)), min(far, key=lambda j: (dist[i, j], j))))
    return chosen


def semi_hard_windows(
    dist: Rows, labels: Labels, ref_labels: Labels, self_index: Labels, margin: float
) -> dict[tuple[int, int], list[int]]:
    """For each ordered positive pair the negatives with d_ap < d_an < d_ap + margin."""
    windows = {}
    for a in range(len(labels)):
        for p in positives(a, labels, ref_labels, self_index):
            others = negatives(a, labels, ref_labels)
            windows[a, p] = [n for n in others if dist[a, p] < dist[a, n] < dist[a, p] + margin]
    return windows


def semi_hard(
    dist: Rows, labels: Labels, ref_labels: Labels, self_index: Labels, margin: float, fallback: str
) -> list[Triplet]:
    """The closest negative of each window, or the fallback's; the lowest index on ties."""
    chosen = []
    for (a, p), window in semi_hard_windows(dist, labels, ref_labels, self_index, margin).items():
        others = negatives(a, labels, ref_labels)
        if window:
            chosen.append((a, p, min(window, key=lambda n: (dist[a, n], n))))
        elif others and fallback == "hardest":
            chosen.append((a, p, min(others, key=lambda n: (dist[a, n], n))))
        elif others and fallback == "easiest":
            chosen.append((a, p, max(others, key=lambda n: (dist[a, n], -n))))
    return chosen


def distance_weighted_chances(
    dist: Rows, labels: Labels, ref_labels: Labels, dim: int, cutoff: float, nonzero_loss_cutoff: float
) -> Rows:
    """(B, R) chances of each negative by Wu et al.; rows of zeros where no negative is eligible."""
    chances = np.zeros(dist.shape)
    for i in range(len(labels)):
        log_weight = {}
        for j in negatives(i, labels, ref_labels):
            if dist[i, j] < nonzero_loss_cutoff:
                d = min(max(float(dist[i, j]), cutoff), 2 - 1e-6)
                log_weight[j] = (2 - dim) * np.log(d) - (dim - 3) / 2 * np.log(1 - d * d / 4)
        if log_weight:
            top = max(log_weight.values())
            total = sum(np.exp(w - top) for w in log_weight.values())
            for j, w in log_weight.items():
                chances[i, j] = np.exp(w - top) / total
    return chances


def batch_all(labels: Labels, ref_labels: Labels, self_index: Labels) -> list[Triplet]:
    """Every triplet."""
    return [
        (a, p, n)
        for a in range(len(labels))
        for p in positives(a, labels, ref_labels, self_index)
        for n in negatives(a, labels, ref_labels)
    ]


def violating(
    dist: Rows, labels: Labels, ref_labels: Labels, self_index: Labels, margin: float
) -> dict[tuple[int, int], list[int]]:
    """For each ordered positive pair the negatives with d_an < d_ap + margin."""
    return {
        (a, p): [n for n in negatives(a, labels, ref_labels) if dist[a, n] < dist[a, p] + margin]
        for a in range(len(labels))
        for p in positives(a, labels, ref_labels, self_index)
    }


def easy_positive(dist: Rows, labels: Labels, ref_labels: Labels, self_index: Labels, negative: str) -> list[Triplet]:
    """Closest positive, with the closest negative or the closest that is no closer; the lowest index on ties."""
    chosen = []
    for a in range(len(labels)):
        near, far = positives(a, labels, ref_labels, self_index), negatives(a, labels, ref_labels)
        if not near:
            continue
        p = min(near, key=lambda j: (dist[a, j], j))
        allowed = [n for n in far if negative == "hardest" or dist[a, n] >= dist[a, p]]
        if allowed:
            chosen.append((a, p, min(allowed, key=lambda j: (dist[a, j], j))))
    return chosen


PairLists = tuple[list[tuple[int, int]], list[tuple[int, int]]]


def pair_margin(
    dist: Rows, labels: Labels, ref_labels: Labels, self_index: Labels, pos_margin: float, neg_margin: float
) -> PairLists:
    """Positive pairs farther, and negative pairs closer than a threshold."""
    near, far = [], []
    for a in range(len(labels)):
        far += [(a, p) for p in positives(a, labels, ref_labels, self_index) if dist[a, p] > pos_margin]
        near += [(a, n) for n in negatives(a, labels, ref_labels) if dist[a, n] < neg_margin]
    return far, near


def multi_similarity(dist: Rows, labels: Labels, ref_labels: Labels, self_index: Labels, epsilon: float) -> PairLists:
    """Positives beyond the closest negative, negatives within the farthest positive, epsilon either way."""
    far, near = [], []
    for a in range(len(labels)):
        pos, neg = positives(a, labels, ref_labels, self_index), negatives(a, labels, ref_labels)
        if pos and neg:
            far += [(a, p) for p in pos if dist[a, p] + epsilon > min(dist[a, n] for n in neg)]
            near += [(a, n) for n in neg if dist[a, n] < max(dist[a, p] for p in pos) + epsilon]
    return far, near
