"""Who is in the picture: what stays the same in all images of one identity.

Lengths are in head units: the face reaches from crown (y = -1) to chin (y = +1); x runs to the right and y down.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metricface.data.synthetic_faces.draws import Floats, bells, described, stream, uniforms

# Everybody resembles one of this many types, so that a few hundred people already hold look-alikes (hard negatives).
ARCHETYPES = 48
_TRAIT, _CHOICE, _TYPE, _TYPE_TRAIT, _TYPE_CHOICE = 11, 12, 13, 14, 15


class Trait(NamedTuple):
    """A bell-shaped number; spread: its standard deviation, shared: the part of its variance that is the type's."""

    mean: float
    spread: float
    shared: float = 0.6


class Choice(NamedTuple):
    """A uniform number in [0, 1); with chance `shared` it is the type's, so that look-alikes choose alike."""

    shared: float


@dataclass(frozen=True)
class People:
    """Traits of n people, each (n,) float32."""

    face_width: Annotated[Floats, Trait(0.76, 0.055)]
    face_taper: Annotated[Floats, Trait(0.36, 0.14)]  # how much narrower the jaw is than the forehead
    face_square: Annotated[Floats, Trait(0.45, 0.22)]  # 0: an ellipse, 1: a broad, flat chin
    cheek: Annotated[Floats, Trait(0.0, 1.0, 0.3)]
    ear_size: Annotated[Floats, Trait(0.17, 0.03)]
    neck_width: Annotated[Floats, Trait(0.42, 0.06)]
    eye_distance: Annotated[Floats, Trait(0.33, 0.032, 0.5)]
    eye_height: Annotated[Floats, Trait(-0.05, 0.045, 0.5)]
    eye_width: Annotated[Floats, Trait(0.165, 0.02, 0.5)]
    eye_open: Annotated[Floats, Trait(0.075, 0.016, 0.5)]
    eye_tilt_rad: Annotated[Floats, Trait(0.04, 0.10)]
    eye_socket: Annotated[Floats, Trait(0.35, 0.15, 0.4)]
    iris_size: Annotated[Floats, Trait(0.075, 0.007, 0.3)]
    brow_gap: Annotated[Floats, Trait(0.215, 0.035, 0.5)]
    brow_length: Annotated[Floats, Trait(0.225, 0.03, 0.5)]
    brow_thick: Annotated[Floats, Trait(0.045, 0.016, 0.5)]
    brow_tilt_rad: Annotated[Floats, Trait(0.02, 0.11, 0.5)]
    brow_arch: Annotated[Floats, Trait(0.045, 0.03, 0.5)]
    nose_length: Annotated[Floats, Trait(0.40, 0.05, 0.5)]
    nose_width: Annotated[Floats, Trait(0.145, 0.03, 0.5)]
    nose_bridge: Annotated[Floats, Trait(0.055, 0.014, 0.4)]
    nose_tip: Annotated[Floats, Trait(0.0, 1.0, 0.3)]
    mouth_height: Annotated[Floats, Trait(0.60, 0.04, 0.5)]
    mouth_width: Annotated[Floats, Trait(0.25, 0.035, 0.5)]
    lip_upper: Annotated[Floats, Trait(0.045, 0.015, 0.5)]
    lip_lower: Annotated[Floats, Trait(0.065, 0.020, 0.5)]
    mouth_curve: Annotated[Floats, Trait(0.0, 0.022, 0.4)]
    lip_red: Annotated[Floats, Trait(0.45, 0.18, 0.5)]
    hairline: Annotated[Floats, Trait(-0.60, 0.055, 0.5)]
    hair_volume: Annotated[Floats, Trait(1.0, 0.25, 0.5)]
    hair_shade: Annotated[Floats, Trait(0.0, 0.10, 0.4)]
    skin_warm: Annotated[Floats, Trait(0.0, 1.0, 0.6)]
    blush: Annotated[Floats, Trait(0.18, 0.10, 0.4)]
    lines: Annotated[Floats, Trait(0.16, 0.16, 0.5)]  # from nose to mouth corner: age
    mark_size: Annotated[Floats, Trait(0.036, 0.009, 0.0)]

    skin: Annotated[Floats, Choice(0.85)]
    hair_style: Annotated[Floats, Choice(0.85)]
    hair_colour: Annotated[Floats, Choice(0.8)]
    hair_parting: Annotated[Floats, Choice(0.5)]
    eye_colour: Annotated[Floats, Choice(0.7)]
    beard: Annotated[Floats, Choice(0.75)]
    glasses: Annotated[Floats, Choice(0.5)]  # how often this person wears them
    frame: Annotated[Floats, Choice(0.2)]
    marks: Annotated[Floats, Choice(0.0)]  # how many
    mark_1_x: Annotated[Floats, Choice(0.0)]
    mark_1_y: Annotated[Floats, Choice(0.0)]
    mark_2_x: Annotated[Floats, Choice(0.0)]
    mark_2_y: Annotated[Floats, Choice(0.0)]
    freckles: Annotated[Floats, Choice(0.4)]
    scar: Annotated[Floats, Choice(0.0)]


_TRAITS = described(People, Trait)
_CHOICES = described(People, Choice)


def people(seed: int, identities: NDArray[np.int64]) -> People:
    """The people with these numbers (n,) in the world `seed`; nobody depends on who else is asked for."""
    kind = archetypes(seed, identities)
    mean, spread, shared = np.array(list(_TRAITS.values()), dtype=np.float32).T
    own = bells(stream(seed, _TRAIT, identities), len(_TRAITS))
    of_kind = bells(stream(seed, _TYPE_TRAIT, kind), len(_TRAITS))
    trait: Floats = mean + spread * (np.sqrt(shared) * of_kind + np.sqrt(1 - shared) * own)

    count = len(_CHOICES)
    (chance,) = np.array(list(_CHOICES.values()), dtype=np.float32).T
    drawn = uniforms(stream(seed, _CHOICE, identities), 2 * count)
    of_kind = uniforms(stream(seed, _TYPE_CHOICE, kind), count)
    choice: Floats = np.where(drawn[:, count:] < chance, of_kind, drawn[:, :count])
    return People(**dict(zip(_TRAITS, trait.T, strict=True)), **dict(zip(_CHOICES, choice.T, strict=True)))


def archetypes(seed: int, identities: NDArray[np.int64]) -> NDArray[np.int64]:
    """The type (n,) that each identity resembles, in [0, ARCHETYPES)."""
    return (uniforms(stream(seed, _TYPE, identities), 1)[:, 0] * ARCHETYPES).astype(np.int64)
