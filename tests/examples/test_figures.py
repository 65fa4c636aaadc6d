"""The scripts that draw the guides' figures, run at reduced size, and the figures that are committed."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from tests.examples.test_loops import EXAMPLES, example

FIGURES = EXAMPLES / "guides" / "figures"


@pytest.mark.parametrize(
    ("name", "arguments", "panels"), [("feature_geometry", ["--epochs", "2"], 9), ("target_logits", [], 3)]
)
def test_a_figure_is_drawn_with_something_in_every_panel(
    name: str, arguments: list[str], panels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plt.switch_backend("agg")
    monkeypatch.setattr("sys.argv", [name, "--output", str(tmp_path / "figure.png"), *arguments])
    example(name).main()
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    axes = plt.gcf().axes
    assert len(axes) == panels
    assert all(one.has_data() and one.get_title() for one in axes)
    plt.close("all")


@pytest.mark.parametrize("path", sorted(FIGURES.glob("*")), ids=lambda path: path.name)
def test_no_committed_figure_is_larger_than_200_kb(path: Path) -> None:
    assert path.suffix == ".png"
    assert path.stat().st_size <= 200_000


def test_guides_show_the_figures_that_are_there() -> None:
    shown = {line.split("figures/")[1].rstrip(")") for line in _lines() if line.startswith("![")}
    assert shown == {path.name for path in FIGURES.glob("*.png")}


def _lines() -> list[str]:
    return [line for guide in (EXAMPLES / "guides").glob("*.md") for line in guide.read_text().splitlines()]
