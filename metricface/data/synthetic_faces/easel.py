"""Brushes for parts of a person: a canvas, the head on it, its colours, and shapes given in head units."""

import numpy as np

from metricface.data.synthetic_faces.canvas import Canvas, Mask, Patch, block, disc, glow, stroke
from metricface.data.synthetic_faces.conditions import Conditions
from metricface.data.synthetic_faces.draws import Floats
from metricface.data.synthetic_faces.hair import Haircut
from metricface.data.synthetic_faces.head import Head, Spot
from metricface.data.synthetic_faces.palette import Palette
from metricface.data.synthetic_faces.people import People

Number = Floats | np.float32 | float  # one for each of the n pictures, or the same for all


class Easel:
    """n people in n circumstances in front of a canvas of n pictures. Lengths are head units, angles radians."""

    def __init__(self, who: People, how: Conditions, canvas: Canvas, crop: float) -> None:
        height, width = canvas.pixels.shape[2:]
        self.who, self.how, self.canvas = who, how, canvas
        self.count = len(who.face_width)
        self.head = Head(who, how, height, width, crop)
        self.ink = Palette(who, canvas.pixels.shape[1])
        self.cut = Haircut.of(who, how)
        # Nobody with long hair has a beard here; it would make the long-haired too easy to tell apart.
        self.beard: Floats = np.where(self.cut.long, np.float32(0), who.beard)

    def each(self, value: Number) -> Floats:
        """(n,) float32 of one number or of n."""
        if isinstance(value, np.ndarray) and value.shape == (self.count,) and value.dtype == np.float32:
            return value
        return np.full(self.count, value, dtype=np.float32)

    def tone(self, red: Number, green: Number, blue: Number) -> Floats:
        """A colour that does not depend on the person, (n, C)."""
        return self.ink.tone(red, green, blue, self.count)

    def at(self, x: Number, y: Number, z: Number) -> Spot:
        """A point of the head that is seen alike from all sides (hair, outline): no foreshortening."""
        one = self.each(1.0)
        return Spot(*self.head.at(self.each(x), self.each(y), self.each(z)), one, one)

    def on_face(self, x: Number, y: Number, lift: float = 0.0) -> Spot:
        """A point of the face's surface, raised by `lift`."""
        return self.head.on_face(self.each(x), self.each(y), lift)

    def patch(
        self,
        spot: Spot,
        half_x: Number,
        half_y: Number,
        *,
        tilt_rad: Number = 0.0,
        margin: Floats | None = None,
        soft_tips: bool = False,
        only: Mask | None = None,
    ) -> Patch | None:
        """Where a shape with these half axes around `spot` is seen, None where nowhere; the rest as in Canvas.patch."""
        unit = self.head.unit
        wide, high = self.each(half_x) * unit * spot.wide, self.each(half_y) * unit * spot.high
        angle = self.head.roll + self.each(tilt_rad)
        return self.canvas.patch(spot.x, spot.y, wide, high, angle, margin=margin, soft_tips=soft_tips, only=only)

    def blend(self, patch: Patch | None, alpha: Floats, colour: Floats, opacity: Number = 1.0) -> None:
        """Paint with opacity alpha (m, h, w), scaled by one number for each picture."""
        if patch is None:
            return
        if not (isinstance(opacity, float) and opacity == 1.0):
            alpha *= patch.of(self.each(opacity))
        self.canvas.blend(patch, alpha, colour)

    def glow(self, spot: Spot, half_x: Number, half_y: Number, colour: Floats, strength: Number) -> None:
        """A soft spot, e.g. a shadow."""
        patch = self.patch(spot, half_x, half_y)
        if patch is not None:
            self.canvas.blend(patch, glow(patch, self.each(strength)), colour)

    def disc(
        self,
        spot: Spot,
        half_x: Number,
        half_y: Number,
        colour: Floats,
        *,
        opacity: Number = 1.0,
        tilt_rad: Number = 0.0,
        only: Mask | None = None,
    ) -> None:
        """An ellipse."""
        patch = self.patch(spot, half_x, half_y, tilt_rad=tilt_rad, soft_tips=True, only=only)
        if patch is not None:
            self.blend(patch, disc(patch), colour, opacity)

    def block(
        self,
        spot: Spot,
        half_x: Number,
        half_y: Number,
        colour: Floats,
        *,
        opacity: Number = 1.0,
        tilt_rad: Number = 0.0,
        only: Mask | None = None,
    ) -> None:
        """A box with round corners."""
        patch = self.patch(spot, half_x, half_y, tilt_rad=tilt_rad, soft_tips=True, only=only)
        if patch is not None:
            self.blend(patch, block(patch), colour, opacity)

    def stroke(
        self,
        spot: Spot,
        half_x: Number,
        thick: Number,
        colour: Floats,
        *,
        rise: Number = 0.0,
        opacity: Number = 1.0,
        tilt_rad: Number = 0.0,
        only: Mask | None = None,
    ) -> None:
        """A brush stroke whose middle lies `rise` above its ends."""
        bend = self.each(rise) * self.head.unit * spot.high
        patch = self.patch(spot, half_x, thick, tilt_rad=tilt_rad, margin=np.abs(bend), only=only)
        if patch is not None:
            self.blend(patch, stroke(patch, bend), colour, opacity)
