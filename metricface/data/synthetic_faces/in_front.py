"""Things that come between a face and the camera: glasses, sunglasses, mask, hand, bar, hat."""

from dataclasses import replace

import numpy as np

from metricface.data.synthetic_faces.canvas import block
from metricface.data.synthetic_faces.easel import Easel

# The share of images with each: a number below the first limit means the first thing, and so on; above all, nothing.
OCCLUDERS = {"sunglasses": 0.05, "mask": 0.09, "hand": 0.12, "bar": 0.15, "hat": 0.20}


def paint_in_front(easel: Easel) -> None:
    """Glasses of those who wear them today, and what else hides a part of a face."""
    who, how = easel.who, easel.how
    place, tone = how.occluder_place, how.occluder_tone
    kind = np.searchsorted(np.array(list(OCCLUDERS.values()), dtype=np.float32), how.occluder, side="right")
    names = list(OCCLUDERS)
    sun, mask, hand, bar, hat = (kind == names.index(name) for name in ("sunglasses", "mask", "hand", "bar", "hat"))
    # A third of the people have glasses: some wear them nearly always, some now and then.
    keen = np.where(who.glasses > 0.66, np.float32(2.6) * (who.glasses - np.float32(0.62)), np.float32(0.02))
    _glasses(easel, (how.wears_glasses < keen) & ~sun, sun)

    cloth = easel.tone(tone, np.float32(0.9) - tone * np.float32(0.6), np.abs(place))
    cover = easel.on_face(0.0, np.float32(0.72) + np.float32(0.08) * place, 0.06)
    easel.block(cover, who.face_width * np.float32(1.0), 0.42, cloth, only=mask)
    fingers = easel.on_face(place * np.float32(0.5), np.float32(0.75) - np.float32(0.5) * tone, 0.2)
    easel.block(fingers, 0.22, 0.62, easel.ink.bright, tilt_rad=place * np.float32(0.9), only=hand)
    fingers = easel.on_face(place * np.float32(0.5), np.float32(0.75) - np.float32(0.5) * tone, 0.2)
    easel.block(fingers, 0.02, 0.5, easel.ink.shade, tilt_rad=place * np.float32(0.9), only=hand)
    easel.block(
        easel.at(place * np.float32(0.9), 0.2, 0.9), 0.13, 2.5, easel.tone(tone, tone, tone), tilt_rad=place, only=bar
    )
    crown = easel.at(0.0, -0.95, 0.1)
    easel.disc(crown, easel.cut.half_width * np.float32(1.1), 0.5, cloth, only=hat)
    easel.block(
        easel.at(0.0, -0.58, 0.25), easel.cut.half_width * np.float32(1.15), 0.08, cloth * np.float32(0.7), only=hat
    )


def _glasses(
    easel: Easel, clear: np.ndarray[tuple[int], np.dtype[np.bool_]], dark: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> None:
    who = easel.who
    worn = clear | dark
    if not worn.any():
        return
    thin = np.float32(0.018) + np.float32(0.03) * who.frame
    half_x, half_y = np.float32(0.235), np.float32(0.13) + np.float32(0.07) * who.frame
    metal = np.where(who.frame > 0.35, np.float32(0.08), np.float32(0.55))
    rim = easel.tone(metal, metal * np.float32(0.85), metal * np.float32(0.7))
    for side in (-1.0, 1.0):
        spot = easel.on_face(np.float32(side) * who.eye_distance, who.eye_height + np.float32(0.02), 0.06)
        easel.block(spot, half_x, half_y, easel.tone(0.05, 0.05, 0.06), only=dark)
        patch = easel.patch(spot, half_x, half_y, soft_tips=True, only=worn)
        if patch is None:
            continue
        # A ring: the rounded box less a smaller one of the same centre.
        part_x, part_y = patch.of(1 - 2 * thin / half_x), patch.of(1 - 2 * thin / half_y)
        inside = replace(
            patch, p=patch.p / part_x, q=patch.q / part_y, half_p=patch.half_p * part_x, half_q=patch.half_q * part_y
        )
        ring = block(patch)
        ring -= block(inside)
        np.maximum(ring, np.float32(0), out=ring)
        easel.canvas.blend(patch, ring, rim)
    easel.stroke(easel.on_face(0.0, who.eye_height, 0.12), 0.12, thin, rim, rise=0.03, only=worn)
