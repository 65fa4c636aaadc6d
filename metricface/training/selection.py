"""What held-out people say of a stage on its way and at its end, and which of its weights go on."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from metricface.data.images import UnreadableImageError
from metricface.training.held_out import Figures, Scored
from metricface.training.run import Moment, Run
from metricface.training.stage_run import StageRun
from metricface.training.stages import TrainingDivergedError

Answer = Literal["go on", "go back", "stop"]


class _Candidate(NamedTuple):
    """Weights that may go on, by their figure on validation people."""

    when: str
    figure: float
    moment: Moment | None  # none for weights seen on the way, which test people have not scored


def check_selection(run: Run, start: Moment) -> None:
    """Raise ValueError where the validation people are too few for the figure that weights are chosen by."""
    key = run.recipe.select_by
    if start.validation[key] is None:
        raise ValueError(
            f"select_by={key} cannot be told of {start.validation['impostor_pairs']:,} pairs of different validation "
            "people. Hold out more of them (data.validation_share), or choose by map_at_r, recall_at_1 or auc."
        )


def evaluate(run: Run, when: str, *, kind: str = "") -> Moment:
    """Score the network as it stands on both held-out sets, show it, and add it to the run's history.

    kind: added to the names of the sets on TensorBoard, for weights that are scored beside others.
    """
    scored: list[Scored] = [people.score(run.model, run.device, run.stopped) for people in run.held_out]
    moment = Moment(when, scored[0].figures, scored[1].figures)
    run.history.append(moment)
    for people, found in zip(run.held_out, scored, strict=True):
        if run.board is not None:
            run.board.held_out(run.step, f"{people.name}{kind}", found.figures, found.scores, found.same, found.curve)
    run.say(f"{when}: " + ", ".join(f"{p.name} {_brief(s.figures)}" for p, s in zip(run.held_out, scored, strict=True)))
    return moment


def look(run: Run, under_way: StageRun) -> Answer:
    """Score the validation people while a stage is under way, and answer a regression as the stage's watch says.

    The best weights seen on the way are kept aside, should the end be worse.
    """
    watch, key = under_way.stage.watch, run.recipe.select_by
    when = f"{under_way.stage.name} at {under_way.clock.progress:.0%}"
    before = _number(_start(run).validation[key])
    now = _look_at(run, under_way, when)
    if under_way.average is not None:  # it may be better, and is what a high learning rate is for
        with under_way.average.in_place_of(run.model):
            now = max(now, _look_at(run, under_way, f"{when}, averaged", kind="_averaged"))
    if now >= before - watch.tolerance:
        return "go on"
    answers: dict[str, tuple[str, Answer]] = {
        "warn": (
            f"Lower stages.{under_way.stage.name}.learning_rate, or let the stage answer by itself "
            "(watch.on_regression: go_back or stop).",
            "go on",
        ),
        "go_back": (f"Going back to the start, with {watch.factor:g} times the learning rate.", "go back"),
        "stop": ("The stage ends here; the best weights are kept.", "stop"),
    }
    told, answer = answers[watch.on_regression]
    run.note(f"{when}, the validation people are worse than at its start ({key} {before:.4f} -> {now:.4f}). {told}")
    return answer


def _look_at(run: Run, under_way: StageRun, when: str, *, kind: str = "") -> float:
    """The figure of the network as it stands on validation people; the best so far is kept aside."""
    key = run.recipe.select_by
    with _divergence(under_way, when):
        figures = run.held_out[0].score(run.model, run.device, run.stopped).figures
    now = _number(figures[key])
    if run.board is not None:
        run.board.scalars(run.step, {f"{under_way.stage.name}/validation{kind}/{key}": now})
    run.say(f"{when}: validation {_brief(figures)}")
    if now > max(_number(_start(run).validation[key]), under_way.best_figure):
        under_way.best = {
            "when": when,
            "figure": now,
            "weights": copy.deepcopy(run.model.state_dict()),
            "objective": copy.deepcopy(under_way.objective.state_dict()),
        }
    return now


def keep_best(run: Run, under_way: StageRun) -> bool:
    """Score the end of a stage, and its average; keep the best of these, of its start, and of what was seen on the way.

    Best is what validation people say. Returns whether the stage has changed the weights.
    """
    name, average, key = under_way.stage.name, under_way.average, run.recipe.select_by
    start = _start(run)
    with _divergence(under_way, f"after {name}"):
        ends = [evaluate(run, f"after {name}")]
        if average is not None:
            with average.in_place_of(run.model):
                ends.append(evaluate(run, f"after {name}, averaged", kind="_averaged"))
    found = [_Candidate(end.when, _number(end.validation[key]), end) for end in ends]
    if under_way.best is not None:
        found.append(_Candidate(under_way.best["when"], under_way.best_figure, None))
    best = max(found, key=lambda candidate: candidate.figure)
    before = _number(start.validation[key])
    for end in ends:
        end.kept = end is best.moment and best.figure >= before
    if best.figure < before:
        run.model.load_state_dict(run.start_weights)
        run.note(
            f"Stage {name!r} ended below its start on the validation people ({key} {before:.4f} -> {best.figure:.4f}); "
            f"the weights from before it were kept."
        )
        return False
    if best.moment is None:
        assert under_way.best is not None
        run.model.load_state_dict(under_way.best["weights"])
        under_way.objective.load_state_dict(under_way.best["objective"])  # the next stage may go on from it, too
        evaluate(run, best.when)
    elif average is not None and best.moment is not ends[0]:
        average.copy_to(run.model)
    return True


def _start(run: Run) -> Moment:
    return [moment for moment in run.history if moment.kept][-1]


@contextmanager
def _divergence(under_way: StageRun, when: str) -> Iterator[None]:
    """Embeddings of held-out people that are not finite are the stage's divergence; an image that has gone is not."""
    try:
        yield
    except UnreadableImageError:  # the checkpoint holds what was trained
        raise
    except ValueError as error:
        raise TrainingDivergedError(f"Stage {under_way.stage.name!r} has diverged ({when}): {error}") from error


def _number(figure: float | int | None) -> float:
    return float("-inf") if figure is None else float(figure)


def _brief(figures: Figures) -> str:
    shown = (("accuracy", "accuracy"), ("R@1", "recall_at_1"), ("MAP@R", "map_at_r"))
    return " ".join(f"{title} {_number(figures[key]):.3f}" for title, key in shown)
