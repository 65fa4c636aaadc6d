"""The features of a face: eyes, brows, nose, mouth, moustache, moles, freckles, scars and lines."""

import numpy as np

from metricface.data.synthetic_faces.canvas import lens
from metricface.data.synthetic_faces.draws import Floats
from metricface.data.synthetic_faces.easel import Easel

_ZERO, _ONE = np.float32(0), np.float32(1)


def paint_face(easel: Easel) -> None:
    """All features, in the order in which they may cover each other."""
    for side in (-1.0, 1.0):
        _eye(easel, np.float32(side))
        _brow(easel, np.float32(side))
    _nose(easel)
    _mouth(easel)
    _moustache(easel)
    _lines_and_marks(easel)


def _eye(easel: Easel, side: np.float32) -> None:
    who, how, head = easel.who, easel.how, easel.head
    spot = easel.on_face(side * who.eye_distance, who.eye_height, -0.06)
    tilt = -side * who.eye_tilt_rad
    socket = np.clip(who.eye_socket, _ZERO, np.float32(0.8))
    easel.glow(spot, who.eye_width * np.float32(1.6), who.eye_width * np.float32(1.25), easel.ink.shade, socket)
    half = who.eye_open * np.clip(how.lids, np.float32(0.12), np.float32(1.25))
    half = np.maximum(half * (_ONE - np.float32(0.18) * np.clip(how.smile, _ZERO, np.float32(1.5))), np.float32(0.012))
    patch = easel.patch(spot, who.eye_width, half, tilt_rad=tilt)
    if patch is None:
        return
    open_px = half * head.unit * spot.high
    white = lens(patch, open_px, open_px * np.float32(0.85))
    easel.canvas.blend(patch, white, easel.tone(0.93, 0.91, 0.89))
    away = (patch.p - patch.of(how.gaze * np.float32(0.35))) * patch.half_p
    away *= away
    rise = patch.q * patch.half_q
    rise *= rise
    away += rise
    size = patch.of(np.maximum(who.iris_size, np.float32(0.04)) * head.unit)
    for part, colour in ((np.float32(1), easel.ink.iris), (np.float32(0.45), easel.tone(0.04, 0.03, 0.03))):
        radius = size * part
        ball = radius * radius - away
        ball *= np.float32(0.5) / radius
        ball += np.float32(0.5)
        np.clip(ball, _ZERO, white, out=ball)
        easel.canvas.blend(patch, ball, colour)
    lid = easel.tone(0.10, 0.07, 0.06)
    easel.stroke(spot, who.eye_width * np.float32(1.08), 0.022, lid, rise=half, tilt_rad=tilt)


def _brow(easel: Easel, side: np.float32) -> None:
    who, how = easel.who, easel.how
    spot = easel.on_face(
        side * who.eye_distance * np.float32(1.04), who.eye_height - who.brow_gap - how.brow_lift, 0.02
    )
    tilt = -side * (who.brow_tilt_rad - how.frown * np.float32(2))
    thick = np.clip(who.brow_thick, np.float32(0.014), np.float32(0.10))
    easel.stroke(spot, who.brow_length, thick, easel.ink.brows, rise=who.brow_arch, tilt_rad=tilt, opacity=0.88)


def _nose(easel: Easel) -> None:
    who, ink = easel.who, easel.ink
    base = who.eye_height + who.nose_length
    middle = who.eye_height + who.nose_length * np.float32(0.45)
    bridge = np.maximum(who.nose_bridge, np.float32(0.02))
    width = np.maximum(who.nose_width, np.float32(0.07))
    # The flank away from the light is darker.
    flank = np.where(easel.how.light_x > 0, np.float32(-1.5), np.float32(1.5)) * bridge
    easel.glow(
        easel.on_face(flank, middle, 0.06), bridge * np.float32(1.4), who.nose_length * np.float32(0.65), ink.shade, 0.6
    )
    easel.glow(easel.on_face(0.0, middle, 0.14), bridge, who.nose_length * np.float32(0.6), ink.bright, 0.6)
    tip = easel.on_face(0.0, base - np.float32(0.05) + np.float32(0.012) * who.nose_tip, 0.19)
    easel.glow(tip, width * np.float32(1.1), 0.11, ink.flush, 0.35)
    under = easel.on_face(0.0, base + np.float32(0.02), 0.12)
    sag = np.float32(-0.035) - np.float32(0.012) * who.nose_tip
    easel.stroke(under, width, 0.026, ink.deep_shade, rise=sag, opacity=0.75)
    for side in (-1.0, 1.0):
        hole = easel.on_face(np.float32(side) * width * np.float32(0.45), base + np.float32(0.01), 0.13)
        easel.disc(hole, width * np.float32(0.26), 0.025, ink.deep_shade, opacity=0.7)


