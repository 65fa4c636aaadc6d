"""Compare objectives under one budget: every variant of a recipe, over seeds, as a table of mean and spread.

    python examples/study.py examples/recipes/lfw.yaml --budget 180s --seeds 0 1 -- --data.train FOLDER
    python examples/study.py examples/recipes/lfw.yaml --share_first_stage --variants recipe look_alikes_50 -- ...
    python examples/study.py examples/recipes/lfw.yaml --steps 600 3000 --variants small_batches -- ...
    python examples/study.py --variants default_softmax default_arcface    (no recipe: the built-in faces)

Variants share the recipe's data, network, first stage and budget, and differ in what happens to them. Runs go one after
another to OUTPUT/VARIANT-SEED; those whose report exists are not run again, so an interrupted study can be continued.
With --share_first_stage the first stage of the recipe is trained once a seed and every variant goes on from its weights
(--model.start), for the rest of the budget: variants differ in nothing before their last stage.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from metricface.training import checkpoint
from metricface.training import recipe as recipes

Recipe = dict[str, Any]
SOFTMAX = {"name": "Softmax"}
HELD = 0.6  # the share of the budget over which the learning rate is held before it falls, where it is held at all
COSFACE = {"name": "CosFace", "options": {"margin_cos": 0.35, "scale": 30.0}}
# For a small network on few images; at the paper's .5 and 64 it collapses on LFW's.
ARCFACE = {"name": "ArcFace", "options": {"margin_rad": 0.3, "scale": 30.0}}
FIGURES = ("recall_at_1", "map_at_r", "tar_at_far_1e-2", "tar_at_far_1e-3", "accuracy")


def default(head: dict[str, Any]) -> Callable[[Recipe], None]:
    """The stages that `metricface-train` has without a recipe, with this head in each of them."""

    def change(recipe: Recipe) -> None:
        recipe["stages"] = recipes.as_dict(recipes.Recipe())["stages"]
        for stage in recipe["stages"]:
            for part in (stage, *stage["plus"]):
                part["head"] = head if part["head"] is not None else None

    return change


def only(head: dict[str, Any], *, held: float = 0.0) -> Callable[[Recipe], None]:
    """The first stage with this head, for the whole budget; its learning rate falls from the share `held` on."""

    def change(recipe: Recipe) -> None:
        recipe["stages"] = recipe["stages"][:1]
        recipe["stages"][0]["head"] = head
        recipe["stages"][0]["schedule"] = {"shape": "cosine", "start": held}

    return change


def as_it_falls(
    head: dict[str, Any] = COSFACE,
    *,
    again: bool = True,
    weight: float | None = 1.0,
    memory: int | None = None,
    rate: float = 1.0,
    loss: dict[str, Any] | None = None,
    **batches: Any,
) -> Callable[[Recipe], None]:
    """The first stage at a held learning rate; as it falls, in balanced batches, the head and mined triplets together.

    again: whether the head goes on. weight: of the triplets; none: the head alone.
    memory: in batches of images as in the first stage, positives and negatives come from so many images before.
    rate: the learning rate beside the first stage's. loss: in place of mined triplets. batches: options of the sampler.
    """

    def change(recipe: Recipe) -> None:
        first, *_, last = recipe["stages"]
        first |= {"head": head, "share": HELD, "schedule": {"shape": "constant"}}
        last |= {name: first[name] for name in ("learning_rate", "optimizer")}
        last |= {"share": 1.0 - HELD, "warmup": 0.02}
        last["learning_rate"] *= rate
        last["sampler"]["options"] |= {"identities_per_batch": 32, **batches}
        if memory is not None:
            last |= {"sampler": first["sampler"], "memory": memory}
        if loss is not None:
            last["loss"], last["miner"] = loss, None
        last |= {"plus": [], "keep_head": False}
        if not again:
            last["learning_rate"] /= 2  # of triplets alone, which have larger gradients
            return
        mined = {name: last.pop(name, None) for name in ("loss", "miner", "memory")}
        mined |= {"name": "mined", "weight": weight}
        last |= {"head": head, "keep_head": True, "plus": [mined] if weight is not None else []}

    return change


def then(miner: str, head: dict[str, Any] = SOFTMAX) -> Callable[[Recipe], None]:
    """The recipe's stages, the first one with this head, the last one with this miner and its own loss."""

    def change(recipe: Recipe) -> None:
        recipe["stages"][0]["head"] = head
        last = recipe["stages"][-1]
        last |= {"plus": [], "keep_head": False}
        if last.get("miner", {}).get("name") != miner:
            last["miner"] = {"name": miner}

    return change


