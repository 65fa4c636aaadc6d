"""What differs between images of one person: pose, expression, light, occlusion, camera, background."""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metricface.data.synthetic_faces.draws import Floats, bells, described, stream, uniforms

_BELL, _UNIFORM = 21, 22


class Bell(NamedTuple):
    """A bell-shaped number; `spread` is its standard deviation."""

    mean: float
    spread: float


class Between(NamedTuple):
    """A uniform number in [low, high)."""

    low: float
    high: float


@dataclass(frozen=True)
class Conditions:
    """Circumstances of n images, each (n,) float32. Angles in radians, lengths in head units unless said otherwise."""

    yaw_rad: Annotated[Floats, Bell(0.0, 0.30)]
    pitch_rad: Annotated[Floats, Bell(0.0, 0.13)]
    roll_rad: Annotated[Floats, Bell(0.0, 0.09)]
    zoom: Annotated[Floats, Bell(1.0, 0.055)]
    shift_x: Annotated[Floats, Bell(0.0, 0.022)]  # share of the picture's side
    shift_y: Annotated[Floats, Bell(0.0, 0.022)]
    smile: Annotated[Floats, Bell(0.15, 0.55)]
    mouth_open: Annotated[Floats, Bell(-0.25, 0.55)]  # below 0: closed
    brow_lift: Annotated[Floats, Bell(0.0, 0.028)]
    frown: Annotated[Floats, Bell(0.0, 0.06)]
    lids: Annotated[Floats, Bell(0.92, 0.18)]  # 1: as open as the person's eyes are
    gaze: Annotated[Floats, Bell(0.0, 0.22)]
    hair_change: Annotated[Floats, Bell(1.0, 0.08)]
    light_x: Annotated[Floats, Bell(0.0, 0.22)]
    light_y: Annotated[Floats, Bell(-0.10, 0.13)]
    gain: Annotated[Floats, Bell(1.0, 0.15)]
    gamma: Annotated[Floats, Bell(0.0, 0.28)]  # log of the tone curve's bend
    cast_warm: Annotated[Floats, Bell(0.0, 0.07)]
    cast_green: Annotated[Floats, Bell(0.0, 0.03)]

    back_red: Annotated[Floats, Between(0.05, 0.95)]
    back_green: Annotated[Floats, Between(0.05, 0.95)]
    back_blue: Annotated[Floats, Between(0.05, 0.95)]
    back_slope_x: Annotated[Floats, Between(-0.35, 0.35)]
    back_slope_y: Annotated[Floats, Between(-0.35, 0.35)]
    thing_x: Annotated[Floats, Between(-1.0, 1.0)]  # something out of focus behind the person
    thing_y: Annotated[Floats, Between(-1.0, 0.6)]
    thing_size: Annotated[Floats, Between(0.2, 0.7)]
    thing_tone: Annotated[Floats, Between(0.0, 1.0)]
    cloth_red: Annotated[Floats, Between(0.05, 0.95)]
    cloth_green: Annotated[Floats, Between(0.05, 0.95)]
    cloth_blue: Annotated[Floats, Between(0.05, 0.95)]
    teeth: Annotated[Floats, Between(0.0, 1.0)]
    wears_glasses: Annotated[Floats, Between(0.0, 1.0)]
    occluder: Annotated[Floats, Between(0.0, 1.0)]  # see in_front.OCCLUDERS
    occluder_place: Annotated[Floats, Between(-1.0, 1.0)]
    occluder_tone: Annotated[Floats, Between(0.0, 1.0)]
    softness: Annotated[Floats, Between(0.0, 1.0)]
    noise: Annotated[Floats, Between(0.0, 1.0)]
    grain: Annotated[Floats, Between(0.0, 1.0)]


_BELLS = described(Conditions, Bell)
_UNIFORMS = described(Conditions, Between)


def conditions(seed: int, identities: NDArray[np.int64], images: NDArray[np.int64]) -> Conditions:
    """The circumstances of image number `images` (n,) of each of `identities` (n,) in the world `seed`."""
    mean, spread = np.array(list(_BELLS.values()), dtype=np.float32).T
    bell: Floats = mean + spread * bells(stream(seed, _BELL, identities, images), len(_BELLS))
    low, high = np.array(list(_UNIFORMS.values()), dtype=np.float32).T
    even: Floats = low + (high - low) * uniforms(stream(seed, _UNIFORM, identities, images), len(_UNIFORMS))
    return Conditions(**dict(zip(_BELLS, bell.T, strict=True)), **dict(zip(_UNIFORMS, even.T, strict=True)))
