"""Stages whose batches are look-alikes: tables from every source, renewed in the background, and runs that repeat."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metricface.training import assemble, batches, checkpoint, look_alikes, loop, selection, stage_run
from metricface.training.contradictions import check
from metricface.training.held_out import embed
from metricface.training.look_alikes import LookAlikeTables
from metricface.training.loop import train
from metricface.training.people import gather
from metricface.training.recipe import Component, LookAlikes, Recipe, Term
from metricface.training.schedules import Clock
from metricface.training.stages import TrainingDivergedError
from samplers import LookAlikeBatchSampler
from tests.training.conftest import tiny_recipe
from tests.training.test_loop import after, assert_same, quiet, weights

DELAY = 20  # above the 16 batches that are planned ahead, with images in memory and no workers


def alike_recipe() -> Recipe:
    """The tiny recipe, its triplet stage of 70 steps with look-alike batches and tables renewed every 25."""
    recipe = tiny_recipe()
    stage = recipe.stages[1]
    stage.sampler = Component(
        "LookAlikeBatchSampler", {"identities_per_batch": 6, "images_per_identity": 2, "neighbourhood": 3}
    )
    stage.look_alikes = LookAlikes(neighbours=5, every_steps=25, delay=DELAY)
    stage.steps = 70
    recipe.data.workers = 0
    return recipe


@pytest.fixture
def alike() -> Recipe:
    return alike_recipe()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights at the end of a run that nothing interrupted."""
    return weights(train(alike_recipe(), tmp_path_factory.mktemp("straight") / "run", say=quiet))


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("source", ["centroids", "images", "head"])
def test_a_stage_trains_on_look_alikes_from_every_source_and_shows_their_age(
    source: Any, alike: Recipe, tmp_path: Path
) -> None:
    stage = alike.stages[1]
    assert stage.look_alikes is not None
    stage.look_alikes.source = source
    if source == "head":  # one of its own, beside the triplets
        stage.plus = [Term("classes", head=Component("Softmax"))]
    run = train(alike, tmp_path / "run", say=quiet)
    assert [stage["steps"] for stage in run.stage_reports] == [6, 70]
    shown = curves(tmp_path / "run")
    ages = {step - 6: value for step, value in shown["triplet/look_alikes/age"]}
    # The table of the weights after step 25 is in force after step 45, that of step 50 not yet.
    assert ages == {step: step if step <= 45 else step - 25 for step in ages}
    assert 0.0 <= shown["triplet/look_alikes/missing_share"][-1][1] < 0.5
    assert shown["triplet/look_alikes/seconds"][-1][1] > 0.0
    assert {"triplet/look_alikes/twins", "triplet/look_alikes/without"} <= shown.keys()


