"""The shipped recipes on the real sets, at a reduced budget: `make test-slow`."""

import json
from pathlib import Path

import pytest

from metricface.cli.train import main

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("lfw", (700, 40)), ("omniglot", (250, 40)), ("orl", (150, 30))])
def test_a_shipped_recipe_learns_from_its_real_set(
    name: str, steps: tuple[int, int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    out = tmp_path / "out"
    # In steps: what a budget comes to depends on how busy the machine is.
    lengths = ["--budget", "null", f"--stages.softmax.steps={steps[0]}", f"--stages.triplet.steps={steps[1]}"]
    assert main([str(RECIPES / f"{name}.yaml"), "--data.train", str(folder), *lengths, "--output", str(out)]) == 0
    history = json.loads((out / "report.json").read_text())["history"]
    start, end = history[0]["test"], [moment for moment in history if moment["kept"]][-1]["test"]
    assert end["map_at_r"] > start["map_at_r"] + 0.05
    assert end["people"] == {"lfw": 808, "omniglot": end["people"], "orl": 10}[name]
