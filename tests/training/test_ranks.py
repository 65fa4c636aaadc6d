"""Training on several ranks: the same steps as one process on the joined batch."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import metricface
from metricface.data.augment import Augmentation
from metricface.data.images import UnreadableImageError
from metricface.distributed import gather, gather_plain, rank, sum_over_ranks, world_size
from metricface.evaluation import retrieval
from metricface.heads import Softmax
from metricface.heads.partial_fc import PartialFC
from metricface.heads.reshard import sharded_parameters
from metricface.miners import CurriculumMiner
from metricface.models import build
from metricface.models.layers import freeze_statistics
from metricface.training import assemble, checkpoint, loop, ranks, selection, stage_run, stages, update
from metricface.training.objective import SumObjective
from metricface.training.people import gather as gather_people
from metricface.training.recipe import Component, LookAlikes, Model, Recipe, Schedule, Stage, Term, as_dict
from metricface.training.run import Run
from metricface.training.stage_run import StageRun
from metricface.training.update import apply_gradient, drawing_from, drawing_state, embed
from samplers import IdentityBalancedBatchSampler, PairBatchSampler
from tests.folders import write_people
from tests.ranks import on_ranks
from tests.training.conftest import tiny_recipe

CPU = torch.device("cpu")
RECIPE = Recipe(model=Model(embedding_dim=8))
SAMPLER = Component("IdentityBalancedBatchSampler", {})
LOSSES = {
    "CurriculumMiner": {"first": {"name": "SemiHardMiner"}, "then": {"name": "BatchHardMiner"}, "start": 0, "end": 9}
}
MINED = [name for name in assemble.MINERS if name != "CurriculumMiner"]
# Of one rank after the other, unevenly; one may have none.
PARTS = {1: [13], 2: [9, 4], 4: [5, 1, 0, 7]}


def images() -> Tensor:
    return torch.randn(13, 1, 20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 0, 2, 3, 3, 2, 1, 4])


def stage(kind: str, name: str) -> Stage:
    if kind == "head":
        return Stage(name="s", sampler=SAMPLER, head=Component(name))
    if kind == "loss":
        return Stage(name="s", sampler=SAMPLER, loss=Component(name))
    pairs = name in ("MultiSimilarityMiner", "PairMarginMiner")
    loss = Component("ContrastiveLoss") if pairs else Component("TripletLoss", {"margin": 0.5})
    return Stage(name="s", sampler=SAMPLER, loss=loss, miner=Component(name, LOSSES.get(name, {})))


def trunk() -> nn.Module:
    torch.manual_seed(0)
    made = build("small", embedding_dim=8, channels=1, height=20, width=20, widths=[4, 6], units=[1, 1]).double()
    made(images())  # statistics of its own
    freeze_statistics(made)
    return made


def goal(kind: str, name: str) -> SumObjective:
    torch.manual_seed(2)
    made = assemble.objective(stage(kind, name), RECIPE, 5).double()
    for module in made.modules():
        if isinstance(module, CurriculumMiner):
            module.steps = 4  # on its way from one miner to the other, with draws for each anchor
    made.follow(0.0)
    return made


def take_a_step(cases: list[tuple[str, str]], chunk: int | None = None) -> list[tuple[Tensor, Any, Any]]:
    """Loss, gradients of the trunk and of the objective, for every case: on this rank's part of the batch."""
    counts = PARTS[world_size()]
    start = sum(counts[: rank()])
    own = slice(start, start + counts[rank()])
    plain = partial(assemble.autocast, torch.float32, CPU)
    off = torch.amp.GradScaler("cpu", enabled=False)
    found = []
    for kind, name in cases:
        model, objective = trunk(), goal(kind, name)
        network = ranks.data_parallel(model, CPU)
        torch.manual_seed(100 + rank())  # of chance in the network, which differs by rank
        drawing = list(drawing_state(CPU))
        drawing[0] = torch.Generator().manual_seed(7).get_state()
        embedded = embed(network, images()[own], plain, chunk=chunk)
        joined = gather(embedded.embeddings, averaged=True)
        labels = gather_plain(LABELS[own])
        with drawing_from(drawing, CPU):
            loss = objective(joined, labels)
        parameters = [*model.parameters(), *objective.parameters()]
        apply_gradient(loss, embedded, torch.optim.SGD(parameters, lr=0.0), off)
        grads = [[p.grad for p in module.parameters()] for module in (model, objective)]
        found.append((loss.detach(), *copy.deepcopy(grads)))
    return found


