import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from metricface.training import checkpoint

CPU = torch.device("cpu")


def test_a_file_that_cannot_be_read_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save({"a": torch.ones(2)}, tmp_path)

    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(MemoryError, match="no room"):
        checkpoint.load(tmp_path)


def files(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def steps(run: Path) -> list[int]:
    """Of all that are there, oldest first."""
    return [torch.load(run / "checkpoints" / name, weights_only=True)["step"] for name in files(run)]


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {"weights": torch.arange(6.0).reshape(2, 3), "history": [{"when": "start", "auc": 0.5, "tar": None}]}
    made = checkpoint.save(state, tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert torch.equal(loaded["weights"], state["weights"])  # type: ignore[arg-type]
    assert loaded["history"] == state["history"]
    assert files(tmp_path) == [made.name]
    assert made.name == f"000001-{hashlib.sha256(made.read_bytes()).hexdigest()[:16]}.pt"


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_the_newest_few_are_kept(tmp_path: Path, kept: int) -> None:
    for step in range(12):
        checkpoint.save({"step": step}, tmp_path, kept=kept)
        assert checkpoint.load(tmp_path)["step"] == step
    assert steps(tmp_path) == list(range(12 - kept, 12))


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_leaves_the_checkpoints_before_it_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    for step in (1, 2):
        checkpoint.save({"step": step}, tmp_path)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, full_disk)
    with pytest.raises(OSError, match=r"No space left.*are intact"):
        checkpoint.save({"step": 3}, tmp_path)
    assert checkpoint.load(tmp_path)["step"] == 2
    assert steps(tmp_path) == [1, 2]


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    checkpoint.save({"step": 1}, tmp_path)
    (tmp_path / "checkpoints" / ".000002.part").write_bytes(b"half")
    assert checkpoint.load(tmp_path)["step"] == 1
    checkpoint.save({"step": 2}, tmp_path)
    assert steps(tmp_path) == [1, 2]


def test_a_missing_checkpoint_says_so(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("place", [0, 300, -1])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path: Path, place: int, cut: bool) -> None:
    first = checkpoint.save({"step": 1, "weights": torch.randn(1000)}, tmp_path)
    second = checkpoint.save({"step": 2, "weights": torch.randn(1000)}, tmp_path)
    content = bytearray(second.read_bytes())
    if cut:
        content = content[:place]
    else:
        content[place] ^= 1
    second.write_bytes(content)
    said: list[str] = []
    assert checkpoint.load(tmp_path, said.append)["step"] == 1
    assert said[0].startswith(f"Damaged, and passed over: {second.name}")
    first.write_bytes(b"")
    with pytest.raises(ValueError, match=f"is whole; damaged: {second.name}, {first.name}"):
        checkpoint.load(tmp_path, said.append)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def put(content: Any, run: Path) -> None:
    """A file with a name that is right for what is in it."""
    (run / "checkpoints").mkdir()
    torch.save(content, run / "any")
    digest = hashlib.sha256((run / "any").read_bytes()).hexdigest()[:16]
    os.replace(run / "any", run / "checkpoints" / f"000001-{digest}.pt")


def test_a_pickle_in_place_of_a_checkpoint_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put({"version": checkpoint.VERSION, "evil": Evil()}, tmp_path)
    with pytest.raises(ValueError, match=r"No checkpoint .* is whole"):
        checkpoint.load(tmp_path)
    assert not Path("executed").exists()


def test_another_file_is_no_checkpoint(tmp_path: Path) -> None:
    put({"weights": torch.ones(2)}, tmp_path)
    with pytest.raises(ValueError, match="no checkpoint of version"):
        checkpoint.load(tmp_path)
