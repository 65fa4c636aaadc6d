import time
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metricface.evaluation import verification
from metricface.monitoring.board import Board, distances_figure, roc_figure


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = Board(tmp_path)
    for step in (10, 20, 30):
        first.scalars(step, {"loss": float(step)})
    first.close()
    time.sleep(1.1)  # event files are read in the order of their names, which tell seconds
    second = Board(tmp_path, after=20)
    second.scalars(30, {"loss": -1.0})
    second.close()
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss")] == [(10, 10), (20, 20), (30, -1)]


def test_one_evaluation_writes_figures_histograms_and_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    same = np.arange(400) < 100
    scores = np.where(same, 0.6, 0.1).astype(np.float32) + rng.normal(0, 0.2, 400).astype(np.float32)
    board = Board(tmp_path)
    board.held_out(7, "test", {"auc": 0.9, "tar": None}, scores, same, verification.evaluate(scores, same))
    board.close()
    found = events(tmp_path)
    assert found.Tags()["scalars"] == ["test/auc"]
    assert set(found.Tags()["histograms"]) == {"test/distance_positive", "test/distance_negative"}
    assert set(found.Tags()["images"]) == {"test/distances", "test/roc"}
    assert found.Histograms("test/distance_positive")[0].histogram_value.num == 100


def test_the_roc_figure_ends_where_impostors_run_out() -> None:
    same = np.arange(300) < 100
    scores = np.linspace(1, 0, 300)
    axes = roc_figure(verification.evaluate(scores, same)).axes[0]
    assert axes.get_xlim()[0] == 1 / 200


def test_distances_of_both_kinds_stand_in_one_figure() -> None:
    distances = np.linspace(0, 2, 50).astype(np.float32)
    axes = distances_figure(distances, distances < 1).axes[0]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["same (25)", "other (25)"]
