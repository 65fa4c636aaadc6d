"""The examples, run at reduced size as a user would import them."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["loop", "loop_pml"])
def test_a_loop_of_ones_own_lowers_the_loss_of_what_is_mined(name: str) -> None:
    means = example(name).main(identities=48, epochs=4)
    assert means[-1] < 0.9 * means[0]


def test_the_raw_loop_is_thirty_lines() -> None:
    lines = (EXAMPLES / "loop.py").read_text().splitlines()
    body = lines[lines.index("def main(identities: int = 200, epochs: int = 5) -> list[float]:") :]
    assert len(body) <= 30
