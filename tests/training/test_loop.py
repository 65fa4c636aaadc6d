import contextlib
import copy
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import metricface
from metricface.data.images import UnreadableImageError
from metricface.training import assemble, checkpoint, loop, selection, stage_run, stages, update
from metricface.training.averaging import WeightAverage
from metricface.training.held_out import HeldOut, embed
from metricface.training.loop import train
from metricface.training.objective import MinedObjective
from metricface.training.recipe import Component, Recipe, Watch
from metricface.training.run import Moment, Run
from metricface.training.schedules import Decay
from metricface.training.stages import TrainingDivergedError
from tests.training.conftest import tiny_recipe


def quiet(_: str) -> None:
    pass


def after(steps: int) -> Callable[[], bool]:
    """A stop request that comes after so many steps."""
    asked = iter(range(10**6))
    return lambda: next(asked) >= steps


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.model.state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny recipe, run without an interruption."""
    return train(tiny_recipe(), tmp_path_factory.mktemp("straight") / "run", say=quiet)


def test_a_run_leaves_report_checkpoint_curves_and_an_embedder(recipe: Recipe, tmp_path: Path) -> None:
    run = train(recipe, tmp_path / "run", say=quiet)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [moment["when"] for moment in report["history"]] == ["start", "after softmax", "after triplet"]
    assert report["people"]["training"] == {"people": 29, "images": 174}
    assert report["people"]["validation"]["people"] == 3
    assert report["people"]["test"]["people"] == 8
    test = report["final"]["test"]
    assert test["genuine_pairs"] == 8 * 15
    assert test["tar_at_far_1e-1"] is not None
    assert [stage["steps"] for stage in report["stages"]] == [6, 5]
    embedder = metricface.load(tmp_path / "run" / "model")
    images = run.people.test
    ours = embed(run.model, images, torch.device("cpu"))
    np.testing.assert_allclose(embedder.embed(images.read(range(len(images)))), ours, atol=1e-5)


def test_the_three_sets_of_people_are_disjoint(recipe: Recipe, tmp_path: Path) -> None:
    run = train(recipe, tmp_path / "run", say=quiet)
    names = [name for images in run.people.by_name().values() for name in images.identities]
    assert len(names) == len(set(names)) == 40


def test_the_same_recipe_gives_the_same_weights(recipe: Recipe, straight: Run, tmp_path: Path) -> None:
    assert_same(weights(train(recipe, tmp_path / "again", say=quiet)), weights(straight))


@pytest.mark.parametrize("steps", [0, 3, 6, 8])
def test_an_interrupted_run_resumes_to_the_weights_of_an_uninterrupted_one(
    recipe: Recipe, straight: Run, tmp_path: Path, steps: int
) -> None:
    stopped = train(recipe, tmp_path / "run", stopped=after(steps), say=quiet)
    assert stopped.interrupted
    assert not (tmp_path / "run" / "report.json").exists()
    resumed = train(recipe, tmp_path / "run", resume=True, say=quiet)
    assert not resumed.interrupted
    assert_same(weights(straight), weights(resumed))
    a, b = (json.loads((run.folder / "report.json").read_text()) for run in (straight, resumed))
    assert a["final"] == b["final"]


@pytest.mark.parametrize("miner", ["RandomMiner", "DistanceWeightedMiner"])
def test_miners_with_chance_draw_after_a_resume_what_they_would_have_drawn(
    recipe: Recipe, tmp_path: Path, miner: str
) -> None:
    recipe.stages[1].miner = Component(miner)
    whole = train(recipe, tmp_path / "whole", say=quiet)
    train(recipe, tmp_path / "run", stopped=after(8), say=quiet)
    assert_same(weights(whole), weights(train(recipe, tmp_path / "run", resume=True, say=quiet)))


def test_a_run_does_not_go_on_with_another_recipe(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", stopped=lambda: True, say=quiet)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    recipe.stages[0].learning_rate *= 2
    name = recipe.stages[0].name
    with pytest.raises(ValueError, match=rf"started with other settings: stages\.{name}\.learning_rate \("):
        train(recipe, tmp_path / "run", resume=True, say=quiet)
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == checkpoints
    recipe.stages[0].learning_rate /= 2
    recipe.log_every += 1  # what changes nothing of the result is free
    assert not train(recipe, tmp_path / "run", resume=True, say=quiet).interrupted


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", stopped=lambda: True, say=quiet)
    file = tmp_path / "run" / "recipe.yaml"
    saved = yaml.safe_load(file.read_text())
    for stage in saved["stages"]:
        del stage["keep_head"]
    del saved["mining"]
    file.write_text(yaml.safe_dump(saved))
    recipe.mining = "per_rank"
    with pytest.raises(ValueError, match=r"other settings: mining \('joined' against 'per_rank'\)"):
        train(recipe, tmp_path / "run", resume=True, say=quiet)
    recipe.mining = "joined"
    assert not train(recipe, tmp_path / "run", resume=True, say=quiet).interrupted


def test_a_run_that_may_not_go_on_keeps_its_recipe(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", stopped=lambda: True, say=quiet)
    saved = (tmp_path / "run" / "recipe.yaml").read_text()
    recipe.device = "meta"  # in place of another kind of device, which this machine may lack
    with pytest.raises(ValueError, match="was trained on cpu"):
        train(recipe, tmp_path / "run", resume=True, say=quiet)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == saved


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
def test_a_run_in_epochs_resumes_to_the_bit(recipe: Recipe, tmp_path: Path, optimizer: str) -> None:
    for stage in recipe.stages:
        stage.steps, stage.epochs = None, 1.5
        stage.optimizer, stage.learning_rate = Component(optimizer), 0.001
    whole = train(recipe, tmp_path / "whole", say=quiet)
    steps = [stage["steps"] for stage in whole.stage_reports]
    assert train(recipe, tmp_path / "run", stopped=after(steps[0] + steps[1] // 2), say=quiet).interrupted
    assert_same(weights(whole), weights(train(recipe, tmp_path / "run", resume=True, say=quiet)))


def test_a_memory_goes_on_after_a_resume_with_what_it_held(recipe: Recipe, tmp_path: Path) -> None:
    recipe.stages[1].memory = 40
    whole = train(recipe, tmp_path / "whole", say=quiet)
    train(recipe, tmp_path / "run", stopped=after(9), say=quiet)
    assert_same(weights(whole), weights(train(recipe, tmp_path / "run", resume=True, say=quiet)))
    recipe.stages[1].memory = None
    without = train(recipe, tmp_path / "without", say=quiet)
    assert not torch.equal(weights(whole)["project.linear.weight"], weights(without)["project.linear.weight"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
@pytest.mark.parametrize("steps", [3, 6, 9])
def test_a_full_disk_ends_a_run_with_the_reason_and_its_last_checkpoint_goes_on(
    recipe: Recipe, straight: Run, tmp_path: Path, steps: int
) -> None:
    recipe.checkpoint_every = 1e-6
    asked = iter(range(10**6))

    def filling() -> bool:
        """No request to stop; the checkpoints from here on are written to a full disk."""
        if next(asked) == steps:
            for number in range(2, 40):
                (tmp_path / "run" / "checkpoints" / f".{number:06d}.part").symlink_to("/dev/full")
        return False

    with pytest.raises(OSError, match=r"No space left on device.*are intact; make room, and go on with --resume"):
        train(recipe, tmp_path / "run", stopped=filling, say=quiet)
    for left in (tmp_path / "run" / "checkpoints").glob(".*"):
        left.unlink()  # room is made
    assert_same(weights(straight), weights(train(recipe, tmp_path / "run", resume=True, say=quiet)))


def test_a_run_does_not_go_on_with_other_images(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", stopped=after(3), say=quiet)
    recipe.data.synthetic_images = 7
    (tmp_path / "run" / "recipe.yaml").unlink()  # which would say that it is another recipe
    with pytest.raises(ValueError, match="images have changed"):
        train(recipe, tmp_path / "run", resume=True, say=quiet)


def test_a_last_update_that_breaks_the_weights_counts_as_divergence(recipe: Recipe, tmp_path: Path) -> None:
    recipe.stages[1].steps, recipe.stages[1].learning_rate, recipe.stages[1].warmup = 1, 1e38, 0.0
    recipe.stages[1].optimizer = Component("SGD", {"momentum": 0.0, "weight_decay": 1e10})
    with pytest.raises(TrainingDivergedError, match="weights are not finite"):
        train(recipe, tmp_path / "run", say=quiet)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["final"]["when"] == "after softmax"


def test_a_finished_run_that_is_resumed_trains_no_further(recipe: Recipe, tmp_path: Path) -> None:
    whole = train(recipe, tmp_path / "run", say=quiet)
    again = train(recipe, tmp_path / "run", resume=True, say=quiet)
    assert_same(weights(whole), weights(again))
    assert len(again.history) == len(whole.history)


def test_a_stage_that_ends_below_its_start_gives_the_better_weights_back_and_says_so(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([0.1, 0.6, 0.5])  # start, after softmax, after triplet
    real = selection.evaluate
    seen: list[dict[str, torch.Tensor]] = []

    def scripted(run: Run, when: str) -> Moment:
        moment = real(run, when)
        moment.validation["map_at_r"] = next(figures)
        seen.append({name: value.clone() for name, value in weights(run).items()})
        return moment

    monkeypatch.setattr(loop, "evaluate", scripted)
    monkeypatch.setattr(selection, "evaluate", scripted)
    recipe.stages[1].watch.at = []
    run = train(recipe, tmp_path / "run", say=quiet)
    assert_same(weights(run), seen[1])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "Stage 'triplet' ended below its start" in report["notes"][0]
    assert "0.6000 -> 0.5000" in report["notes"][0]
    assert [moment["kept"] for moment in report["history"]] == [True, True, False]
    assert report["final"]["when"] == "after softmax"


def test_tensorboard_shows_mining_training_and_held_out_people(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", say=quiet)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    wanted = {
        "softmax/loss",
        "softmax/learning_rate",
        "softmax/head/accuracy",
        "triplet/loss",
        "triplet/mining/active_share",
        "triplet/mining/d_ap_mean",
        "triplet/mining/d_an_mean",
        "triplet/embedding/norm_mean",
        "triplet/embedding/spread",
        "validation/map_at_r",
        "test/accuracy",
    }
    assert wanted <= scalars
    assert {"test/distance_positive", "test/distance_negative"} <= set(events.Tags()["histograms"])
    assert "test/roc" in events.Tags()["images"]
    assert [event.step for event in events.Scalars("test/accuracy")] == [0, 6, 11]
    assert all(np.isfinite(event.value) for event in events.Scalars("triplet/loss"))


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    recipe.stages[0].learning_rate = 1e30
    with pytest.raises(TrainingDivergedError, match=r"Stage 'softmax' has diverged.*stages\.softmax\.learning_rate"):
        train(recipe, tmp_path / "run", say=quiet)
    state = checkpoint.load(tmp_path / "run")
    assert all(torch.isfinite(value).all() for value in state["model"].values() if value.is_floating_point())


def test_a_stage_that_diverges_leaves_report_and_embedder_of_the_stages_before_it(
    recipe: Recipe, tmp_path: Path
) -> None:
    recipe.stages[1].learning_rate = 1e30
    with pytest.raises(TrainingDivergedError, match="Stage 'triplet' has diverged"):
        train(recipe, tmp_path / "run", say=quiet)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["final"]["when"] == "after softmax"
    assert "Stage 'triplet' diverged" in report["notes"][0]
    assert np.isfinite(metricface.load(tmp_path / "run" / "model").embed(np.zeros((32, 32, 3), np.uint8))).all()


def test_a_stage_that_diverges_after_better_weights_leaves_these(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.stages[1].watch.at = [0.3]
    scripted_figures(monkeypatch, [0.1, 0.6, 0.9, 0.9])  # start, after softmax, at 40%, and once more where it is kept
    break_weights_at(monkeypatch, 6 + 4)
    with pytest.raises(TrainingDivergedError, match="Stage 'triplet' has diverged"):
        train(recipe, tmp_path / "run", say=quiet)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["final"]["when"] == "triplet at 40%"
    assert report["final"]["validation"]["map_at_r"] == 0.9
    assert "its best weights from before that (triplet at 40%) were kept" in report["notes"][0]
    assert np.isfinite(metricface.load(tmp_path / "run" / "model").embed(np.zeros((32, 32, 3), np.uint8))).all()


def break_weights_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let that step of the run, counted from 1, leave weights that are not finite."""
    taken: list[bool] = []

    def apply_gradient(loss: Any, embedded: Any, optimizer: Any, *rest: Any, **by: Any) -> bool:
        taken.append(update.apply_gradient(loss, embedded, optimizer, *rest, **by))
        if len(taken) == step:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(torch.nan)
        return taken[-1]

    monkeypatch.setattr(stages, "apply_gradient", apply_gradient)