def look_alikes(share: float, neighbourhood: int = 4, **tables: Any) -> Callable[[Recipe], None]:
    """The recipe's stages, the last one with a share of look-alikes in its batches of as many identities."""

    def change(recipe: Recipe) -> None:
        last = recipe["stages"][-1]
        options = last["sampler"]["options"] | {"look_alike_share": share, "neighbourhood": neighbourhood}
        options.pop("identity_weights", None)
        last["sampler"] = {"name": "LookAlikeBatchSampler", "options": options}
        last["look_alikes"] = tables or None

    return change


def mostly_mined(batches: Callable[[Recipe], None] = lambda recipe: None) -> Callable[[Recipe], None]:
    """The recipe with four fifths of the time mined, in small batches, at a higher rate: where mining has to do it."""

    def change(recipe: Recipe) -> None:
        first, *_, last = recipe["stages"]
        first["share"], last["share"] = 0.2, 0.8
        last["learning_rate"] = 0.02
        last["sampler"]["options"] = {"identities_per_batch": 24, "images_per_identity": 3}
        batches(recipe)

    return change


def small_batches(batches: Callable[[Recipe], None] = lambda recipe: None) -> Callable[[Recipe], None]:
    """The recipe with batches of 6 identities x 4 images in its last stage, mined by the hardest."""

    def change(recipe: Recipe) -> None:
        last = recipe["stages"][-1]
        last["learning_rate"], last["miner"] = 0.01, {"name": "BatchHardMiner"}
        last["sampler"]["options"] = {"identities_per_batch": 6, "images_per_identity": 4}
        batches(recipe)

    return change


