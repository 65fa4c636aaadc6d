"""Every head, with its oracle: options and the same in the oracle's words."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from metricface import heads
from metricface.heads.base import Head
from tests.heads import oracles


class Kind(NamedTuple):
    head: type[Head]
    options: dict[str, Any]
    oracle: Callable[..., float]
    words: Mapping[str, Any] = MappingProxyType({})

    def make(self, num_classes: int, embedding_dim: int, **more: Any) -> Head:
        return self.head(num_classes, embedding_dim, **self.options, **more)

    def expected(self, x: torch.Tensor, head: Head, labels: torch.Tensor) -> float:
        """Loss of the head's weights by the oracle; its state must not have moved."""
        words = {k: value(head) if callable(value) and k != "target" else value for k, value in self.words.items()}
        rows: list[NDArray[np.float64]] = [t.detach().double().numpy() for t in (x, head.weight)]
        return oracles.mean(self.oracle, rows[0], rows[1], labels.tolist(), **words)


def _cos(scale: float, target: Callable[[float], float]) -> dict[str, Any]:
    return {"scale": scale, "target": target}


KINDS: dict[str, Kind] = {
    "softmax": Kind(heads.Softmax, {}, oracles.softmax, {"bias": lambda head: head.bias.detach().numpy()}),
    "softmax without bias": Kind(heads.Softmax, {"bias": False}, oracles.softmax),
    "l2 softmax": Kind(
        heads.L2Softmax,
        {"alpha": 5.0},
        lambda x, w, y, bias: oracles.softmax(5.0 * oracles.unit(x), w, y, bias),
        {"bias": lambda head: head.bias.detach().numpy()},
    ),
    "l2 softmax, learned": Kind(
        heads.L2Softmax,
        {"alpha": 5.0, "learn_alpha": True, "bias": False},
        lambda x, w, y: oracles.softmax(5.0 * oracles.unit(x), w, y),
    ),
    "normface": Kind(heads.NormFace, {"scale": 12.0}, oracles.on_cosines, _cos(12.0, np.cos)),
    "coco": Kind(heads.COCO, {"scale": 12.0}, oracles.on_cosines, _cos(12.0, np.cos)),
    "l-softmax": Kind(
        heads.LSoftmax,
        {"margin": 3, "lambda_base": 0.0, "lambda_min": 0.5},
        oracles.multiplied_angle,
        {"m": 3, "lam": 0.5, "keep_weights": True},
    ),
    "sphereface": Kind(
        heads.SphereFace,
        {"margin": 4, "lambda_base": 0.0, "lambda_min": 2.0},
        oracles.multiplied_angle,
        {"m": 4, "lam": 2.0, "keep_weights": False},
    ),
    "cosface": Kind(
        heads.CosFace,
        {"margin_cos": 0.35, "scale": 10.0},
        oracles.on_cosines,
        _cos(10.0, lambda t: float(np.cos(t)) - 0.35),
    ),
    "arcface": Kind(
        heads.ArcFace,
        {"scale": 10.0},
        oracles.on_cosines,
        _cos(10.0, lambda t: oracles.arcface(t, 0.5, "monotone")),
    ),
    "arcface, easy": Kind(
        heads.ArcFace,
        {"scale": 10.0, "beyond_pi": "easy"},
        oracles.on_cosines,
        _cos(10.0, lambda t: oracles.arcface(t, 0.5, "easy")),
    ),
    "arcface, none": Kind(
        heads.ArcFace,
        {"scale": 10.0, "beyond_pi": "none", "margin_rad": 1.2},
        oracles.on_cosines,
        _cos(10.0, lambda t: oracles.arcface(t, 1.2, "none")),
    ),
    "combined": Kind(
        heads.CombinedMargin,
        {"m1": 0.9, "m2": 0.4, "m3": 0.15, "scale": 10.0},
        oracles.on_cosines,
        _cos(10.0, lambda t: float(np.cos(0.9 * t + 0.4)) - 0.15),
    ),
    "sub-center": Kind(
        heads.SubCenterArcFace,
        {"sub_centers": 3, "scale": 10.0},
        oracles.sub_centers,
        {"k": 3, "m": 0.5, "scale": 10.0},
    ),
    "adaface": Kind(
        heads.AdaFace,
        {"scale": 10.0},
        oracles.adaface,
        {
            "m": 0.4,
            "h": 0.333,
            "scale": 10.0,
            "mean": lambda head: float(head.length_mean),
            "deviation": lambda head: float(head.length_deviation),
        },
    ),
    "magface": Kind(heads.MagFace, {"scale": 10.0}, oracles.magface, {"scale": 10.0, "weight": 35.0}),
    "curricularface": Kind(
        heads.CurricularFace,
        {"scale": 10.0},
        oracles.curricularface,
        {"m": 0.5, "scale": 10.0, "t": lambda head: float(head.t)},
    ),
    "sphereface2": Kind(
        heads.SphereFace2,
        {"scale": 10.0, "t": 3.0},
        oracles.sphereface2,
        {"b": lambda head: float(head.offset.detach()), "weight": 0.7, "r": 10.0, "m": 0.4, "t": 3.0},
    ),
    "c-contrastive": Kind(heads.CContrastive, {"margin": 1.5}, oracles.c_contrastive, {"m": 1.5}),
    "c-triplet": Kind(heads.CTriplet, {}, oracles.proxy_triplets, {"delta": 0.8}),
    "c-triplet, hardest": Kind(heads.CTriplet, {"hardest_only": True}, oracles.proxy_triplets, {"delta": 0.8, "k": 1}),
    "npt": Kind(heads.NPT, {"k": 3, "margin_cos": 0.4}, oracles.proxy_triplets, {"delta": 0.8, "k": 3}),
}

EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
# Those whose unit class vectors and cosines leave no sign of the embedding's length in the loss.
FREE_OF_LENGTH = ["normface", "coco", "cosface", "arcface", "combined", "sub-center", "curricularface", "sphereface2"]


def filled(head: Head, seed: int = 1) -> Head:
    """In float64, every parameter drawn anew: nothing at its neutral start."""
    head.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name not in ("scale", "alpha", "offset"):
                parameter.normal_(generator=generator)
    return head
