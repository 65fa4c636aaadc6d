"""The floors of the house: an import may point down, never up (see the architecture guide)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each part may import of our own; a longer name wins over a shorter one. `samplers` is a floor of its own.
FLOOR_0 = {
    "metricface.choices",
    "metricface.modes",
    "metricface.distances",
    "metricface.distributed",
    "metricface.identities",
    "metricface.products",
    "metricface.tuples",
}
DATA = {"metricface.data"}
MAY_IMPORT: dict[str, set[str]] = {
    "samplers": {"samplers"},
    "metricface": {"metricface.models.embedder"},
    "metricface.atomic": set(),
    "metricface.choices": set(),
    "metricface.modes": set(),
    "metricface.distances": {"metricface.choices"},
    "metricface.distributed": set(),
    "metricface.tuples": {"metricface.distances"},
    "metricface.identities": {"metricface.tuples"},
    "metricface.diagnostics": FLOOR_0,
    "metricface.miners": FLOOR_0 | {"metricface.miners"},
    "metricface.miners.dataset": FLOOR_0 | {"metricface.atomic", "metricface.miners", "samplers"},
    "metricface.losses": FLOOR_0
    | {"metricface.diagnostics", "metricface.heads", "metricface.losses", "metricface.miners"},
    "metricface.products": {"metricface.distances"},
    "metricface.heads": FLOOR_0 | {"metricface.heads"},
    "metricface.models": {"metricface.models"},
    "metricface.models.embedder": {"metricface.atomic", "metricface.models", "metricface.distances", "metricface.modes"}
    | DATA,
    "metricface.data": DATA,
    "metricface.data.pair_lists": DATA | {"metricface.evaluation.pairs"},
    "metricface.label_noise": {"metricface.atomic", "metricface.label_noise", "metricface.miners.dataset", "samplers"}
    | FLOOR_0
    | DATA,
    "metricface.evaluation": {"metricface.evaluation"} | FLOOR_0,
    "metricface.monitoring": {"metricface.evaluation", "metricface.data", "metricface.monitoring"} | FLOOR_0,
    "metricface.training.recipe": {"metricface.training.schedules", "metricface.data.augment"},
    "metricface.training.schedules": set(),
    "metricface.training.checkpoint": {"metricface.atomic"},
    "metricface.training": {"metricface", "samplers"},
    "metricface.cli": {"metricface"},
}
ABOVE = {"metricface.training": {"metricface.cli"}}


def modules() -> list[Path]:
    return sorted([*(ROOT / "metricface").rglob("*.py"), *(ROOT / "samplers").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which floor they reach"
            assert node.module is not None
            inner = ROOT / Path(*node.module.split("."))
            found |= {f"{node.module}.{a.name}" if _is_module(inner / a.name) else node.module for a in node.names}
    return {name for name in found if name.split(".")[0] in ("metricface", "samplers")}


def _is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").exists()


def within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def forbidden(path: Path) -> set[str]:
    name = module_name(path)
    rule = max((part for part in MAY_IMPORT if within(name, part)), key=len)
    above = {up for part, ups in ABOVE.items() if within(name, part) for up in ups}
    return {
        target
        for target in imported(path)
        if not any(within(target, allowed) for allowed in MAY_IMPORT[rule]) or any(within(target, up) for up in above)
    }


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    assert forbidden(path) == set()


def test_an_arrow_that_runs_up_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    bad = tmp_path / "metricface" / "losses" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("from metricface.training import loop\nimport torch\n")
    assert forbidden(bad) == {"metricface.training"}
