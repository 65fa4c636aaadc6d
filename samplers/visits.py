"""Which identities the batches of an epoch visit: each once, or more often those with more images.

An epoch's plan says of any batch and any of its P slots who stands there. It is a function of (seed, epoch), and the P
identities of a batch are distinct.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from samplers.shuffles import Words, key_of, keys_for, shuffled

IdentityWeights = Literal["uniform", "sqrt", "count"]


class Planned(NamedTuple):
    """Visits, all of shape (batches, slots) and int64.

    who: numbers 0..C-1. turns: the turn of its images each visit has, counted over epochs. ahead: how many visits
    fillers of the last batch are ahead of that turn; 0 for all others.
    """

    who: NDArray[np.int64]
    turns: NDArray[np.int64]
    ahead: NDArray[np.int64]


class EvenVisits:
    """Each of `number` identities once an epoch, in ceil(number / P) batches of `per_batch`, P for short.

    The last batch is filled up with the first identities of the order: others than its own, since there are at least P.
    Nothing is held but these numbers: an epoch's order is evaluated where it is looked at.

    of: what they are, where it is not identities; each has an order of its own.
    """

    def __init__(self, number: int, per_batch: int, seed: int, of: str = "identities") -> None:
        self.number, self.per_batch, self.seed, self.of = number, per_batch, seed, of
        self.num_batches = -(-number // per_batch)

    def epoch(self, epoch: int) -> "EvenEpoch":
        """The plan of an epoch."""
        return EvenEpoch(self, epoch)


class EvenEpoch:
    """One epoch of `EvenVisits`."""

    def __init__(self, visits: EvenVisits, epoch: int) -> None:
        self._visits, self._epoch = visits, epoch
        self._key = key_of(visits.of, visits.seed, epoch)

    def at(self, batches: NDArray[np.int64], slots: NDArray[np.int64]) -> Planned:
        """Who stands in these batches (B,) at these slots (S,): Planned of (B, S)."""
        number = self._visits.number
        places = batches[:, None] * self._visits.per_batch + slots
        filler = places >= number
        who = shuffled(places - number * filler, number, self._key)
        return Planned(who, np.full_like(who, self._epoch), filler.astype(np.int64))


class WeightedVisits:
    """Identities with more images more often: ceil(n / K), or ceil(sqrt(n / K)), visits an epoch, and at least one.

    Weighted by "count" an epoch so shows each image at least once. Nobody can stand in a batch twice, so there are at
    most `num_batches` visits for anyone: `capped` identities would have had more. The last places of an epoch are
    filled up with one more visit for some.

    counts: (C,) images of each identity. per_batch: P <= C. per_visit: K.
    visits: attribute, (C,) visits an epoch of each identity, without fillers.
    """

    def __init__(self, counts: NDArray[np.int64], per_batch: int, per_visit: int, weights: str, seed: int) -> None:
        asked = counts / per_visit
        asked = np.ceil(np.sqrt(asked) if weights == "sqrt" else asked).astype(np.int64)
        self.per_batch, self.seed = per_batch, seed
        # Fewer batches cap more identities, whose missing visits leave fewer batches still, down to a fixed point.
        batches = -(-int(asked.sum()) // per_batch)
        while (fewer := -(-int(np.minimum(asked, batches).sum()) // per_batch)) < batches:
            batches = fewer
        self.num_batches = batches
        self.visits = np.minimum(asked, batches)
        self.capped = int((asked > batches).sum())

    def epoch(self, epoch: int) -> "WeightedEpoch":
        """The plan of an epoch: one pass over all identities, so O(C)."""
        return WeightedEpoch(self, epoch)


class WeightedEpoch:
    """One epoch of `WeightedVisits`.

    All visits stand in one row, those of an identity side by side, and are dealt out: B of them fill slot 0 of the B
    batches, the next B slot 1, and so on. Nobody has more than B visits, so nobody is dealt a batch twice. Dealt
    straight, identities that once meet would meet again at each of their visits; so within every slot the batches are
    shuffled in blocks. A run of v visits that crosses from one slot to the next stays out of its first block there as
    long as blocks are at most B - v + 1 long, which keeps batches distinct. So that blocks are long, runs of more than
    half a slot do not cross: each begins a slot, and identities with a single visit fill it up, while there are any.
    """

    def __init__(self, visits: WeightedVisits, epoch: int) -> None:
        number, total = len(visits.visits), visits.num_batches * visits.per_batch
        self._epoch, self._visits, self._batches = epoch, visits.visits, visits.num_batches
        self._key = key_of("weighted identities", visits.seed, epoch)
        order = shuffled(np.arange(number), number, self._key)
        dealt = visits.visits[order]
        left = total - int(dealt.sum())
        while left:
            able = np.flatnonzero(dealt < self._batches)[:left]
            dealt[able] += 1
            left -= len(able)
        arranged = _long_runs_first(dealt, self._batches)
        self._order, dealt = order[arranged], dealt[arranged]
        self._ends = np.cumsum(dealt)
        self._starts = self._ends - dealt
        crossing = self._starts // self._batches < (self._ends - 1) // self._batches
        longest = int(dealt[crossing].max(initial=1))
        self._blocks = -(-self._batches // (self._batches - longest + 1))

    def at(self, batches: NDArray[np.int64], slots: NDArray[np.int64]) -> Planned:
        """Who stands in these batches (B,) at these slots (S,): Planned of (B, S)."""
        served = shuffled(batches, self._batches, keys_for(self._key, np.array([1])))  # batches of a run lie apart
        block = ((served + 1) * self._blocks - 1) // self._batches
        start = block * self._batches // self._blocks
        length = (block + 1) * self._batches // self._blocks - start
        keys: Words = keys_for(keys_for(self._key, slots + 2)[None, :], block[:, None])  # (B, S)
        within = shuffled((served - start)[:, None], length[:, None], keys)
        row = slots * self._batches + start[:, None] + within
        found = np.searchsorted(self._ends, row, side="right")
        who = self._order[found]
        number = row - self._starts[found]  # which of its visits
        own = self._visits[who]
        ahead = np.maximum(number - own + 1, 0)
        return Planned(who, self._epoch * own + np.minimum(number, own - 1), ahead)


def _long_runs_first(lengths: NDArray[np.int64], slot: int) -> NDArray[np.int64]:
    """An order of runs in which those longer than half a slot begin one, which runs of length 1 fill up.

    The longest come first, as many as there are runs of length 1 for; all others follow in their order.
    """
    long = np.flatnonzero(2 * lengths > slot) if slot > 1 else np.empty(0, dtype=np.int64)
    long = long[np.argsort(-lengths[long], kind="stable")]
    single = np.flatnonzero(lengths == 1)
    needed = np.cumsum(slot - lengths[long])
    long = long[needed <= len(single)]
    needed = np.concatenate(([0], needed[: len(long)]))
    begun = np.insert(single[: needed[-1]], needed[:-1], long)
    rest = np.ones(len(lengths), dtype=bool)
    rest[begun] = False
    return np.concatenate((begun, np.flatnonzero(rest)))
