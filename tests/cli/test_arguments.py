import os
from pathlib import Path

import pytest
import yaml

from metricface.cli.arguments import Command, parse
from metricface.training.loop import CHECKPOINT, RECIPE
from metricface.training.recipe import Component, Recipe, Stage, as_dict


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(folder: str, recipe: Recipe | None = None) -> Path:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / RECIPE).write_text(yaml.safe_dump(as_dict(recipe or Recipe()), sort_keys=False))
    (path / CHECKPOINT).touch()
    return path


def message(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_no_argument_means_the_default_recipe_in_a_folder_of_its_name() -> None:
    assert parse([]) == Command(Recipe(), Path("runs/demo"), resume=False)


def test_settings_are_overridden_by_their_dotted_names() -> None:
    recipe = parse(["--data.train", "faces", "--data.crop=0.7", "--budget", "20s", "--seed", "3"]).recipe
    assert (recipe.data.train, recipe.data.crop, recipe.budget, recipe.seed) == ("faces", 0.7, "20s", 3)


def test_a_recipe_file_comes_first_and_later_settings_win() -> None:
    Path("r.yaml").write_text("name: mine\nseed: 5\ndata: {height: 40}\n")
    recipe = parse(["r.yaml", "--seed", "6"]).recipe
    assert (recipe.name, recipe.seed, recipe.data.height, recipe.data.width) == ("mine", 6, 40, 56)


def test_the_stages_of_a_recipe_file_owe_nothing_to_the_default_stages() -> None:
    Path("r.yaml").write_text("""
stages:
- {name: a, sampler: {name: ImageBatchSampler}, head: {name: Softmax}, optimizer: {name: Adam}}
""")
    only = parse(["r.yaml"]).recipe.stages
    assert only == [Stage("a", Component("ImageBatchSampler"), head=Component("Softmax"), optimizer=Component("Adam"))]


def test_a_stage_is_reached_by_its_name_or_number() -> None:
    argv = ["--stages.triplet.learning_rate", "0.5", "--stages.0.head.options.scale=16", "--stages.triplet.warmup=0.3"]
    softmax, triplet = parse(argv).recipe.stages
    assert (triplet.learning_rate, triplet.warmup) == (0.5, 0.3)
    assert softmax.head is not None
    assert softmax.head.options == {"margin_cos": 0.35, "scale": 16}


def test_a_part_named_alone_replaces_the_part_and_its_options() -> None:
    triplet = parse(["--stages.triplet.miner", "SemiHardMiner", "--stages.triplet.miner.options.margin", "0.3"]).recipe
    assert triplet.stages[1].miner == Component("SemiHardMiner", {"margin": 0.3})


def test_a_part_that_is_replaced_leaves_its_options_behind() -> None:
    Path("r.yaml").write_text("""
stages:
- {name: a, sampler: {name: ImageBatchSampler}, loss: {name: TripletLoss, options: {margin: 0.5}}}
""")
    for argv in (["r.yaml", "--stages.a.loss.name", "ContrastiveLoss"], ["r.yaml", "--stages.a.loss=ContrastiveLoss"]):
        assert parse(argv).recipe.stages[0].loss == Component("ContrastiveLoss")
    loss = parse(["--stages.triplet.loss.options.normalize", "true", "--stages.triplet.loss", "ContrastiveLoss"])
    assert loss.recipe.stages[1].loss == Component("ContrastiveLoss", {"normalize": True})


def test_an_unknown_stage_is_an_error_that_lists_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert "its stages are softmax, triplet" in message(["--stages.finetune.learning_rate", "1"], capsys)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--data.tain", "x"], "data.tain"),
        (["--stages.triplet.learning_rat", "1"], "learning_rat"),
        (["--data.height", "tall"], "tall"),
        (["missing.yaml"], "missing.yaml"),
        (["--stages.triplet.clip_norm", "--seed", "1"], "--stages.triplet.clip_norm has no value"),
        (["--stages.triplet.name.x", "3"], "name holds one value"),
        (["--resume", "a", "--output", "b"], "give one"),
    ],
)
def test_an_unknown_key_or_a_wrong_value_is_an_error_that_names_it(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in message(argv, capsys)


def test_an_unknown_key_in_a_recipe_file_is_an_error_that_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text("data: {hight: 40}\n")
    assert "hight" in message(["r.yaml"], capsys)


def test_an_output_that_holds_a_run_is_an_error_that_shows_both_ways_on(capsys: pytest.CaptureFixture[str]) -> None:
    written("out")
    text = message(["--output", "out"], capsys)
    assert "already holds a run" in text
    assert "--resume out" in text


def test_default_folders_are_numbered_so_that_a_second_run_overwrites_nothing() -> None:
    written("runs/demo")
    assert parse([]).folder == Path("runs/demo-2")


def test_resume_takes_the_saved_recipe() -> None:
    saved = Recipe(seed=7)
    saved.stages[1].learning_rate = 0.123
    written("out", saved)
    assert parse(["--resume", "out"]) == Command(saved, Path("out"), resume=True)


def test_resume_without_a_folder_takes_the_newest_run_or_the_output() -> None:
    os.utime(written("runs/lfw") / CHECKPOINT, (2, 2))
    os.utime(written("runs/demo") / CHECKPOINT, (1, 1))
    written("other")
    assert parse(["--resume"]).folder == Path("runs/lfw")
    assert parse(["--output", "other", "--resume"]).folder == Path("other")


def test_resume_with_other_settings_is_an_error_that_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    written("out")
    text = message(["--resume", "out", "--stages.triplet.learning_rate", "9"], capsys)
    assert "stages.triplet.learning_rate (0.05 against 9.0)" in text


def test_resume_may_change_what_does_not_touch_the_result() -> None:
    written("out")
    assert parse(["--resume", "out", "--data.workers", "7"]).recipe.data.workers == 7


def test_resume_of_a_folder_without_a_run_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run" in message(["--resume", "nowhere"], capsys)


def test_a_printed_config_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--seed", "4", "--print_config", "--stages.triplet.learning_rate=0.5"])
    assert stopped.value.code == 0
    Path("r.yaml").write_text(capsys.readouterr().out)
    expected = Recipe(seed=4)
    expected.stages[1].learning_rate = 0.5
    assert parse(["r.yaml"]).recipe == expected
