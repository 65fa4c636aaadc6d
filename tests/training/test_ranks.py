"""Training on several ranks: the same steps as one process on the joined batch."""

import copy
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from metricface.data.augment import Augmentation
from metricface.distributed import gather, gather_plain, rank, sum_over_ranks, world_size
from metricface.heads import Softmax
from metricface.heads.partial_fc import PartialFC
from metricface.heads.reshard import sharded_parameters
from metricface.models import build
from metricface.models.layers import freeze_statistics
from metricface.training import assemble, ranks
from metricface.training.loop import train
from metricface.training.objective import SumObjective
from metricface.training.recipe import Component, Model, Recipe, Schedule, Stage, Term, as_dict
from metricface.training.update import apply_gradient, drawing_from, drawing_state, embed
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


def train_on_ranks(folder: str, changes: dict[str, Any], steps: int | None = None, resume: bool = False) -> Any:
    """A tiny run; what it came to, on this rank."""
    recipe = tiny_recipe()
    recipe.data.augmentation, recipe.precision = Augmentation.off(), "float32"
    for stage in recipe.stages:
        stage.batch_norm = "frozen"
    for name, value in changes.items():
        setattr(recipe, name, value)
    asked = iter(range(10**6))
    stopped = (lambda: False) if steps is None else (lambda: next(asked) >= steps)
    said: list[str] = []
    run = train(recipe, Path(folder), resume=resume, stopped=stopped, say=said.append)
    return run.model.state_dict(), [vars(moment) for moment in run.history], run.interrupted, said


def test_a_run_on_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    alone, history, *_ = train_on_ranks(str(tmp_path / "alone"), {})
    first, second = on_ranks(2, train_on_ranks, str(tmp_path / "two"), {})
    for name, value in alone.items():
        torch.testing.assert_close(first[0][name], value, rtol=1e-3, atol=1e-5, msg=name)
        assert torch.equal(first[0][name], second[0][name]), name
    assert [moment["when"] for moment in first[1]] == [moment["when"] for moment in history]
    assert first[1] == second[1]
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    assert (tmp_path / "two" / "report.json").exists()


def test_a_run_on_ranks_is_interrupted_on_all_and_resumes_bit_by_bit_on_as_many(tmp_path: Path) -> None:
    whole = on_ranks(2, train_on_ranks, str(tmp_path / "whole"), {})
    stopped = on_ranks(2, train_on_ranks, str(tmp_path / "run"), {}, 8)
    assert [found[2] for found in stopped] == [True, True]
    resumed = on_ranks(2, train_on_ranks, str(tmp_path / "run"), {}, None, True)
    for name, value in whole[0][0].items():
        assert torch.equal(resumed[0][0][name], value), name


def test_a_run_goes_on_on_another_number_of_ranks_with_the_same_plan(tmp_path: Path) -> None:
    whole, *_ = train_on_ranks(str(tmp_path / "whole"), {})
    on_ranks(2, train_on_ranks, str(tmp_path / "run"), {}, 8)
    resumed, *_ = train_on_ranks(str(tmp_path / "run"), {}, None, True)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-5, msg=name)


def with_memory() -> dict[str, Any]:
    stages = tiny_recipe().stages
    for stage in stages:
        stage.batch_norm = "frozen"
    stages[1].memory = 40
    return {"stages": stages}


def test_a_memory_holds_the_images_of_all_ranks(tmp_path: Path) -> None:
    alone, *_ = train_on_ranks(str(tmp_path / "alone"), with_memory())
    for weights, *_ in on_ranks(2, train_on_ranks, str(tmp_path / "two"), with_memory()):
        for name, value in alone.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=name)
    with pytest.raises(ValueError, match="leave mining: per_rank out"):
        train_on_ranks(str(tmp_path / "per_rank"), with_memory() | {"mining": "per_rank"})