VARIANTS: dict[str, Callable[[Recipe], None]] = {
    "recipe": lambda recipe: None,
    "default_softmax": default(SOFTMAX),
    "default_arcface": default(ARCFACE),
    "softmax": only(SOFTMAX),
    "cosface": only(COSFACE),
    "cosface_held": only(COSFACE, held=HELD),
    "cosface_joined": as_it_falls(),
    "cosface_joined_3": as_it_falls(weight=3.0),
    "cosface_joined_10": as_it_falls(weight=10.0),
    "cosface_joined_views": as_it_falls(identities_per_batch=64, images_per_identity=2, singletons_per_batch=0),
    "cosface_joined_without_singletons": as_it_falls(identities_per_batch=43, singletons_per_batch=0),
    "cosface_joined_count": as_it_falls(
        identities_per_batch=43, images_per_identity=2, singletons_per_batch=42, identity_weights="count"
    ),
    "cosface_joined_memory": as_it_falls(memory=4096),
    "cosface_joined_large": as_it_falls(identities_per_batch=128, rate=2.0),
    "cosface_joined_multi_similarity": as_it_falls(loss={"name": "MultiSimilarityLoss"}),
    "cosface_again": as_it_falls(weight=None),
    "triplets_as_it_falls": as_it_falls(again=False),
    "semi_hard": then("SemiHardMiner"),
    "batch_hard": then("BatchHardMiner"),
    "distance_weighted": then("DistanceWeightedMiner"),
    "random": then("RandomMiner"),
    "cosface_distance_weighted": then("DistanceWeightedMiner", COSFACE),
    "look_alikes_25": look_alikes(0.25),
    "look_alikes_50": look_alikes(0.5),
    "look_alikes_75": look_alikes(0.75, neighbourhood=8),
    "look_alikes_50_renewed": look_alikes(0.5, every_steps=50),
    "look_alikes_50_wide": look_alikes(0.5, neighbours=100),
    "small_batches": small_batches(),
    "small_batches_look_alikes_50": small_batches(look_alikes(0.5, neighbourhood=3)),
    "mostly_mined": mostly_mined(),
    "mostly_mined_look_alikes_75": mostly_mined(look_alikes(0.75, neighbourhood=8, every_steps=300)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--budget", default="180s", help="training time of each run")
    parser.add_argument("--steps", type=int, nargs="+", help="of each stage, in place of a budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--share_first_stage", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    given = sys.argv[1:]
    ours = given.index("--") if "--" in given else len(given)
    arguments, settings = parser.parse_args(given[:ours]), given[ours + 1 :]
    _check_stages(arguments)
    reports: dict[str, list[Recipe]] = {}
    for seed in arguments.seeds:
        for variant in arguments.variants:
            recipe = read(arguments.recipe) | {"budget": arguments.budget, "seed": seed}
            VARIANTS[variant](recipe)
            if arguments.steps:
                _in_steps(recipe, arguments.steps)
            if arguments.share_first_stage:
                recipe = after_first_stage(recipe, arguments.output, settings)
            reports.setdefault(variant, []).append(run(recipe, arguments.output / f"{variant}-{seed}", settings))
    print(table(reports, since=0 if arguments.share_first_stage else 1))


def _check_stages(arguments: argparse.Namespace) -> None:
    """Exit where a variant has not the stages for what was asked, before any of them is trained."""
    for variant in arguments.variants:
        recipe = read(arguments.recipe)
        VARIANTS[variant](recipe)
        found = len(recipe["stages"])
        if arguments.steps and len(arguments.steps) != found:
            raise SystemExit(f"--steps has {len(arguments.steps)} numbers, but {variant} {found} stages: leave it out.")
        if arguments.share_first_stage and found < 2:
            raise SystemExit(f"--share_first_stage needs a second stage; {variant} has none: leave it out.")


def read(path: Path | None) -> Recipe:
    found: Recipe = yaml.safe_load(path.read_text()) if path else recipes.as_dict(recipes.Recipe())
    return found


def after_first_stage(recipe: Recipe, output: Path, settings: list[str]) -> Recipe:
    """The recipe without its first stage, going on from that stage's weights; they are trained where nobody has yet.

    A first stage is known by all its settings and the seed: variants with another one have one of their own. Its head
    is not among the weights: heads that would have gone on start from class means.
    """
    first, *rest = recipe["stages"]
    if rest[0].pop("keep_head", False):
        rest[0]["class_means"] = True
    model = recipe.get("model", {})
    known = hashlib.sha256(yaml.safe_dump(first).encode()).hexdigest()[:8]
    if recipe["budget"] is None:
        folder = output / f"first-{known}-{recipe['seed']}"
        run(recipe | {"stages": [first]}, folder, settings)
        return recipe | {"stages": rest, "model": model | {"start": str(folder / "model")}}
    shares = [stage["share"] for stage in recipe["stages"]]
    seconds = recipes.budget_seconds(recipe["budget"])
    budgets = [f"{seconds * part / sum(shares):.1f}s" for part in (shares[0], sum(shares[1:]))]
    folder = output / f"first-{known}-{budgets[0]}-{recipe['seed']}"
    run(recipe | {"stages": [first], "budget": budgets[0]}, folder, settings)
    return recipe | {"stages": rest, "budget": budgets[1], "model": model | {"start": str(folder / "model")}}


def _in_steps(recipe: Recipe, steps: list[int]) -> None:
    recipe["budget"] = None
    for stage, number in zip(recipe["stages"], steps, strict=True):
        stage.pop("share", None)
        stage["steps"] = number


def run(recipe: Recipe, folder: Path, settings: list[str]) -> Recipe:
    """The report of a training run, in a process of its own, so that no run inherits threads or caches from another."""
    if not (folder / "report.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        varied = folder.with_suffix(".yaml")
        varied.write_text(yaml.safe_dump(recipe, sort_keys=False))
        command = [sys.executable, "-m", "metricface.cli.train", str(varied), "--output", str(folder), *settings]
        if checkpoint.newest(folder) is not None:  # it was interrupted
            command = [sys.executable, "-m", "metricface.cli.train", "--resume", str(folder)]
        subprocess.run(command, check=True)
    report: Recipe = json.loads((folder / "report.json").read_text())
    return report


def table(reports: dict[str, list[Recipe]], since: int = 1) -> str:
    """A Markdown table of test figures from evaluation `since` on: mean over seeds, and half the range between them.

    Of the ends of stages: a seed whose best weights were seen in a stage's middle has been scored there as well.
    """
    head = ("variant", "when", *FIGURES)
    lines = [" | ".join(head), "|".join("---" for _ in head)]
    for variant, found in reports.items():
        by_moment = [{moment["when"]: moment["test"] for moment in report["history"][since:]} for report in found]
        for when in [when for when in by_moment[0] if all(when in moments for moments in by_moment)]:
            cells = [spread([moments[when][name] for moments in by_moment]) for name in FIGURES]
            lines.append(" | ".join((variant, when, *cells)))
    return "\n".join(f"| {line} |" for line in lines)


def spread(values: list[float | None]) -> str:
    """Mean and half the range; a dash where too few pairs support the figure with one of the seeds."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    return f"{statistics.mean(known):.3f} ± {(max(known) - min(known)) / 2:.3f}"


if __name__ == "__main__":
    main()
