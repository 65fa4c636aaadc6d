"""How hard an index has to search: the share of true neighbours that it finds, measured on a sample of its rows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metricface.miners.dataset.engines import Indices, in_threads, inner_products, ladder
from metricface.miners.dataset.rows import Rows, UnitRows

SAMPLED_QUERIES = 1024
TRUE_NEIGHBOURS = 128
TIE = 2e-6  # float32 cosines of the same two rows, summed in another order, differ by less

Codes = NDArray[np.integer[Any]]
Shares = NDArray[np.float64]


class Found(NamedTuple):
    """The nearest rows of each query, nearest first; at equal cosine the lower index first."""

    indices: Indices  # (Q, k) int64, -1 where there are fewer
    cos: Rows  # (Q, k) float32, -inf there


class Calibration(NamedTuple):
    """How hard an index searches, and the share of the true neighbours that this found in a sample."""

    effort: int
    recall: float


class Sample:
    """Up to 1,024 rows of a set, drawn by a seed, whose true neighbours are known by comparing them with all rows.

    codes: (N,) the identity of each row, from 0 on, whose own rows are no neighbours; None: only a row itself is none.
    """

    def __init__(self, rows: UnitRows, seed: int, codes: Codes | None = None) -> None:
        number = min(len(rows), SAMPLED_QUERIES)
        self.at = np.sort(np.random.default_rng(seed).choice(len(rows), number, replace=False, shuffle=False))
        self.queries = rows.at(self.at)
        self._rows, self._codes = rows, codes
        self._own = np.ones(number, dtype=np.int64) if codes is None else np.bincount(codes)[codes[self.at]]
        self._cos: Rows = np.empty((number, 0), dtype=np.float32)  # of the nearest neighbours, largest first

    def shares(self, search: Callable[[Rows, int], Found], m: int) -> Shares:
        """The share of its m nearest neighbours that each row of the sample finds, (n,); 1 for a row without any.

        search: finds k rows for queries (Q, D). It is asked for m and as many as are of the row's own identity.
        """
        there = np.minimum(m, len(self._rows) - self._own)
        least = np.take_along_axis(self._nearest(m), (there - 1).clip(min=0)[:, None], axis=1) - TIE
        found = np.ones(len(self.at))
        for k, part in self._by_asked(m):
            near = search(self.queries[part], k)
            right = (near.cos >= least[part]) & ~self._is_own(near.indices, part) & (near.indices >= 0)
            found[part] = right.sum(axis=1).clip(max=there[part]) / there[part].clip(min=1)
        found[there == 0] = 1.0
        return found

    def _nearest(self, m: int) -> Rows:
        """Cosines of at least the m nearest neighbours, largest first, -inf where there are fewer."""
        if self._cos.shape[1] < m:  # once for many m: it means reading all rows
            wide = max(m, TRUE_NEIGHBOURS)
            best = np.full((len(self.at), wide), -np.inf, dtype=np.float32)
            for start, block in self._rows.blocks():
                for k, part in self._by_asked(wide):
                    search = partial(inner_products, rows=block, k=min(k, len(block)))
                    cos, near = in_threads(search, self.queries[part], len(part))
                    cos[self._is_own(near + start, part)] = -np.inf
                    best[part] = -np.sort(-np.concatenate((best[part], cos), axis=1), axis=1)[:, :wide]
            self._cos = best
        return self._cos

    def _by_asked(self, m: int) -> list[tuple[int, Indices]]:
        """How many rows are asked for so that m neighbours are among them, and the places in the sample that ask."""
        asked = self._own + m if self._codes is None else rounded_up(self._own + m)
        return [(int(k), np.flatnonzero(asked == k)) for k in np.unique(asked)]

    def _is_own(self, indices: Indices, part: Indices) -> NDArray[np.bool_]:
        at = self.at[part, None]
        own: NDArray[np.bool_] = indices == at if self._codes is None else self._codes[indices] == self._codes[at]
        return own


def rounded_up(asked: Indices) -> Indices:
    """Each up to the next of a few numbers, so that many queries ask for equally many rows."""
    steps = np.array(ladder(2 * int(asked.max())), dtype=np.int64)
    return steps[np.searchsorted(steps, asked)]


def least_effort(
    efforts: Sequence[int], shares_with: Callable[[int], Shares], target: float
) -> tuple[Calibration, bool]:
    """The least effort whose mean share is above the target by twice its standard error, and whether there is one.

    efforts: ascending. Where none is enough it is the greatest. By doubling first, then among the steps between: four
    measurements more where one by one would take forty.
    """
    places = [*range(0, len(efforts) - 1, 4), len(efforts) - 1]
    for place in places:
        mean, enough = _judged(shares_with(efforts[place]), target)
        if enough:
            break
    if enough:
        for before in range(max(0, place - 3), place):
            less, enough_too = _judged(shares_with(efforts[before]), target)
            if enough_too:
                return Calibration(efforts[before], less), True
    return Calibration(efforts[place], mean), enough


def _judged(shares: Shares, target: float) -> tuple[float, bool]:
    mean, error = float(shares.mean()), float(shares.std() / np.sqrt(len(shares)))
    return mean, mean - 2.0 * error >= target
