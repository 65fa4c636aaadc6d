"""In what two recipes differ, and whether a run goes on with its own."""

from pathlib import Path
from typing import Any

# Settings that change how fast a run goes or what it shows, never what it computes: free to differ when it goes on.
FREE_ON_RESUME = (
    *("threads", "data.workers", "data.memory_mib", "log_every", "checkpoint_every", "checkpoints_kept"),
    "device",  # of the same kind, which the checkpoint knows
)


def check_same(saved: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    """Raise ValueError where the run in `folder`, whose recipe is `saved`, cannot go on as `asked` (plain values)."""
    changed = [found for found in differences(saved, asked) if not found.startswith(FREE_ON_RESUME)]
    if changed:
        raise ValueError(
            f"The run in {folder} was started with other settings: {'; '.join(changed)}. Leave them out to go on with "
            "it, or start a new run in another --output."
        )


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted names of the settings in which two recipes (or parts of them) as plain values differ."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and all(map(_is_named, (*a, *b))):
        return [found for x, y in zip(a, b, strict=True) for found in differences(x, y, f"{path}.{_called(x, y)}")]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = {**a, **b}
        return [found for key in keys for found in differences(a.get(key), b.get(key), f"{path}.{key}".lstrip("."))]
    return [] if a == b else [f"{path} ({a!r} against {b!r})"]


def _is_named(item: Any) -> bool:
    return isinstance(item, dict) and "name" in item


def _called(a: dict[str, Any], b: dict[str, Any]) -> str:
    """What users call an item of a list of stages or terms."""
    return str(a["name"]) if a["name"] == b["name"] else f"{a['name']}/{b['name']}"
