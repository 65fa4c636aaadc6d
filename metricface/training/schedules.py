"""How far a stage has come, and the learning rate, weights and margins that belong there."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Shape = Literal["cosine", "polynomial", "exponential", "step", "constant"]
Curve = Literal["ramp", "anneal", "step"]


@dataclass(frozen=True)
class Decay:
    """How the learning rate falls once it is warmed up; `t` goes from 0 to 1 over the rest of the stage.

    Args:
        shape: `cosine`: half a cosine; `polynomial`: (1 - t)^power, a line for power 1; `exponential`: to^t; `step`:
            times `factor` at each share of `at`; `constant`.
        start: The share of the stage until which the peak is kept (from the end of the warm-up, if that is later).
        to: The share of the peak that is left at the end (neither `step` nor `constant`); above 0 for `exponential`.
        power: Of `polynomial`.
        at: Shares of the stage, rising, for `step`.
        factor: For `step`.
    """

    shape: Shape = "cosine"
    start: float = 0.0
    to: float = 0.01
    power: float = 1.0
    at: list[float] = field(default_factory=list)
    factor: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.start < 1.0 or not 0.0 <= self.to <= 1.0:
            raise ValueError(f"start is a share of the stage, to one of the peak; found {self.start} and {self.to}.")
        if self.shape == "exponential" and self.to == 0.0:
            raise ValueError("an exponential decay never comes to 0; set to above it, such as 0.001.")
        if not self.power > 0.0 or not 0.0 < self.factor <= 1.0:
            raise ValueError(
                f"power must be above 0, and factor above 0 and at most 1; found {self.power} and {self.factor}."
            )
        if self.at != sorted(set(self.at)) or not all(0.0 < share < 1.0 for share in self.at):
            raise ValueError(f"at holds shares of the stage, rising between 0 and 1; found {self.at}.")
        if (self.shape == "step") != bool(self.at):
            raise ValueError(f"the shape step needs shares of the stage in at, others none; found {self.at}.")


def learning_rate(progress: float, *, peak: float, warmup: float, decay: Decay) -> float:
    """Learning rate at a share `progress` in [0, 1] of a stage.

    Rises linearly from 1% of `peak` over the first `warmup` share (so that a fresh objective cannot shock a trained
    trunk), then falls as `decay` says. Progress beyond 1 counts as 1.
    Sources: triplet-reid (Hermans et al. 2017) is exponential with start t0 / t1 and to .001; Caffe's multistep, as
    SphereFace uses it, is step.
    """
    progress = min(progress, 1.0)
    if progress < warmup:
        return peak * (0.01 + 0.99 * progress / warmup)
    begin = max(warmup, decay.start)
    t = max(0.0, progress - begin) / (1.0 - begin)
    if decay.shape == "step":
        return peak * math.pow(decay.factor, sum(progress >= share for share in decay.at))
    if decay.shape == "exponential":
        return peak * math.pow(decay.to, t)
    left = {"cosine": 0.5 + 0.5 * math.cos(math.pi * t), "polynomial": math.pow(1.0 - t, decay.power), "constant": 1.0}
    return peak * (decay.to + (1.0 - decay.to) * left[decay.shape])


def scheduled(progress: float, *, shape: Curve, points: Sequence[Sequence[float]]) -> float:
    """The value of a curve at a share `progress` in [0, 1] of a stage.

    points: at least one (share, value), shares rising. Between two points the value goes along a line ("ramp") or half
    a cosine ("anneal"), or stays that of the first until the second is reached ("step"). It stays before the first
    point and after the last.
    """
    if progress < points[0][0]:
        return points[0][1]
    for (start, before), (end, after) in itertools.pairwise(points):
        if progress < end:
            passed = (progress - start) / (end - start)
            if shape == "step":
                return before
            if shape == "anneal":
                passed = 0.5 - 0.5 * math.cos(math.pi * passed)
            return before + passed * (after - before)
    return points[-1][1]


@dataclass
class Clock:
    """The length of a stage and how much of it has passed, in steps or in training seconds.

    Exactly one of `total_steps` and `total_seconds` is set. Time passes only between `start()` and `pause()`, so that
    evaluation and saving are not counted.
    """

    total_steps: int | None = None
    total_seconds: float | None = None
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    _since: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        assert (self.total_steps is None) != (self.total_seconds is None)

    def start(self) -> None:
        """Let time pass from now on."""
        self._since = time.perf_counter()

    def set(self, seconds: float) -> None:
        """Let so many training seconds have passed, by the clock that counts for all."""
        self.seconds = seconds
        if self._since is not None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop counting time."""
        self.seconds, self._since = self.elapsed, None

    @property
    def elapsed(self) -> float:
        """Training seconds so far."""
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    @property
    def progress(self) -> float:
        """Share of the stage that has passed; 1 or more when it is over."""
        return self.progress_at(self.elapsed)

    def progress_at(self, seconds: float) -> float:
        """The same, had so many training seconds passed, by the clock that counts for all."""
        if self.total_steps is not None:
            return self.steps / self.total_steps
        assert self.total_seconds is not None
        return seconds / self.total_seconds

    @property
    def images_per_second(self) -> float:
        """Training images over training seconds; 0 before the first step."""
        return self.images / self.elapsed if self.elapsed > 0 else 0.0

    def state_dict(self) -> dict[str, float | int]:
        """What has passed, for a checkpoint."""
        return {"steps": self.steps, "images": self.images, "seconds": self.elapsed}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go on from `state_dict()`; the lengths are the recipe's."""
        self.steps, self.images, self.seconds = int(state["steps"]), int(state["images"]), float(state["seconds"])
