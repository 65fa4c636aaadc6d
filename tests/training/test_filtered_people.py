"""The recipe's filter: on those who are trained and chosen on, never on test people."""

import json
from pathlib import Path

import pytest

from metricface.cli.train import main
from metricface.training.people import People, gather
from metricface.training.recipe import Data


def keys(people: People, name: str) -> list[str]:
    return list(people.by_name()[name].keys)


def gathered(folder: Path, *lines: str, **options: object) -> People:
    """People of the folder under a filter of these lines; without lines, without a filter."""
    data = Data(train=str(folder), height=32, width=32, test_share=0.25, validation_share=0.2, **options)  # type: ignore[arg-type]
    if lines:
        path = folder.parent / "filter.csv"
        path.write_text("\n".join(["key,action,identity", *lines]) + "\n")
        data.filter = str(path)
    return gather(data, seed=0)


def test_test_people_and_who_they_are_do_not_depend_on_the_filter(people_folder: Path) -> None:
    plain = gathered(people_folder)
    tested, trained = plain.test, plain.training
    lines = [f"{tested.keys[0]},drop,", f"{tested.keys[1]},relabel,{trained.identities[0]}", f"{trained.keys[0]},drop,"]
    filtered = gathered(people_folder, *lines)
    assert filtered.test.keys == tested.keys
    assert filtered.test.identities == tested.identities
    assert filtered.filtered is not None
    assert (filtered.filtered.dropped, filtered.filtered.held_out) == (1, 2)
    assert trained.keys[0] not in [*filtered.training.keys, *filtered.validation.keys]
    assert "1 images dropped" in filtered.describe()[-1]
    assert "2 lines on held-out images not applied" in filtered.describe()[-1]


def test_images_go_to_the_identity_that_the_filter_gives_them(people_folder: Path) -> None:
    plain = gathered(people_folder)
    one, two = plain.training.identities[:2]
    moved = [key for key in plain.training.keys if key.startswith(one)]
    merged = gathered(people_folder, *(f"{key},relabel,{two}" for key in moved))
    assert merged.filtered is not None
    assert merged.filtered.gone == (one,)
    everyone = {
        key: images.identities[label]
        for images in (merged.training, merged.validation)
        for key, label in zip(images.keys, images.labels, strict=True)
    }
    assert {everyone[key] for key in moved} == {two}
    assert set(everyone) == {*plain.training.keys, *plain.validation.keys}
    assert not set(merged.training.identities) & set(merged.validation.identities)


def test_an_image_that_shows_a_test_person_leaves_training(people_folder: Path) -> None:
    plain = gathered(people_folder)
    key = plain.training.keys[0]
    filtered = gathered(people_folder, f"{key},relabel,{plain.test.identities[0]}")
    assert key not in [*filtered.training.keys, *filtered.validation.keys, *filtered.test.keys]
    assert filtered.filtered is not None
    assert filtered.filtered.shows_held_out == 1


def test_a_run_does_not_go_on_with_other_labels(people_folder: Path) -> None:
    plain = gathered(people_folder)
    one, two, three = plain.training.identities[:3]
    key = next(key for key in plain.training.keys if key.startswith(one))
    digests = {gathered(people_folder, f"{key},relabel,{name}").digest() for name in (two, three)}
    assert len(digests | {plain.digest()}) == 3


def test_the_report_of_a_run_counts_what_the_filter_did(
    people_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = gathered(people_folder)
    Path("f.csv").write_text(f"key,action,identity\n{plain.training.keys[0]},drop,\nNobody/1.jpg,drop,\n")
    arguments = [
        "--data.train",
        str(people_folder),
        "--data.filter",
        "f.csv",
        "--data.height",
        "32",
        "--data.width",
        "32",
    ]
    arguments += ["--budget", "0.5s", "--stages.triplet.sampler.options.identities_per_batch", "4", "--output", "out"]
    assert main([*arguments, "--data.test_share", "0.25", "--data.validation_share", "0.2"]) == 0
    counts = json.loads(Path("out/report.json").read_text())["filter"]
    assert (counts["dropped"], counts["unknown"]) == (1, ["Nobody/1.jpg"])
    assert "filter     1 images dropped" in capsys.readouterr().out


def test_a_filter_that_is_not_there_or_cannot_be_meant_is_a_clear_error(
    people_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("key,action,identity\nAnn/1.jpg,remove,\n")
    for path, says in ((bad, "line 2: action 'remove' is unknown"), (tmp_path / "none.csv", "none.csv")):
        arguments = ["--data.train", str(people_folder), "--data.filter", str(path), "--output", str(tmp_path / "out")]
        assert main(arguments) == 1
        assert says in capsys.readouterr().err
