import os
from pathlib import Path
from typing import Any

import pytest
import torch

from metricface.training import checkpoint

CPU = torch.device("cpu")


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {"weights": torch.arange(6.0).reshape(2, 3), "history": [{"when": "start", "auc": 0.5, "tar": None}]}
    checkpoint.save(state, tmp_path / "c.pt")
    loaded = checkpoint.load(tmp_path / "c.pt", CPU)
    assert torch.equal(loaded["weights"], state["weights"])  # type: ignore[arg-type]
    assert loaded["history"] == state["history"]
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_failed_write_leaves_the_checkpoint_before_it_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save({"step": 1}, path)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left.*is intact"):
        checkpoint.save({"step": 2}, path)
    assert checkpoint.load(path, CPU)["step"] == 1
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_missing_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.load(tmp_path / "c.pt", CPU)


def test_a_damaged_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save({"weights": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        checkpoint.load(path, CPU)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def test_a_pickle_in_place_of_a_checkpoint_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"version": checkpoint.VERSION, "evil": Evil()}, "c.pt")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        checkpoint.load(Path("c.pt"), CPU)
    assert not Path("executed").exists()


def test_another_file_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="no checkpoint of version"):
        checkpoint.load(tmp_path / "c.pt", CPU)