def _mouth(easel: Easel) -> None:
    who, how, ink = easel.who, easel.how, easel.ink
    gap = np.clip(how.mouth_open, _ZERO, np.float32(1.2)) * np.float32(0.085)
    # A smile's corners lie above its middle: all arcs of the mouth sag by as much.
    sag = how.smile * np.float32(0.045) + who.mouth_curve
    width = who.mouth_width * (_ONE + np.float32(0.13) * np.clip(how.smile, np.float32(-0.6), np.float32(1.5)))
    spot = easel.on_face(0.0, who.mouth_height - sag * np.float32(0.5), 0.06)
    upper = np.clip(who.lip_upper, np.float32(0.012), np.float32(0.1)) + gap * np.float32(0.4)
    lower = np.clip(who.lip_lower, np.float32(0.018), np.float32(0.13)) + gap * np.float32(0.6)
    patch = easel.patch(spot, width, np.maximum(upper, lower) + np.abs(sag))
    if patch is not None:
        scale = easel.head.unit * spot.high
        easel.canvas.blend(patch, lens(patch, (upper - sag) * scale, sag * scale), ink.lips)
        easel.canvas.blend(patch, lens(patch, -sag * scale, (lower + sag) * scale), ink.lower_lip)
        inner = np.where(how.teeth > 0.45, np.float32(0.85), np.float32(0.16))
        between = lens(patch, (gap * np.float32(0.4) - sag) * scale, (gap * np.float32(0.6) + sag) * scale)
        easel.blend(patch, between, easel.tone(inner, inner * np.float32(0.93), inner * np.float32(0.88)), np.sign(gap))
    closed: np.ndarray[tuple[int], np.dtype[np.bool_]] = gap <= 0.012
    easel.stroke(spot, width * np.float32(1.04), 0.018, ink.lip_line, rise=-sag, only=closed)
    easel.glow(
        easel.on_face(0.0, who.mouth_height + np.float32(0.18), 0.03),
        who.mouth_width * np.float32(0.75),
        0.075,
        ink.shade,
        0.5,
    )


def _moustache(easel: Easel) -> None:
    who, beard = easel.who, easel.beard
    wears = (beard > 0.93) | ((beard > 0.70) & (beard < 0.80))
    nose: Floats = who.eye_height + who.nose_length
    above_lip: Floats = nose + (who.mouth_height - nose) * np.float32(0.72)
    lip = easel.on_face(0.0, above_lip, 0.09)
    easel.stroke(lip, who.mouth_width * np.float32(1.05), 0.055, easel.ink.brows, rise=0.05, opacity=0.9, only=wears)
    chin = easel.on_face(0.0, who.mouth_height + np.float32(0.25), 0.05)
    goatee = (beard > 0.76) & (beard < 0.84)
    easel.disc(chin, 0.17, 0.15, easel.ink.brows, opacity=0.85, only=goatee)


def _lines_and_marks(easel: Easel) -> None:
    who, ink = easel.who, easel.ink
    nose, lines = who.eye_height + who.nose_length, np.clip(who.lines, _ZERO, np.float32(0.6))
    for side in (-1.0, 1.0):
        fold = easel.on_face(
            np.float32(side) * who.mouth_width * np.float32(1.05), (nose + who.mouth_height) * np.float32(0.5), 0.03
        )
        easel.stroke(
            fold, 0.15, 0.022, ink.deep_shade, rise=0.02, tilt_rad=side * 1.05, opacity=lines, only=lines > 0.12
        )
    size = np.clip(who.mark_size, np.float32(0.02), np.float32(0.06))
    for number, across, down in ((0.45, who.mark_1_x, who.mark_1_y), (0.8, who.mark_2_x, who.mark_2_y)):
        spot = easel.on_face(_across(easel, across), np.float32(0.95) * down - np.float32(0.20), 0.02)
        easel.disc(spot, size, size, ink.mark, only=who.marks > number)
    freckled = who.freckles > 0.86
    if freckled.any():
        for x, y in (
            (-0.42, 0.18),
            (-0.30, 0.26),
            (-0.20, 0.17),
            (0.21, 0.19),
            (0.33, 0.27),
            (0.44, 0.17),
            (-0.37, 0.34),
            (0.36, 0.36),
        ):
            easel.disc(easel.on_face(x, y), 0.032, 0.032, ink.freckle, opacity=0.8, only=freckled)
    scarred = who.scar > 0.93
    spot = easel.on_face(_across(easel, who.mark_2_y), np.float32(0.8) * who.mark_2_x - np.float32(0.3), 0.02)
    easel.stroke(spot, 0.17, 0.028, ink.scar, tilt_rad=(who.mark_1_x - np.float32(0.5)) * np.float32(3), only=scarred)


def _across(easel: Easel, share: Floats) -> Floats:
    """A number in [0, 1) as a place from one cheek to the other."""
    return (share - np.float32(0.5)) * np.float32(1.3) * easel.who.face_width
