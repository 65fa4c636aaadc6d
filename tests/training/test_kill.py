"""Runs that are killed at random moments, in the middle of a write too, and end as if nothing had happened."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from metricface.training import checkpoint
from metricface.training.averaging import WeightAverage
from metricface.training.loop import train
from metricface.training.recipe import Component, Recipe
from metricface.training.run import Run

CPU = torch.device("cpu")


def quiet(_: str) -> None:
    pass


def eventful(recipe: Recipe) -> Recipe:
    """Two stages with all that a checkpoint holds, saved after every step."""
    recipe.checkpoint_every = 1e-9
    recipe.stages[0].average = 0.99
    recipe.stages[1].miner = Component("DistanceWeightedMiner")
    recipe.stages[1].watch.at = [0.3, 0.6]
    recipe.stages[1].watch.on_regression = "go_back"
    for stage in recipe.stages:
        stage.steps = 25
    return recipe


def wait_for_a_new_checkpoint(child: multiprocessing.process.BaseProcess, folder: Path) -> None:
    before = checkpoint.newest(folder)
    while child.is_alive() and checkpoint.newest(folder) == before:
        time.sleep(0.001)


def go_on(recipe: Recipe, folder: Path) -> Run:
    return train(recipe, folder, resume=checkpoint.newest(folder) is not None, say=quiet)


def _in_a_process_of_its_own(recipe: Recipe, folder: Path) -> None:
    torch.set_num_threads(1)
    go_on(recipe, folder)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(recipe: Recipe, tmp_path: Path, kills: int) -> None:
    eventful(recipe)
    since = time.monotonic()
    whole = train(recipe, tmp_path / "whole", say=quiet)
    took = time.monotonic() - since
    folder, drawn = tmp_path / "run", random.Random(kills)
    forks = multiprocessing.get_context("fork")
    reached = []
    for kill in range(kills):
        child = forks.Process(target=_in_a_process_of_its_own, args=(recipe, folder))
        child.start()
        # Every second one gets some way, of which enough is left for all kills; others may still be reading.
        if kill % 2:
            wait_for_a_new_checkpoint(child, folder)
        child.join(drawn.uniform(0.0, took / kills))
        if child.exitcode is not None:
            assert child.exitcode == 0
            break
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        reached.append(checkpoint.newest(folder))
        for file in (folder / checkpoint.FOLDER).glob("*.pt"):
            assert checkpoint._read(file) is not None
    resumed = go_on(recipe, folder)
    assert len(reached) > kills / 2
    assert len(set(reached) - {None}) > len(reached) / 4, "runs were killed before they had come anywhere"
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert [vars(moment) for moment in whole.history] == [vars(moment) for moment in resumed.history]


def test_the_average_is_in_the_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    eventful(recipe)
    asked = iter(range(100))
    train(recipe, tmp_path / "run", stopped=lambda: next(asked) >= 9, say=quiet)
    state = checkpoint.load(tmp_path / "run")["stage"]
    assert state["average"]["updates"] == 9
    fresh = WeightAverage(train(recipe, tmp_path / "run", resume=True, say=quiet).model, 0.5)
    assert state["average"]["values"].keys() == fresh.state_dict()["values"].keys()
