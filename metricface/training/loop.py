"""A whole run, top to bottom: people, network, evaluation, stage after stage, report, exported embedder."""

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import metricface
from metricface.atomic import replacing
from metricface.data.images import UnreadableImageError
from metricface.models.embedder import Embedder
from metricface.monitoring.board import Board
from metricface.training import assemble, batches, checkpoint, contradictions, stages
from metricface.training import recipe as recipes
from metricface.training.held_out import Figures, HeldOut, Scored
from metricface.training.look_alikes import ClassWeights
from metricface.training.people import People, gather
from metricface.training.recipe import Recipe
from metricface.training.throughput import bare_images_per_second

RECIPE = "recipe.yaml"
CHECKPOINT = "checkpoint.pt"
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
    """What a run has come to; `history` and `notes` are what its report says."""

    recipe: Recipe
    folder: Path
    people: People
    device: torch.device
    model: nn.Module
    held_out: tuple[HeldOut, HeldOut]
    say: Callable[[str], None]
    index: int = 0
    step: int = 0
    history: list[Moment] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stage_reports: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    class_vectors: ClassWeights | None = None  # of the head of the last kept stage that had one
    _start_weights: dict[str, Tensor] = field(default_factory=dict)
    _board: Board | None = None

    @property
    def board(self) -> Board:
        """Where curves go; opened when the first is written, or by `restore`, which knows from which step on."""
        if self._board is None:
            self._board = Board(self.folder)
        return self._board

    def state_dict(self, under_way: stages.StageRun | None) -> dict[str, Any]:
        """Everything a checkpoint holds."""
        return {
            "people": self.people.digest(),
            "index": self.index,
            "step": self.step,
            "model": self.model.state_dict(),
            "start_weights": self._start_weights,
            "class_vectors": None if self.class_vectors is None else tuple(self.class_vectors),
            "stage": None if under_way is None else under_way.state_dict(),
            "history": [vars(moment) for moment in self.history],
            "notes": self.notes,
            "stage_reports": self.stage_reports,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def save(self, under_way: stages.StageRun | None = None) -> None:
        """Write the checkpoint, atomically."""
        checkpoint.save(self.state_dict(under_way), self.folder / CHECKPOINT)

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, but for the stage under way.

        Raises ValueError where the images are not those the run was started with: people once trained on could
        otherwise end up among those that are scored.
        """
        if state["people"] != self.people.digest():
            raise ValueError(
                f"The images have changed since the run in {self.folder} was started, and with them who is trained on "
                "and who is scored. Restore the folders, or start a new run."
            )
        self.index, self.step = state["index"], state["step"]
        self.model.load_state_dict(state["model"])
        self._start_weights = state["start_weights"]
        self.class_vectors = None if state["class_vectors"] is None else ClassWeights(*state["class_vectors"])
        self.history = [Moment(**moment) for moment in state["history"]]
        self.notes, self.stage_reports = state["notes"], state["stage_reports"]
        _restore_randomness(state)
        self._board = Board(self.folder, after=self.step)


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    stopped: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> Run:
    """Train as the recipe says, write everything to `folder`, and return what became of it.

    folder: gets the recipe, TensorBoard events, the checkpoint, and at the end `report.json` and the embedder in
    `model/`. resume: go on from its checkpoint. stopped: asked after every step; where it says so the run saves
    and returns with `interrupted` set. Raises ValueError for a recipe or data that cannot work (before
    training), OSError where `folder` cannot be written, and TrainingDivergedError where a stage diverges: the report
    and the embedder then hold what the stages before it came to.
    """
    contradictions.check(recipe)
    assemble.check_names(recipe)
    run = _prepare(recipe, folder, say, resume=resume)
    state = checkpoint.load(folder / CHECKPOINT, run.device) if resume else None
    if state is not None:
        run.restore(state)
    else:
        _evaluate(run, "start")
        run.save()
    while run.index < len(recipe.stages):
        try:
            _stage(run, state if state and state["stage"] else None, stopped)
        except stages.TrainingDivergedError:
            _give_up(run)
            raise
        state = None
        if run.interrupted:
            return run
    _finish(run)
    return run


def _prepare(recipe: Recipe, folder: Path, say: Callable[[str], None], *, resume: bool) -> Run:
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
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"network    {recipe.model.name}, {parameters:,} parameters, on {device} ({torch.get_num_threads()} threads), "
        f"{assemble.precision(recipe.precision, device)}"
    )
    held_out = (
        HeldOut("validation", people.validation, seed=recipe.seed),
        HeldOut("test", people.test, people.listed, seed=recipe.seed),
    )
    notes = _about(start, recipe, people)
    for line in notes:
        say(line)
    folder.mkdir(parents=True, exist_ok=True)
    _write(yaml.safe_dump(recipes.as_dict(recipe), sort_keys=False, allow_unicode=True), folder / RECIPE)
    return Run(recipe, folder, people, device, model, held_out, say, notes=notes)


def _about(start: Embedder | None, recipe: Recipe, people: People) -> list[str]:
    """A warning where the network starts from weights that may know the people it is scored on."""
    if start is None or start.description.get("people") == people.digest():
        return []
    return [
        f"The network started from {recipe.model.start}, which was not trained on just this division of people: some "
        "that are scored here may have been trained on there."
    ]


def _stage(run: Run, resumed: dict[str, Any] | None, stopped: Callable[[], bool]) -> None:
    """Train one stage and keep the better of its start and its end."""
    under_way = stages.begin(run.index, run.recipe, run.people, run.model, run.device)
    stage = under_way.stage
    if resumed is not None:
        under_way.load_state_dict(resumed["stage"])
        _restore_randomness(resumed)  # once more: making the stage's parts has drawn from it
        run.say(f"Going on with stage {stage.name!r} at step {under_way.clock.steps:,}.")
    else:
        run._start_weights = _copy(run.model)
        run.say(f"stage {stage.name}: {batches.describe(under_way.sampler)}")
        if stage.class_means:
            stages.start_from_class_means(under_way, run.people, run.model, run.device)
        stages.find_look_alikes(under_way, run.model, run.class_vectors)
    steps_before = run.step - under_way.clock.steps

    def report(step: int, scalars: dict[str, float]) -> None:
        run.board.scalars(steps_before + step, {f"{stage.name}/{name}": value for name, value in scalars.items()})

    def save() -> None:
        run.step = steps_before + under_way.clock.steps
        run.save(under_way)

    try:
        stages.train(
            under_way,
            run.recipe,
            run.people,
            run.model,
            device=run.device,
            stopped=stopped,
            report=report,
            save=save,
            class_vectors=run.class_vectors,
        )
    except (UnreadableImageError, OSError):  # an image has gone: what was trained since the last checkpoint is good
        save()
        raise
    save()  # before evaluation, which can be interrupted
    if stopped():
        run.interrupted = True
        return
    _note_speed(run, under_way)
    _note_failed_tables(run, under_way)
    if _keep_better(run, stage.name):
        run.class_vectors = stages.class_weights(under_way) or run.class_vectors
    run.index += 1
    run.save()


def _keep_better(run: Run, name: str) -> bool:
    """Evaluate the end of a stage; where it lies below its start on validation people, go back to the start.

    Returns whether the end is kept.
    """
    start = [moment for moment in run.history if moment.kept][-1]
    try:
        end = _evaluate(run, f"after {name}")
    except UnreadableImageError:  # of held-out people; the checkpoint holds the stage's end
        raise
    except ValueError as error:
        raise stages.TrainingDivergedError(f"Stage {name!r} has diverged: {error}") from error
    figure = run.recipe.select_by
    before, after = _number(start.validation[figure]), _number(end.validation[figure])
    if after >= before:
        return True
    end.kept = False
    run.model.load_state_dict(run._start_weights)
    note = (
        f"Stage {name!r} ended below its start on the validation people ({figure} {before:.4f} -> {after:.4f}); "
        f"the weights from before it were kept."
    )
    run.notes.append(note)
    run.say(note)
    return False


def _evaluate(run: Run, when: str) -> Moment:
    scored: list[Scored] = [people.score(run.model, run.device) for people in run.held_out]
    moment = Moment(when, scored[0].figures, scored[1].figures)
    run.history.append(moment)
    for people, found in zip(run.held_out, scored, strict=True):
        run.board.held_out(run.step, people.name, found.figures, found.scores, found.same, found.curve)
    run.say(f"{when}: " + ", ".join(f"{p.name} {_brief(s.figures)}" for p, s in zip(run.held_out, scored, strict=True)))
    return moment


def _give_up(run: Run) -> None:
    """After a stage that diverged: report and export the weights from before it, if a stage had made them."""
    if run.index == 0:
        return
    name = run.recipe.stages[run.index].name
    run.model.load_state_dict(run._start_weights)
    run.notes.append(f"Stage {name!r} diverged; the weights from before it were kept.")
    _finish(run)


def _note_speed(run: Run, under_way: stages.StageRun) -> None:
    clock = under_way.clock
    if clock.steps == 0:
        run.notes.append(f"Stage {under_way.stage.name!r} took no step: nothing of its budget was left.")
        run.say(run.notes[-1])
    batch = round(clock.images / clock.steps) if clock.steps else assemble.TRIAL_CLASSES
    bare = bare_images_per_second(
        run.model, batch, run.people.training.preprocessing.shape, run.device, under_way.precision
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
    )
    run.say(
        f"{under_way.stage.name}: {clock.steps:,} steps, {clock.images_per_second:,.0f} images/s; the bare forward and "
        f"backward pass of the network {bare:,.0f} ({clock.images_per_second / bare:.2f} of it)"
    )


def _note_failed_tables(run: Run, under_way: stages.StageRun) -> None:
    failures = [] if under_way.look_alikes is None else under_way.look_alikes.failures
    if failures:
        note = (
            f"Stage {under_way.stage.name!r}: {len(failures)} tables of look-alikes could not be computed, the last "
            f"because: {failures[-1]}"
        )
        run.notes.append(note)
        run.say(note)


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
    _write(json.dumps(report, indent=2) + "\n", run.folder / REPORT)
    description = {
        "recipe": report["recipe"],
        "people": run.people.digest(),
        "threshold": kept.validation["threshold"],
        "figures": kept.test,
    }
    Embedder(run.model, run.people.training.preprocessing, description).save(run.folder / EXPORT)
    run.board.close()


def _write(text: str, path: Path) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def _restore_randomness(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["rng"].cpu())
    if state["cuda_rng"]:
        torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _number(figure: float | int | None) -> float:
    return float("-inf") if figure is None else float(figure)


def _brief(figures: Figures) -> str:
    shown = (("accuracy", "accuracy"), ("R@1", "recall_at_1"), ("MAP@R", "map_at_r"))
    return " ".join(f"{title} {_number(figures[key]):.3f}" for title, key in shown)
