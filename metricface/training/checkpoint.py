"""Everything a run needs to go on, in one file that is either whole or not there."""

from pathlib import Path
from typing import Any

import torch

from metricface.atomic import replacing

VERSION = 3


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and plain values only) to `path`, atomically.

    A crash, a full disk or a kill leaves the checkpoint before it intact. Raises OSError, naming the file,
    where it cannot be written.
    """
    try:
        with replacing(path) as file:
            torch.save({"version": VERSION, **state}, file)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"Could not write the checkpoint {path}: {error}. The one before it, if any, is intact."
        ) from error


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what `save` wrote, tensors on `device`; nothing in the file is executed.

    Raises FileNotFoundError where there is none, ValueError where it is no checkpoint of this version.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}; was the run stopped before its first one?")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} is no checkpoint of version {VERSION}; found {found}.")
    return state
