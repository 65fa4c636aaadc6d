"""What goes wrong in training without an error: embeddings collapse, or mining finds nothing to learn from."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from metricface.training.objective import MinedObjective, SumObjective

PATIENCE = 3  # logged steps in a row before a warning
STARVED = 0.01  # share of active triplets below which a batch teaches hardly anything
CLOSE = 0.02  # relative, of a loss to the value it has where all distances are equal
COLLAPSED = 0.05  # spread of unit embeddings, 1 - length of their mean
FALLEN = 0.25  # of the spread that the stage began with


class Alarms:
    """Looks at the figures of a stage as they are logged, and says in words what they mean; each thing once.

    name: of the stage. objective: what it minimises.
    """

    def __init__(self, name: str, objective: SumObjective) -> None:
        self._name = name
        self._mined = {part: made for part, made in objective.parts.items() if isinstance(made, MinedObjective)}
        self._first = next(iter(objective.parts))
        self._several = len(objective.parts) > 1
        self._in_a_row: dict[str, int] = {}
        self._spread: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """What it has seen, for a checkpoint."""
        return {"in_a_row": dict(self._in_a_row), "spread": self._spread}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._in_a_row, self._spread = dict(state["in_a_row"]), state["spread"]

    def see(self, scalars: Mapping[str, float]) -> list[str]:
        """What to warn of at this logged step. scalars: as on TensorBoard, without the stage's name; with `loss`."""
        found: dict[str, tuple[bool, str]] = {}
        for part, made in self._mined.items():
            prefix = "" if part == self._first else f"{part}/"
            loss = scalars.get(f"term/{part}" if self._several else "loss", math.nan)
            mining = {key: scalars.get(f"{prefix}mining/{key}", math.nan) for key in _SEEN}
            found |= self._of_part(part, _level(made.loss), loss, mining)
        spread = scalars.get("embedding/spread", math.nan)
        if self._spread is None:
            self._spread = spread
        found["collapse"] = (
            spread < max(COLLAPSED, FALLEN * self._spread),
            f"Stage {self._name!r}: the embeddings are collapsing to one point (spread {spread:.3f}, at its first step "
            f"{self._spread:.3f}). {self._remedy()}",
        )
        return [text for key, (bad, text) in found.items() if self._at_last(key, bad)]

    def _of_part(
        self, part: str, level: float | None, loss: float, mining: Mapping[str, float]
    ) -> dict[str, tuple[bool, str]]:
        near = level is not None and abs(loss - level) <= CLOSE * level
        equal = abs(mining["d_an_mean"] - mining["d_ap_mean"]) <= CLOSE * mining["d_an_mean"]
        starved = mining["active_share"] < STARVED or mining["triplets"] == 0
        what = f"Stage {self._name!r}, {part}"
        found = f"active share {mining['active_share']:.1%} of {mining['triplets']:,.0f} triplets"
        if mining["triplets"] == 0:
            found = "no triplets"
        return {
            f"{part} stuck": (
                near and equal,
                f"{what}: the loss stands at {loss:.3f}, its value where positives are as far as negatives. "
                f"{self._remedy()}",
            ),
            f"{part} starved": (
                starved,
                f"{what}: mining finds nothing to learn from ({found}). Use a harder miner (BatchHardMiner, "
                "DistanceWeightedMiner), batches of more identities or of look-alikes (LookAlikeBatchSampler), or a "
                "larger margin.",
            ),
        }

    def _at_last(self, key: str, bad: bool) -> bool:
        """Whether it has been bad often enough in a row, just now."""
        self._in_a_row[key] = self._in_a_row.get(key, 0) + 1 if bad else min(self._in_a_row.get(key, 0), 0)
        if self._in_a_row[key] < PATIENCE:
            return False
        self._in_a_row[key] = -(10**9)  # said once
        return True

    def _remedy(self) -> str:
        return (
            f"Lower stages.{self._name}.learning_rate or lengthen its warmup, mine semi-hard negatives in place of the "
            "hardest (SemiHardMiner), or train longer on softmax before."
        )


_SEEN = ("active_share", "triplets", "d_ap_mean", "d_an_mean")


def _level(loss: nn.Module) -> float | None:
    """The loss of triplets whose two distances are equal; none where it has no such value. A schedule may change it."""
    if not type(loss).__name__.endswith("TripletLoss") or getattr(loss, "reduction", "mean") == "sum":
        return None
    margin = getattr(loss, "margin", 0.0)
    return math.log(2.0) if margin == "soft" else float(margin) or None
