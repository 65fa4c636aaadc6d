"""From a painted scene to pixels: light, colour cast, tone curve, softness, noise, eight bits."""

import functools

import cv2
import numpy as np
from numpy.typing import NDArray

from metricface.data.synthetic_faces.conditions import Conditions
from metricface.data.synthetic_faces.draws import Floats, stream, uniforms

_GRAIN = 31
_GRAIN_STARTS = 1 << 18  # places in the table of noise at which a picture may begin
# (blur as a share of the side, rows the sensor has for 56 of the picture) in the order of Conditions.softness
_SOFTNESS = (
    (0.0, 56),
    (0.0, 56),
    (0.0, 56),
    (0.0, 56),
    (0.0, 44),
    (0.009, 56),
    (0.0, 34),
    (0.016, 56),
    (0.0, 27),
    (0.012, 34),
    (0.022, 40),
    (0.0, 21),
)


def expose(scene: Floats, how: Conditions) -> NDArray[np.uint8]:
    """The scene (n, C, H, W), which is used up, as pixels: uint8 (n, H, W, C)."""
    count, channels, height, width = scene.shape
    level = np.minimum((how.softness * len(_SOFTNESS)).astype(np.int64), len(_SOFTNESS) - 1)
    for number in np.flatnonzero([_SOFTNESS[which] != (0.0, 56) for which in level]):
        for channel in range(channels):
            scene[number, channel] = _softened(scene[number, channel], max(height, width), *_SOFTNESS[level[number]])
    across = np.linspace(-1, 1, width, dtype=np.float32) * how.light_x[:, None]
    down = np.linspace(-1, 1, height, dtype=np.float32) * how.light_y[:, None]
    light = across[:, None, :] + down[:, :, None]
    light += np.maximum(how.gain, np.float32(0.4))[:, None, None]
    cast = _cast(how, channels)
    bend = np.exp(how.gamma).astype(np.float32)[:, None, None]
    strength = (np.float32(0.006) + np.float32(0.04) * how.noise * how.noise)[:, None, None]
    start = (how.grain * np.float32(_GRAIN_STARTS)).astype(np.int64)
    runs = np.lib.stride_tricks.sliding_window_view(_grain(_GRAIN_STARTS + height * width), height * width)
    picture = np.empty((count, height, width, channels), dtype=np.uint8)
    for channel in range(channels):
        plane = scene[:, channel]
        plane *= light
        plane *= cast[:, channel, None, None]
        np.clip(plane, np.float32(0), np.float32(1), out=plane)
        # x / (x + bend (1 - x)): black and white stay, grey moves; a gamma curve without a power per pixel.
        curve = np.subtract(np.float32(1), plane)
        curve *= bend
        curve += plane
        plane /= curve
        noise = runs[(start + channel * 77_777) % _GRAIN_STARTS].reshape(count, height, width)
        noise *= strength
        plane += noise
        plane *= np.float32(255)
        plane += np.float32(0.5)
        np.clip(plane, np.float32(0), np.float32(255), out=plane)
        picture[..., channel] = plane
    return picture


@functools.cache
def _grain(length: int) -> Floats:
    """One table of noise, mean 0 and variance 1; every picture takes its run of it."""
    names = np.arange((length + 255) // 256, dtype=np.int64)
    even = uniforms(stream(0, _GRAIN, names), 256 * 2).reshape(-1, 2)
    # The sum of two uniforms is bell-shaped enough for a sensor's noise.
    grain: Floats = (even[:, 0] + even[:, 1] - np.float32(1)) * np.float32(6**0.5)
    return grain


def _cast(how: Conditions, channels: int) -> Floats:
    """(n, C) factors: warm light has more red and less blue; grey pictures keep their brightness."""
    factors = np.ones((len(how.gain), channels), dtype=np.float32)
    if channels == 3:
        factors[:, 0] += how.cast_warm
        factors[:, 1] += how.cast_green
        factors[:, 2] -= how.cast_warm
    return factors


def _softened(plane: Floats, side: int, blur: float, rows: int) -> Floats:
    """One channel (H, W) out of focus by `blur` of the side, and as a sensor with rows / 56 of the rows saw it."""
    height, width = plane.shape
    if blur * side > 0.2:
        # Three deviations to each side hold the bell; OpenCV's own choice is four, a third slower.
        taps = 2 * max(round(3 * blur * side), 1) + 1
        plane = cv2.GaussianBlur(plane, (taps, taps), blur * side).astype(np.float32, copy=False)
    if rows < 56:
        coarse = (max(round(width * rows / 56), 1), max(round(height * rows / 56), 1))
        fewer = cv2.resize(plane, coarse, interpolation=cv2.INTER_AREA)
        plane = cv2.resize(fewer, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32, copy=False)
    return plane
