"""`metricface-data` as people run it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from metricface.cli.data import main
from metricface.data.images import Preprocessing
from metricface.models import Blueprint
from metricface.models.embedder import Embedder
from tests.folders import write_people


@pytest.fixture
def model(tmp_path: Path) -> str:
    torch.manual_seed(0)
    network = Blueprint(name="small", channels=3, height=32, width=32, embedding_dim=16, options={}).build()
    Embedder(network, Preprocessing(32, 32)).save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Twenty people with four images each, one copy, one empty file."""
    folder = write_people(tmp_path / "people", 20, 4)
    copied = (folder / "Person_03" / "Person_03_0002.png").read_bytes()
    (folder / "Person_11" / "again.png").write_bytes(copied)
    (folder / "Person_12" / "empty.png").write_bytes(b"")
    return folder


def noise(*arguments: object) -> int:
    return main(["noise", *(str(argument) for argument in arguments)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_is_looked_through_and_reported_on(
    people: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert noise("--data", people, "--model", model, "--output", out) == 0
    printed = capsys.readouterr().out
    assert "20 identities, 81 images, 1 files left out" in printed
    assert f"--data.filter {out / 'proposed_filter.csv'}" in printed
    found = rows(out / "duplicates.csv")[0]
    assert {found["first"], found["second"]} == {"Person_03/Person_03_0002.png", "Person_11/again.png"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["files_left_out"] == [{"key": "Person_12/empty.png", "reason": "the file is empty"}]
    assert (out / "gallery" / "duplicates_1.png").exists()


def test_a_test_folder_is_looked_for_in_the_data(people: Path, model: str, tmp_path: Path) -> None:
    test = write_people(tmp_path / "strangers", 6, 4, first=50)
    (test / "Person_50" / "leak.png").write_bytes((people / "Person_07" / "Person_07_0001.png").read_bytes())
    out = tmp_path / "out"
    assert noise("--data", people, "--model", model, "--test", test, "--output", out) == 0
    found = rows(out / "overlap_images.csv")[0]
    assert (found["first"], found["second"]) == ("Person_07/Person_07_0001.png", "Person_50/leak.png")


def test_embeddings_are_made_once_and_again_when_an_image_has_changed(
    people: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ("--data", people, "--model", model, "--output", out, "--no-pixels")
    assert noise(*arguments) == 0
    first = list(out.glob("embeddings_*.npy"))
    made = first[0].stat().st_mtime_ns
    assert noise(*arguments) == 0
    assert [file.stat().st_mtime_ns for file in out.glob("embeddings_*.npy")] == [made]
    assert noise(*arguments, "--flip") == 0
    flipped = list(out.glob("embeddings_*.npy"))
    assert len(flipped) == 1
    assert flipped != first
    one, two = people / "Person_00" / "Person_00_0001.png", people / "Person_01" / "Person_01_0001.png"
    one.write_bytes(two.read_bytes())
    assert noise(*arguments, "--flip") == 0
    assert list(out.glob("embeddings_*.npy")) != flipped


def test_mirrored_embeddings_are_the_sum_of_both(people: Path, model: str, tmp_path: Path) -> None:
    import metricface

    out = tmp_path / "out"
    assert noise("--data", people, "--model", model, "--output", out, "--flip", "--no-pixels") == 0
    found = np.load(next(out.glob("embeddings_*.npy")), allow_pickle=False)[0]
    expected = metricface.load(model).embed(people / "Person_00" / "Person_00_0001.png", flip=True)[0]
    assert np.allclose(found / np.linalg.norm(found), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--data": "nowhere"}, "there is no folder nowhere"),
        ({"--model": "nowhere"}, "there is no embedder in nowhere"),
        ({"--false-share": "2"}, "false_share lies between 0 and 1"),
        ({"--probability": "0"}, "probability lies above 0"),
        ({"--confident": "5"}, "confident is a probability"),
        ({"--confident": "nan"}, "confident is a probability"),
        ({"--threads": "0"}, "--threads must be at least 1"),
        ({"--seed": "-1"}, "--seed must be at least 0"),
        ({"--memory-mib": "-5"}, "--memory-mib must be at least 0"),
        ({"--device": "nonsense"}, "device='nonsense' cannot be used here"),
    ],
)
def test_bad_input_is_a_clear_error_without_a_traceback(
    change: dict[str, str], says: str, people: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--data": people, "--model": model, "--output": tmp_path / "out"} | change
    assert noise(*(part for pair in given.items() for part in pair)) == 1
    error = capsys.readouterr().err
    assert error.startswith("metricface-data: ")
    assert says in error


def test_a_report_does_not_go_where_the_people_are(
    people: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(people.rglob("*"))
    for output in (people, people / "noise"):
        assert noise("--data", people, "--model", model, "--output", output) == 1
        assert "lies in --data" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(people)
    assert noise("--data", tmp_path / "link", "--model", model, "--output", people / "noise") == 1
    assert sorted(people.rglob("*")) == before


def test_people_with_one_image_each_say_nothing(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_people(tmp_path / "single", 8, 1)
    assert noise("--data", folder, "--model", model, "--output", tmp_path / "out") == 1
    assert "all 8 identities have a single image" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["noise"], ["noise", "--data", "x"], ["hum"]])
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: metricface-data" in capsys.readouterr().err


def test_an_interrupt_is_told_and_embeddings_are_kept(
    people: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("metricface.cli.data.find_all", interrupted)
    assert noise("--data", people, "--model", model, "--output", tmp_path / "out") == 130
    assert "embeddings that were made are kept" in capsys.readouterr().err
    assert list((tmp_path / "out").glob("embeddings_*.npy"))
