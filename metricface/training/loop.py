"""A whole run, top to bottom: people, network, evaluation, stage after stage, report, exported embedder."""

import copy
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

import metricface
from metricface.atomic import replacing
from metricface.data.images import UnreadableImageError
from metricface.distributed import rank, world_size
from metricface.heads.partial_fc import heads_in
from metricface.models.embedder import Embedder
from metricface.training import assemble, batches, checkpoint, comparison, contradictions, ranks, stage_run, stages
from metricface.training import recipe as recipes
from metricface.training.held_out import HeldOut
from metricface.training.interrupt import StoppedError, never
from metricface.training.people import People, gather
from metricface.training.recipe import Recipe
from metricface.training.run import EXPORT, RECIPE, REPORT, Moment, Run
from metricface.training.selection import check_selection, evaluate, keep_best, look
from metricface.training.throughput import bare_images_per_second


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    stopped: Callable[[], bool] = never,
    say: Callable[[str], None] = print,
) -> Run:
    """Train as the recipe says, write everything to `folder`, and return what became of it.

    folder: gets the recipe, TensorBoard events, checkpoints, and at the end `report.json` and the embedder in `model/`.
    resume: go on from its checkpoint, with the recipe that it was started with. stopped: asked after every step, and
    between batches where images are embedded; where it says so the run saves and returns with `interrupted` set.
    Raises ValueError for a recipe or data that cannot work (before training), or another recipe than the one to go on
    with; OSError where `folder` cannot be written; and TrainingDivergedError where a stage diverges: the report and the
    embedder then hold the best that there was before.
    """
    assemble.check_names(recipe)
    contradictions.check(recipe)
    if resume and (folder / RECIPE).exists():
        saved = recipes.from_dict(yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")))
        comparison.check_same(recipes.as_dict(saved), yaml.safe_load(_as_yaml(recipe)), folder)
    run = _prepare(recipe, folder, say, stopped, resume=resume)
    if resume:
        run.restore(checkpoint.load(folder, say))
    _write(_as_yaml(recipe), folder / RECIPE)  # not before: a run that is not gone on with keeps its own
    try:
        if not run.history:
            check_selection(run, _score_start(run))
            run.save()
        while run.index < len(recipe.stages) and not run.interrupted:
            _stage(run)
    except StoppedError:  # in a pass over images; the last checkpoint is of just before it
        run.interrupted = True
    if not run.interrupted:
        _finish(run)
    return run


def _score_start(run: Run) -> Moment:
    try:
        return evaluate(run, "start")
    except StoppedError:
        run.save()
        raise


def _prepare(
    recipe: Recipe, folder: Path, say: Callable[[str], None], stopped: Callable[[], bool], *, resume: bool
) -> Run:
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device = assemble.device(recipe.device)
    people = gather(recipe.data, recipe.seed)
    for line in people.describe():
        say(line)
    assemble.rehearse(recipe, people.training)
    torch.manual_seed(recipe.seed)
    start = None if resume else assemble.start(recipe)  # the checkpoint has weights of its own
    model = assemble.model(recipe, device, start)
    if rank() > 0:  # what networks draw (dropout) differs by rank
        torch.manual_seed(recipe.seed + 104729 * rank())
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"network    {recipe.model.name}, {parameters:,} parameters, on {device} ({torch.get_num_threads()} threads), "
        f"{assemble.precision(recipe.precision, device)}"
    )
    if world_size() > 1:
        say(_about_ranks(recipe))
    held_out = (
        HeldOut("validation", people.validation, seed=recipe.seed),
        HeldOut("test", people.test, people.listed, seed=recipe.seed),
    )
    notes = _about(start, recipe, people)
    for line in notes:
        say(line)
    return Run(recipe, folder, people, device, model, held_out, say, stopped, notes=notes)


def _as_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipes.as_dict(recipe), sort_keys=False, allow_unicode=True)


def _about_ranks(recipe: Recipe) -> str:
    number = world_size()
    if recipe.mining == "joined":
        return f"ranks      {number}; each mines among the images of all"
    return (
        f"ranks      {number}; each mines among its own images: an anchor meets 1/{number} of a batch's negatives, and "
        "positives on its own rank only (mining: joined has them all)"
    )


