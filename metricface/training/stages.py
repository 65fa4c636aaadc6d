"""One stage of training: from the weights it is given to the weights it leaves, in steps that can be interrupted."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Never

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from metricface.data.augment import augment
from metricface.data.images import ImageBatch
from metricface.diagnostics import embedding_statistics
from metricface.heads.base import Head
from metricface.losses import CenterLoss, ContrastiveCenterLoss
from metricface.training import assemble, batches
from metricface.training.held_out import embed
from metricface.training.look_alikes import ClassWeights, LookAlikeTables, NoTableError
from metricface.training.objective import SumObjective
from metricface.training.people import People
from metricface.training.recipe import Recipe, Stage, budget_seconds
from metricface.training.schedules import Clock, learning_rate

Report = Callable[[int, dict[str, float]], None]


class TrainingDivergedError(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass
class StageRun:
    """A stage under way: everything that a checkpoint in its middle has to hold, beside the trunk."""

    stage: Stage
    objective: SumObjective
    optimizer: Optimizer
    sampler: batches.Sampler
    clock: Clock
    augmenting: torch.Generator
    precision: torch.dtype
    look_alikes: LookAlikeTables | None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "clock": self.clock.state_dict(),
            "augmenting": self.augmenting.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken."""
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.clock.load_state_dict(state["clock"])
        self.augmenting.set_state(state["augmenting"].cpu())


def begin(index: int, recipe: Recipe, people: People, model: nn.Module, device: torch.device) -> StageRun:
    """Make a stage's own sampler, objective and optimiser; the trunk goes on from the stage before."""
    stage = recipe.stages[index]
    seed = recipe.seed + 1000 * index
    sampler = batches.sampler(stage, people.training, seed)
    objective = assemble.objective(stage, recipe, len(people.training.identities), sampler).to(device)
    return StageRun(
        stage=stage,
        objective=objective,
        optimizer=assemble.optimizer(stage, model, objective),
        sampler=sampler,
        clock=_clock(stage, recipe, len(sampler)),
        augmenting=torch.Generator(device).manual_seed(seed),
        precision=assemble.precision(recipe.precision, device),
        look_alikes=batches.look_alikes(stage, sampler, people.training, recipe.data.workers, device),
    )


def start_from_class_means(run: StageRun, people: People, model: nn.Module, device: torch.device) -> None:
    """Give the stage's heads and centres the mean embedding of each training person, under the network as it stands.

    Images are embedded without augmentation, in evaluation mode, before the stage's clock starts.
    """
    embeddings = torch.from_numpy(embed(model, people.training, device, unit=False))  # (N, D), raw, on the CPU
    labels = torch.from_numpy(people.training.labels)  # (N,)
    for part in run.objective.modules():
        if isinstance(part, Head):
            part.class_weights_from(embeddings, labels)
        elif isinstance(part, CenterLoss | ContrastiveCenterLoss):
            part.centers_from(embeddings.to(device), labels)


def find_look_alikes(run: StageRun, model: nn.Module, weights: ClassWeights | None) -> None:
    """Compute the table of look-alikes a stage begins with, if it needs one; its time counts as training.

    weights: of the last stage that had a head.
    """
    if run.look_alikes is not None:
        run.clock.start()
        try:
            run.look_alikes.first(model, class_weights(run) or weights)
        except NoTableError as error:
            raise _without_table(run, error) from error
        run.clock.pause()


def class_weights(run: StageRun) -> ClassWeights | None:
    """The class vectors of the stage's head, or of the first of its heads."""
    heads = [part for part in run.objective.modules() if isinstance(part, Head)]
    return ClassWeights(heads[0].weight.detach(), heads[0].vectors_per_class) if heads else None


def train(
    run: StageRun,
    recipe: Recipe,
    people: People,
    model: nn.Module,
    *,
    device: torch.device,
    stopped: Callable[[], bool],
    report: Report,
    save: Callable[[], None],
    class_vectors: ClassWeights | None = None,
) -> None:
    """Take steps until the stage is over or `stopped()`; call `report` and `save` as often as the recipe says.

    class_vectors: of an earlier stage's head, for look-alikes that are found by them.
    Raises TrainingDivergedError when the loss is not finite, before anything of it can reach a checkpoint.
    """
    stage, clock = run.stage, run.clock
    loader = batches.loader(people.training, run.sampler, 0 if people.in_memory else recipe.data.workers)
    model.train()
    if stage.batch_norm == "frozen":
        freeze_batch_norm(model)
    saved_at, bar = clock.elapsed, _bar(run)
    endless = _endless(loader)
    tables = run.look_alikes
    clock.start()
    with tables or contextlib.nullcontext():
        while clock.progress < 1.0 and not stopped():
            batch = _next(endless, run)  # not before the test above: a batch that was pulled counts as trained on
            rate = _set_learning_rate(run)
            numbers = run.objective.follow(clock.progress)
            loss, embeddings, labels = _step(run, recipe, people, model, batch, device)
            clock.steps += 1
            clock.images += len(labels)
            _advance(bar, clock)
            if tables is not None:
                tables.after(clock.steps, model, lambda: class_weights(run) or class_vectors, clock.total_steps)
            if clock.steps % recipe.log_every == 0 or clock.steps == 1:
                value = _finite(loss, run)
                scalars = _scalars(run, embeddings, labels)
                scalars |= {f"schedule/{key}": number for key, number in numbers.items()}
                report(clock.steps, {"loss": value, "learning_rate": rate, **scalars})
                bar.set_postfix_str(f"loss {value:.3f}, {clock.images_per_second:,.0f} images/s", refresh=False)
            if clock.elapsed - saved_at >= recipe.checkpoint_every:
                if tables is not None:
                    tables.wait()
                clock.pause()
                _check_weights(run, model)
                save()
                saved_at = clock.elapsed
                clock.start()
        if tables is not None:
            tables.wait()  # the checkpoint that follows holds it
    clock.pause()
    bar.close()
    _check_weights(run, model)


