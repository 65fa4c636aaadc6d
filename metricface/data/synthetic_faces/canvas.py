"""Soft-edged shapes painted on a batch of pictures at once.

A shape is a function of two coordinates (p, q) that run from -1 to 1 along its half axes. Each picture has its own
centre, axes and angle; all pictures of the batch are computed in one NumPy call per step, and only on the box of pixels
that holds the shape in any of them. Opacity is exactly 0 outside a shape, and pixels use +, -, *, /, min and max alone,
so that a picture comes out the same to the bit whatever shares its batch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metricface.data.synthetic_faces.draws import Floats

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Patch:
    """Where a shape may be seen.

    rows, columns: the box of pixels. members: (m,) the pictures that have the shape, None for all.
    p, q: (m, h, w) the shape's own coordinates there; half_p, half_q: (m, 1, 1) its half axes in pixels.
    """

    rows: slice
    columns: slice
    members: NDArray[np.int64] | None
    p: Floats
    q: Floats
    half_p: Floats
    half_q: Floats

    def of(self, values: Floats) -> Floats:
        """(n,) numbers of the batch as (m, 1, 1) numbers of this patch."""
        chosen = values if self.members is None else values[self.members]
        return chosen[:, None, None]


class Canvas:
    """n pictures, (n, C, H, W) float32, 0 black and 1 white."""

    def __init__(self, count: int, channels: int, height: int, width: int) -> None:
        self.pixels: Floats = np.zeros((count, channels, height, width), dtype=np.float32)
        self._x = np.arange(width, dtype=np.float32) + np.float32(0.5)
        self._y = np.arange(height, dtype=np.float32) + np.float32(0.5)

    def patch(
        self,
        x: Floats,
        y: Floats,
        half_p: Floats,
        half_q: Floats,
        angle_rad: Floats,
        *,
        margin: Floats | None = None,
        soft_tips: bool = False,
        only: Mask | None = None,
    ) -> Patch | None:
        """The box of pixels around shapes at (x, y), all (n,) and in pixels; None where nothing of them is in sight.

        margin: (n,) pixels by which a bent shape leaves the box of its half axes.
        soft_tips: for `disc` and `block`, whose edge is softer, and so wider, where they are pointed.
        only: (n,) the pictures that have this shape at all.
        """
        members: NDArray[np.int64] | None = None
        if only is not None and not only.all():
            members = np.flatnonzero(only)
            if not len(members):
                return None
            x, y, half_p, half_q, angle_rad = (a[members] for a in (x, y, half_p, half_q, angle_rad))
            margin = None if margin is None else margin[members]
        # A shape thinner than a pixel is drawn a pixel thick: its opacity, not its place, should carry its thinness.
        half_p, half_q = np.maximum(half_p, np.float32(0.5)), np.maximum(half_q, np.float32(0.5))
        cos: Floats = np.cos(angle_rad)
        sin: Floats = np.sin(angle_rad)
        wide = np.abs(half_p * cos) + np.abs(half_q * sin)
        high = np.abs(half_p * sin) + np.abs(half_q * cos)
        if soft_tips:
            # disc: opacity ends where p^2 = 1 + 1 / the shorter half axis; block ends nearer.
            tips = np.sqrt(1 + 1 / np.minimum(half_p, half_q))
            wide, high = wide * tips, high * tips
        if margin is not None:
            wide, high = wide + margin, high + margin
        columns = _span(x - wide, x + wide, len(self._x))
        rows = _span(y - high, y + high, len(self._y))
        if columns.start >= columns.stop or rows.start >= rows.stop:
            return None
        away_x: Floats = self._x[None, columns] - x[:, None]
        away_y: Floats = self._y[None, rows] - y[:, None]
        p = _slope(away_x, away_y, cos / half_p, sin / half_p)
        q = _slope(away_x, away_y, -sin / half_q, cos / half_q)
        return Patch(rows, columns, members, p, q, half_p[:, None, None], half_q[:, None, None])

    def blend(self, patch: Patch | None, alpha: Floats, colour: Floats) -> None:
        """Paint colour (n, C) with opacity alpha (m, h, w) over the patch."""
        if patch is None:
            return
        members = patch.members
        if members is not None:
            colour = colour[members]
        for channel in range(self.pixels.shape[1]):
            plane = self.pixels[:, channel, patch.rows, patch.columns]
            chosen = plane if members is None else plane[members]
            change = colour[:, channel, None, None] - chosen
            change *= alpha
            chosen += change
            if members is not None:
                plane[members] = chosen


def _slope(x: Floats, y: Floats, per_x: Floats, per_y: Floats) -> Floats:
    """per_x x + per_y y for x (n, w), y (n, h) and factors (n,): (n, h, w)."""
    across: Floats = x * per_x[:, None]
    down: Floats = y * per_y[:, None]
    total: Floats = across[:, None, :] + down[:, :, None]
    return total


def _span(low: Floats, high: Floats, size: int) -> slice:
    # Two pixels more than the outermost shape: one for its soft edge, one for rounding.
    return slice(max(int(low.min()) - 2, 0), min(int(high.max()) + 3, size))


def _edge(inside: Floats) -> Floats:
    """Opacity from pixels inside the outline: half at the outline, full half a pixel within."""
    inside += np.float32(0.5)
    return np.clip(inside, np.float32(0), np.float32(1), out=inside)


def disc(patch: Patch) -> Floats:
    """An ellipse: p^2 + q^2 < 1."""
    inside = patch.p * patch.p
    inside += patch.q * patch.q
    np.subtract(np.float32(1), inside, out=inside)
    inside *= np.minimum(patch.half_p, patch.half_q) * np.float32(0.5)
    return _edge(inside)


def block(patch: Patch) -> Floats:
    """A box with round corners: p^4 + q^4 < 1."""
    inside = patch.p * patch.p
    inside *= inside
    other = patch.q * patch.q
    other *= other
    inside += other
    np.subtract(np.float32(1), inside, out=inside)
    inside *= np.minimum(patch.half_p, patch.half_q) * np.float32(0.25)
    return _edge(inside)


def glow(patch: Patch, strength: Floats) -> Floats:
    """A soft spot: strength (n,) at the centre, nothing at the ellipse."""
    inside = patch.p * patch.p
    inside += patch.q * patch.q
    np.subtract(np.float32(1), inside, out=inside)
    np.maximum(inside, np.float32(0), out=inside)
    inside *= inside
    inside *= patch.of(strength)
    return inside


def lens(patch: Patch, above: Floats, below: Floats) -> Floats:
    """Between two arcs that meet at p = -1 and 1 and reach `above` and `below` (n,) pixels from q = 0 at the middle."""
    arch = patch.p * patch.p
    np.subtract(np.float32(1), arch, out=arch)
    off = patch.q * patch.half_q
    inside = patch.of(above) * arch
    inside += off
    arch *= patch.of(below)
    arch -= off
    np.minimum(inside, arch, out=inside)
    return _cut_ends(patch, inside)


def stroke(patch: Patch, bend: Floats) -> Floats:
    """A brush stroke from p = -1 to 1, half an axis q thick on each side at the middle and thinner towards the ends.

    bend: (n,) pixels by which the middle lies above the ends: positive is a frowning arc, negative a smiling one. Pass
    its magnitude to `patch` as the margin.
    """
    arch = patch.p * patch.p
    np.subtract(np.float32(1), arch, out=arch)
    off = patch.q * patch.half_q
    off += patch.of(bend) * arch
    np.abs(off, out=off)
    arch += np.float32(1)
    arch *= patch.half_q * np.float32(0.5)
    arch -= off
    return _cut_ends(patch, arch)


def _cut_ends(patch: Patch, inside: Floats) -> Floats:
    ends = np.abs(patch.p)
    np.subtract(np.float32(1), ends, out=ends)
    ends *= patch.half_p
    np.minimum(inside, ends, out=inside)
    return _edge(inside)