def _about(start: Embedder | None, recipe: Recipe, people: People) -> list[str]:
    """A warning where the network starts from weights that may know the people it is scored on."""
    if start is None or start.description.get("people") == people.digest():
        return []
    return [
        f"The network started from {recipe.model.start}, which was not trained on just this division of people: some "
        "that are scored here may have been trained on there."
    ]


def _stage(run: Run) -> None:
    """Train one stage and keep the better of its start and its end."""
    under_way = stage_run.begin(run.index, run.recipe, run.people, run.model, run.device)
    try:
        _set_out(run, under_way)
        _train(run, under_way)
        if not run.interrupted:
            _end(run, under_way)
    except stages.TrainingDivergedError:
        _give_up(run, under_way)
        raise


def _set_out(run: Run, under_way: stage_run.StageRun) -> None:
    """Bring a stage to where it goes on: where a checkpoint left it, or at its beginning."""
    stage = under_way.stage
    if stage.fade is not None:
        under_way.objective.take_over(run.objective_before)
    if run.resumed is not None:
        under_way.load_state_dict(run.resumed)
        run.resumed = None  # as large as all that it has been copied to
        run.say(f"Going on with stage {stage.name!r} at step {under_way.clock.steps:,}.")
    else:
        if stage.fade is not None and run.objective_before is None:
            run.note(f"Stage {stage.name!r} has nothing to fade from: the stage before it was not kept.")
        run.start_weights = _copy(run.model)
        run.say(f"stage {stage.name}: {batches.describe(under_way.sampler)}")
        _start_heads(run, under_way)
        under_way.mark_start()
        stages.find_look_alikes(under_way, run.model, run.class_vectors, run.stopped)


def _start_heads(run: Run, under_way: stage_run.StageRun) -> None:
    stage, before = under_way.stage, run.objective_before
    if stage.keep_head and not heads_in(under_way.objective.own):
        return
    if stage.keep_head and before is not None:
        under_way.objective.go_on_with(before, stage.kept_heads(run.recipe.stages[run.index - 1]))
        if stage.fade is None:
            run.objective_before = None
        return
    if stage.keep_head:
        run.note(f"Stage {stage.name!r}: the stage before it was not kept; heads start from class means.")
    if stage.class_means or stage.keep_head:
        stages.start_from_class_means(under_way, run.people, run.model, run.device, run.stopped)


def _train(run: Run, under_way: stage_run.StageRun) -> None:
    """Take the steps of a stage, and save where it has come to; `run.interrupted` says whether it was stopped."""
    stage = under_way.stage
    steps_before = run.step - under_way.clock.steps

    def report(step: int, scalars: dict[str, float]) -> None:
        if run.board is not None:
            run.board.scalars(steps_before + step, {f"{stage.name}/{name}": value for name, value in scalars.items()})

    def save() -> None:
        run.step = steps_before + under_way.clock.steps
        run.save(under_way)

    def looked_at() -> bool:
        run.step = steps_before + under_way.clock.steps
        answer = look(run, under_way)
        if answer == "go back":
            under_way.go_back(run.model, run.start_weights)
        return answer == "stop"

    try:
        stages.train(
            under_way,
            run.recipe,
            run.people,
            run.model,
            device=run.device,
            stopped=run.stopped,
            report=report,
            save=save,
            warn=run.note,
            look=looked_at if run.index > 0 or run.recipe.model.start is not None else None,
            class_vectors=run.class_vectors,
        )
    except (UnreadableImageError, stages.NoLookAlikesError, StoppedError):  # on all ranks, and what was trained is good
        stages.check_weights(under_way, run.model)
        save()
        raise
    except OSError as error:
        # Other ranks, which know nothing of it, would be waited for.
        if world_size() == 1 and not isinstance(error, checkpoint.NotWrittenError):
            stages.check_weights(under_way, run.model)
            save()
        raise
    save()  # before evaluation, which can be interrupted
    run.interrupted = ranks.any_of(run.stopped())


