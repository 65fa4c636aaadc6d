"""Stages that minimise a weighted sum, with weights and margins on schedules, through the whole training loop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metricface.training import assemble, loop, stages
from metricface.training.held_out import embed
from metricface.training.loop import train
from metricface.training.objective import HeadObjective
from metricface.training.people import People
from metricface.training.recipe import Component, Recipe, Schedule, Stage, Term
from metricface.training.run import Run
from metricface.training.stage_run import StageRun
from metricface.training.stages import TrainingDivergedError
from tests.training.test_loop import after, assert_same, quiet, weights

STEPS = 6


@pytest.fixture
def composed(recipe: Recipe) -> Recipe:
    """One stage: CosFace with a rising margin, and hard triplets whose weight rises from the middle on."""
    recipe.stages = [
        Stage(
            name="sum",
            sampler=Component("IdentityBalancedBatchSampler", {"identities_per_batch": 8, "images_per_identity": 3}),
            head=Component("CosFace", {"scale": 16.0}),
            plus=[Term("triplet", loss=Component("TripletLoss"), miner=Component("BatchHardMiner"))],
            schedules={
                "head.margin_cos": Schedule("ramp", [[0.0, 0.0], [1.0, 0.3]]),
                "triplet.weight": Schedule("ramp", [[0.5, 0.0], [1.0, 0.6]]),
            },
            steps=STEPS,
            learning_rate=0.05,
        )
    ]
    recipe.log_every = 1
    return recipe


@pytest.fixture
def _end_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """So short a stage often ends below its start, and runs that went back there would all be the same."""
    monkeypatch.setattr(loop, "keep_best", lambda run, name: None)


def curves(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_sum_trains_from_a_recipe_and_its_curves_add_up(composed: Recipe, tmp_path: Path) -> None:
    train(composed, tmp_path / "run", say=quiet)
    found = curves(tmp_path / "run")
    weight = [0.0, 0.0, 0.0, 0.0, 0.2, 0.4]  # at step / STEPS before each step
    assert found["sum/schedule/triplet.weight"] == pytest.approx(weight, abs=1e-6)
    assert found["sum/schedule/head.margin_cos"] == pytest.approx([0.05 * step for step in range(STEPS)], abs=1e-6)
    parts = zip(found["sum/term/head"], found["sum/term/triplet"], weight, strict=True)
    assert found["sum/loss"] == pytest.approx([head + factor * triplet for head, triplet, factor in parts], rel=1e-5)
    assert found["sum/triplet/mining/triplets"] == [24.0] * STEPS
    assert len(found["sum/head/accuracy"]) == STEPS
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    stage = report["recipe"]["stages"][0]
    assert stage["plus"][0]["miner"] == {"name": "BatchHardMiner", "options": {}}
    assert stage["schedules"]["triplet.weight"] == {"shape": "ramp", "points": [[0.5, 0.0], [1.0, 0.6]]}


@pytest.mark.usefixtures("_end_kept")
def test_a_term_without_weight_leaves_the_run_as_it_is_without_the_term(composed: Recipe, tmp_path: Path) -> None:
    def trained(name: str, points: list[list[float]] | None) -> Run:
        stage = composed.stages[0]
        stage.schedules = {} if points is None else {"triplet.weight": Schedule("step", points)}
        stage.plus = stage.plus if points is not None else []
        return train(composed, tmp_path / name, say=quiet)

    other = weights(trained("weighted", [[0.0, 1.0]]))
    none = weights(trained("none", [[0.0, 0.0]]))
    assert_same(none, weights(trained("head", None)))
    assert any(not torch.equal(none[name], other[name]) for name in none)


@pytest.mark.usefixtures("_end_kept")
@pytest.mark.parametrize("class_means", [False, True])
@pytest.mark.parametrize("steps", [0, 4])
def test_an_interrupted_sum_on_schedules_resumes_to_the_weights_of_an_uninterrupted_one(
    composed: Recipe, tmp_path: Path, steps: int, class_means: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[StageRun] = []
    monkeypatch.setattr(loop, "_note_speed", lambda run, under_way: ended.append(under_way))
    stage = composed.stages[0]
    stage.class_means = class_means
    stage.plus += [Term("boundary", loss=Component("MarginBasedLoss"), miner=Component("DistanceWeightedMiner"))]
    whole = train(composed, tmp_path / "whole", say=quiet)
    assert train(composed, tmp_path / "run", stopped=after(steps), say=quiet).interrupted
    resumed = train(composed, tmp_path / "run", resume=True, say=quiet)
    assert_same(weights(whole), weights(resumed))
    assert_same(*(run.objective.state_dict() for run in ended))  # heads and boundaries, too


def test_heads_start_from_class_means_of_the_network_as_it_stands_and_only_once(
    composed: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed.stages[0].class_means = True
    composed.stages[0].plus.append(Term("second", head=Component("CosFace")))
    seen: list[tuple[StageRun, float]] = []
    real = stages.start_from_class_means

    def watched(run: StageRun, people: People, model: torch.nn.Module, device: torch.device, *stopped: Any) -> None:
        real(run, people, model, device, *stopped)
        seen.append((run, run.clock.elapsed))
        rows = embed(model, people.training, device, unit=True)  # in the order of the set
        for part in (run.objective.parts["head"], run.objective.parts["second"]):
            assert isinstance(part, HeadObjective)
            classes = part.head.get_parameter("weight").detach().numpy()
            for label, vector in enumerate(classes):
                mean = np.mean([row for row, own in zip(rows, people.training.labels, strict=True) if own == label], 0)
                cosine = vector @ mean / np.linalg.norm(vector) / np.linalg.norm(mean)
                assert cosine == pytest.approx(1.0, abs=1e-5)

    monkeypatch.setattr(stages, "start_from_class_means", watched)
    train(composed, tmp_path / "run", stopped=after(3), say=quiet)
    train(composed, tmp_path / "run", resume=True, say=quiet)
    assert len(seen) == 1
    assert seen[0][1] == 0.0  # before the clock of the stage


def test_mined_triplets_beside_a_head_may_come_from_batches_of_each_image_once(
    composed: Recipe, tmp_path: Path
) -> None:
    composed.stages[0].sampler = Component("ImageBatchSampler", {"batch_size": 24})
    train(composed, tmp_path / "run", say=quiet)
    triplets = curves(tmp_path / "run")["sum/triplet/mining/triplets"]
    assert len(triplets) == STEPS
    assert min(triplets) < 24.0  # few images have a positive beside them, and that is shown


def test_a_sum_that_diverges_says_which_terms_and_names_their_weights(composed: Recipe, tmp_path: Path) -> None:
    composed.stages[0].schedules = {}
    composed.stages[0].plus[0].weight = 1e39
    with pytest.raises(TrainingDivergedError) as error:
        train(composed, tmp_path / "run", say=quiet)
    text = str(error.value)
    assert "Stage 'sum' has diverged: its loss is inf (head is" in text
    assert "with weight 1, triplet is" in text
    assert "with weight 1e+39) at step 1" in text
    assert "Lower stages.sum.learning_rate, or stages.sum.plus.triplet.weight, lengthen its warmup" in text


def test_a_schedule_that_cannot_work_is_found_before_any_image_is_read(
    composed: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(*_: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr("metricface.training.loop.gather", gather)
    composed.stages[0].schedules["head.margin_cos"].points[1][1] = 7.0
    with pytest.raises(ValueError, match=r"Stage 'sum': schedules\.head\.margin_cos goes to 7, which is refused: marg"):
        train(composed, tmp_path / "run", say=quiet)


def test_parts_that_do_not_go_together_are_found_before_the_first_stage_and_are_no_divergence(
    composed: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TakesNoTuple(torch.nn.Module):
        def forward(self, rows: torch.Tensor, labels: torch.Tensor, found: object = None) -> torch.Tensor:
            if found is not None:
                raise ValueError("TakesNoTuple takes no miner's tuple.")
            return rows.square().mean()

    monkeypatch.setitem(assemble.LOSSES, "TakesNoTuple", TakesNoTuple)
    composed.stages[0].plus[0].loss = Component("TakesNoTuple")
    with pytest.raises(ValueError, match="Stage 'sum': triplet: TakesNoTuple takes no miner's tuple"):
        train(composed, tmp_path / "run", say=quiet)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", sorted(assemble.HEADS))
def test_every_head_trains_from_a_recipe_by_its_name(composed: Recipe, tmp_path: Path, name: str) -> None:
    stage = composed.stages[0]
    stage.head, stage.plus, stage.schedules = Component(name, {"streaming": True}), [], {}
    stage.steps = 2
    run = train(composed, tmp_path / "run", say=quiet)
    assert not [note for note in run.notes if "diverged" in note]
    assert run.stage_reports[0]["steps"] == 2


@pytest.mark.parametrize("name", sorted(assemble.LOSSES))
def test_every_loss_trains_beside_a_head_from_a_recipe_by_its_name(composed: Recipe, tmp_path: Path, name: str) -> None:
    stage = composed.stages[0]
    stage.plus, stage.schedules = [Term("second", loss=Component(name), weight=0.01)], {}
    stage.steps, stage.class_means = 2, True
    run = train(composed, tmp_path / "run", say=quiet)
    assert not [note for note in run.notes if "diverged" in note]
    assert run.stage_reports[0]["steps"] == 2


def test_class_means_reach_the_centres_and_heads_inside_losses_too(
    composed: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = composed.stages[0]
    stage.class_means, stage.schedules = True, {}
    stage.plus = [
        Term("center", loss=Component("CenterLoss")),
        Term("ratio", loss=Component("ContrastiveCenterLoss")),
        Term("pairs", loss=Component("DeepID2Loss")),
    ]
    real, seen = stages.start_from_class_means, []

    def watched(run: StageRun, people: People, model: torch.nn.Module, device: torch.device, *stopped: Any) -> None:
        real(run, people, model, device, *stopped)
        rows = torch.from_numpy(embed(model, people.training, device, unit=False))
        labels = torch.from_numpy(people.training.labels)
        means = torch.stack([rows[labels == c].mean(dim=0) for c in range(int(labels.max()) + 1)])
        state = run.objective.state_dict()
        found = [value for name, value in state.items() if name.endswith(("centers", "identification.weight"))]
        assert len(found) == 3
        assert all(torch.allclose(value, means, atol=1e-5) for value in found)
        seen.append(run)

    monkeypatch.setattr(stages, "start_from_class_means", watched)
    train(composed, tmp_path / "run", stopped=after(1), say=quiet)
    assert seen
