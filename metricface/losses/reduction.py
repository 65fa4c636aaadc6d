"""From many losses to one number."""

from collections.abc import Sequence

from torch import Tensor


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError, listing the right words, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, choices))}.")


def mean_over(total: Tensor, number: Tensor) -> Tensor:
    """Divide a sum by a number, both 0-dim: 0 with gradient 0, and still in the graph, where the number is 0."""
    return total * (number > 0) / number.clamp_min(1)
