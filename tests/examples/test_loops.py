"""The examples, run at reduced size as a user would import them."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from metricface.cli.arguments import parse
from metricface.training.assemble import check_names
from metricface.training.contradictions import check

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


@pytest.mark.parametrize("name", ["lfw", "omniglot", None])
def test_every_variant_of_the_study_is_a_recipe_that_can_be_read(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = example("study")
    for variant, change in study.VARIANTS.items():
        recipe = study.read(EXAMPLES / "recipes" / f"{name}.yaml" if name else None)
        change(recipe)
        Path("varied.yaml").write_text(yaml.safe_dump(recipe))
        read = parse(["varied.yaml", "--output", variant]).recipe
        check(read)
        check_names(read)
        assert len(read.stages) == (1 if variant in ("softmax", "cosface", "cosface_held") else 2)


@pytest.mark.parametrize("asked", [["--steps", "3", "4"], ["--share_first_stage"]])
def test_the_study_refuses_what_a_variant_cannot_do_before_it_trains_any(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = example("study")
    monkeypatch.setattr(study, "run", lambda *_: pytest.fail("a variant was trained"))
    variants = ["--variants", "cosface_joined", "cosface"]
    monkeypatch.setattr("sys.argv", ["study.py", *asked, *variants, "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"cosface .*: leave it out"):
        study.main()


def test_the_table_of_the_study_gives_mean_and_half_the_range_over_seeds() -> None:
    study = example("study")
    reports = [
        {"history": [{"when": "start"}, {"when": "after softmax", "test": dict.fromkeys(study.FIGURES, value)}]}
        for value in (0.4, 0.5)
    ]
    assert study.table({"softmax": reports}).splitlines()[-1].count("0.450 ± 0.050") == len(study.FIGURES)
