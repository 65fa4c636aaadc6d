"""`metricface-train` as people run it: from the command line, with good input, bad input and an interrupt."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

import metricface
from metricface.cli.arguments import parse
from metricface.cli.train import INTERRUPTED, main
from metricface.data.images import MemoryImages, Preprocessing
from metricface.training import stages
from metricface.training.assemble import check_names, rehearse
from metricface.training.contradictions import check
from tests.folders import write_people

ROOT = Path(__file__).parents[2]
SMALL = ["--data.height", "32", "--data.width", "32"]
SHORT = ["--budget", "1s", "--stages.triplet.sampler.options.identities_per_batch", "4", *SMALL]
BUILT_IN = ["--data.synthetic_identities", "40", "--data.synthetic_images", "6"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


SPEEDS = ("images_per_second", "bare_images_per_second")


def report(folder: str = "out") -> dict[str, dict[str, dict[str, float]]]:
    loaded: dict[str, dict[str, dict[str, float]]] = json.loads(Path(folder, "report.json").read_text())
    return loaded


def test_the_built_in_faces_need_no_argument_but_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, *BUILT_IN]) == 0
    printed = capsys.readouterr().out
    assert "after triplet" in printed
    assert "bare forward and backward" in printed
    assert Path("runs/demo/report.json").exists()
    assert main([*SHORT, *BUILT_IN]) == 0  # a second run overwrites nothing
    assert Path("runs/demo-2/report.json").exists()


def test_a_folder_of_people_is_split_for_the_user() -> None:
    write_people(Path("faces"), 24, 4)
    assert main([*SHORT, "--data.train", "faces", "--output", "out"]) == 0
    people = report()["people"]
    assert [people[name]["people"] for name in ("training", "validation", "test")] == [17, 2, 5]
    with pytest.raises(FileNotFoundError, match="its embedder is in out/model"):
        metricface.load("out")
    embedder = metricface.load("out/model")
    assert np.linalg.norm(embedder.embed("faces/Person_00/Person_00_0001.png")) == pytest.approx(1.0)
    thresholds = embedder.description["thresholds"]
    assert {"accuracy", "far_1e-1"} <= thresholds.keys()
    assert all(-1.0 <= value <= 1.0 for value in thresholds.values())
    assert "far_1e-3" not in thresholds  # of so few pairs it cannot be told


def test_a_second_folder_and_a_list_of_pairs_are_scored() -> None:
    write_people(Path("faces"), 16, 4)
    write_people(Path("strangers"), 6, 4, first=50)
    lines = ["4"]
    lines += [f"Person_{p}\t1\t{i}" for p in (50, 51) for i in (2, 3)]
    lines += [f"Person_{p}\t1\tPerson_{p + 1}\t{i}" for p in (50, 52) for i in (2, 3)]
    Path("pairs.txt").write_text("\n".join(lines))
    arguments = [*SHORT, "--data.train", "faces", "--data.test", "strangers", "--data.pairs", "pairs.txt"]
    assert main([*arguments, "--data.validation_share", "0.2", "--output", "out"]) == 0
    final = report()["final"]["test"]
    assert (final["people"], final["images"]) == (6, 24)
    assert (final["listed/genuine_pairs"], final["listed/impostor_pairs"]) == (4, 4)


def test_corrupt_and_empty_images_are_counted_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    write_people(Path("faces"), 24, 4)
    Path("faces/Person_03/Person_03_0001.png").write_bytes(b"")
    Path("faces/Person_04/Person_04_0002.png").write_bytes(b"no image at all")
    assert main([*SHORT, "--data.train", "faces", "--output", "out"]) == 0
    assert "left out   2 files" in capsys.readouterr().out
    skipped = json.loads(Path("out/report.json").read_text())["skipped"]
    assert sorted(file["key"] for file in skipped) == [
        "Person_03/Person_03_0001.png",
        "Person_04/Person_04_0002.png",
    ]


def test_people_who_are_in_both_folders_are_left_out_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    write_people(Path("faces"), 20, 4)
    write_people(Path("strangers"), 6, 4, first=16)
    assert main([*SHORT, "--data.train", "faces", "--data.test", "strangers", "--output", "out"]) == 0
    assert "4 training identities that are also among the test people" in capsys.readouterr().out
    assert json.loads(Path("out/report.json").read_text())["overlap"] == [f"Person_{n}" for n in (16, 17, 18, 19)]


def faulty(name: str) -> list[str]:
    """Arguments that name input with one fault."""
    if name == "empty folder":
        Path("faces").mkdir()
    elif name == "one image per person":
        write_people(Path("faces"), 20, 1)
    elif name == "one identity":
        write_people(Path("faces"), 1, 8)
    elif name == "both folders the same":
        write_people(Path("faces"), 8, 3)
        return ["--data.train", "faces", "--data.test", "faces"]
    elif name in ("too many identities a batch", "pair list names a missing file"):
        write_people(Path("faces"), 20, 3)
    if name == "too many identities a batch":
        return ["--data.train", "faces", "--stages.triplet.sampler.options.identities_per_batch", "500"]
    if name == "pair list names a missing file":
        Path("pairs.txt").write_text("1\nPerson_00\t1\t9\nPerson_01\t1\tNobody\t1\n")
        write_people(Path("strangers"), 4, 3, first=60)
        return ["--data.train", "faces", "--data.test", "strangers", "--data.pairs", "pairs.txt"]
    if name == "unknown miner":
        return ["--stages.triplet.miner", "HardestMiner"]
    return ["--data.train", "faces"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("empty folder", "faces"),
        ("missing folder", "no folder faces"),
        ("one image per person", "cannot be scored"),
        ("one identity", "identit"),
        ("both folders the same", "leave data.test out"),
        ("too many identities a batch", "needs 500 identities"),
        ("pair list names a missing file", "Person_00/Person_00_0009 (line 2)"),
        ("unknown miner", "known are BatchAllMiner, BatchHardMiner"),
    ],
)
def test_bad_input_is_a_clear_error_without_a_traceback(
    fault: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = faulty(fault)
    assert main([*SHORT, *BUILT_IN, *arguments, "--output", "out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("metricface-train: ")
    assert says in error
    assert not Path("out/report.json").exists()


def test_a_folder_that_failed_before_training_can_be_used_again() -> None:
    assert main([*SHORT, *BUILT_IN, "--stages.triplet.miner", "HardestMiner", "--output", "out"]) == 1
    assert main([*SHORT, *BUILT_IN, "--output", "out"]) == 0


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_cleanly_with_a_checkpoint_and_resume_goes_on(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "metricface.cli.train", *SHORT, *BUILT_IN, "--output", "out", "--budget", "120s"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True) as run:
        _wait_for_training()
        time.sleep(0.5)
        run.send_signal(number)
        printed, errors = run.communicate(timeout=60)
    assert run.returncode == INTERRUPTED, errors
    assert "metricface-train --resume out" in printed
    assert "Traceback" not in errors
    # The clock of the checkpoint goes on: shorten the budget, as 120 s are too long for a test.
    saved = yaml.safe_load(Path("out/recipe.yaml").read_text()) | {"budget": "3s"}
    Path("out/recipe.yaml").write_text(yaml.safe_dump(saved))
    assert main(["--resume", "out"]) == 0
    assert Path("out/report.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="groups of processes")
def test_a_signal_to_the_whole_group_of_processes_ends_cleanly_too() -> None:
    """As a scheduler sends it, or `timeout`: to the workers that read images as well."""
    write_people(Path("faces"), 24, 4)
    settings = ["--data.train", "faces", "--data.memory_mib", "0", "--data.workers", "2", "--budget", "120s"]
    command = [sys.executable, "-m", "metricface.cli.train", *SHORT, *settings, "--output", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment, text=True, start_new_session=True) as run:
        _wait_for_training()
        time.sleep(1.0)
        os.killpg(run.pid, signal.SIGTERM)
        printed, errors = run.communicate(timeout=60)
    assert run.returncode == INTERRUPTED, errors
    assert "metricface-train --resume out" in printed
    assert "Traceback" not in errors


def _wait_for_training() -> None:
    deadline = time.monotonic() + 60
    while not list(Path("out").glob("checkpoints/*.pt")):
        assert time.monotonic() < deadline, "the run wrote no first checkpoint"
        time.sleep(0.1)


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml"))])
def test_every_shipped_recipe_can_be_read_and_its_parts_go_together(name: str) -> None:
    recipe = parse([str(ROOT / "examples" / "recipes" / f"{name}.yaml"), "--output", "out"]).recipe
    check(recipe)
    check_names(recipe)
    labels = np.arange(300).repeat(4)
    images = MemoryImages(
        np.zeros((1200, 8, 8, 3), np.uint8), [f"{i:03d}" for i in range(300)], labels, [""] * 1200, Preprocessing(8, 8)
    )
    rehearse(recipe, images)


def test_the_shipped_recipes_run_on_folders_of_their_layout() -> None:
    write_people(Path("lfw"), 24, 4)
    options = "--stages.triplet.sampler.options"
    small = [f"{options}.identities_per_batch", "4", "--budget", "1s"]
    assert main([str(ROOT / "examples/recipes/lfw.yaml"), *small, "--output", "out"]) == 0
    assert report()["people"]["test"]["people"] == 5
    speeds = [stage[key] for stage in json.loads(Path("out/report.json").read_text())["stages"] for key in SPEEDS]
    assert min(speeds) > 0
    write_people(Path("others"), 12, 4, first=100)
    names = sorted(folder.name for folder in Path("others").iterdir())
    lines = [f"{name}\t1\t2" for name in names[:4]]
    lines += [f"{one}\t1\t{other}\t1" for one, other in zip(names[:4], names[4:8], strict=True)]
    Path("pairs.txt").write_text("\n".join(["4", *lines]) + "\n")
    other = ["--data.train", "lfw", "--data.test", "others"]
    lfw = [str(ROOT / "examples/recipes/lfw.yaml"), *small, *other, "--data.pairs", "pairs.txt", "--output", "judged"]
    assert main(lfw) == 0
    assert report("judged")["people"]["test"]["people"] == 12
    assert report("judged")["final"]["test"]["listed/people"] == 8
    for alphabet in range(6):
        source = write_people(Path("drawn"), 4, 5, first=10 * alphabet)
        for folder in sorted(source.iterdir()):
            shutil.move(folder, Path("omniglot_background") / f"Alphabet{alphabet}__{folder.name}")
    assert main([str(ROOT / "examples/recipes/omniglot.yaml"), *small, "--output", "letters"]) == 0
    assert report("letters")["people"]["test"]["people"] == 4  # one whole alphabet


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "quantum"], "device='quantum' cannot be used here"),
        (["--threads", "0"], "threads=0 must be above 0"),
        (["--model.options", '{"widths": "abc"}'], "The network small cannot be made"),
        (["--stages.softmax.epochs", "2"], "--budget null"),
        (["--data.train", "synthetic", "--stages.softmax.head", "CosFase"], "known are AdaFace, ArcFace, CContrastive"),
    ],
)
def test_a_wrong_setting_is_a_clear_error_and_leaves_nothing_behind(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, *BUILT_IN, *arguments]) == 1
    assert says in capsys.readouterr().err
    assert not Path("runs/demo").exists()


def test_an_image_that_goes_away_while_workers_read_saves_what_was_trained(capsys: pytest.CaptureFixture[str]) -> None:
    faces = write_people(Path("faces"), 24, 4)
    arguments = [*SHORT, "--data.train", "faces", "--data.memory_mib", "0", "--data.workers", "1", "--output", "out"]
    with pytest.MonkeyPatch.context() as patch:
        real = stages.train

        def train_after_a_loss(*given: object, **named: object) -> None:
            for image in faces.glob("*/*_0001.png"):
                image.unlink()
            real(*given, **named)  # type: ignore[arg-type]

        patch.setattr(stages, "train", train_after_a_loss)
        assert main(arguments) == 1
    assert "cannot read image" in capsys.readouterr().err
    assert list(Path("out").glob("checkpoints/*.pt"))
