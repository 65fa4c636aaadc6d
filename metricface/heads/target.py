"""The angle between an embedding and its own class, as cosine and sine, and what margins make of it.

No arc cosine stands in a gradient's way: its slope is infinite at 0 and pi. A margin in radians is added by
cos(theta + m) = cos theta cos m - sin theta sin m, with the sine taken from the rows' difference and sum (1 - cos^2 has
no correct digit left below an angle of 0.02 degrees in float32) and its gradient from sin' = -cos / sin, defined as 0
where the sine is below 4 machine epsilons: there the direction in which the angle would grow is unknown.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from metricface.choices import check_choice
from metricface.distances import safe_sqrt, unit_rows

# A sine of so many machine epsilons has a direction.
DIRECTION = 4.0

BeyondPi = Literal["monotone", "easy", "none"]


class Target(NamedTuple):
    """Of each row, (B,) each, with gradient."""

    cos: Tensor
    sin: Tensor  # >= 0
    length: Tensor  # of the raw embedding


def make_target(cos: Tensor, x: Tensor, classes: Tensor) -> Target:
    """cos: (B,) of the angles between x (B, D) and the own class vectors (B, D), both raw, with gradient.

    The lengths' gradient flows to x; the sine's to cos. Rows of zeros have cosine 0 and sine 1.
    """
    with torch.no_grad():
        z, w = unit_rows(x), unit_rows(classes)
        # |z - w|^2 = 2 - 2 cos, |z + w|^2 = 2 + 2 cos
        both = torch.linalg.vector_norm(z - w, dim=1) * torch.linalg.vector_norm(z + w, dim=1)
        is_zero = (z == 0).all(dim=1) | (w == 0).all(dim=1)
        value = torch.where(is_zero, 1.0, 0.5 * both)
        # Closer than this the direction between the two is rounding, and the slope would multiply it without bound.
        apart = value > DIRECTION * torch.finfo(value.dtype).eps
        slope = torch.where(apart, -cos / torch.where(apart, value, 1.0), 0.0)
    return Target(cos, with_slope(value, slope, cos), lengths_of(x))


def lengths_of(x: Tensor) -> Tensor:
    """Lengths of the rows of x (B, D), (B,); the gradient at a row of zeros is 0."""
    return safe_sqrt(x.square().sum(dim=1))


def with_slope(value: Tensor, slope: Tensor | float, x: Tensor) -> Tensor:
    """A tensor of that value whose derivative with respect to x is `slope`; all of one shape, value and slope plain."""
    return value.detach() + slope * (x - x.detach())


def shifted(target: Target, margin_rad: float | Tensor) -> Tensor:
    """cos(theta + margin): (B,). margin_rad: a number or (B,), with or without gradient."""
    cos_m, sin_m = _cos_sin(margin_rad)
    return target.cos * cos_m - target.sin * sin_m


def angle(target: Target) -> Tensor:
    """Theta in radians, (B,) in [0, pi], with a finite gradient: 0 at angles of 0 and pi."""
    return torch.atan2(target.sin, target.cos)


def check_beyond_pi(rule: str) -> None:
    """Raise ValueError, listing the right words, unless it is one of them."""
    check_choice("beyond_pi", rule, get_args(BeyondPi))


def shifted_by_rule(target: Target, margin_rad: float | Tensor, rule: BeyondPi) -> Tensor:
    """cos(theta + margin), and what stands there where theta + margin > pi and the cosine would rise again.

    rule: "monotone": cos theta - m sin m there, which goes on falling (after a jump down from -1);
    "easy": cos(theta + m) only where cos theta > 0, and cos theta, without a margin, elsewhere; "none": as it is.
    Returns (B,).
    """
    moved = shifted(target, margin_rad)
    if rule == "none":
        return moved
    if rule == "easy":
        return torch.where(target.cos > 0, moved, target.cos)
    cos_m, sin_m = _cos_sin(margin_rad)
    return torch.where(target.cos > -cos_m, moved, target.cos - margin_rad * sin_m)


def _cos_sin(angle_rad: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    if isinstance(angle_rad, Tensor):
        return angle_rad.cos(), angle_rad.sin()
    return math.cos(angle_rad), math.sin(angle_rad)
