import os
from pathlib import Path

import pytest
import yaml

from metricface.cli.arguments import Command, parse
from metricface.training.recipe import Component, LookAlikes, Recipe, Schedule, Stage, Term, as_dict
from metricface.training.run import RECIPE

CHECKPOINT = "checkpoints/000001-0123456789abcdef.pt"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(folder: str, recipe: Recipe | None = None) -> Path:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / RECIPE).write_text(yaml.safe_dump(as_dict(recipe or Recipe()), sort_keys=False))
    (path / CHECKPOINT).parent.mkdir(exist_ok=True)
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


SUM = """
stages:
- name: a
  sampler: {name: ImageBatchSampler}
  head: {name: CosFace}
  plus:
  - {name: triplet, loss: {name: TripletLoss, options: {margin: 0.5}}, miner: {name: BatchHardMiner}, weight: 0.1}
  schedules:
    head.margin_cos: {shape: ramp, points: [[0, 0], [0.5, 0.35]]}
"""


def parsed_sum(*argv: str) -> Stage:
    Path("r.yaml").write_text(SUM)
    return parse(["r.yaml", *argv]).recipe.stages[0]


def test_terms_and_schedules_are_read_from_a_recipe_file() -> None:
    loss = Component("TripletLoss", {"margin": 0.5})
    triplet = Term("triplet", loss=loss, miner=Component("BatchHardMiner"), weight=0.1)
    schedules = {"head.margin_cos": Schedule("ramp", [[0.0, 0.0], [0.5, 0.35]])}
    assert parsed_sum() == Stage(
        "a", Component("ImageBatchSampler"), head=Component("CosFace"), plus=[triplet], schedules=schedules
    )


def test_settings_of_a_term_go_by_its_name() -> None:
    (term,) = parsed_sum(
        "--stages.a.plus.triplet.weight", "1e-3", "--stages.a.plus.triplet.miner", "SemiHardMiner"
    ).plus
    assert (term.weight, term.miner) == (0.001, Component("SemiHardMiner"))
    (term,) = parsed_sum("--stages.a.plus.triplet.loss.options.margin=0.2").plus
    assert term.loss == Component("TripletLoss", {"margin": 0.2})
    for argv in (
        ["--stages.a.plus.triplet.loss", "ContrastiveLoss"],
        ["--stages.a.plus.triplet.loss.name=ContrastiveLoss"],
    ):
        assert parsed_sum(*argv).plus[0].loss == Component("ContrastiveLoss")


def test_a_head_or_loss_for_a_new_name_adds_a_term_and_an_empty_list_drops_all() -> None:
    softmax = parse(["--stages.softmax.plus.centre.weight", "0.2", "--stages.softmax.plus.centre.loss", "TripletLoss"])
    assert softmax.recipe.stages[0].plus == [Term("centre", loss=Component("TripletLoss"), weight=0.2)]
    argv = ["--stages.a.plus.centre.loss.name", "TripletLoss", "--stages.a.plus", "[]"]
    assert parsed_sum(*argv).plus == [Term("centre", loss=Component("TripletLoss"))]


def test_a_schedule_goes_by_the_number_that_follows_it() -> None:
    changed = parsed_sum("--stages.a.schedules.head.margin_cos.points", "[[0, 0.1], [1, 0.2]]").schedules
    assert changed == {"head.margin_cos": Schedule("ramp", [[0.0, 0.1], [1.0, 0.2]])}
    added = parsed_sum("--stages.a.schedules.triplet.weight", "{shape: step, points: [[0, 0], [0.5, 1]]}").schedules
    assert added == {
        "head.margin_cos": Schedule("ramp", [[0.0, 0.0], [0.5, 0.35]]),
        "triplet.weight": Schedule("step", [[0.0, 0.0], [0.5, 1.0]]),
    }
    alone = [
        "--stages.softmax.schedules.head.scale.shape=anneal",
        "--stages.softmax.schedules.head.scale.points=[[0,9]]",
    ]
    assert parse(alone).recipe.stages[0].schedules == {"head.scale": Schedule("anneal", [[0.0, 9.0]])}
    assert parsed_sum("--stages.a.schedules", "{}").schedules == {}


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
        (
            ["--stages.triplet.plus.centre.weight", "3"],
            "no further term of that name (it has: classes). To add it, give it",
        ),
        (["--stages.triplet.plus.centre", "3"], "say which setting of the term, such as plus.centre.weight"),
        (["--stages.triplet.plus.centre.loss", "X", "--stages.triplet.plus.centre.wait", "3"], "'wait'"),
        (["--stages.triplet.schedules.loss.margin.points", "[[0, 1]]"], "shape"),
        (["--stages.triplet.schedules.loss.margin", "{shape: jump, points: [[0, 1]]}"], "jump"),
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
    assert "stages.triplet.learning_rate (0.1 against 9.0)" in text


