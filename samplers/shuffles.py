"""Random permutations one can look into at any place: no state, no list of the whole.

A sampler must know place 7,000,000 of an epoch's order without drawing the places before it (resume, ranks), and the
image order of a few identities of a batch without touching the others. A Feistel network is a permutation whatever its
round function; with a keyed hash as round function it is a random-looking one, and NumPy evaluates it for
thousands of (place, size, key) at once. Nothing depends on NumPy's generators, whose streams may change by version.

Sources: Luby and Rackoff 1988 (Feistel); Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, generalized
Feistel and cycle walking; Steele et al. 2014 (the SplitMix64 mixing function).
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
# Four rounds are enough for large sizes, but an identity has 2 to 30 images: there a chi-square test over 60,000 keys
# still tells which pairs come together after 6 rounds, and no longer does after 10 (a test repeats it).
_ROUNDS = 10


def key_of(*words: int | str) -> np.uint64:
    """A 64-bit key from any whole numbers and names: the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def keys_for(key: np.uint64 | Words, numbers: NDArray[np.int64]) -> Words:
    """One key for each of `numbers` (an array of whole numbers) under `key`; shapes broadcast."""
    return _mixed(numbers.astype(np.uint64) * _GOLDEN + key)


def shuffled(places: ArrayLike, sizes: ArrayLike, keys: ArrayLike) -> NDArray[np.int64]:
    """What stands at each place of a random permutation of range(size), one permutation for each (size, key).

    places: whole numbers, 0 <= place < size. sizes: 1 <= size < 2**32. keys: uint64. All three broadcast.
    Returns int64 of the broadcast shape. For fixed size and key, places 0..size-1 give each of 0..size-1 once.
    """
    place, size, key = np.broadcast_arrays(
        np.asarray(places, dtype=np.uint64), np.asarray(sizes, dtype=np.uint64), np.asarray(keys, dtype=np.uint64)
    )
    return _shuffled(place.ravel(), size.ravel(), key.ravel()).reshape(place.shape)


def _shuffled(place: Words, size: Words, key: Words) -> NDArray[np.int64]:
    # The smallest square that holds the size: between 1 and 2 times as large, so that few places have to walk.
    side = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    found = _feistel(place, side, key)
    walking = np.flatnonzero(found >= size)
    while len(walking):  # a place thrown outside goes through again; its cycle leads back inside
        found[walking] = _feistel(found[walking], side[walking], key[walking])
        walking = walking[found[walking] >= size[walking]]
    # A random turn on top makes each single place exactly uniform, also where the network is only a few bits wide.
    found += _scaled(_mixed(key ^ _GOLDEN), size)
    found -= size * (found >= size)
    return found.astype(np.int64)


def _feistel(place: Words, side: Words, key: Words) -> Words:
    left = place // side
    right = place - left * side
    for step in range(_ROUNDS):
        words: Words = right * _GOLDEN + key
        words += np.uint64(step << 40)
        shift = _scaled(_mixed(words), side) + left
        shift -= side * (shift >= side)
        left, right = right, shift
    return left * side + right


def _scaled(hashes: Words, below: Words) -> Words:
    """Hashes onto 0..below-1 by multiplication (no slow modulo); below < 2**32."""
    hashes >>= _HALF
    hashes *= below
    hashes >>= _HALF
    return hashes


def _mixed(words: Words) -> Words:
    """SplitMix64's finaliser: each bit of the input moves every bit of the output. May overwrite its argument."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def turn(
    turns: ArrayLike, counts: NDArray[Any], draw: int, ahead: ArrayLike = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which places of which shuffle one draw takes, when `draw` of `count` things are taken each turn.

    A cycle is ceil(count / draw) turns and has its own shuffle; turn j of it takes places j*draw, j*draw + 1, ... and
    wraps around. So each turn takes as many distinct things as there are, and each cycle takes all of them.
    turns, counts: (V,) or scalars, count >= 1. ahead: (V,), so many places further on (a second visit in one turn).
    Returns cycle (V,) and places (V, draw).
    """
    count = np.asarray(counts, dtype=np.int64)
    cycle, j = np.divmod(np.asarray(turns, dtype=np.int64), -(-count // draw))
    first = j * draw + np.asarray(ahead, dtype=np.int64)
    return cycle, (first[..., None] + np.arange(draw)) % count[..., None]


def in_turn(
    turns: NDArray[np.int64], total: int, draw: int, part: NDArray[np.int64], key: np.uint64
) -> NDArray[np.int64]:
    """Draws that take each of `total` things in its turn, `draw` of them a turn, in a new order each cycle.

    turns: (V,). part: (n,) which of the `draw` of each turn are wanted. Returns (V, n) numbers 0..total-1.
    """
    cycle, places = turn(turns, np.full(len(turns), total), draw)
    return shuffled(places[:, part], total, keys_for(key, cycle)[:, None])