def test_an_image_that_goes_away_after_the_weights_have_broken_saves_nothing_of_them(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.log_every = 100
    break_weights_at(monkeypatch, 3)
    real = stages._endless
    had: list[Any] = []

    def endless(loader: Any) -> Any:
        for batch in real(loader):
            if len(had) == 3:
                raise UnreadableImageError("gone.png", "it has gone")
            had.append(batch)
            yield batch

    monkeypatch.setattr(stages, "_endless", endless)
    with pytest.raises(TrainingDivergedError, match="weights are not finite"):
        train(recipe, tmp_path / "run", say=quiet)
    state = checkpoint.load(tmp_path / "run")
    assert all(torch.isfinite(value).all() for value in state["model"].values() if value.is_floating_point())


def test_a_figure_that_too_few_people_support_cannot_choose_weights(recipe: Recipe, tmp_path: Path) -> None:
    recipe.select_by, recipe.data.synthetic_images = "tar_at_far_1e-2", 4
    with pytest.raises(ValueError, match=r"cannot be told of 48 pairs .*data\.validation_share.* map_at_r"):
        train(recipe, tmp_path / "run", say=quiet)


def test_float16_that_always_overflows_is_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.precision, recipe.stages[0].steps = "float16", 40
    recipe.stages[0].average = 0.5
    moved: list[int] = []
    monkeypatch.setattr(stages, "apply_gradient", lambda *_, **__: False)
    monkeypatch.setattr(WeightAverage, "update", lambda *_: moved.append(1))
    with pytest.raises(TrainingDivergedError, match="gradient in float16 has overflowed 25 times in a row"):
        train(recipe, tmp_path / "run", say=quiet)
    assert not moved  # steps that were not taken are not averaged


def test_shares_that_one_step_passes_are_one_look(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.stages[1].watch = Watch(at=[0.02, 0.05, 0.1], on_regression="go_back")
    scripted_figures(monkeypatch, [0.1, 0.6, 0.5, 0.7])
    run = train(recipe, tmp_path / "run", say=quiet)
    assert len(run.notes) == 1
    assert "Going back" in run.notes[0]


def test_after_going_back_the_learning_rate_rises_from_nothing_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.log_every, recipe.stages[1].steps, recipe.stages[1].warmup = 1, 20, 0.2
    recipe.stages[1].watch = Watch(at=[0.5], on_regression="go_back")
    scripted_figures(monkeypatch, [0.1, 0.6, 0.5, 0.7])
    train(recipe, tmp_path / "run", say=quiet)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rates = [event.value for event in events.Scalars("triplet/learning_rate")]
    assert rates[0] < 0.05 * rates[4]
    assert rates[9] < rates[4]
    assert rates[10] < 0.05 * 0.3 * rates[9]
    assert rates[10] < rates[11] < rates[12] < 0.3 * rates[4]


def test_the_speed_of_a_network_is_measured_on_no_more_images_than_it_has_had_at_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.stages[1].chunk = 9
    sizes: list[int] = []

    def images_per_second(_: Any, size: int, *__: Any) -> float:
        sizes.append(size)
        return 1.0

    monkeypatch.setattr(loop, "bare_images_per_second", images_per_second)
    train(recipe, tmp_path / "run", say=quiet)
    assert sizes == [29, 9]


def test_a_checkpoint_of_another_kind_of_device_says_so(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe, tmp_path / "run", stopped=after(3), say=quiet)
    real = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *given: real(*given) | {"device": "cuda"})
    with pytest.raises(ValueError, match=r"was trained on cuda, .* Resume it with --device cuda"):
        train(recipe, tmp_path / "run", resume=True, say=quiet)


def test_a_resumed_stage_keeps_nothing_of_the_checkpoint_in_memory(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe, tmp_path / "run", stopped=after(3), say=quiet)
    read: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    real_load, real_step = checkpoint.load, stages._step

    def load(*given: Any) -> Any:
        state = real_load(*given)
        tensors = [*state["model"].values(), *state["stage"]["objective"].values()]
        read.extend(weakref.ref(tensor) for tensor in tensors)
        return state

    def step(*given: Any) -> Any:
        alive.append(sum(reference() is not None for reference in read))
        return real_step(*given)

    monkeypatch.setattr(checkpoint, "load", load)
    monkeypatch.setattr(stages, "_step", step)
    train(recipe, tmp_path / "run", resume=True, say=quiet)
    assert len(read) > 20
    assert alive[0] == 0


def test_embeddings_too_long_to_be_squared_are_divergence_and_no_fault_of_the_data(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MinedObjective.forward
    monkeypatch.setattr(MinedObjective, "forward", lambda self, rows, labels: real(self, rows * 1e30, labels))
    monkeypatch.setattr(assemble, "rehearse", lambda *_: None)  # it would find them before training
    with pytest.raises(TrainingDivergedError, match=r"Stage 'triplet' has diverged.*objective refuses its embeddings"):
        train(recipe, tmp_path / "run", say=quiet)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["final"]["when"] == "after softmax"


def test_a_held_out_image_that_goes_away_is_no_divergence_and_the_stages_end_is_saved(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = HeldOut.score, [0]

    def score(self: HeldOut, *rest: Any) -> Any:
        calls[0] += 1
        if calls[0] > 2:  # both sets have been scored at the start
            raise UnreadableImageError("cannot read image gone.png")
        return real(self, *rest)

    monkeypatch.setattr(HeldOut, "score", score)
    with pytest.raises(UnreadableImageError, match=r"gone\.png"):
        train(recipe, tmp_path / "run", say=quiet)
    monkeypatch.undo()
    run = train(recipe, tmp_path / "run", resume=True, say=quiet)
    assert [moment.when for moment in run.history] == ["start", "after softmax", "after triplet"]


def test_a_budget_is_shared_by_the_stages_and_evaluation_is_not_counted(recipe: Recipe, tmp_path: Path) -> None:
    recipe.budget = "2s"
    for stage, share in zip(recipe.stages, (3.0, 1.0), strict=True):
        stage.share, stage.steps = share, None
    train(recipe, tmp_path / "run", say=quiet)
    seconds = [stage["seconds"] for stage in json.loads((tmp_path / "run" / "report.json").read_text())["stages"]]
    assert seconds == pytest.approx([1.5, 0.5], abs=0.25)


def test_frozen_batch_norm_keeps_its_statistics_and_still_learns(recipe: Recipe, tmp_path: Path) -> None:
    recipe.stages[1].batch_norm = "frozen"
    recipe.stages[1].steps = 3
    before: dict[str, torch.Tensor] = {}
    real = stage_run.begin

    def begin(index: int, *rest: object) -> stage_run.StageRun:
        model = rest[2]
        assert isinstance(model, torch.nn.Module)
        before.update({name: value.clone() for name, value in model.state_dict().items()})
        return real(index, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_run, "begin", begin)
        patch.setattr(loop, "keep_best", lambda run, name: None)
        run = train(recipe, tmp_path / "run", say=quiet)
    after = weights(run)
    running = [name for name in after if "running" in name]
    learned = [name for name in after if name.endswith("weight")]
    assert running
    assert all(torch.equal(before[name], after[name]) for name in running)
    assert not any(torch.equal(before[name], after[name]) for name in learned)


@pytest.mark.parametrize(
    ("miner", "loss"),
    [
        ("SemiHardMiner", Component("TripletLoss")),
        ("DistanceWeightedMiner", Component("MarginBasedLoss")),
        ("RandomMiner", Component("TripletLoss", {"margin": "soft", "distance": "euclidean"})),
        (None, Component("ContrastiveLoss", {"normalize": True})),
    ],
)
def test_every_miner_and_loss_trains_from_a_recipe(
    recipe: Recipe, tmp_path: Path, miner: str | None, loss: Component
) -> None:
    recipe.stages[1].miner = None if miner is None else Component(miner)
    recipe.stages[1].loss = loss
    run = train(recipe, tmp_path / "run", say=quiet)
    assert len(run.history) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: setattr(r.stages[1], "miner", Component("HardMiner")), "known are .*BatchHardMiner"),
        (lambda r: setattr(r.stages[1], "loss", Component("TripletLoss", {"magin": 1})), "its options are: margin"),
        (lambda r: setattr(r.stages[0], "head", Component("CosFace", {"num_classes": 3})), "no option num_classes"),
        (lambda r: setattr(r.stages[1].sampler, "options", {"identities_per_batch": 8}), "images_per_identity"),
        (lambda r: r.stages[1].sampler.options.update(identities_per_batch=64), "64 identities"),
        (lambda r: setattr(r.model, "name", "huge"), "huge"),
        (lambda r: setattr(r.data, "synthetic_images", 1), "cannot be scored"),
    ],
)
def test_a_recipe_that_cannot_work_fails_before_training(
    recipe: Recipe, tmp_path: Path, change: Callable[[Recipe], None], says: str
) -> None:
    change(recipe)
    with pytest.raises(ValueError, match=says):
        train(recipe, tmp_path / "run", say=quiet)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_people_with_one_image_become_negatives_of_balanced_batches_and_are_said_so(
    recipe: Recipe, tmp_path: Path, people_folder: Path
) -> None:
    for person in sorted(people_folder.iterdir())[:6]:
        for image in sorted(person.iterdir())[1:]:
            image.unlink()
    recipe.data.train = str(people_folder)
    recipe.data.validation_share = 0.3
    recipe.stages[1].sampler.options["identities_per_batch"] = 3
    said: list[str] = []
    run = train(recipe, tmp_path / "run", say=said.append)
    singles = min(3, int((run.people.training.counts() == 1).sum()))
    assert singles > 0
    assert any(f"3 identities x 3 images + {singles} people with one image, as negatives" in line for line in said)


