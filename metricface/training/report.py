"""The table at the end of a run."""

from collections.abc import Sequence

from metricface.training.held_out import Figures

COLUMNS = (
    ("accuracy", "accuracy"),
    ("TAR@1e-1", "tar_at_far_1e-1"),
    ("TAR@1e-2", "tar_at_far_1e-2"),
    ("TAR@1e-3", "tar_at_far_1e-3"),
    ("AUC", "auc"),
    ("EER", "eer"),
    ("R@1", "recall_at_1"),
    ("MAP@R", "map_at_r"),
)


def table(rows: Sequence[tuple[str, str, Figures]]) -> str:
    """Rows of (when, people, figures) as aligned text.

    Accuracy is the mean of ten folds with its standard error; a figure that too few pairs support is a dash.
    """
    lines = [("", "people", *(title for title, _ in COLUMNS))]
    lines += [(when, people, *(_cell(figures, key) for _, key in COLUMNS)) for when, people, figures in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cell(figures: Figures, key: str) -> str:
    value = figures.get(key)
    if value is None:
        return "-"
    error = figures.get(f"{key}_se")
    return f"{value:.3f}" if error is None else f"{value:.3f} ±{error:.3f}"
