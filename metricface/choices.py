"""Arguments that are one of a few words, or numbers of a kind."""

import math
from collections.abc import Sequence
from numbers import Integral, Real


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError, listing the right words, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, choices))}.")


def is_number(value: object, *, infinite: bool = False) -> bool:
    """Whether `value` is a real number, not NaN, and finite unless `infinite` is allowed. True and False are none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return math.isfinite(value) or (infinite and not math.isnan(value))


def is_count(value: object) -> bool:
    """Whether `value` is a whole number of 1 or more, of an integer type."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