def test_a_run_starts_from_an_exported_embedder_of_the_same_people(recipe: Recipe, tmp_path: Path) -> None:
    second = recipe.stages.pop()
    first = train(recipe, tmp_path / "first", say=quiet)
    recipe.stages = [second]
    recipe.model.start = str(tmp_path / "first" / "model")
    said: list[str] = []
    run = train(recipe, tmp_path / "second", say=said.append)
    ends, begins = first.history[-1], run.history[0]
    assert begins.when == "start"
    assert begins.test["auc"] == pytest.approx(ends.test["auc"] if ends.kept else first.history[0].test["auc"])
    assert not any("trained on there" in note for note in run.notes)
    recipe.seed = 1  # other people are held out
    train(recipe, tmp_path / "third", say=said.append)
    report = json.loads((tmp_path / "third" / "report.json").read_text())
    assert "some that are scored here may have been trained on there" in report["notes"][0]


def test_a_run_goes_on_without_the_embedder_that_it_started_from(recipe: Recipe, tmp_path: Path) -> None:
    recipe.stages = recipe.stages[:1]
    recipe.stages[0].steps = 2
    train(recipe, tmp_path / "first", say=quiet)
    recipe.model.start, recipe.seed = str(tmp_path / "first" / "model"), 1
    asked = iter([False, True, True])
    assert train(recipe, tmp_path / "second", stopped=lambda: next(asked), say=quiet).interrupted
    shutil.rmtree(tmp_path / "first")
    run = train(recipe, tmp_path / "second", resume=True, say=quiet)
    assert not run.interrupted
    assert "may have been trained on there" in run.notes[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"embedding_dim": 64}, "is another network: .*128.*the recipe asks for .*64"), ({"start": "nowhere"}, "nowhere")],
)
def test_a_start_that_does_not_fit_is_refused(
    change: dict[str, Any], words: str, recipe: Recipe, tmp_path: Path
) -> None:
    recipe.stages = recipe.stages[:1]
    recipe.stages[0].steps = 1
    train(recipe, tmp_path / "first", say=quiet)
    recipe.model.start = str(tmp_path / "first" / "model")
    for name, value in change.items():
        setattr(recipe.model, name, value)
    with pytest.raises((ValueError, OSError), match=words):
        train(recipe, tmp_path / "second", say=quiet)


