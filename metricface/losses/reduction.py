"""From many losses to one number."""

from torch import Tensor


def mean_over(total: Tensor, number: Tensor) -> Tensor:
    """Divide a sum by a number, both 0-dim: 0 with gradient 0, and still in the graph, where the number is 0."""
    return total * (number > 0) / number.clamp_min(1)
