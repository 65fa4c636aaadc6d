"""Numbers that look random and depend on nothing but the integers they are named by.

A NumPy generator gives its numbers in order, so the image of a person would depend on how many were drawn before it;
and one generator per image costs much. Here number `slot` of stream `(seed, purpose, identity, image)` is a hash of
these integers, computed for a whole batch at once.
"""

from typing import TypeVar, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

UInts = NDArray[np.uint64]
Floats = NDArray[np.float32]

T = TypeVar("T")

_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: UInts) -> UInts:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): flips each output bit with chance 1/2 per input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream(seed: int, purpose: int, *names: NDArray[np.int64]) -> UInts:
    """One key for each row of `names`, all (n,); another name, purpose or seed gives an unrelated key."""
    key = _mixed(np.array([seed % 2**64], dtype=np.uint64) + _STEP)
    key = _mixed((key ^ np.uint64(purpose)) * _STEP + _STEP)
    for name in names:
        # Added before mixing, so that the order of the names counts: (3, 5) and (5, 3) are different images.
        key = _mixed(key * _STEP + name.astype(np.int64).view(np.uint64))
    return key


def uniforms(keys: UInts, count: int) -> Floats:
    """(n, count) numbers in [0, 1) for keys (n,), on a grid of 2**-24 so that float32 holds them exactly."""
    slots = (np.arange(1, count + 1, dtype=np.uint64) * _STEP)[None, :]
    bits: UInts = _mixed(keys[:, None] + slots) >> np.uint64(40)
    return bits.astype(np.float32) * np.float32(2**-24)


def bells(keys: UInts, count: int) -> Floats:
    """(n, count) bell-shaped numbers, mean 0, variance 1, never beyond +-3.47: nobody gets an impossible face."""
    four = uniforms(keys, 4 * count).reshape(len(keys), count, 4)
    # The sum of four uniforms has mean 2 and variance 1/3.
    bell: Floats = (four.sum(axis=2, dtype=np.float32) - np.float32(2)) * np.float32(3**0.5)
    return bell


def described(owner: type, by: type[T]) -> dict[str, T]:
    """The fields of `owner` that are Annotated by a `by`, in order, with it: which numbers a class wants drawn."""
    hints = get_type_hints(owner, include_extras=True)
    notes = {name: get_args(hint)[1] for name, hint in hints.items() if len(get_args(hint)) > 1}
    return {name: note for name, note in notes.items() if isinstance(note, by)}
