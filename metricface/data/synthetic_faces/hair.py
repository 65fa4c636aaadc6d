"""Hair styles: how far hair stands out, how far it falls, and the line from which the forehead is bare."""

from dataclasses import dataclass

import numpy as np

from metricface.data.synthetic_faces.conditions import Conditions
from metricface.data.synthetic_faces.draws import Floats
from metricface.data.synthetic_faces.people import People

Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]

# share of people, top, side (beyond the skull), bottom, hairline, its curve, parting, ears seen, falls long, bun
_STYLES = np.array(
    [
        (0.06, 0.00, 0.00, -0.40, -1.60, 0.0, 0.0, 1.0, 0, 0),  # bald
        (0.10, 0.03, 0.01, -0.10, -0.03, 0.7, 0.0, 1.0, 0, 0),  # shaved
        (0.13, 0.12, 0.04, -0.05, 0.02, 0.6, 0.2, 1.0, 0, 0),  # short
        (0.10, 0.15, 0.05, 0.00, -0.02, 0.7, 0.55, 1.0, 0, 0),  # short, side parting
        (0.07, 0.26, 0.03, -0.10, -0.06, 0.5, 0.1, 1.0, 0, 0),  # quiff
        (0.06, 0.07, 0.05, 0.02, -0.17, 1.3, 0.1, 1.0, 0, 0),  # receding
        (0.07, 0.36, 0.34, 0.18, 0.02, 0.5, 0.0, 0.2, 0, 0),  # afro
        (0.08, 0.16, 0.12, 0.42, 0.24, 0.2, 0.1, 0.0, 0, 0),  # mop with fringe
        (0.09, 0.13, 0.17, 0.85, 0.02, 0.9, 0.4, 0.0, 1, 0),  # bob
        (0.09, 0.12, 0.15, 1.70, -0.02, 1.1, 0.2, 0.0, 1, 0),  # long
        (0.07, 0.13, 0.19, 1.60, 0.25, 0.2, 0.0, 0.0, 1, 0),  # long with fringe
        (0.08, 0.08, 0.03, -0.05, -0.02, 0.7, 0.2, 1.0, 0, 1),  # bun
    ],
    dtype=np.float32,
)
_UP_TO = np.cumsum(_STYLES[:, 0])


@dataclass(frozen=True)
class Haircut:
    """n haircuts, each (n,); lengths in head units."""

    present: Floats  # 0 for bald heads
    top: Floats  # y of the highest hair
    bottom: Floats  # y of the lowest
    half_width: Floats
    line: Floats  # y of the hairline at its middle
    curve: Floats  # how far it comes down towards the temples
    part: Floats  # where its highest point lies, in half widths of the face
    ears_seen: Floats  # 1 seen, 0 covered
    long: Mask
    bun: Mask

    @classmethod
    def of(cls, who: People, how: Conditions) -> "Haircut":
        """The haircuts of n people as they wear them in n images."""
        style = np.minimum(np.searchsorted(_UP_TO, who.hair_style), len(_STYLES) - 1)
        _, top, side, bottom, line, curve, part, ears, long, bun = _STYLES[style].T
        full = np.clip(who.hair_volume * how.hair_change, np.float32(0.45), np.float32(1.7))
        sign = np.where(who.hair_parting < 0.5, np.float32(-1), np.float32(1))
        return cls(
            present=(style > 0).astype(np.float32),
            top=np.float32(-1) - top * full,
            bottom=bottom * (np.float32(0.8) + np.float32(0.2) * full),
            half_width=who.face_width * np.float32(1.01) + side * full,
            line=who.hairline + line,
            curve=curve,
            part=part * sign * (np.float32(0.4) + who.hair_parting * np.float32(0.6)),
            ears_seen=ears,
            long=long > 0,
            bun=bun > 0,
        )
