"""The closest pair of images, or of vectors, of each pair of identities, gathered bit by bit."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metricface.miners.dataset.engines import Indices
from metricface.miners.dataset.rows import Rows

WAITING = 1 << 22  # pairs that wait to be merged: 50 MiB


class TwinIdentities(NamedTuple):
    """Pairs of identities that are closer than max_cos: perhaps one person. Each pair once, by first, then second."""

    first: Indices  # (S,) rows of the table of identities, first < second
    second: Indices  # (S,)
    cos: Rows  # (S,)


class ClosestPairs:
    """Pairs of identities with the largest cosine seen of each, gathered bit by bit."""

    def __init__(self, identities: int) -> None:
        self.identities = identities
        self._keys = np.empty(0, dtype=np.int64)  # first * identities + second, first < second, ascending
        self._cos = np.empty(0, dtype=np.float32)
        self._waiting: list[tuple[Indices, Rows]] = []

    def add(self, one: NDArray[np.integer[Any]], other: NDArray[np.integer[Any]], cos: Rows) -> None:
        """Pairs (n,) of different identities, in any order, several times too."""
        keys = np.minimum(one, other).astype(np.int64) * self.identities + np.maximum(one, other)
        self._waiting.append(_largest(keys, cos))
        if sum(len(part) for part, _ in self._waiting) > WAITING + len(self._keys):
            self._merge()

    def all(self) -> TwinIdentities:
        """Each pair once, ascending."""
        self._merge()
        first, second = np.divmod(self._keys, self.identities)
        return TwinIdentities(first, second, self._cos)

    def __len__(self) -> int:
        self._merge()
        return len(self._keys)

    def touched(self) -> NDArray[np.bool_]:
        """(C,) whether an identity is in a pair."""
        pairs = self.all()
        found = np.zeros(self.identities, dtype=bool)
        found[pairs.first] = found[pairs.second] = True
        return found

    def _merge(self) -> None:
        parts = [(self._keys, self._cos), *self._waiting]
        self._keys, self._cos = _largest(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
        self._waiting = []


def _largest(keys: Indices, cos: Rows) -> tuple[Indices, Rows]:
    """Each key once, ascending, with its largest cosine."""
    order = np.lexsort((-cos, keys))
    keys, cos = keys[order], cos[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], cos[first]