def _end(run: Run, under_way: stage_run.StageRun) -> None:
    """Report on a stage, and keep the best of its weights."""
    _note_speed(run, under_way)
    _note_failed_tables(run, under_way)
    run.objective_before = None
    if keep_best(run, under_way):
        later = run.recipe.stages[run.index + 1 :]
        if any(other.look_alikes is not None and other.look_alikes.source == "head" for other in later):
            run.class_vectors = stages.class_weights(under_way) or run.class_vectors
        if later and (later[0].fade is not None or later[0].keep_head):
            run.objective_before = copy.deepcopy(under_way.objective.state_dict())
    run.index += 1
    run.save()


def _give_up(run: Run, under_way: stage_run.StageRun) -> None:
    """After a stage that diverged: report and export the best weights from before that, if there are trained ones."""
    name, best = under_way.stage.name, under_way.best
    if best is not None:
        run.model.load_state_dict(best["weights"])
        evaluate(run, best["when"])
        run.notes.append(f"Stage {name!r} diverged; its best weights from before that ({best['when']}) were kept.")
    elif run.index > 0 or run.recipe.model.start is not None:
        run.model.load_state_dict(run.start_weights)
        run.notes.append(f"Stage {name!r} diverged; the weights from before it were kept.")
    else:
        return
    _finish(run)


def _note_speed(run: Run, under_way: stage_run.StageRun) -> None:
    clock = under_way.clock
    if clock.steps == 0:
        run.note(f"Stage {under_way.stage.name!r} took no step: nothing of its budget was left.")
    batch = round(clock.images / clock.steps) if clock.steps else assemble.TRIAL_CLASSES
    at_once = max(1, batch // world_size())  # of a rank, and no more than the network has had
    bare = world_size() * bare_images_per_second(
        run.model,
        min(at_once, under_way.stage.chunk or at_once),
        run.people.training.preprocessing.shape,
        run.device,
        under_way.precision,
        run.stopped,
    )
    run.stage_reports.append(
        {
            "name": under_way.stage.name,
            "steps": clock.steps,
            "images": clock.images,
            "seconds": round(clock.elapsed, 2),
            "images_per_second": round(clock.images_per_second, 1),
            "bare_images_per_second": round(bare, 1),
        }
        | ({"overflows": under_way.overflows} if under_way.scaler.is_enabled() else {})
    )
    run.say(
        f"{under_way.stage.name}: {clock.steps:,} steps, {clock.images_per_second:,.0f} images/s; the bare forward and "
        f"backward pass of the network {bare:,.0f} ({clock.images_per_second / bare:.2f} of it)"
    )


def _note_failed_tables(run: Run, under_way: stage_run.StageRun) -> None:
    failures = [] if under_way.look_alikes is None else under_way.look_alikes.failures
    if failures:
        run.note(
            f"Stage {under_way.stage.name!r}: {len(failures)} tables of look-alikes could not be computed, the last "
            f"because: {failures[-1]}"
        )


def _finish(run: Run) -> None:
    kept = [moment for moment in run.history if moment.kept][-1]
    report = {
        "recipe": recipes.as_dict(run.recipe),
        "people": {
            name: {"people": len(images.identities), "images": len(images)}
            for name, images in run.people.by_name().items()
        },
        "skipped": [file._asdict() for file in run.people.skipped],
        "overlap": list(run.people.overlap),
        "filter": None if run.people.filtered is None else run.people.filtered._asdict(),
        "stages": run.stage_reports,
        "history": [vars(moment) for moment in run.history],
        "final": {"when": kept.when, "validation": kept.validation, "test": kept.test},
        "notes": run.notes,
        "machine": {
            "device": str(run.device),
            "threads": torch.get_num_threads(),
            "precision": str(assemble.precision(run.recipe.precision, run.device)),
        },
        "versions": {
            "metricface": metricface.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    if not ranks.speaks():
        return
    _write(json.dumps(report, indent=2) + "\n", run.folder / REPORT)
    description = {
        "recipe": report["recipe"],
        "people": run.people.digest(),
        # Of cosines, chosen on validation people: the most accurate, and those for a share of false accepts.
        "thresholds": {
            name.removeprefix("threshold_at_") if name != "threshold" else "accuracy": value
            for name, value in kept.validation.items()
            if name.startswith("threshold") and value is not None
        },
        "figures": kept.test,
    }
    Embedder(run.model, run.people.training.preprocessing, description).save(run.folder / EXPORT)
    if run.board is not None:
        run.board.close()


def _write(text: str, path: Path) -> None:
    if not ranks.speaks():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
