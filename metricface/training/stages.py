"""The steps of a stage: from the weights it is given to the weights it leaves; they can be interrupted."""

import bisect
import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Never

import torch
from torch import Tensor, nn
from tqdm import tqdm

from metricface.data.augment import augment
from metricface.data.images import ImageBatch, UnreadableImageError
from metricface.diagnostics import embedding_statistics
from metricface.distributed import gather, gather_plain, world_size
from metricface.heads.partial_fc import PartialFC, heads_in
from metricface.losses import CenterLoss, ContrastiveCenterLoss
from metricface.training import assemble, batches, ranks
from metricface.training.held_out import UNREADABLE_ELSEWHERE, embed
from metricface.training.interrupt import never
from metricface.training.look_alikes import ClassWeights, NoTableError
from metricface.training.objective import SumObjective
from metricface.training.people import People
from metricface.training.recipe import Recipe
from metricface.training.schedules import Clock, learning_rate
from metricface.training.stage_run import StageRun
from metricface.training.throughput import Waiting
from metricface.training.update import apply_gradient, drawing_from
from metricface.training.update import embed as embed_batch

Report = Callable[[int, dict[str, float]], None]
# Steps between two exchanges of what should be alike on all ranks, and that rounding may have parted.
ALIKE_EVERY = 20
# Overflows in a row after which float16 is given up: from 65,536 on, the scale has then come below 1.
OVERFLOWS = 25


class TrainingDivergedError(RuntimeError):
    """The loss is no longer a finite number."""


class NoLookAlikesError(OSError):
    """A table of look-alikes could not be computed, and no rank can go on without it."""


def start_from_class_means(
    run: StageRun, people: People, model: nn.Module, device: torch.device, stopped: Callable[[], bool] = never
) -> None:
    """Give the stage's heads and centres the mean embedding of each training person, under the network as it stands.

    Images are embedded without augmentation, in evaluation mode, before the stage's clock starts; ranks share the work.
    Raises StoppedError where `stopped()` says so on the way.
    """
    found = embed(model, people.training, device, unit=False, shared=True, stopped=stopped)
    embeddings = torch.from_numpy(found)  # (N, D), raw, on the CPU
    labels = torch.from_numpy(people.training.labels)  # (N,)
    for head in heads_in(run.objective.own):
        head.class_weights_from(embeddings, labels)
    for part in run.objective.own.modules():
        if isinstance(part, CenterLoss | ContrastiveCenterLoss):
            part.centers_from(embeddings.to(device), labels)
    ranks.take_from_first(run.objective)


def find_look_alikes(
    run: StageRun, model: nn.Module, weights: ClassWeights | None, stopped: Callable[[], bool] = never
) -> None:
    """Compute the table of look-alikes a stage begins with, if it needs one; its time counts as training.

    weights: of the last stage that had a head; they come before those of a head that has just been drawn. Raises
    StoppedError where `stopped()` says so on the way.
    """
    if run.look_alikes is not None:
        own = class_weights(run) if run.stage.keep_head or run.stage.class_means else None
        run.clock.start()
        try:
            run.look_alikes.first(model, own or weights, stopped)
        except NoTableError as error:
            raise _without_table(run, error) from error
        run.clock.pause()


