"""How far a stage has come, and the learning rate, weights and margins that belong there."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Shape = Literal["cosine", "linear", "constant"]
Curve = Literal["ramp", "anneal", "step"]


def learning_rate(progress: float, *, peak: float, warmup: float, shape: Shape) -> float:
    """Learning rate at a share `progress` in [0, 1] of a stage.

    Rises linearly from 1% of `peak` over the first `warmup` share (so that a fresh objective cannot shock a trained
    trunk), then falls along half a cosine or a line to 1% of `peak`, or stays. Progress beyond 1 counts as 1.
    """
    progress = min(progress, 1.0)
    if progress < warmup:
        return peak * (0.01 + 0.99 * progress / warmup)
    if shape == "constant":
        return peak
    left = 1.0 - (progress - warmup) / (1.0 - warmup)  # 1 at the peak, 0 at the end
    fall = 0.5 - 0.5 * math.cos(math.pi * left) if shape == "cosine" else left
    return peak * (0.01 + 0.99 * fall)


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
        if self.total_steps is not None:
            return self.steps / self.total_steps
        assert self.total_seconds is not None
        return self.elapsed / self.total_seconds

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