CASES = [("miner", name) for name in assemble.MINERS] + [("head", name) for name in assemble.HEADS]
CASES += [("loss", name) for name in assemble.LOSSES]


@pytest.mark.parametrize("number", [2, 4])
def test_losses_and_gradients_are_those_of_one_process_on_the_joined_batch(number: int) -> None:
    expected = take_a_step(CASES)
    for found in on_ranks(number, take_a_step, CASES):
        for (_, name), one, other in zip(CASES, expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6, msg=partial(_named, name))


def _named(name: str, text: str) -> str:
    return f"{name}: {text}"


def test_chunks_on_ranks_too() -> None:
    cases = [("miner", "DistanceWeightedMiner"), ("head", "ArcFace")]
    expected = take_a_step(cases)
    for found in on_ranks(2, take_a_step, cases, 3):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def plain_recipe() -> Recipe:
    """One whose batches every number of ranks makes the same of."""
    recipe = tiny_recipe()
    recipe.data.augmentation, recipe.precision = Augmentation.off(), "float32"
    for stage in recipe.stages:
        stage.batch_norm = "frozen"
    return recipe


def train_on_ranks(folder: str, changes: dict[str, Any], steps: int | None = None, resume: bool = False) -> Any:
    """A tiny run; what its stages came to, on this rank."""
    recipe = plain_recipe()
    for name, value in changes.items():
        setattr(recipe, name, value)
    asked = iter(range(10**6))
    stopped = (lambda: False) if steps is None else (lambda: next(asked) >= steps)
    said: list[str] = []
    ends: dict[str, Any] = {}

    def keep_best(run: Run, under_way: StageRun) -> bool:
        """The end of a stage is looked at before the better of it and its start is kept."""
        for name, value in run.model.state_dict().items():
            ends[f"{under_way.stage.name}: {name}"] = value.clone()
        return selection.keep_best(run, under_way)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "keep_best", keep_best)
        run = loop.train(recipe, Path(folder), resume=resume, stopped=stopped, say=said.append)
    return ends, [vars(moment) for moment in run.history], run.interrupted, said


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, exactly: bool = False) -> None:
    """Of stages that have been gone through since the last resume, their ends; the last stage's is among them."""
    assert any(name.startswith("triplet: ") for name in found)
    for name, value in found.items():
        if exactly:
            assert torch.equal(value, expected[name]), name
        else:
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)


# Requests to stop that come in the middle of the first stage, and of the second: a stage asks before each step, and
# twice at its end.
IN_MID_STAGE = pytest.mark.parametrize("steps", [pytest.param(4, marks=pytest.mark.slow), 10])


def test_a_run_on_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    alone, history, *_ = train_on_ranks(str(tmp_path / "alone"), {})
    first, second = on_ranks(2, train_on_ranks, str(tmp_path / "two"), {})
    assert_same(first[0], alone)
    assert_same(second[0], first[0], exactly=True)
    assert [moment["when"] for moment in first[1]] == [moment["when"] for moment in history]
    assert first[1] == second[1]
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    assert (tmp_path / "two" / "report.json").exists()


@IN_MID_STAGE
def test_a_run_on_ranks_is_interrupted_on_all_and_resumes_bit_by_bit_on_as_many(tmp_path: Path, steps: int) -> None:
    whole = on_ranks(2, train_on_ranks, str(tmp_path / "whole"), {})
    stopped = on_ranks(2, train_on_ranks, str(tmp_path / "run"), {}, steps)
    assert [found[2] for found in stopped] == [True, True]
    resumed = on_ranks(2, train_on_ranks, str(tmp_path / "run"), {}, None, True)
    assert_same(resumed[0][0], whole[0][0], exactly=True)


