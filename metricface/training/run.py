"""A run: what it has come to, and all that a checkpoint holds of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metricface.distributed import rank, world_size
from metricface.heads.reshard import whole_state
from metricface.monitoring.board import Board
from metricface.training import checkpoint, ranks
from metricface.training.held_out import Figures, HeldOut
from metricface.training.interrupt import never
from metricface.training.look_alikes import ClassWeights
from metricface.training.people import People
from metricface.training.recipe import Recipe
from metricface.training.stage_run import StageRun
from metricface.training.update import drawing_state, set_drawing_state

RECIPE = "recipe.yaml"
REPORT = "report.json"
EXPORT = "model"


@dataclass
class Moment:
    """One evaluation of the run, on both held-out sets. kept: these weights went on."""

    when: str
    validation: Figures
    test: Figures
    kept: bool = True


@dataclass
class Run:
    """What a run has come to; `history` and `notes` are what its report says.

    stopped: whether it was asked to stop; `interrupted`: whether it did.
    """

    recipe: Recipe
    folder: Path
    people: People
    device: torch.device
    model: nn.Module
    held_out: tuple[HeldOut, HeldOut]
    say: Callable[[str], None]
    stopped: Callable[[], bool] = never
    index: int = 0
    step: int = 0
    history: list[Moment] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stage_reports: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    class_vectors: ClassWeights | None = None  # of the head of the last kept stage that had one
    resumed: dict[str, Any] | None = None  # what a checkpoint holds of the stage under way, until that is made
    objective_before: dict[str, Tensor] | None = None  # of the last stage, if it was kept and fades out in the next one
    start_weights: dict[str, Tensor] = field(default_factory=dict)
    _board: Board | None = None

    @property
    def board(self) -> Board | None:
        """Where curves go; opened when the first is written, or by `restore`, which knows from which step on.

        None on all ranks but the first.
        """
        if self._board is None and ranks.speaks():
            self._board = Board(self.folder)
        return self._board

    def note(self, text: str) -> None:
        """Say something that the report says, too."""
        self.notes.append(text)
        self.say(text)

    def state_dict(self, under_way: StageRun | None) -> dict[str, Any]:
        """Everything a checkpoint holds."""
        return {
            "people": self.people.digest(),
            "index": self.index,
            "step": self.step,
            "model": self.model.state_dict(),
            "start_weights": self.start_weights,
            "class_vectors": None if self.class_vectors is None else tuple(self.class_vectors),
            "objective_before": None if self.objective_before is None else whole_state(self.objective_before),
            "stage": None if under_way is None else under_way.state_dict(),
            "device": self.device.type,
            "history": [vars(moment) for moment in self.history],
            "notes": self.notes,
            "stage_reports": self.stage_reports,
            "rng": ranks.of_all(drawing_state(self.device)),
        }

    def save(self, under_way: StageRun | None = None) -> None:
        """Write a checkpoint, atomically, and keep the newest few. All ranks must call it."""
        state = self.state_dict(under_way)
        if ranks.speaks():
            checkpoint.save(state, self.folder, kept=self.recipe.checkpoints_kept)

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, but for the stage under way, which `resumed` then has.

        Raises ValueError where the images are not those the run was started with: people once trained on could
        otherwise end up among those that are scored.
        """
        if state["people"] != self.people.digest():
            raise ValueError(
                f"The images have changed since the run in {self.folder} was started, and with them who is trained on "
                "and who is scored. Restore the folders, or start a new run."
            )
        if state["device"] != self.device.type:
            raise ValueError(
                f"The run in {self.folder} was trained on {state['device']}, whose draws cannot go on on "
                f"{self.device.type}. Resume it with --device {state['device']}, or start a new run from its weights."
            )
        self.index, self.step, self.resumed = state["index"], state["step"], state["stage"]
        self.model.load_state_dict(state["model"])
        self.start_weights = state["start_weights"]
        self.class_vectors = None if state["class_vectors"] is None else ClassWeights(*state["class_vectors"])
        self.objective_before = state["objective_before"]
        self.history = [Moment(**moment) for moment in state["history"]]
        self.notes, self.stage_reports = state["notes"], state["stage_reports"]
        if len(state["rng"]) == world_size():  # on another number of ranks networks draw in another way
            set_drawing_state(self.device, tuple(drawn.cpu() for drawn in state["rng"][rank()]))
        self._board = Board(self.folder, after=self.step) if ranks.speaks() else None