def test_resume_with_another_weight_or_schedule_is_an_error_that_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    saved = Recipe()
    saved.stages[0].name = "first"
    saved.stages[0].plus = [Term("centre", loss=Component("TripletLoss"), weight=0.2)]
    saved.stages[0].schedules = {"head.scale": Schedule("ramp", [[0.0, 9.0]])}
    written("out", saved)
    assert parse(["--resume", "out", "--stages.first.plus.centre.weight", "0.2"]).recipe == saved
    argv = ["--stages.first.plus.centre.weight", "0.3", "--stages.first.schedules.head.scale.shape", "step"]
    for resume in (["--resume", "out"], ["--resume=out"]):
        text = message([*resume, *argv], capsys)
        assert "stages.first.plus.centre.weight (0.2 against 0.3)" in text
        assert "stages.first.schedules.head.scale.shape ('ramp' against 'step')" in text


def test_resume_may_change_what_does_not_touch_the_result() -> None:
    written("out")
    assert parse(["--resume", "out", "--data.workers", "7"]).recipe.data.workers == 7


def test_resume_of_a_folder_without_a_run_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run" in message(["--resume", "nowhere"], capsys)


COMPOSED = [
    "--stages.softmax.plus.centre.loss=TripletLoss",
    "--stages.softmax.plus.centre.loss.options.margin=0.4",
    "--stages.softmax.schedules.centre.weight={shape: ramp, points: [[0, 0], [1, 0.1]]}",
]


def test_a_printed_config_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--seed", "4", "--print_config", "--stages.triplet.learning_rate=0.5", *COMPOSED])
    assert stopped.value.code == 0
    Path("r.yaml").write_text(capsys.readouterr().out)
    expected = Recipe(seed=4)
    expected.stages[1].learning_rate = 0.5
    expected.stages[0].plus = [Term("centre", loss=Component("TripletLoss", {"margin": 0.4}))]
    expected.stages[0].schedules = {"centre.weight": Schedule("ramp", [[0.0, 0.0], [1.0, 0.1]])}
    assert parse(["r.yaml"]).recipe == expected


def test_null_takes_out_one_term_or_schedule_or_all_of_them() -> None:
    assert parsed_sum("--stages.a.plus.triplet", "null").plus == []
    assert parsed_sum("--stages.a.schedules.head.margin_cos", "null").schedules == {}
    gone = parsed_sum("--stages.a.plus", "null", "--stages.a.schedules", "null")
    assert (gone.plus, gone.schedules) == ([], {})
    anew = parsed_sum("--stages.a.plus", "null", "--stages.a.plus.c.loss", "CenterLoss").plus
    assert anew == [Term("c", loss=Component("CenterLoss"))]


def test_an_empty_line_for_terms_or_schedules_in_a_recipe_means_none(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "stages: [{name: a, sampler: {name: ImageBatchSampler}, head: {name: CosFace}, plus: , schedules: }]\n"
    )
    (stage,) = parse([str(file)]).recipe.stages
    assert (stage.plus, stage.schedules) == ([], {})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--stages.a.schedules.head.margin_cos", "0.3"],
            "--stages.a.schedules.head.margin_cos: a schedule has a shape",
        ),
        (["--stages.a.plus.triplet", "3"], "--stages.a.plus.triplet: say which setting"),
        (["--stages.a.plus", "3", "--stages.a.plus.c.loss", "CenterLoss"], "plus is 3; it must be a list"),
        (["--stages.a.schedules", "[1]", "--stages.a.schedules.head.scale.shape", "ramp"], "it must be a dict"),
        (["--stages.a.plus.nobody", "null"], "has no further term of that name"),
    ],
)
def test_settings_of_terms_and_schedules_that_cannot_be_say_where_and_what_can(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed_sum(*argv)
    assert message in " ".join(capsys.readouterr().err.split())


def test_look_alikes_are_set_by_dotted_names_and_shown() -> None:
    command = parse(
        [
            "--stages.triplet.sampler=LookAlikeBatchSampler",
            "--stages.triplet.sampler.options={identities_per_batch: 32, images_per_identity: 4}",
            "--stages.triplet.sampler.options.look_alike_share=0.25",
            "--stages.triplet.look_alikes.every_steps=100",
            "--stages.triplet.look_alikes.source=images",
            "--output=never_made",
        ]
    )
    stage = command.recipe.stages[1]
    assert stage.sampler.name == "LookAlikeBatchSampler"
    assert stage.sampler.options["look_alike_share"] == 0.25
    assert stage.look_alikes == LookAlikes(source="images", every_steps=100)
    assert command.recipe.stages[0].look_alikes is None


def test_a_misspelt_setting_of_look_alikes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--stages.triplet.look_alikes.evry_steps=100", "--output=never_made"])
    assert "evry_steps" in capsys.readouterr().err
