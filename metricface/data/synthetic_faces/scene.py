"""Everything but the face: background, body, the hair behind and in front, ears, the head's outline and beard."""

import numpy as np

from metricface.data.synthetic_faces.canvas import Patch, disc
from metricface.data.synthetic_faces.draws import Floats
from metricface.data.synthetic_faces.easel import Easel
from metricface.data.synthetic_faces.head import Spot

_ZERO, _ONE = np.float32(0), np.float32(1)


def paint_behind(easel: Easel) -> None:
    """Background, body, hair behind the head."""
    _background(easel)
    who, how = easel.who, easel.how
    cloth = easel.tone(how.cloth_red, how.cloth_green, how.cloth_blue)
    easel.block(easel.at(0.0, 1.05, 0.0), who.neck_width, 0.65, easel.ink.shade)
    easel.disc(easel.at(0.0, 1.95, -0.1), who.neck_width * np.float32(3.3), 0.82, cloth)
    cut, half = easel.cut, np.float32(0.5)
    # Short hair ends where its bottom is; the shape needs a round skull above the eyes all the same.
    bottom = np.maximum(cut.bottom, np.float32(0.25))
    middle = (bottom + cut.top) * half
    short = (cut.present > 0) & ~cut.long
    easel.disc(easel.at(0.0, middle, -0.15), cut.half_width, (bottom - cut.top) * half, easel.ink.hair_dark, only=short)
    round_top = np.float32(0.2)
    easel.disc(
        easel.at(0.0, (round_top + cut.top) * half, -0.12), cut.half_width,
        (round_top - cut.top) * half + np.float32(0.3), easel.ink.hair_dark, only=cut.long,
    )  # fmt: skip
    fall = easel.at(0.0, (cut.bottom - np.float32(0.4)) * half, -0.15)
    easel.block(
        fall, cut.half_width, (cut.bottom + np.float32(0.4)) * half, easel.ink.hair_dark, only=cut.long,
        tilt_rad=easel.head.roll * np.float32(-0.6),
    )  # fmt: skip
    size = np.float32(0.24) * who.hair_volume
    easel.disc(easel.at(0.0, cut.top - np.float32(0.06), -0.1), size, size, easel.ink.hair, only=cut.bun)


def _background(easel: Easel) -> None:
    how, pixels = easel.how, easel.canvas.pixels
    height, width = pixels.shape[2:]
    # Walls are mostly dull: less than half as colourful as numbers at random.
    grey: Floats = (how.back_red + how.back_green + how.back_blue) * np.float32(0.55 / 3)
    red: Floats = grey + how.back_red * np.float32(0.45)
    green: Floats = grey + how.back_green * np.float32(0.45)
    blue: Floats = grey + how.back_blue * np.float32(0.45)
    base = easel.tone(red, green, blue)
    across = np.linspace(-1, 1, width, dtype=np.float32) * how.back_slope_x[:, None]
    down = np.linspace(-1, 1, height, dtype=np.float32) * how.back_slope_y[:, None]
    slope = across[:, None, :] + down[:, :, None]
    for channel in range(pixels.shape[1]):
        np.add(slope, base[:, channel, None, None], out=pixels[:, channel])
    half = np.float32(max(height, width) * 0.5)
    one = easel.each(1.0)
    thing = Spot(half + half * how.thing_x, half + half * how.thing_y, one, one)
    size = how.thing_size * half / easel.head.unit
    mixed: Floats = (how.thing_tone + blue) * np.float32(0.5)
    easel.glow(thing, size, size, easel.tone(how.thing_tone, green, mixed), 0.9)


def paint_head(easel: Easel) -> None:
    """Ears, the outline of skull and jaw, beard, and the large shadows of the skin."""
    who, how, ink = easel.who, easel.how, easel.ink
    turned = np.abs(how.yaw_rad)
    for side in (-1.0, 1.0):
        # The ear on the far side goes behind the head; the near one is painted after it, in front.
        spot = easel.at(np.float32(side) * who.face_width, 0.08, -0.10)
        easel.disc(
            spot,
            who.ear_size * np.float32(0.55),
            who.ear_size,
            ink.shade,
            opacity=easel.cut.ears_seen,
            tilt_rad=side * 0.12,
        )
    half_x = who.face_width * (_ONE + np.float32(0.10) * turned)
    half_y = _ONE - np.float32(0.12) * np.abs(how.pitch_rad)
    # A strong taper makes the temples, and a turned head the chin, stand out of the half axes.
    margin = easel.head.unit * half_x * (np.float32(0.15) + np.float32(0.3) * np.abs(np.sin(how.yaw_rad)))
    patch = easel.patch(easel.at(0.0, 0.0, 0.06), half_x, half_y, margin=margin, soft_tips=True)
    if patch is not None:
        _outline(easel, patch, half_x)
    for side in (-1.0, 1.0):
        # Seen from the front the near ear is mostly hidden, from the side it lies on the head.
        spot = easel.at(np.float32(side) * who.face_width, 0.08, -0.10)
        near = np.clip(np.float32(-side * 3.0) * how.yaw_rad - np.float32(0.6), _ZERO, np.float32(0.9))
        easel.disc(
            spot,
            who.ear_size * np.float32(0.5),
            who.ear_size,
            ink.shade,
            opacity=near * easel.cut.ears_seen,
            tilt_rad=side * 0.12,
        )
        edge = np.float32(side) * who.face_width
        easel.glow(
            easel.on_face(edge * np.float32(0.55), 0.30),
            0.30,
            0.22,
            ink.flush,
            np.clip(who.blush, _ZERO, np.float32(0.5)),
        )
        hollow = np.clip(np.float32(0.30) + np.float32(0.16) * who.cheek, _ZERO, np.float32(0.7))
        easel.glow(easel.on_face(edge * np.float32(0.80), 0.42), 0.26, 0.45, ink.shade, hollow)


