"""A stage under way: its parts, and what a checkpoint in its middle has to hold of them."""

import copy
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metricface.distributed import gather_plain, rank, world_size
from metricface.heads.reshard import own_optimizer, sharded_parameters, whole_optimizer, whole_state
from metricface.training import assemble, batches, ranks
from metricface.training.alarms import Alarms
from metricface.training.averaging import WeightAverage
from metricface.training.look_alikes import LookAlikeTables
from metricface.training.objective import SumObjective
from metricface.training.people import People
from metricface.training.recipe import Recipe, Stage, budget_seconds
from metricface.training.schedules import Clock
from metricface.training.update import drawing_from

# Fields of a StageRun that a checkpoint holds as they are.
_PLAIN = ("overflows", "overflows_in_a_row", "rate_factor", "back_at", "looks", "ended")


@dataclass
class StageRun:
    """A stage under way: everything that a checkpoint in its middle has to hold, beside the trunk."""

    stage: Stage
    objective: SumObjective
    optimizer: Optimizer
    sampler: batches.Sampler
    clock: Clock
    augmenting: torch.Generator
    drawing: list[Tensor]  # where the objective's draws stand, on every rank alike
    precision: torch.dtype
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    look_alikes: LookAlikeTables | None
    alarms: Alarms
    order: Tensor | None = None  # of the rows of all ranks, joined, as one process would have them; none: as they are
    overflows: int = 0  # steps that were left out since their gradient in float16 overflowed
    overflows_in_a_row: int = 0
    rate_factor: float = 1.0  # of the learning rate, below 1 once the stage has gone back to its start
    back_at: float = 0.0  # how far it had come then
    looks: int = 0  # how many of the shares at which it is watched have passed
    best: dict[str, Any] | None = None  # the best seen then: `weights`, `objective`, with `when` and `figure`
    ended: bool = False  # before its time
    objective_at_start: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def sharded(self) -> list[nn.Parameter]:
        """Of the objective's parameters those that are classes of this rank."""
        return sharded_parameters(self.objective)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only; on the first rank whole, as one process would have it."""
        return {
            "objective": whole_state(self.objective.state_dict()),
            "optimizer": whole_optimizer(self.optimizer, self.objective),
            "sampler": self.sampler.state_dict(),
            "clock": self.clock.state_dict(),
            "augmenting": ranks.of_all(self.augmenting.get_state()),
            "drawing": ranks.of_all(self.drawing),
            "scaler": self.scaler.state_dict(),
            "alarms": self.alarms.state_dict(),
            "best": self.best and self.best | {"objective": whole_state(self.best["objective"])},
            "average": None if self.average is None else self.average.state_dict(),
            "objective_at_start": whole_state(self.objective_at_start),
            **{name: getattr(self, name) for name in _PLAIN},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken, on this number of ranks or another."""
        if state["objective_at_start"]:
            self.objective.load_state_dict(state["objective_at_start"])
            self.mark_start()  # of this rank's classes alone
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(own_optimizer(state["optimizer"], self.optimizer, self.objective))
        self.sampler.load_state_dict(state["sampler"])
        self.clock.load_state_dict(state["clock"])
        if len(state["augmenting"]) == world_size():  # another number of ranks changes its images in its own way
            self.augmenting.set_state(state["augmenting"][rank()].cpu())
        own = rank() if len(state["drawing"]) == world_size() else 0
        self.drawing = [drawn.cpu() for drawn in state["drawing"][own]]
        self.scaler.load_state_dict(state["scaler"])
        self.alarms.load_state_dict(state["alarms"])
        self.best = state["best"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for name in _PLAIN:
            setattr(self, name, state[name])

    @property
    def best_figure(self) -> float:
        """Of the best weights seen on the way."""
        return -math.inf if self.best is None else float(self.best["figure"])

    def mark_start(self) -> None:
        """Remember the objective as it is, to go back to it."""
        if self.stage.watch.on_regression == "go_back":
            self.objective_at_start = copy.deepcopy(self.objective.state_dict())

    def go_back(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Begin again from these weights of the trunk and the objective as marked, at a lower learning rate."""
        model.load_state_dict(weights)
        self.objective.load_state_dict(self.objective_at_start)
        self.optimizer.state.clear()
        self.rate_factor *= self.stage.watch.factor
        self.back_at = ranks.from_first(self.clock.progress)
        if self.average is not None:
            self.average = WeightAverage(model, self.average.decay)


def begin(index: int, recipe: Recipe, people: People, model: nn.Module, device: torch.device) -> StageRun:
    """Make a stage's own sampler, objective and optimiser; the trunk goes on from the stage before."""
    stage = recipe.stages[index]
    seed = recipe.seed + 1000 * index
    sampler = batches.sampler(stage, people.training, seed, rank=rank(), world_size=world_size())
    before = assemble.faded(recipe, index)
    drawing = _drawing(seed, device)
    with drawing_from(drawing, device):  # not from where this rank's generators stand: on other ranks it is elsewhere
        objective = assemble.objective(stage, recipe, len(people.training.identities), sampler, before).to(device)
    assemble.set_learning(stage, model)
    precision = assemble.precision(recipe.precision, device)
    return StageRun(
        stage=stage,
        objective=objective,
        optimizer=assemble.optimizer(stage, model, objective),
        sampler=sampler,
        clock=_clock(stage, recipe, len(sampler)),
        augmenting=torch.Generator(device).manual_seed(seed + 7919 * rank()),
        drawing=drawing,
        precision=precision,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        average=None if stage.average is None else WeightAverage(model, stage.average),
        look_alikes=batches.look_alikes(stage, sampler, people.training, recipe.data.workers, device),
        alarms=Alarms(stage.name, objective),
        order=_order(sampler, device) if recipe.mining == "joined" else None,
    )


def _order(sampler: batches.Sampler, device: torch.device) -> Tensor | None:
    """Of the rows of all ranks, one rank after the other, which is first, second, ... in a batch of one process.

    So that draws and memories, which follow the rows, are those of one process.
    """
    places = sampler.places()
    if places is None or world_size() == 1:
        return None
    return gather_plain(torch.from_numpy(places)).argsort().to(device)


def _drawing(seed: int, device: torch.device) -> list[Tensor]:
    generators = [torch.Generator(), *([torch.Generator(device)] if device.type == "cuda" else [])]
    # The trunk's weights are drawn from the seed itself.
    return [generator.manual_seed(seed + 500).get_state() for generator in generators]


def _clock(stage: Stage, recipe: Recipe, batches: int) -> Clock:
    if recipe.budget is not None:
        shares = sum(other.share for other in recipe.stages)
        return Clock(total_seconds=budget_seconds(recipe.budget) * stage.share / shares)
    if stage.steps is not None:
        return Clock(total_steps=stage.steps)
    assert stage.epochs is not None
    return Clock(total_steps=max(1, round(stage.epochs * batches)))