def stopped_on_the_second_rank(folder: str) -> Any:
    return train_on_ranks(folder, {}, 4 if rank() == 1 else None)


def test_a_request_to_one_rank_stops_all(tmp_path: Path) -> None:
    assert [found[2] for found in on_ranks(2, stopped_on_the_second_rank, str(tmp_path / "run"))] == [True, True]


@IN_MID_STAGE
def test_a_run_goes_on_on_another_number_of_ranks_with_the_same_plan(tmp_path: Path, steps: int) -> None:
    whole, *_ = train_on_ranks(str(tmp_path / "whole"), {})
    on_ranks(2, train_on_ranks, str(tmp_path / "run"), {}, steps)
    resumed, *_ = train_on_ranks(str(tmp_path / "run"), {}, None, True)
    assert_same(resumed, whole)


def in_full() -> dict[str, Any]:
    """What differs by rank: statistics of batches, changes of images, chunks; and what follows from them."""
    recipe = tiny_recipe()
    for stage in recipe.stages:
        stage.average, stage.chunk, stage.class_means = 0.9, 9, stage.head is not None
    recipe.stages[1].plus = [Term("second", head=Component("NormFace"), weight=0.1)]
    recipe.stages[1].class_means = True
    return {"stages": recipe.stages, "data": recipe.data, "model": Model(options={"dropout": 0.3})}


@IN_MID_STAGE
def test_ranks_have_one_network_between_steps_whatever_their_batches_and_resume_with_it(
    tmp_path: Path, steps: int
) -> None:
    whole = on_ranks(2, train_on_ranks, str(tmp_path / "whole"), in_full())
    assert_same(whole[1][0], whole[0][0], exactly=True)  # running statistics among them
    assert whole[1][1] == whole[0][1]
    on_ranks(2, train_on_ranks, str(tmp_path / "run"), in_full(), steps)
    resumed = on_ranks(2, train_on_ranks, str(tmp_path / "run"), in_full(), None, True)
    assert_same(resumed[0][0], whole[0][0], exactly=True)
    assert resumed[0][1] == whole[0][1]
    embedder = metricface.load(tmp_path / "run" / "model")
    images = gather_people(tiny_recipe().data, 0).test
    found = retrieval.evaluate(embedder.embed(images.read(range(len(images)))), images.labels)
    kept = [moment for moment in whole[0][1] if moment["kept"]][-1]
    assert found.map_at_r == pytest.approx(kept["test"]["map_at_r"], abs=2e-3)


def with_chunks() -> dict[str, Any]:
    stages = plain_recipe().stages
    stages[0].chunk = 14  # of 29 images in a batch one rank has 14, the other 15
    return {"stages": stages}


def test_chunks_between_the_shares_of_two_ranks(tmp_path: Path) -> None:
    alone, *_ = train_on_ranks(str(tmp_path / "alone"), with_chunks())
    for found, *_ in on_ranks(2, train_on_ranks, str(tmp_path / "two"), with_chunks()):
        assert_same(found, alone)


def with_look_alikes() -> dict[str, Any]:
    """Tables of a network whose batch norms follow their batches, renewed in the second stage."""
    recipe = tiny_recipe()
    options = {"identities_per_batch": 8, "images_per_identity": 3, "look_alike_share": 0.5, "neighbourhood": 3}
    recipe.stages[1].sampler = Component("LookAlikeBatchSampler", options)
    recipe.stages[1].look_alikes = LookAlikes(every_steps=25, delay=17)
    recipe.stages[1].steps = 60
    recipe.data.workers = 0
    return {"stages": recipe.stages, "data": recipe.data}


def look_alikes_on_ranks(folder: str, steps: int | None = None, resume: bool = False) -> Any:
    """What such a run came to, and the tables of its second stage's sampler at the end."""
    tables: list[Any] = []
    real = stages.train

    def train(run: StageRun, *given: Any, **named: Any) -> None:
        real(run, *given, **named)
        if run.look_alikes is not None:
            tables[:] = [kept["table"] for kept in run.sampler.state_dict()["neighbours"]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "train", train)
        return train_on_ranks(folder, with_look_alikes(), steps, resume)[0], tables