@pytest.mark.parametrize("stop", [24, 25, 30, 60])
def test_a_run_stopped_anywhere_resumes_to_the_weights_of_an_uninterrupted_one(
    stop: int, alike: Recipe, straight: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    stopped = train(alike, tmp_path / "stopped", stopped=after(6 + 2 + stop), say=quiet)
    assert stopped.interrupted
    resumed = train(alike, tmp_path / "stopped", resume=True, say=quiet)
    assert_same(straight, weights(resumed))


def test_a_slow_background_changes_nothing_but_the_time(
    alike: Recipe, straight: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = LookAlikeTables._table

    def slow(tables: LookAlikeTables, source: Any, since: float) -> Any:
        time.sleep(0.5)
        return quick(tables, source, since)

    monkeypatch.setattr(LookAlikeTables, "_table", slow)
    assert_same(straight, weights(train(alike, tmp_path / "slow", say=quiet)))


def test_the_table_decides_which_people_meet(alike: Recipe, tmp_path: Path) -> None:
    def meetings(number: int) -> list[list[int]]:
        assert alike.stages[1].look_alikes is not None
        alike.stages[1].look_alikes.neighbours = number
        alike.stages[1].steps = 1
        run = train(alike, tmp_path / str(number), say=quiet)
        sampler = stage_run.begin(1, alike, run.people, run.model, run.device).sampler
        assert isinstance(sampler, LookAlikeBatchSampler)
        tables = batches.look_alikes(alike.stages[1], sampler, run.people.training, 0, run.device)
        assert tables is not None
        tables.first(run.model, None)
        assert sampler.state_dict()["neighbours"][0]["table"].shape == (29, number)
        return list(sampler)

    assert meetings(1) != meetings(5)


def test_class_vectors_cost_no_pass_over_the_images(
    alike: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert alike.stages[1].look_alikes is not None
    alike.stages[1].look_alikes = LookAlikes(source="head")
    alike.select_by = "auc"
    monkeypatch.setattr(selection, "_number", lambda figure: 0.0)  # so that every stage's end is kept
    monkeypatch.setattr(look_alikes, "embed", lambda *_: pytest.fail("images were embedded"))
    run = train(alike, tmp_path / "run", say=quiet)
    assert run.class_vectors is not None
    assert run.class_vectors.rows.shape == (29, 128)


def first_table_source(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the first table of the last stage was computed from, and the run."""
    seen = []
    real = LookAlikeTables._source

    def source(tables: LookAlikeTables, model: Any, weights: Any) -> Any:
        seen.append(real(tables, model, weights))
        return seen[-1]

    monkeypatch.setattr(selection, "_number", lambda figure: 0.0)  # so that every stage's end is kept
    monkeypatch.setattr(LookAlikeTables, "_source", source)
    run = train(recipe, folder, say=quiet)
    return seen[0], run


@pytest.mark.parametrize("keep", [False, True])
def test_a_head_that_was_just_drawn_says_nothing_of_look_alikes(
    keep: bool, alike: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = alike.stages[1]
    stage.look_alikes, stage.steps = LookAlikes(source="head"), 2
    stage.plus, stage.keep_head = [Term("classes", head=alike.stages[0].head)], keep
    kept: list[torch.Tensor] = []
    real = loop._end

    def end(run: Any, under_way: Any) -> None:
        real(run, under_way)
        assert run.class_vectors is not None
        kept.append(run.class_vectors.rows.clone())

    monkeypatch.setattr(loop, "_end", end)
    source, _ = first_table_source(alike, tmp_path / "run", monkeypatch)
    assert torch.equal(source.rows, kept[0])  # what the first stage came to, whether its head goes on or not


def test_a_head_that_fades_out_without_having_learned_says_nothing_either(
    alike: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = alike.stages[1]
    stage.look_alikes, stage.steps, stage.fade = LookAlikes(source="head"), 2, 0.5
    monkeypatch.setattr(loop, "keep_best", lambda run, under_way: False)
    source, run = first_table_source(alike, tmp_path / "run", monkeypatch)
    assert isinstance(source, torch.nn.Module)  # no stage with a head was kept: means of embeddings
    assert run.class_vectors is None


def test_without_class_vectors_that_were_kept_means_of_embeddings_take_their_place(
    alike: Recipe, tmp_path: Path
) -> None:
    assert alike.stages[1].look_alikes is not None
    alike.stages[1].look_alikes = LookAlikes(source="head")
    alike.stages = alike.stages[1:]
    run = train(alike, tmp_path / "run", say=quiet)
    assert run.class_vectors is None
    assert not run.interrupted


def test_a_network_that_breaks_is_divergence_where_its_table_is_needed(
    alike: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def broken(*_: Any, **__: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("3 of 174 embeddings are not finite; the network has diverged.")
        return np.random.default_rng(0).standard_normal((174, 8)).astype(np.float32)

    monkeypatch.setattr(look_alikes, "embed", broken)
    with pytest.raises(TrainingDivergedError, match=r"look-alikes cannot be found \(3 of 174 .* at step (29|3\d|4\d)"):
        train(alike, tmp_path / "run", say=quiet)


@pytest.mark.parametrize("error", [OSError("stale file handle"), RuntimeError("out of memory"), MemoryError()])
def test_what_else_fails_in_the_background_loses_nothing_and_is_not_called_divergence(
    error: Exception, alike: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, calls = embed, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return sound(*arguments, **options)

    monkeypatch.setattr(look_alikes, "embed", failing)
    with pytest.raises(OSError, match=r"look-alikes cannot be found at step 45: .* --resume goes on"):
        train(alike, tmp_path / "run", say=quiet)
    run = train(alike, tmp_path / "run", resume=True, say=quiet)
    assert run.stage_reports[1]["steps"] == 70
    assert len(calls) == 2  # that of step 50 would come too late


def test_a_table_that_failed_before_it_was_needed_is_a_note_in_the_report(
    alike: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return embed(*arguments, **options) if len(calls) == 1 else 1 / 0

    monkeypatch.setattr(look_alikes, "embed", failing)
    monkeypatch.setattr(stage_run, "_clock", lambda *_: Clock(total_seconds=10.0))
    # In seconds, the last step is not known beforehand; here it comes after 30 steps, when 25's table is under way.
    monkeypatch.setattr(Clock, "progress_at", lambda clock, _: clock.steps / 30)
    run = train(alike, tmp_path / "run", say=quiet)
    assert run.stage_reports[1]["steps"] == 30
    told = "1 tables of look-alikes could not be computed, the last because: division by zero"
    assert any(told in note for note in run.notes)
    assert len(calls) == 2  # that of step 50 would come too late


@pytest.mark.parametrize("checkpoint_every", [60.0, 0.001])
def test_a_table_that_failed_and_is_not_in_force_yet_keeps_nothing_from_being_saved(
    checkpoint_every: float, alike: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, calls = embed, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return sound(*arguments, **options) if len(calls) == 1 else 1 / 0

    monkeypatch.setattr(look_alikes, "embed", failing)
    alike.checkpoint_every = checkpoint_every
    stopped = train(alike, tmp_path / "run", stopped=after(6 + 2 + 30), say=quiet)
    assert stopped.interrupted
    state = checkpoint.load(tmp_path / "run")
    assert [kept["at"] for kept in state["stage"]["sampler"]["neighbours"]] == [0]


def test_a_first_table_that_takes_all_of_the_budget_leaves_a_stage_without_steps(
    alike: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = embed

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(1.5)
        return sound(*arguments, **options)

    monkeypatch.setattr(look_alikes, "embed", slow)
    alike.budget = 1.0
    for stage in alike.stages:
        stage.steps = None
    run = train(alike, tmp_path / "run", say=quiet)
    assert run.stage_reports[1]["steps"] == 0


def test_workers_that_fetch_ahead_see_the_same_batches(alike: Recipe, people_folder: Path, tmp_path: Path) -> None:
    alike.data.train, alike.data.memory_mib, alike.data.test_share = str(people_folder), 0, 0.25
    alike.data.validation_share = 0.25
    alike.stages[1].sampler.options["identities_per_batch"] = 4
    assert alike.stages[1].look_alikes is not None
    alike.stages[1].look_alikes.delay = 24
    runs = []
    for workers in (0, 2):
        alike.data.workers = workers
        runs.append(weights(train(alike, tmp_path / str(workers), say=quiet)))
    assert_same(*runs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"every_steps": 40, "every_epochs": 2.0}, "by every_steps or by every_epochs; give one"),
        ({"neighbours": 0}, "look_alikes.neighbours=0 must be above 0"),
        ({"every_epochs": -1.0}, "look_alikes.every_epochs=-1.0 must be above 0"),
        ({"max_cos": 1.5}, r"look_alikes.max_cos=1.5 .* \[-1, 1\]"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(change: dict[str, Any], words: str, alike: Recipe) -> None:
    alike.stages[1].look_alikes = LookAlikes(**change)
    with pytest.raises(ValueError, match=words):
        check(alike)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"every_steps": 20, "delay": 20},
            "renewed every 20 steps, but only in force 20 steps later. Raise every_steps",
        ),
        ({"every_epochs": 0.5, "delay": 20}, "renewed every [0-9]+ steps, but only in force 20 steps"),
        ({"delay": 16}, "look_alikes.delay=16 must be above 16"),
    ],
)
def test_renewals_that_cannot_be_in_time_are_refused_before_training(
    change: dict[str, Any], words: str, alike: Recipe, tmp_path: Path
) -> None:
    alike.stages[1].look_alikes = LookAlikes(**change)
    with pytest.raises(ValueError, match=words):
        train(alike, tmp_path / "run", say=quiet)


def test_renewals_of_class_vectors_that_do_not_change_are_refused(alike: Recipe) -> None:
    alike.stages[1].look_alikes = LookAlikes(source="head", every_steps=50)
    with pytest.raises(ValueError, match="has no head whose vectors would change"):
        check(alike)
    alike.stages[1].look_alikes = LookAlikes(source="head")
    check(alike)


def test_look_alikes_of_another_sampler_are_refused(alike: Recipe) -> None:
    alike.stages[0].look_alikes = LookAlikes()
    with pytest.raises(ValueError, match=r"its sampler is ImageBatchSampler. Make it a LookAlikeBatchSampler"):
        check(alike)


def test_without_faiss_the_error_says_how_to_get_it(
    alike: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"pip install metricface\[cpu\]"):
        train(alike, tmp_path / "run", say=quiet)


def test_a_stage_of_pairs_trains_on_just_these_pairs(recipe: Recipe, tmp_path: Path) -> None:
    stage = recipe.stages[1]
    stage.sampler = Component("PairBatchSampler", {"pairs_per_batch": 12, "positive_share": 0.25})
    stage.miner, stage.loss = None, Component("ContrastiveLoss")
    run = train(recipe, tmp_path / "run", say=quiet)
    assert run.stage_reports[1]["images"] == 5 * 24
    made = batches.sampler(stage, run.people.training, 0)
    batch = next(iter(made))
    goal = assemble.objective(stage, recipe, 29, made)
    labels = torch.from_numpy(run.people.training.labels[batch])
    x = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    expected = goal.parts["loss"].loss(x, labels, made.indices_tuple)  # type: ignore[union-attr,operator]
    assert goal(x, labels) == expected
    everything = goal.parts["loss"].loss(x, labels)  # type: ignore[operator]
    assert goal(x, labels) != everything
    assert batches.describe(made).endswith("of 3 positive and 9 negative pairs")


def test_groups_are_what_a_pattern_finds_in_the_keys_of_images(recipe: Recipe, tmp_path: Path) -> None:
    stage = recipe.stages[1]
    stage.sampler.options |= {"groups": r"/\d*([01])\d$", "images_per_identity": 2}  # of synthetic keys: all one group
    run = train(recipe, tmp_path / "run", say=quiet)
    images = run.people.training
    stage.sampler.options["groups"] = r"([0-2]|[3-5])$"
    made = batches.sampler(stage, images, 0)
    for batch in made:
        for one, other in np.array(batch[:16]).reshape(-1, 2):
            assert images.keys[one][-1] != images.keys[other][-1]
    stage.sampler.options["groups"] = "(camera_[0-9])"
    with pytest.raises(ValueError, match="captures nothing in 174 of 174 names"):
        batches.sampler(stage, images, 0)


def test_weighted_identities_are_described_with_their_shares(recipe: Recipe, people_folder: Path) -> None:
    recipe.stages[1].sampler.options["identity_weights"] = "count"
    people = gather(recipe.data, 0)
    said = batches.describe(batches.sampler(recipe.stages[1], people.training, 0))
    assert "the one with most images has 3.45% of the visits; by count 3.45%" in said
