"""Compare objectives under one budget: every variant of a recipe, over seeds, as a table of mean and spread.

    python examples/study.py examples/recipes/lfw.yaml --budget 180s --seeds 0 1 -- --data.train FOLDER

Variants share the recipe's data, network, first stage and budget, and differ in what happens to them. Runs go one after
another to OUTPUT/VARIANT-SEED; those whose report exists are not run again, so an interrupted study can be continued.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Recipe = dict[str, Any]
SOFTMAX = {"name": "Softmax"}
COSFACE = {"name": "CosFace", "options": {"margin_cos": 0.35, "scale": 30.0}}
FIGURES = ("recall_at_1", "map_at_r", "tar_at_far_1e-2", "tar_at_far_1e-3", "accuracy")


def only(head: dict[str, Any]) -> Callable[[Recipe], None]:
    """The first stage with this head, for the whole budget."""

    def change(recipe: Recipe) -> None:
        recipe["stages"] = recipe["stages"][:1]
        recipe["stages"][0]["head"] = head

    return change


def then(miner: str, head: dict[str, Any] = SOFTMAX) -> Callable[[Recipe], None]:
    """The recipe's stages, the first one with this head, the last one with this miner and its own loss."""

    def change(recipe: Recipe) -> None:
        recipe["stages"][0]["head"] = head
        last = recipe["stages"][-1]
        if last.get("miner", {}).get("name") != miner:
            last["miner"] = {"name": miner}

    return change


VARIANTS: dict[str, Callable[[Recipe], None]] = {
    "softmax": only(SOFTMAX),
    "cosface": only(COSFACE),
    "semi_hard": then("SemiHardMiner"),
    "batch_hard": then("BatchHardMiner"),
    "distance_weighted": then("DistanceWeightedMiner"),
    "random": then("RandomMiner"),
    "cosface_distance_weighted": then("DistanceWeightedMiner", COSFACE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--budget", default="180s", help="training time of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    given = sys.argv[1:]
    ours = given.index("--") if "--" in given else len(given)
    arguments, settings = parser.parse_args(given[:ours]), given[ours + 1 :]
    reports: dict[str, list[Recipe]] = {}
    for seed in arguments.seeds:
        for variant in arguments.variants:
            folder = arguments.output / f"{variant}-{seed}"
            if not (folder / "report.json").exists():
                run(variant, arguments.recipe, folder, ["--budget", arguments.budget, "--seed", str(seed), *settings])
            reports.setdefault(variant, []).append(json.loads((folder / "report.json").read_text()))
    print(table(reports))


def run(variant: str, recipe: Path, folder: Path, settings: list[str]) -> None:
    """One training run in a process of its own, so that no run inherits threads or caches from another."""
    changed = copy.deepcopy(yaml.safe_load(recipe.read_text()))
    VARIANTS[variant](changed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    varied = folder.with_suffix(".yaml")
    varied.write_text(yaml.safe_dump(changed, sort_keys=False))
    command = [sys.executable, "-m", "metricface.cli.train", str(varied), "--output", str(folder), *settings]
    subprocess.run(command, check=True)


def table(reports: dict[str, list[Recipe]]) -> str:
    """A Markdown table of test figures: mean over seeds, and half the range between them."""
    head = ("variant", "when", *FIGURES)
    lines = [" | ".join(head), "|".join("---" for _ in head)]
    for variant, found in reports.items():
        for moment in range(1, len(found[0]["history"])):
            figures = [report["history"][moment]["test"] for report in found]
            cells = [spread([one[name] for one in figures]) for name in FIGURES]
            lines.append(" | ".join((variant, found[0]["history"][moment]["when"], *cells)))
    return "\n".join(f"| {line} |" for line in lines)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


if __name__ == "__main__":
    main()