def test_all_ranks_have_the_first_ones_look_alikes_and_resume_with_them(tmp_path: Path) -> None:
    first, second = on_ranks(2, look_alikes_on_ranks, str(tmp_path / "whole"))
    assert len(first[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert_same(second[0], first[0], exactly=True)
    on_ranks(2, look_alikes_on_ranks, str(tmp_path / "run"), 8 + 38)
    resumed = on_ranks(2, look_alikes_on_ranks, str(tmp_path / "run"), None, True)
    assert_same(resumed[0][0], first[0], exactly=True)


def with_memory() -> dict[str, Any]:
    stages = plain_recipe().stages
    stages[1].memory = 40
    return {"stages": stages}


def test_a_memory_holds_the_images_of_all_ranks(tmp_path: Path) -> None:
    alone, *_ = train_on_ranks(str(tmp_path / "alone"), with_memory())
    for found, *_ in on_ranks(2, train_on_ranks, str(tmp_path / "two"), with_memory()):
        assert_same(found, alone)
    with pytest.raises(ValueError, match="leave mining: per_rank out"):
        train_on_ranks(str(tmp_path / "per_rank"), with_memory() | {"mining": "per_rank"})


def rows_of_a_batch(kind: str) -> list[Tensor]:
    """Indices of three batches, joined in the order of one process."""
    labels = [i // 4 for i in range(48)] + [100 + i for i in range(7)]
    part: dict[str, Any] = {"rank": rank(), "world_size": world_size()}
    sampler: Any = PairBatchSampler(labels, 8, positive_share=0.5, **part)
    if kind == "identities":
        sampler = IdentityBalancedBatchSampler(labels, 4, 3, singletons_per_batch=5, **part)
    order = stage_run._order(sampler, CPU)
    found = [gather_plain(torch.tensor(batch)) for batch in sampler][:3]
    return found if order is None else [batch[order] for batch in found]


@pytest.mark.parametrize("kind", ["identities", "pairs"])
def test_the_rows_of_all_ranks_stand_as_in_one_process_so_that_draws_follow_them(kind: str) -> None:
    expected = rows_of_a_batch(kind)
    for found in on_ranks(2, rows_of_a_batch, kind):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def with_partial_fc(rate: float | None, head: str = "CosFace", **options: Any) -> dict[str, Any]:
    """Everything that reaches for a head: a schedule, class means, clipping, a term that keeps it, fading in."""
    stages = plain_recipe().stages
    for stage in stages:
        stage.clip_norm = 0.7
    stages[0].head, stages[0].partial_fc, stages[0].class_means = Component(head, options), rate, True
    stages[0].schedules = {"head.margin_cos": Schedule("ramp", [[0.0, 0.0], [0.5, 0.35]])} if head == "CosFace" else {}
    stages[1].fade, stages[1].watch.on_regression = 0.6, "go_back"
    stages[1].plus = [Term("second", head=Component(head, options), partial_fc=rate, weight=0.1)]
    stages[1].keep_head = True
    return {"stages": stages}


def test_a_sharded_head_trains_as_the_whole_one_does(tmp_path: Path) -> None:
    whole, *_ = train_on_ranks(str(tmp_path / "whole"), with_partial_fc(None))
    for found, *_ in on_ranks(2, train_on_ranks, str(tmp_path / "sharded"), with_partial_fc(1.0)):
        assert_same(found, whole)


def test_a_sharded_head_joins_the_rows_of_all_ranks_where_mining_does_not(tmp_path: Path) -> None:
    changes = with_partial_fc(1.0)
    changes["stages"] = [replace(changes["stages"][0], name="triplet")]
    whole, *_ = train_on_ranks(str(tmp_path / "whole"), changes)
    for found, *_ in on_ranks(2, train_on_ranks, str(tmp_path / "run"), changes | {"mining": "per_rank"}):
        assert_same(found, whole)


@IN_MID_STAGE
def test_a_sharded_head_resumes_bit_by_bit_with_the_draws_it_would_have_had(tmp_path: Path, steps: int) -> None:
    changes = with_partial_fc(0.5)
    whole = on_ranks(2, train_on_ranks, str(tmp_path / "whole"), changes)
    on_ranks(2, train_on_ranks, str(tmp_path / "run"), changes, steps)
    for found, *_ in on_ranks(2, train_on_ranks, str(tmp_path / "run"), changes, None, True):
        assert_same(found, whole[0][0], exactly=True)


@IN_MID_STAGE
def test_a_sharded_head_goes_on_on_other_numbers_of_ranks(tmp_path: Path, steps: int) -> None:
    changes = with_partial_fc(1.0, "NormFace")  # it has a scale that it learns
    whole, *_ = train_on_ranks(str(tmp_path / "whole"), with_partial_fc(None, "NormFace"))
    on_ranks(4, train_on_ranks, str(tmp_path / "run"), changes, steps - 1)
    on_ranks(2, train_on_ranks, str(tmp_path / "run"), changes, 1, True)
    resumed, *_ = train_on_ranks(str(tmp_path / "run"), changes, None, True)
    assert_same(resumed, whole)


def test_a_sharded_head_samples_in_one_process_too(tmp_path: Path) -> None:
    whole, *_ = train_on_ranks(str(tmp_path / "whole"), with_partial_fc(0.3))
    train_on_ranks(str(tmp_path / "run"), with_partial_fc(0.3), 4)
    resumed, *_ = train_on_ranks(str(tmp_path / "run"), with_partial_fc(0.3), None, True)
    plain, *_ = train_on_ranks(str(tmp_path / "plain"), with_partial_fc(None))
    assert_same(resumed, whole, exactly=True)
    assert not all(torch.equal(whole[name], value) for name, value in plain.items())


def test_a_scale_grows_after_an_overflow_as_with_the_head_alone() -> None:
    scales = []
    for head in (Softmax(6, 2), PartialFC(Softmax(6, 2))):
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=4)
        found = []
        for step in range(12):
            embedded = embed(
                nn.Identity(), torch.ones(2, 2, requires_grad=True), partial(assemble.autocast, torch.float32, CPU)
            )
            loss = head(embedded.embeddings, torch.tensor([0, 5])) * (torch.inf if step == 3 else 1.0)
            apply_gradient(loss, embedded, optimizer, scaler, sharded=sharded_parameters(head))
            found.append(scaler.get_scale())
        scales.append(found)
    assert scales[0] == scales[1]
    assert scales[0][:8] == [4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0, 4.0]


def overflow_on_the_second_rank() -> tuple[bool, float, bool, float, float]:
    """Of a step whose gradient overflows in one rank's classes, and of one that does not."""
    head = PartialFC(Softmax(6, 2))
    optimizer, scaler = torch.optim.SGD(head.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    start = torch.ones(2, 2, requires_grad=True)
    found: list[Any] = []
    for factor in (torch.inf if rank() else 1.0, 1.0):
        embedded = embed(nn.Identity(), start, partial(assemble.autocast, torch.float32, CPU))
        loss = head(embedded.embeddings, torch.tensor([0, 5])) + factor * head.head.weight.sum()
        found.append(apply_gradient(loss, embedded, optimizer, scaler, clip_norm=0.5, sharded=sharded_parameters(head)))
        found.append(scaler.get_scale())
    grads = [p.grad.square().sum() for p in head.parameters() if p.grad is not None]
    found.append(float(sum_over_ranks(torch.stack(grads).sum()).sqrt()))
    return tuple(found)


def test_an_overflow_in_the_classes_of_one_rank_is_one_on_all_and_clipping_sees_all_classes() -> None:
    for found in on_ranks(2, overflow_on_the_second_rank):
        assert found[:4] == (False, 2.0, True, 2.0)
        assert found[4] == pytest.approx(0.5, rel=1e-4)


def per_rank(loss: str) -> dict[str, Any]:
    stages = tiny_recipe().stages
    stages[1].plus = [Term("second", loss=Component(loss), weight=0.1)]
    return {"mining": "per_rank", "stages": stages}


@pytest.mark.parametrize("loss", ["CenterLoss", pytest.param("MarginBasedLoss", marks=pytest.mark.slow)])
def test_per_rank_mining_trains_alike_on_all_ranks_resumes_and_says_what_it_costs(tmp_path: Path, loss: str) -> None:
    first, second = on_ranks(2, train_on_ranks, str(tmp_path / "whole"), per_rank(loss))
    assert_same(second[0], first[0], exactly=True)
    assert any("an anchor meets 1/2 of a batch's negatives" in line for line in first[3])
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert [stage["images"] for stage in report["stages"]] == [6 * 29, 5 * 24]  # of both
    on_ranks(2, train_on_ranks, str(tmp_path / "run"), per_rank(loss), 10)
    for found, *_ in on_ranks(2, train_on_ranks, str(tmp_path / "run"), per_rank(loss), None, True):
        assert_same(found, first[0], exactly=True)


def diverging_on_the_second_rank(folder: str) -> str:
    """What is raised where the embeddings of one rank alone are not finite."""
    real = update.embed
    calls: list[int] = []

    def broken(*given: Any, **named: Any) -> Any:
        made = real(*given, **named)
        calls.append(1)
        bad = rank() == 1 and len(calls) == 9
        return made._replace(embeddings=made.embeddings * torch.nan) if bad else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "embed_batch", broken)
        try:
            train_on_ranks(folder, {"mining": "per_rank"})
        except stages.TrainingDivergedError as error:
            return str(error)
    return "nothing"


def test_where_one_rank_diverges_all_do_and_the_stage_before_is_reported(tmp_path: Path) -> None:
    for told in on_ranks(2, diverging_on_the_second_rank, str(tmp_path / "run")):
        assert "embeddings are not finite" in told
    assert (tmp_path / "run" / "report.json").exists()
    assert (tmp_path / "run" / "model").exists()


def losing_an_image_on_the_second_rank(folder: str, people: str) -> tuple[str, int]:
    """What each rank is told, and how many batches it had."""
    real = stages._endless
    had: list[Any] = []

    def endless(loader: Any) -> Any:
        for batch in real(loader):
            if rank() == 1 and len(had) == 3:
                raise UnreadableImageError("gone.png", "it has gone")
            had.append(batch)
            yield batch

    data = replace(plain_recipe().data, train=people, memory_mib=0, workers=0, validation_share=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_endless", endless)
        try:
            train_on_ranks(folder, {"data": data})
        except UnreadableImageError as error:
            return str(error), len(had)
    return "nothing", len(had)


def test_an_image_that_one_rank_cannot_read_ends_all_with_what_was_trained_saved(tmp_path: Path) -> None:
    people = str(write_people(tmp_path / "people", 16, 4))
    first, second = on_ranks(2, losing_an_image_on_the_second_rank, str(tmp_path / "run"), people)
    assert "Another rank could not read an image" in first[0]
    assert "gone.png" in second[0]
    assert (first[1], second[1]) == (4, 3)
    state = checkpoint.load(tmp_path / "run")
    assert state["stage"]["clock"]["steps"] == 3


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *arguments]


def test_torchrun_trains_from_the_command_line_prints_once_and_resumes_after_ctrl_c(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    recipe.stages[0].steps = 2000
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(as_dict(recipe)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = torchrun("metricface.cli.train", "recipe.yaml", "--output", "out", "--checkpoint_every", "0.2")
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True) as run:
        deadline = time.monotonic() + 90
        while len(list(tmp_path.glob("out/checkpoints/*.pt"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        printed, errors = run.communicate(timeout=60)
    assert "Interrupted; everything is saved" in printed, errors
    assert printed.count("run        out") == 1
    saved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    saved["stages"][0]["steps"] = 1
    (tmp_path / "out" / "recipe.yaml").write_text(yaml.safe_dump(saved))
    again = subprocess.run(
        torchrun("metricface.cli.train", "--resume", "out"),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "report.json").exists()
