"""Worked examples of every formula: inputs and the values they must give, computed outside this project."""

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _cases() -> dict[str, dict[str, Any]]:
    with (Path(__file__).parent / "vectors.json").open(encoding="utf-8") as file:
        cases: dict[str, dict[str, Any]] = json.load(file)
    return cases


def case(name: str) -> dict[str, Any]:
    """Return the case of that id, {"title", "inputs", "expected"}; ids start with the section number of the formula."""
    return _cases()[name]
