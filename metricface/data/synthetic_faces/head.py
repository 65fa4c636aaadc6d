"""A head that turns: where a point of the face, given in head units, lies in the picture."""

from typing import NamedTuple

import numpy as np

from metricface.data.synthetic_faces.conditions import Conditions
from metricface.data.synthetic_faces.draws import Floats
from metricface.data.synthetic_faces.people import People

# Half the height of a face as a share of the side of the (square) scene, and where its middle lies.
FACE_SHARE, MIDDLE_X, MIDDLE_Y = 0.39, 0.5, 0.535
DEPTH = 0.72  # of the ellipsoid that the face is wrapped on: half its depth in head units


class Spot(NamedTuple):
    """A point of the face in the picture: x, y in pixels; wide, high: how much lengths shrink there by turning away."""

    x: Floats
    y: Floats
    wide: Floats
    high: Floats


class Head:
    """Pose of n heads in pictures of height x width pixels; weak perspective.

    The scene is a square photograph; a picture that is not square, or has crop < 1, is its largest centred box of that
    aspect ratio, as Preprocessing cuts it out of a photograph.
    """

    def __init__(self, who: People, how: Conditions, height: int, width: int, crop: float) -> None:
        side = max(height, width) / crop
        self.unit: Floats = (how.zoom * np.float32(FACE_SHARE * side)).astype(np.float32)
        self.roll: Floats = how.roll_rad
        self._sin_yaw, self._cos_yaw = np.sin(how.yaw_rad), np.cos(how.yaw_rad)
        self._sin_pitch, self._cos_pitch = np.sin(how.pitch_rad), np.cos(how.pitch_rad)
        self._sin_roll, self._cos_roll = np.sin(how.roll_rad), np.cos(how.roll_rad)
        self._x0 = np.float32(width / 2) + np.float32(side) * (how.shift_x + np.float32(MIDDLE_X - 0.5))
        self._y0 = np.float32(height / 2) + np.float32(side) * (how.shift_y + np.float32(MIDDLE_Y - 0.5))
        self._face_width = who.face_width
        self.yaw_rad = how.yaw_rad

    def at(self, x: Floats, y: Floats, z: Floats | float) -> tuple[Floats, Floats]:
        """The pixel of the point (x, y, z), z towards the camera, in head units, all (n,)."""
        across = x * self._cos_yaw + z * self._sin_yaw
        ahead = z * self._cos_yaw - x * self._sin_yaw
        down = y * self._cos_pitch + ahead * self._sin_pitch
        px = self._x0 + self.unit * (across * self._cos_roll - down * self._sin_roll)
        py = self._y0 + self.unit * (across * self._sin_roll + down * self._cos_roll)
        return px.astype(np.float32), py.astype(np.float32)

    def on_face(self, x: Floats, y: Floats, lift: float = 0.0) -> Spot:
        """The point of the face's surface in front of (x, y), raised by `lift` head units."""
        side_on = x / (self._face_width * np.float32(1.12))
        tall = y * np.float32(1 / 1.25)
        bulge = np.sqrt(np.maximum(1 - side_on * side_on - tall * tall, np.float32(0.08)))
        z = np.float32(DEPTH) * bulge + np.float32(lift)
        slope_x = -np.float32(DEPTH) * side_on / (bulge * self._face_width * np.float32(1.12))
        slope_y = -np.float32(DEPTH) * tall / (bulge * np.float32(1.25))
        wide = np.clip(self._cos_yaw + slope_x * self._sin_yaw, np.float32(0.25), np.float32(1.2))
        high = np.clip(self._cos_pitch + slope_y * self._sin_pitch, np.float32(0.5), np.float32(1.2))
        px, py = self.at(x, y, z)
        return Spot(px, py, wide.astype(np.float32), high.astype(np.float32))