def class_weights(run: StageRun) -> ClassWeights | None:
    """The class vectors of the stage's own head, or of the first of its heads; all ranks must ask."""
    found = heads_in(run.objective.own)
    if not found:
        return None
    if isinstance(found[0], PartialFC):
        return ClassWeights(found[0].class_vectors(), found[0].head.vectors_per_class)
    return ClassWeights(found[0].weight.detach(), found[0].vectors_per_class)


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
    warn: Callable[[str], None],
    look: Callable[[], bool] | None = None,
    class_vectors: ClassWeights | None = None,
) -> None:
    """Take steps until the stage is over or `stopped()`; call `report` and `save` as often as the recipe says.

    warn: gets what the logged figures say is going wrong. look: scores held-out people where the stage's watch says,
    and returns whether the stage ends there; what it raises ends the steps as well.
    class_vectors: of an earlier stage's head, for look-alikes that are found by them.
    Raises TrainingDivergedError when the loss is not finite, before anything of it can reach a checkpoint.
    """
    clock = run.clock
    loader = batches.loader(people.training, run.sampler, 0 if people.in_memory else recipe.data.workers, device)
    network = assemble.compiled(model, people.training.preprocessing.shape, device) if recipe.compile else model
    network = ranks.data_parallel(network, device)
    endless, bar = _endless(loader), _bar(run)
    tables, saved_at = run.look_alikes, math.nan
    waiting = Waiting(clock.elapsed)
    clock.start()
    with tables or contextlib.nullcontext():
        while (now := _now(run, stopped)) is not None:
            looks = bisect.bisect_right(run.stage.watch.at, now.progress)  # a step may pass several of these shares
            if look is not None and looks > run.looks:
                clock.pause()
                run.ended = look()
                run.looks = looks  # not before: a look that was left is made anew on resume
                clock.start()
                if run.ended:
                    break
            if math.isnan(saved_at):
                saved_at = now.seconds
            elif now.seconds - saved_at >= recipe.checkpoint_every:
                if tables is not None:
                    tables.wait()
                clock.pause()
                check_weights(run, model)
                save()
                saved_at = now.seconds
                clock.start()
            with waiting:
                # Not before the test above: a batch that was pulled counts as trained on.
                batch = _next(endless, run, exchange=not people.in_memory)
            rate = _set_learning_rate(run, now.progress)
            numbers = run.objective.follow(now.progress)
            loss, embeddings, labels = _step(run, recipe, network, model, batch, device)
            clock.steps += 1
            clock.images += len(labels) if recipe.mining == "joined" else ranks.total(len(labels))
            _advance(bar, clock)
            if tables is not None:
                tables.after(clock.steps, model, lambda: class_weights(run) or class_vectors, clock.total_steps)
            if clock.steps % ALIKE_EVERY == 0:
                ranks.take_from_first(run.objective)
            if clock.steps % recipe.log_every == 0 or clock.steps == 1:
                value = _finite(ranks.mean(loss), run)
                scalars = _scalars(run, embeddings, labels)
                scalars |= {f"schedule/{key}": number for key, number in numbers.items()}
                shown = {
                    "loss": value,
                    "learning_rate": rate,
                    "loader_wait_share": waiting.share(clock.elapsed),
                    **scalars,
                }
                report(clock.steps, shown)
                for warning in run.alarms.see(shown):
                    warn(warning)
                bar.set_postfix_str(f"loss {value:.3f}, {clock.images_per_second:,.0f} images/s", refresh=False)
        if tables is not None:
            tables.wait()  # the checkpoint that follows holds it
    clock.pause()
    bar.close()
    check_weights(run, model)


class _Now(NamedTuple):
    """How far a stage has come, the same on every rank."""

    seconds: float
    progress: float


def _now(run: StageRun, stopped: Callable[[], bool]) -> _Now | None:
    """Where the stage is; None where no further step is to be taken."""
    clock = run.clock
    seconds, stop = ranks.beat(clock.elapsed, stopped())
    if world_size() > 1:
        clock.set(seconds)
    progress = clock.progress_at(seconds)
    return None if stop or run.ended or progress >= 1.0 else _Now(seconds, progress)


def _next(endless: Iterator[ImageBatch], run: StageRun, *, exchange: bool) -> ImageBatch:
    """The next batch, of this rank. exchange: whether a rank may fail alone, which all then learn of."""
    batch, failed = None, None
    try:
        batch = next(endless)
    except NoTableError as error:  # on all ranks
        raise _without_table(run, error) from error
    except UnreadableImageError as error:
        if not exchange:
            raise
        failed = error
    if exchange:
        ranks.raise_together(failed, UnreadableImageError, UNREADABLE_ELSEWHERE)
    assert batch is not None
    return batch


def _without_table(run: StageRun, error: NoTableError) -> Exception:
    """What a run stops with that cannot find look-alikes."""
    if error.diverged:
        return _diverged(run, f"look-alikes cannot be found ({error})")
    return NoLookAlikesError(
        f"Stage {run.stage.name!r}: look-alikes cannot be found at step {run.clock.steps:,}: {error}. What was trained "
        "is saved; --resume goes on with the table before."
    )


