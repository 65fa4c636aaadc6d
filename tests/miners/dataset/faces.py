"""Embeddings of made-up identities, and neighbours by plain loops in float64: what the tests of this folder share."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def faces(identities: int, images: int, dim: int, seed: int = 0, within: float = 0.6) -> tuple[Float32, NDArray[Any]]:
    """Clustered embeddings of any length (identities * images, dim), and labels, shuffled."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(identities) * 7 - 3, images))
    centres = rng.standard_normal((identities, dim))
    rows = centres[(labels + 3) // 7] + within * rng.standard_normal((len(labels), dim))
    return (rows * rng.uniform(0.1, 30.0, (len(rows), 1))).astype(np.float32), labels


def cosines(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """All cosines in float64."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    a /= np.sqrt((a * a).sum(axis=1, keepdims=True))
    b /= np.sqrt((b * b).sum(axis=1, keepdims=True))
    found: NDArray[np.float64] = a @ b.T
    return found


def mean_direction(rows: NDArray[Any]) -> NDArray[np.float64]:
    """The normalised mean of the normalised rows, one row at a time."""
    total = np.zeros(rows.shape[1])
    for row in rows.astype(np.float64):
        total += row / np.sqrt((row * row).sum())
    found: NDArray[np.float64] = total / np.sqrt((total * total).sum())
    return found
