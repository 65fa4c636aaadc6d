"""The heads as loops over NumPy float64, written from the papers' formulas and from nothing in the package."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]


def unit(row: Rows) -> Rows:
    return row / math.sqrt(float((row**2).sum()))


def cross_entropy(logits: list[float], label: int) -> float:
    top = max(logits)
    return top + math.log(sum(math.exp(value - top) for value in logits)) - logits[label]


def psi(theta: float, m: int) -> float:
    k = min(int(theta * m / math.pi), m - 1)
    return float((-1) ** k * math.cos(m * theta) - 2 * k)


def softmax(x: Rows, w: Rows, y: int, bias: Rows | None = None) -> float:
    return cross_entropy([float(x @ row) + (0.0 if bias is None else bias[j]) for j, row in enumerate(w)], y)


def on_cosines(x: Rows, w: Rows, y: int, scale: float, target: Callable[[float], float]) -> float:
    """target: of the angle, in place of its cosine."""
    cos = [float(np.clip(unit(x) @ unit(row), -1, 1)) for row in w]
    cos[y] = target(math.acos(cos[y]))
    return cross_entropy([scale * c for c in cos], y)


def arcface(theta: float, m: float, rule: str) -> float:
    if rule == "none":
        return math.cos(theta + m)
    if rule == "easy":
        return math.cos(theta + m) if math.cos(theta) > 0 else math.cos(theta)
    return math.cos(theta + m) if theta + m < math.pi else math.cos(theta) - m * math.sin(m)


def multiplied_angle(x: Rows, w: Rows, y: int, m: int, lam: float, keep_weights: bool) -> float:
    logits = []
    for j, row in enumerate(w):
        length = float(np.linalg.norm(x)) * (float(np.linalg.norm(row)) if keep_weights else 1.0)
        theta = math.acos(float(np.clip(unit(x) @ unit(row), -1, 1)))
        logits.append(length * ((lam * math.cos(theta) + psi(theta, m)) / (1 + lam) if j == y else math.cos(theta)))
    return cross_entropy(logits, y)


def adaface(x: Rows, w: Rows, y: int, m: float, h: float, mean: float, deviation: float, scale: float) -> float:
    length = min(max(float(np.linalg.norm(x)), 0.001), 100.0)
    z = min(max(h * (length - mean) / (deviation + 1e-3), -1.0), 1.0)
    return on_cosines(x, w, y, scale, lambda t: math.cos(min(max(t - m * z, 0.0), math.pi)) - (m + m * z))


def magface(x: Rows, w: Rows, y: int, scale: float, weight: float) -> float:
    a = min(max(float(np.linalg.norm(x)), 10.0), 110.0)
    m = 0.45 + (0.8 - 0.45) / 100 * (a - 10)
    return on_cosines(x, w, y, scale, lambda t: arcface(t, m, "easy")) + weight * (1 / a + a / 110**2)


def curricularface(x: Rows, w: Rows, y: int, m: float, t: float, scale: float) -> float:
    cos = [float(np.clip(unit(x) @ unit(row), -1, 1)) for row in w]
    theta = math.acos(cos[y])
    logits = [c if c <= math.cos(theta + m) else c * (t + c) for c in cos]
    logits[y] = arcface(theta, m, "monotone")
    return cross_entropy([scale * c for c in logits], y)


def sphereface2(x: Rows, w: Rows, y: int, b: float, weight: float, r: float, m: float, t: float) -> float:
    total = 0.0
    for j, row in enumerate(w):
        g = 2 * ((float(unit(x) @ unit(row)) + 1) / 2) ** t - 1
        if j == y:
            total += weight / r * float(np.logaddexp(0, -(r * (g - m) + b)))
        else:
            total += (1 - weight) / r * float(np.logaddexp(0, r * (g + m) + b))
    return total


def sub_centers(x: Rows, w: Rows, y: int, k: int, m: float, scale: float) -> float:
    cos = [max(float(unit(x) @ unit(w[c * k + i])) for i in range(k)) for c in range(len(w) // k)]
    cos[y] = arcface(math.acos(cos[y]), m, "monotone")
    return cross_entropy([scale * c for c in cos], y)


def sq_dist(x: Rows, row: Rows) -> float:
    return float(((unit(x) - unit(row)) ** 2).sum())


def c_contrastive(x: Rows, w: Rows, y: int, m: float) -> float:
    return sum(sq_dist(x, row) if j == y else max(0.0, m - sq_dist(x, row)) for j, row in enumerate(w))


def proxy_triplets(x: Rows, w: Rows, y: int, delta: float, k: int | None = None) -> float:
    terms = [max(0.0, sq_dist(x, w[y]) - d + delta) for d in sorted(sq_dist(x, w[j]) for j in range(len(w)) if j != y)]
    return sum(terms[:k])


def mean(loss: Callable[..., float], x: Rows, w: Rows, labels: list[int], **options: Any) -> float:
    return sum(loss(row, w, y, **options) for row, y in zip(x, labels, strict=True)) / len(labels)