def _outline(easel: Easel, patch: Patch, half_x: Floats) -> None:
    who, how = easel.who, easel.how
    # The chin swings with the nose while the skull does not: shear the lower half of the outline.
    p = np.maximum(patch.q, _ZERO)
    p *= patch.of(np.sin(how.yaw_rad) * np.float32(-0.22) / half_x)
    p += patch.p
    q_sq = patch.q * patch.q
    taper = patch.of(np.clip(who.face_taper, _ZERO, np.float32(0.8))) * patch.q
    taper += _ONE
    inside = p * p
    inside *= taper
    quartic = q_sq * q_sq
    quartic -= q_sq
    # Only the chin may be square; the skull is round.
    quartic *= patch.of(np.clip(who.face_square, _ZERO, _ONE)) * (patch.q > 0)
    quartic += q_sq
    inside += quartic
    np.subtract(_ONE, inside, out=inside)
    inside *= np.minimum(patch.half_p, patch.half_q) * np.float32(0.5)
    inside += np.float32(0.5)
    alpha = np.clip(inside, _ZERO, _ONE, out=inside)
    easel.canvas.blend(patch, alpha, easel.ink.skin)
    _beard(easel, patch, p, alpha)


def _beard(easel: Easel, patch: Patch, p: Floats, face: Floats) -> None:
    """Full beards and stubble: the lower part of the head's own outline."""
    style = easel.beard
    strength = np.where(style > 0.93, np.float32(0.92), np.where(style > 0.84, np.float32(0.33), _ZERO))
    some = np.flatnonzero(strength)
    if not len(some):
        return
    q, p = patch.q[some], p[some]
    drop = easel.how.pitch_rad[some, None, None] * np.float32(0.55)
    # From the sideburns down the cheeks to below the corners of the mouth.
    alpha = q - drop + p * p * np.float32(0.55) - np.float32(0.52)
    alpha = np.clip(alpha * np.float32(5), _ZERO, _ONE) * face[some] * strength[some, None, None]
    part = Patch(patch.rows, patch.columns, some, q, q, patch.half_p[some], patch.half_q[some])
    easel.canvas.blend(part, alpha, easel.ink.hair_dark)


def paint_hair(easel: Easel) -> None:
    """The hair on top of the head, down to the hairline: the last thing that belongs to the person."""
    cut, how, ink = easel.cut, easel.how, easel.ink
    bottom = np.float32(0.55)
    half = (bottom - cut.top) * np.float32(0.5)
    patch = easel.patch(
        easel.at(0.0, (bottom + cut.top) * np.float32(0.5), -0.04),
        cut.half_width,
        half,
        soft_tips=True,
        only=cut.present > 0,
    )
    if patch is None:
        return
    alpha = disc(patch)
    # The line is a parabola on the forehead: it turns and nods with the face, unlike the skull behind it.
    ahead = np.float32(0.62)
    middle = cut.part * np.float32(0.5) + np.sin(how.yaw_rad) * ahead / cut.half_width
    line = (
        cut.line * np.cos(how.pitch_rad) + np.sin(how.pitch_rad) * ahead - (bottom + cut.top) * np.float32(0.5)
    ) / half
    below = patch.p - patch.of(middle)
    below *= below
    below *= patch.of(cut.curve / half)
    below += patch.of(line)
    below -= patch.q
    below *= patch.half_q * np.float32(0.7)
    below += np.float32(0.5)
    np.clip(below, _ZERO, _ONE, out=below)
    alpha *= below
    easel.canvas.blend(patch, alpha, ink.hair)
    shine = patch.p - patch.of(np.clip(how.light_x * np.float32(2), np.float32(-0.5), np.float32(0.5)))
    shine *= shine
    np.subtract(np.float32(0.8), shine, out=shine)
    np.maximum(shine, _ZERO, out=shine)
    shine *= shine
    shine *= alpha
    easel.canvas.blend(patch, shine, ink.hair_bright)