def with_partial_fc(rate: float | None, head: str = "CosFace", **options: Any) -> dict[str, Any]:
    """Everything that reaches for a head: a schedule, class means, clipping, a term beside it, fading into a stage."""
    stages = tiny_recipe().stages
    for stage in stages:
        stage.batch_norm, stage.clip_norm = "frozen", 0.7
    stages[0].head, stages[0].partial_fc, stages[0].class_means = Component(head, options), rate, True
    stages[0].schedules = {"head.margin_cos": Schedule("ramp", [[0.0, 0.0], [0.5, 0.35]])} if head == "CosFace" else {}
    stages[1].fade, stages[1].watch.on_regression = 0.6, "go_back"
    stages[1].plus = [Term("second", head=Component("ArcFace"), partial_fc=rate, weight=0.1)]
    return {"stages": stages}


def last(history: list[dict[str, Any]]) -> list[Any]:
    """Where a run came to: figures are those of a stage's end, whether or not its weights were kept."""
    return [(moment["when"], pytest.approx(moment["validation"]["auc"], abs=1e-3)) for moment in history]


def test_a_sharded_head_trains_as_the_whole_one_does(tmp_path: Path) -> None:
    whole, history, *_ = train_on_ranks(str(tmp_path / "whole"), with_partial_fc(None))
    for weights, seen, *_ in on_ranks(2, train_on_ranks, str(tmp_path / "sharded"), with_partial_fc(1.0)):
        assert last(seen) == last(history)
        for name, value in whole.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_sharded_head_joins_the_rows_of_all_ranks_where_mining_does_not(tmp_path: Path) -> None:
    changes = with_partial_fc(1.0)
    changes["stages"] = changes["stages"][:1]
    whole, *_ = train_on_ranks(str(tmp_path / "whole"), changes)
    for weights, *_ in on_ranks(2, train_on_ranks, str(tmp_path / "run"), changes | {"mining": "per_rank"}):
        for name, value in whole.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("steps", [4, 8])
def test_a_sharded_head_resumes_bit_by_bit_with_the_draws_it_would_have_had(tmp_path: Path, steps: int) -> None:
    changes = with_partial_fc(0.5)
    whole = on_ranks(2, train_on_ranks, str(tmp_path / "whole"), changes)
    on_ranks(2, train_on_ranks, str(tmp_path / "run"), changes, steps)
    resumed = on_ranks(2, train_on_ranks, str(tmp_path / "run"), changes, None, True)
    for name, value in whole[0][0].items():
        assert torch.equal(resumed[0][0][name], value), name
        assert torch.equal(resumed[1][0][name], value), name


@pytest.mark.parametrize("steps", [4, 8])
def test_a_sharded_head_goes_on_on_other_numbers_of_ranks(tmp_path: Path, steps: int) -> None:
    changes = with_partial_fc(1.0, "NormFace")  # it has a scale that it learns
    whole, history, *_ = train_on_ranks(str(tmp_path / "whole"), with_partial_fc(None, "NormFace"))
    on_ranks(4, train_on_ranks, str(tmp_path / "run"), changes, steps - 2)
    on_ranks(2, train_on_ranks, str(tmp_path / "run"), changes, 2, True)
    resumed, seen, *_ = train_on_ranks(str(tmp_path / "run"), changes, None, True)
    assert last(seen) == last(history)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_sharded_head_samples_in_one_process_too(tmp_path: Path) -> None:
    whole, *_ = train_on_ranks(str(tmp_path / "whole"), with_partial_fc(0.3))
    train_on_ranks(str(tmp_path / "run"), with_partial_fc(0.3), 4)
    resumed, *_ = train_on_ranks(str(tmp_path / "run"), with_partial_fc(0.3), None, True)
    plain, *_ = train_on_ranks(str(tmp_path / "plain"), with_partial_fc(None))
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
    assert not all(torch.equal(whole[name], value) for name, value in plain.items())


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


def test_per_rank_mining_trains_alike_on_all_ranks_and_says_what_it_costs(tmp_path: Path) -> None:
    first, second = on_ranks(2, train_on_ranks, str(tmp_path / "run"), {"mining": "per_rank"})
    for name, value in first[0].items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(value, second[0][name]), name
    assert any("an anchor meets 1/2 of a batch's negatives" in line for line in first[3])


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
