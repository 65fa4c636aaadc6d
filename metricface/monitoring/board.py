"""The TensorBoard of a run: what training and mining do, and what held-out people say of it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from metricface.evaluation.verification import VerificationReport


class Board:
    """Writes events under a folder; `tensorboard --logdir FOLDER` shows them.

    after: the last step of what is there already; events beyond it, from a run that went on after its checkpoint, are
    replaced.
    """

    def __init__(self, folder: Path, *, after: int | None = None) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=None if after is None else after + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Curves: one point each at `step`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def held_out(
        self,
        step: int,
        people: str,
        figures: Mapping[str, float | int | None],
        scores: NDArray[np.float32],
        same: NDArray[np.bool_],
        curve: VerificationReport,
    ) -> None:
        """One evaluation: figures as curves, histograms of distances, and a ROC figure.

        scores: (P,) cosines of unit embeddings, same: (P,) whether of one identity. Distances are Euclidean, in [0, 2].
        """
        # Whole numbers are counts of pairs and people, which a run does not change; those are in its report.
        self.scalars(step, {f"{people}/{name}": value for name, value in figures.items() if isinstance(value, float)})
        distances = np.sqrt(np.clip(2.0 - 2.0 * scores, 0.0, None))
        for name, chosen in (("positive", same), ("negative", ~same)):
            self._writer.add_histogram(f"{people}/distance_{name}", distances[chosen], step)
        self._writer.add_figure(f"{people}/distances", distances_figure(distances, same), step)
        self._writer.add_figure(f"{people}/roc", roc_figure(curve), step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()


def roc_figure(report: VerificationReport) -> Figure:
    """TAR over FAR on a logarithmic axis that ends where impostor pairs run out."""
    figure, axes = _drawing()
    axes.plot(report.roc_far, report.roc_tar, color="tab:blue")
    smallest = 1.0 / report.impostors
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda far, _: f"{far:.0e}".replace("e-0", "e-").replace("e+00", ""))
    axes.set(xlim=(smallest, 1.0), ylim=(0.0, 1.01), xlabel="FAR (false accepts / impostor pairs)", ylabel="TAR")
    axes.set_title(f"AUC {report.auc:.4f}, EER {report.eer:.4f}, {report.genuine:,} + {report.impostors:,} pairs")
    axes.grid(alpha=0.3)
    return figure


def distances_figure(distances: NDArray[np.float32], same: NDArray[np.bool_]) -> Figure:
    """Histograms of positive and negative distances over each other: the overlap is what mining works on."""
    figure, axes = _drawing()
    bins = np.linspace(0.0, 2.0, 81).tolist()
    for name, chosen, colour in (("same", same, "tab:green"), ("other", ~same, "tab:red")):
        label = f"{name} ({int(chosen.sum()):,})"
        axes.hist(distances[chosen], bins, histtype="stepfilled", density=True, alpha=0.6, color=colour, label=label)
    axes.set(xlim=(0.0, 2.0), xlabel="Euclidean distance of unit embeddings", ylabel="density")
    axes.legend(loc="upper left")
    return figure


def _drawing() -> tuple[Figure, Axes]:
    """With fixed margins: finding fitting ones takes longer than all the drawing, and a run draws often."""
    figure = Figure(figsize=(5, 4))
    return figure, figure.add_axes((0.13, 0.12, 0.84, 0.8))
