"""`metricface-train`: from a recipe to a trained embedder and its figures."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from metricface.cli.arguments import Command, parse
from metricface.distributed import rank
from metricface.training import ranks
from metricface.training.interrupt import StopRequest
from metricface.training.loop import train
from metricface.training.report import table
from metricface.training.run import EXPORT, REPORT, Run
from metricface.training.stages import TrainingDivergedError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns 0; 1 where the run failed; 2 for wrong arguments; 130 where it was interrupted."""
    with ranks.together():
        return _run(_command(sys.argv[1:] if argv is None else argv))


def _command(argv: Sequence[str]) -> Command:
    """What the user asked for, read once: all ranks write to one folder. Exits on wrong arguments."""
    found: Command | int | str | None = None
    if ranks.speaks():
        try:
            found = parse(argv)
        except SystemExit as error:
            found = error.code
    found = ranks.from_first(found)
    if not isinstance(found, Command):
        sys.exit(found)
    return found


def _run(command: Command) -> int:
    # Prints above a progress bar, not through it.
    say: Callable[[str], None] = tqdm.write if ranks.speaks() else _silently
    say(f"run        {command.folder}")
    with StopRequest(say) as stopped:
        try:
            run = train(command.recipe, command.folder, resume=command.resume, stopped=stopped, say=say)
        except (ValueError, OSError, TrainingDivergedError) as error:
            print(f"metricface-train{'' if ranks.speaks() else f' (rank {rank()})'}: {error}", file=sys.stderr)
            _leave_no_empty_folder(command.folder)
            return 1
        except KeyboardInterrupt:
            print("metricface-train: stopped at once; what the last checkpoint holds is saved.", file=sys.stderr)
            _leave_no_empty_folder(command.folder)
            return INTERRUPTED
    if run.interrupted:
        say(f"Interrupted; everything is saved. Go on with: metricface-train --resume {run.folder}")
        return INTERRUPTED
    say("\n" + _summary(run))
    return 0


def _silently(_: str) -> None:
    """In place of a print, on the ranks that do not speak."""


def _leave_no_empty_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not there, or holds something
        folder.rmdir()


def _summary(run: Run) -> str:
    rows = [
        (moment.when if moment.kept else f"({moment.when})", people, figures)
        for people in ("validation", "test")
        for moment in run.history
        for figures in [moment.validation if people == "validation" else moment.test]
    ]
    kept = [moment for moment in run.history if moment.kept][-1]
    test = kept.test
    lines = [
        table(rows),
        "",
        f"Kept: the weights {kept.when}. Test people: {test['people']:,}, {test['images']:,} images, "
        f"{test['genuine_pairs']:,} genuine and {test['impostor_pairs']:,} impostor pairs; accuracy on "
        f"{test['accuracy_genuine_pairs']:,} + {test['accuracy_impostor_pairs']:,} of them in "
        f"{test['accuracy_folds']} folds.",
    ]
    if "listed/accuracy" in test:
        lines.append(
            f"Listed pairs: accuracy {test['listed/accuracy']:.4f} ± {test['listed/accuracy_se']:.4f}, AUC "
            f"{test['listed/auc']:.4f} ({test['listed/genuine_pairs']:,} genuine, {test['listed/impostor_pairs']:,} "
            f"impostor pairs, {test['listed/missing_pairs']:,} left out as missing)."
        )
    lines += run.notes
    lines.append(
        f"Report: {run.folder / REPORT}; embedder: {run.folder / EXPORT}; curves: tensorboard --logdir {run.folder}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