def scripted_figures(monkeypatch: pytest.MonkeyPatch, figures: list[float]) -> None:
    """What validation people say, in the order in which they are asked."""
    real, left = HeldOut.score, iter(figures)

    def score(self: HeldOut, *rest: Any) -> Any:
        found = real(self, *rest)
        if self.name == "validation":
            found.figures["map_at_r"] = next(left)
        return found

    monkeypatch.setattr(HeldOut, "score", score)


@pytest.mark.parametrize("raw", [0.5, 0.9])
def test_the_better_of_the_weights_and_their_average_is_kept(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: float
) -> None:
    recipe.stages[1].average = 0.9
    recipe.stages[1].watch.at = []
    kept: dict[str, dict[str, torch.Tensor]] = {}
    real = WeightAverage.in_place_of

    @contextlib.contextmanager
    def in_place_of(self: WeightAverage, model: torch.nn.Module) -> Any:
        kept["raw"] = copy.deepcopy(model.state_dict())
        with real(self, model):
            kept["averaged"] = copy.deepcopy(model.state_dict())
            yield

    monkeypatch.setattr(WeightAverage, "in_place_of", in_place_of)
    scripted_figures(monkeypatch, [0.1, 0.2, raw, 0.7])
    run = train(recipe, tmp_path / "run", say=quiet)
    better = "raw" if raw == 0.9 else "averaged"
    assert_same(weights(run), kept[better])
    assert not torch.equal(kept["raw"]["project.linear.weight"], kept["averaged"]["project.linear.weight"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [moment["when"] for moment in report["history"]][2:] == ["after triplet", "after triplet, averaged"]
    assert [moment["kept"] for moment in report["history"]][2:] == [raw == 0.9, raw == 0.5]
    assert report["final"]["when"] == ("after triplet" if raw == 0.9 else "after triplet, averaged")


def test_an_average_below_the_start_goes_back_to_it(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.stages[1].average = 0.9
    recipe.stages[1].watch.at = []
    scripted_figures(monkeypatch, [0.1, 0.8, 0.6, 0.7])
    run = train(recipe, tmp_path / "run", say=quiet)
    assert [moment.kept for moment in run.history] == [True, True, False, False]
    assert "(map_at_r 0.8000 -> 0.7000)" in run.notes[0]


def test_a_regression_is_seen_on_the_way_and_warned_of(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_figures(monkeypatch, [0.1, 0.8, 0.7, 0.9])
    run = train(recipe, tmp_path / "run", say=quiet)
    said = "triplet at 20%, the validation people are worse than at its start (map_at_r 0.8000 -> 0.7000)"
    assert said in run.notes[0]
    assert "Lower stages.triplet.learning_rate" in run.notes[0]
    assert [stage["steps"] for stage in run.stage_reports] == [6, 5]
    assert [moment.when for moment in run.history] == ["start", "after softmax", "after triplet"]


def test_within_the_tolerance_nothing_is_said(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.stages[1].watch = Watch(on_regression="stop", tolerance=0.15)
    scripted_figures(monkeypatch, [0.1, 0.8, 0.7, 0.9])
    assert train(recipe, tmp_path / "run", say=quiet).notes == []


def test_after_a_regression_a_stage_stops_and_the_best_weights_are_kept(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.stages[1].watch = Watch(at=[0.1, 0.5], on_regression="stop")
    scripted_figures(monkeypatch, [0.1, 0.6, 0.9, 0.5, 0.4, 0.9])
    run = train(recipe, tmp_path / "run", say=quiet)
    assert [stage["steps"] for stage in run.stage_reports] == [6, 3]
    assert [moment.when for moment in run.history] == ["start", "after softmax", "after triplet", "triplet at 20%"]
    assert [moment.kept for moment in run.history] == [True, True, False, True]
    recipe.stages[1].watch = Watch(at=[])
    monkeypatch.undo()
    scripted_figures(monkeypatch, [0.1, 0.6])
    first = train(
        recipe, tmp_path / "one", stopped=after(9), say=quiet
    )  # 6 steps, twice more, and 1: where it was best
    assert_same(weights(run), weights(first))


def test_after_a_regression_a_stage_goes_back_and_on_at_a_lower_learning_rate(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.stages[1].watch = Watch(at=[0.3], on_regression="go_back", factor=0.25)
    recipe.stages[1].warmup, recipe.stages[1].schedule = 0.0, Decay("constant")
    recipe.log_every = 1
    scripted_figures(monkeypatch, [0.1, 0.6, 0.5, 0.9])
    went: list[bool] = []
    real = stage_run.StageRun.go_back

    def go_back(self: stage_run.StageRun, model: torch.nn.Module, start: dict[str, torch.Tensor]) -> None:
        real(self, model, start)
        went.append(all(torch.equal(value, start[name]) for name, value in model.state_dict().items()))
        assert not self.optimizer.state

    monkeypatch.setattr(stage_run.StageRun, "go_back", go_back)
    run = train(recipe, tmp_path / "run", say=quiet)
    assert went == [True]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rates = [event.value for event in events.Scalars("triplet/learning_rate")]
    assert rates == pytest.approx([0.01, 0.01, 0.0025, 0.0025, 0.0025])
    assert "Going back to the start, with 0.25 times the learning rate" in run.notes[0]


@pytest.mark.parametrize("on_regression", ["go_back", "stop"])
def test_a_watched_stage_resumes_to_the_weights_of_an_uninterrupted_one(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_regression: Any
) -> None:
    recipe.stages[1].watch = Watch(at=[0.3], on_regression=on_regression)
    recipe.stages[1].average = 0.9
    figures = [0.1, 0.6, 0.5, 0.4, 0.9, 0.8]  # at the look and at the end, of the weights and of their average
    scripted_figures(monkeypatch, figures)
    whole = train(recipe, tmp_path / "whole", say=quiet)
    for steps in (9, 10, 11):  # before, at and after the look
        monkeypatch.undo()
        scripted_figures(monkeypatch, figures)
        train(recipe, tmp_path / str(steps), stopped=after(steps), say=quiet)
        resumed = train(recipe, tmp_path / str(steps), resume=True, say=quiet)
        assert_same(weights(whole), weights(resumed))
        assert whole.stage_reports[1]["steps"] == resumed.stage_reports[1]["steps"]


def test_a_first_stage_from_random_weights_is_not_watched(recipe: Recipe, tmp_path: Path) -> None:
    said: list[str] = []
    train(recipe, tmp_path / "run", say=said.append)
    assert not any(line.startswith("softmax at") for line in said)
    assert any(line.startswith("triplet at 20%: validation accuracy") for line in said)


def test_an_embedding_layer_alone_learns_and_a_frozen_trunk_stays(recipe: Recipe, tmp_path: Path) -> None:
    recipe.stages[1].learns = "embedding_layer"
    started: list[dict[str, torch.Tensor]] = []

    def keep(run: Run, under_way: stage_run.StageRun) -> bool:
        started.append(run.start_weights)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "keep_best", keep)
        run = train(recipe, tmp_path / "run", say=quiet)
    changed = {name for name, value in weights(run).items() if not torch.equal(value, started[1][name])}
    assert changed
    assert all(name.startswith("project.") for name in changed)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_chunks_recomputation_and_precisions_train_and_resume(recipe: Recipe, tmp_path: Path, precision: Any) -> None:
    recipe.precision, recipe.recompute = precision, True
    for stage in recipe.stages:
        stage.chunk, stage.average, stage.clip_norm, stage.layer_decay = 10, 0.99, 1.0, 0.9
    whole = train(recipe, tmp_path / "whole", say=quiet)
    train(recipe, tmp_path / "run", stopped=after(8), say=quiet)
    assert_same(weights(whole), weights(train(recipe, tmp_path / "run", resume=True, say=quiet)))
    assert ("overflows" in whole.stage_reports[0]) is (precision == "float16")


def compiled_by(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[nn.Module]:
    """Which networks torch.compile gets; it captures their graphs, and with "eager" runs them."""
    real, seen = torch.compile, []

    def compile_(module: nn.Module) -> Any:
        seen.append(module)
        return real(module, backend=backend)

    monkeypatch.setattr(torch, "compile", compile_)
    return seen


def test_a_compiled_network_trains_as_it_would_and_resumes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.precision = "float32"
    plain = train(recipe, tmp_path / "plain", say=quiet)
    recipe.compile = True
    seen = compiled_by(monkeypatch, "eager")
    whole = train(recipe, tmp_path / "whole", say=quiet)
    assert seen == [whole.model, whole.model]
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(whole)[name], value, rtol=1e-3, atol=1e-5, msg=name)
    train(recipe, tmp_path / "run", stopped=after(8), say=quiet)
    assert_same(weights(whole), weights(train(recipe, tmp_path / "run", resume=True, say=quiet)))
    assert metricface.load(tmp_path / "run" / "model").model.state_dict().keys() == weights(plain).keys()


def test_a_compiler_that_does_not_work_here_is_an_error_before_the_first_step(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.compile = True
    compiled_by(monkeypatch, "no such backend")
    with pytest.raises(ValueError, match=r"torch.compile does not work here .* Leave compile out"):
        train(recipe, tmp_path / "run", say=quiet)


@pytest.mark.slow
def test_a_network_is_compiled_for_this_machine(recipe: Recipe, tmp_path: Path) -> None:
    recipe.precision, recipe.compile = "float32", True
    made = train(recipe, tmp_path / "compiled", say=quiet)
    recipe.compile = False
    plain = train(recipe, tmp_path / "plain", say=quiet)
    for name, value in weights(plain).items():
        # Roundings grow over the steps: beside the largest of a tensor they are small, beside one near 0 they are not.
        largest = value.abs().max().item()
        torch.testing.assert_close(weights(made)[name], value, rtol=0.0, atol=5e-3 * largest, msg=name)


def test_a_collapse_is_named_in_the_notes(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.log_every, recipe.stages[1].steps = 1, 6
    real = stages._scalars
    monkeypatch.setattr(stages, "_scalars", lambda *given: real(*given) | {"embedding/spread": 0.01})
    run = train(recipe, tmp_path / "run", say=quiet)
    assert len([note for note in run.notes if "collapsing to one point" in note]) == 2  # of each stage once


@pytest.mark.parametrize("steps", [6, 8])
def test_an_objective_fades_into_the_next_and_resumes(recipe: Recipe, tmp_path: Path, steps: int) -> None:
    recipe.stages[1].fade, recipe.log_every = 0.5, 1
    with pytest.MonkeyPatch.context() as patch:
        scripted_figures(patch, [0.1, 0.2, 0.3, 0.4])
        whole = train(recipe, tmp_path / "whole", say=quiet)
    with pytest.MonkeyPatch.context() as patch:
        scripted_figures(patch, [0.1, 0.2, 0.3, 0.4, 0.5])
        train(recipe, tmp_path / "run", stopped=after(steps), say=quiet)
        resumed = train(recipe, tmp_path / "run", resume=True, say=quiet)
    assert_same(weights(whole), weights(resumed))
    events = EventAccumulator(str(tmp_path / "whole" / "tensorboard"))
    events.Reload()
    come_in = [event.value for event in events.Scalars("triplet/schedule/fade")]
    assert come_in == pytest.approx([0.0, 0.4, 0.8, 1.0, 1.0])
    assert len(events.Scalars("triplet/term/before/head")) == 3


def test_there_is_nothing_to_fade_from_where_the_stage_before_was_not_kept(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.stages[1].fade = 0.5
    scripted_figures(monkeypatch, [0.5, 0.2, 0.6, 0.7])
    run = train(recipe, tmp_path / "run", say=quiet)
    assert "has nothing to fade from" in run.notes[1]