def _step(
    run: StageRun, recipe: Recipe, network: nn.Module, model: nn.Module, batch: ImageBatch, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    images = augment(batch.images.to(device, non_blocking=True), recipe.data.augmentation, run.augmenting)
    labels = batch.labels.to(device, non_blocking=True)
    autocast = partial(assemble.autocast, run.precision, device)
    embedded = embed_batch(network, images, autocast, chunk=run.stage.chunk)
    embeddings = embedded.embeddings
    joined = recipe.mining == "joined"
    if joined:
        embeddings, labels = gather(embeddings, averaged=True), gather_plain(labels)
        if run.order is not None:
            embeddings, labels = embeddings[run.order], labels[run.order]
    broken = not bool(torch.isfinite(embeddings).all())
    if broken if joined else ranks.any_of(broken):
        raise _diverged(run, "embeddings are not finite")
    refused, loss = None, embeddings.new_zeros(())
    try:
        with drawing_from(run.drawing, device):
            loss = run.objective(embeddings, labels)
    except ValueError as error:  # rows too long to be squared, for instance: finite, and beyond use
        refused = error
    if refused is not None if joined else ranks.any_of(refused is not None):
        raise _diverged(run, f"objective refuses its embeddings ({refused or 'on another rank'})") from refused
    taken = apply_gradient(
        loss,
        embedded,
        run.optimizer,
        run.scaler,
        clip_norm=run.stage.clip_norm,
        average=None if joined else run.objective,
        sharded=run.sharded,
    )
    ranks.average_statistics(model)
    if not joined:
        ranks.average_buffers(run.objective)
    _count_overflows(run, taken)
    if taken and run.average is not None:
        run.average.update(model)
    return loss.detach(), embeddings, labels


def _count_overflows(run: StageRun, taken: bool) -> None:
    run.overflows += not taken
    run.overflows_in_a_row = 0 if taken else run.overflows_in_a_row + 1
    if run.overflows_in_a_row >= OVERFLOWS:
        raise _diverged(
            run, f"gradient in float16 has overflowed {OVERFLOWS} times in a row, however small the loss was made"
        )


def _scalars(run: StageRun, embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """What the objective and the embeddings look like; NaN where a batch has nothing to average is left out."""
    found = run.objective.statistics(embeddings, labels)
    found |= {f"embedding/{name}": value for name, value in embedding_statistics(embeddings.detach()).items()}
    values = {name: float(value) for name, value in found.items()}
    if run.look_alikes is not None:
        values |= run.look_alikes.scalars(run.clock.steps)
    if run.scaler.is_enabled():
        values |= {"loss_scale": run.scaler.get_scale(), "overflows": float(run.overflows)}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _set_learning_rate(run: StageRun, progress: float) -> float:
    stage = run.stage
    # After going back the rate rises once more, over as large a share of what is left.
    rising = (1.0 - run.back_at) * stage.warmup if run.back_at else 0.0
    factor = run.rate_factor * (min(1.0, 0.01 + 0.99 * (progress - run.back_at) / rising) if rising else 1.0)
    for group in run.optimizer.param_groups:
        peak = factor * group["peak"]
        group["lr"] = learning_rate(progress, peak=peak, warmup=stage.warmup, decay=stage.schedule)
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


def check_weights(run: StageRun, model: nn.Module) -> None:
    """Raise TrainingDivergedError, on all ranks, where weights are not finite: a checkpoint must not hold them.

    The update after the last finite loss may itself have been infinite, and in the classes of one rank alone.
    """
    values = [*model.state_dict().values(), *run.objective.parameters(), *run.objective.buffers()]
    if ranks.any_of(not all(bool(torch.isfinite(value).all()) for value in values)):
        raise _diverged(run, "weights are not finite")


def _diverged(run: StageRun, what: str) -> TrainingDivergedError:
    name = run.stage.name
    weights = "".join(f", or stages.{name}.plus.{term.name}.weight" for term in run.stage.plus)
    return TrainingDivergedError(
        f"Stage {name!r} has diverged: its {what} at step {run.clock.steps:,} (learning rate "
        f"{run.optimizer.param_groups[0]['lr']:.3g}). The last checkpoint is intact. "
        f"Lower stages.{name}.learning_rate{weights}, lengthen its warmup, or set its clip_norm."
    )


def _endless(loader: torch.utils.data.DataLoader[ImageBatch]) -> Iterator[ImageBatch]:
    while True:
        yield from loader


def _bar(run: StageRun) -> "tqdm[Never]":
    clock = run.clock
    shared: dict[str, Any] = {"desc": run.stage.name, "mininterval": 0.5, "disable": not ranks.speaks()}
    if clock.total_steps is not None:
        return tqdm(total=clock.total_steps, initial=clock.steps, unit="step", **shared)
    assert clock.total_seconds is not None
    begun = min(clock.elapsed, clock.total_seconds)  # looking for look-alikes may have taken all of it
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f}s [{remaining} left{postfix}]"
    return tqdm(total=clock.total_seconds, initial=begun, bar_format=form, **shared)


def _advance(bar: "tqdm[Never]", clock: Clock) -> None:
    wanted = clock.steps if clock.total_steps is not None else min(clock.elapsed, clock.total_seconds or 0.0)
    bar.update(wanted - bar.n)
