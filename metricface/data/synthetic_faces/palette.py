"""Colours of skin, hair, eyes and things: (n, C) float32, 0 black and 1 white, C = 3 red, green, blue or 1 luma."""

from typing import Any

import numpy as np

from metricface.data.synthetic_faces.draws import Floats
from metricface.data.synthetic_faces.people import People


def _table(*rows: tuple[float, ...]) -> Floats:
    return np.array(rows, dtype=np.float32)


_SKIN = _table(
    (0.97, 0.84, 0.75), (0.93, 0.76, 0.64), (0.86, 0.66, 0.52), (0.72, 0.51, 0.38),
    (0.52, 0.35, 0.25), (0.38, 0.25, 0.18)
)  # fmt: skip
_HAIR = _table(
    (0.07, 0.06, 0.06), (0.16, 0.11, 0.08), (0.28, 0.18, 0.11), (0.42, 0.27, 0.15), (0.50, 0.22, 0.10),
    (0.66, 0.47, 0.25), (0.85, 0.71, 0.45), (0.58, 0.57, 0.56), (0.86, 0.85, 0.83),
)  # fmt: skip
_HAIR_SHARES = np.cumsum([0.22, 0.2, 0.16, 0.1, 0.07, 0.09, 0.08, 0.05, 0.03])
_EYES = _table(
    (0.16, 0.09, 0.05), (0.30, 0.18, 0.09), (0.42, 0.32, 0.16), (0.30, 0.42, 0.25),
    (0.32, 0.48, 0.66), (0.45, 0.50, 0.52)
)  # fmt: skip
_LUMA = _table((0.299, 0.587, 0.114))


class Palette:
    """The colours of n people, in colour or as luma (ITU-R BT.601) straight away."""

    def __init__(self, who: People, channels: int) -> None:
        self._channels = channels
        skin = _ramp(_SKIN, who.skin * np.float32(0.999) * (len(_SKIN) - 1))
        # Warm skin has less blue, cool skin more; brightness hardly changes.
        skin = skin * (1 + np.float32(0.025) * who.skin_warm[:, None] * _table((1.0, 0.0, -2.0)))
        # Dark skin goes with the darker half of the hair colours.
        darker = np.where(who.skin > np.float32(0.6), np.float32(0.65), np.float32(1))
        rank = np.minimum(np.searchsorted(_HAIR_SHARES, who.hair_colour * darker), len(_HAIR) - 1)
        hair = np.clip(
            _HAIR[rank] * (1 + who.hair_shade[:, None] * np.float32(1.6)), np.float32(0.03), np.float32(0.95)
        )
        lips = skin * _table((0.92, 0.62, 0.62))
        lips = skin + (lips - skin) * np.clip(who.lip_red * np.float32(2), np.float32(0.3), np.float32(1.4))[:, None]
        self.skin = self.ink(skin)
        self.shade = self.ink(skin * _table((0.66, 0.57, 0.54)))
        self.deep_shade = self.ink(skin * _table((0.42, 0.32, 0.30)))
        self.bright = self.ink(np.minimum(skin * np.float32(1.16) + np.float32(0.02), np.float32(1)))
        self.flush = self.ink(skin * _table((1.02, 0.74, 0.72)))
        self.lips = self.ink(lips)
        self.lower_lip = self.ink(np.minimum(lips * np.float32(1.12), np.float32(1)))
        self.lip_line = self.ink(lips * np.float32(0.5))
        self.hair = self.ink(hair)
        self.hair_bright = self.ink(np.minimum(hair * np.float32(1.3) + np.float32(0.04), np.float32(1)))
        self.hair_dark = self.ink(hair * np.float32(0.78))
        # Brows follow the hair, but stay visible on fair people.
        self.brows = self.ink(np.minimum(hair * np.float32(0.72), skin * np.float32(0.62)))
        self.iris = self.ink(_EYES[(who.eye_colour * np.float32(0.999) * len(_EYES)).astype(np.int64)])
        self.mark = self.ink(skin * _table((0.42, 0.30, 0.27)))
        self.freckle = self.ink(skin * _table((0.78, 0.62, 0.52)))
        self.scar = self.ink(np.minimum(skin * np.float32(1.12) + _table((0.10, 0.05, 0.05)), np.float32(1)))

    def ink(self, rgb: Floats) -> Floats:
        """(n, 3) as (n, C)."""
        if self._channels == 3:
            return rgb.astype(np.float32, copy=False)
        luma: Floats = (rgb * _LUMA).sum(axis=1, keepdims=True, dtype=np.float32)
        return luma

    def tone(self, red: Any, green: Any, blue: Any, count: int) -> Floats:
        """The same colour for all, or one each: three numbers or arrays (n,) as (n, C)."""
        rgb = np.empty((count, 3), dtype=np.float32)
        rgb[:, 0], rgb[:, 1], rgb[:, 2] = red, green, blue
        return self.ink(rgb)


def _ramp(table: Floats, place: Floats) -> Floats:
    low = np.minimum(place.astype(np.int64), len(table) - 2)
    part = (place - low).astype(np.float32)[:, None]
    between: Floats = table[low] + (table[low + 1] - table[low]) * part
    return between