def _next(endless: Iterator[ImageBatch], run: StageRun) -> ImageBatch:
    try:
        return next(endless)
    except NoTableError as error:
        raise _without_table(run, error) from error


def _without_table(run: StageRun, error: NoTableError) -> Exception:
    """What a run stops with that cannot find look-alikes."""
    if error.diverged:
        return _diverged(run, f"look-alikes cannot be found ({error})")
    return OSError(
        f"Stage {run.stage.name!r}: look-alikes cannot be found at step {run.clock.steps:,}: {error}. What was trained "
        "is saved; --resume goes on with the table before."
    )


def freeze_batch_norm(model: nn.Module) -> None:
    """Let batch norms normalise by the statistics they have, and keep these; their weights go on learning."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _step(
    run: StageRun, recipe: Recipe, people: People, model: nn.Module, batch: ImageBatch, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    images = augment(batch.images.to(device, non_blocking=True), recipe.data.augmentation, run.augmenting)
    labels = batch.labels.to(device, non_blocking=True)
    with assemble.autocast(run.precision, device):
        embeddings = model(images).float()  # (B, D), raw
    if not bool(torch.isfinite(embeddings).all()):
        raise _diverged(run, "embeddings are not finite")
    try:
        loss = run.objective(embeddings, labels)
    except ValueError as error:  # rows too long to be squared, for instance: finite, and beyond use
        raise _diverged(run, f"objective refuses its embeddings ({error})") from error
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if run.stage.clip_norm is not None:
        nn.utils.clip_grad_norm_([*model.parameters(), *run.objective.parameters()], run.stage.clip_norm)
    run.optimizer.step()
    return loss.detach(), embeddings, labels


def _scalars(run: StageRun, embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """What the objective and the embeddings look like; NaN where a batch has nothing to average is left out."""
    found = run.objective.statistics(embeddings, labels)
    found |= {f"embedding/{name}": value for name, value in embedding_statistics(embeddings.detach()).items()}
    values = {name: float(value) for name, value in found.items()}
    if run.look_alikes is not None:
        values |= run.look_alikes.scalars(run.clock.steps)
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _set_learning_rate(run: StageRun) -> float:
    stage = run.stage
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.clock.progress, peak=group["peak"], warmup=stage.warmup, shape=stage.schedule)
    rate: float = run.optimizer.param_groups[0]["lr"]
    return rate


def _finite(loss: Tensor, run: StageRun) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise _diverged(run, f"loss is {value}{_by_term(run.objective)}")
    return value


def _by_term(objective: SumObjective) -> str:
    """Which term it was, in a sum of several."""
    values = objective.values if len(objective.parts) > 1 else {}
    told = ", ".join(
        f"{name} is {float(value):.4g} with weight {objective.weights[name]:.4g}" for name, value in values.items()
    )
    return f" ({told})" if told else ""


def _check_weights(run: StageRun, model: nn.Module) -> None:
    """The update after the last finite loss may itself have been infinite."""
    values = [*model.state_dict().values(), *run.objective.parameters(), *run.objective.buffers()]
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise _diverged(run, "weights are not finite")


def _diverged(run: StageRun, what: str) -> TrainingDivergedError:
    name = run.stage.name
    weights = "".join(f", or stages.{name}.plus.{term.name}.weight" for term in run.stage.plus)
    return TrainingDivergedError(
        f"Stage {name!r} has diverged: its {what} at step {run.clock.steps:,} (learning rate "
        f"{run.optimizer.param_groups[0]['lr']:.3g}). The last checkpoint is intact. "
        f"Lower stages.{name}.learning_rate{weights}, lengthen its warmup, or set its clip_norm."
    )


def _clock(stage: Stage, recipe: Recipe, batches: int) -> Clock:
    if recipe.budget is not None:
        shares = sum(other.share for other in recipe.stages)
        return Clock(total_seconds=budget_seconds(recipe.budget) * stage.share / shares)
    if stage.steps is not None:
        return Clock(total_steps=stage.steps)
    assert stage.epochs is not None
    return Clock(total_steps=max(1, round(stage.epochs * batches)))


def _endless(loader: torch.utils.data.DataLoader[ImageBatch]) -> Iterator[ImageBatch]:
    while True:
        yield from loader


def _bar(run: StageRun) -> "tqdm[Never]":
    clock = run.clock
    if clock.total_steps is not None:
        return tqdm(desc=run.stage.name, total=clock.total_steps, initial=clock.steps, unit="step", mininterval=0.5)
    assert clock.total_seconds is not None
    begun = min(clock.elapsed, clock.total_seconds)  # looking for look-alikes may have taken all of it
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f}s [{remaining} left{postfix}]"
    return tqdm(desc=run.stage.name, total=clock.total_seconds, initial=begun, bar_format=form, mininterval=0.5)


def _advance(bar: "tqdm[Never]", clock: Clock) -> None:
    wanted = clock.steps if clock.total_steps is not None else min(clock.elapsed, clock.total_seconds or 0.0)
    bar.update(wanted - bar.n)
