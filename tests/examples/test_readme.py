"""README's snippets run as they stand."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from metricface.data.images import Preprocessing
from metricface.models import build
from metricface.models.embedder import Embedder

README = Path(__file__).parents[2] / "README.md"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_first_screen_holds_a_snippet_of_at_most_twelve_lines() -> None:
    assert len(snippets()[0].splitlines()) <= 12


def test_the_loop_of_the_first_screen_runs_and_gives_a_gradient() -> None:
    labels = torch.arange(64).repeat_interleave(5)
    model = torch.nn.Linear(6, 4)
    names = {"labels": labels, "dataset": TensorDataset(torch.randn(320, 6), labels), "model": model}
    exec(snippets()[0], names)
    assert model.weight.grad is not None
    assert model.weight.grad.any()


def test_two_images_are_compared_by_the_exported_embedder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    network = build("small", embedding_dim=8, channels=3, height=32, width=32)
    Embedder(network, Preprocessing(32, 32), {"thresholds": {"accuracy": 0.4}}).save("runs/demo/model")
    for name in ("one.jpg", "other.jpg"):
        cv2.imwrite(name, np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    exec(snippets()[1], {})
    assert capsys.readouterr().out == "same person\n"
