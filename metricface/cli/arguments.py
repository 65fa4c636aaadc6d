"""The command line of `metricface-train`: a recipe, dotted overrides, an output folder."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from metricface.training.loop import RECIPE
from metricface.training.recipe import Recipe, as_dict, differences

RUNS = Path("runs")
# Settings that change how fast a run goes or what it shows, never what it computes: free to differ on --resume.
FREE_ON_RESUME = ("threads", "data.workers", "data.memory_mib", "log_every", "checkpoint_every")

DESCRIPTION = """Train a face embedder and score it on people it never saw.

Without arguments: the built-in faces and the default recipe. Give a recipe file first, then any setting by its dotted
name; settings of a stage go by the stage's name: --stages.triplet.learning_rate 0.01 --stages.triplet.miner.name
SemiHardMiner"""


@dataclass
class Command:
    """What the user asked for. folder: where the run is, or will be, written."""

    recipe: Recipe
    folder: Path
    resume: bool


def parse(argv: Sequence[str]) -> Command:
    """Read the command line; on wrong arguments print what is wrong to stderr and exit with 2, as argparse does."""
    parser = _parser(default_stages=True)
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--recipe")  # the recipe may come first without its name
    try:
        arguments, overrides = _split_overrides(arguments)
        recipe, output, resume = _read(arguments, overrides)
        if resume is None:
            return Command(recipe, _new_folder(output, recipe.name), resume=False)
        folder = _old_folder(resume or output, recipe.name)
        saved, *_ = _read(["--recipe", str(folder / RECIPE)], {})
        asked, *_ = _read(["--recipe", str(folder / RECIPE), *arguments], overrides)
        _check_same(saved, asked, folder)
        return Command(asked, folder, resume=True)
    except ValueError as error:
        parser.error(str(error))


def _parser(*, default_stages: bool) -> ArgumentParser:
    parser = ArgumentParser(prog="metricface-train", description=DESCRIPTION)
    parser.add_argument("--recipe", action="config", help="A recipe file (YAML); also as the first argument.")
    parser.add_class_arguments(Recipe, None)
    # As plain values, so that --print_config can show them.
    parser.set_defaults({"stages": as_dict(Recipe())["stages"] if default_stages else []})
    parser.add_argument("--output", type=str | None, default=None, help="Folder for the run (default: runs/NAME).")
    parser.add_argument(
        "--resume", nargs="?", const="", default=None, help="Go on with the run in this folder (default: the newest)."
    )
    return parser


def _read(
    arguments: list[str], overrides: dict[str, list[tuple[list[str], Any]]]
) -> tuple[Recipe, str | None, str | None]:
    # jsonargparse would fill each stage of a recipe up with the options of the default stage in its place.
    parser = _parser(default_stages=not _brings_stages(arguments))
    config = parser.parse_args(arguments)
    plain = config.as_dict()
    plain.pop("recipe", None)
    output, resume = plain.pop("output", None), plain.pop("resume", None)
    plain["stages"] = _override(plain["stages"], overrides)
    made = parser.instantiate(parser.parse_object(plain))
    return Recipe(**{field.name: made[field.name] for field in fields(Recipe)}), output, resume


def _brings_stages(arguments: list[str]) -> bool:
    files = [Path(value) for name, value in itertools.pairwise(arguments) if name == "--recipe"]
    files += [Path(argument.partition("=")[2]) for argument in arguments if argument.startswith("--recipe=")]
    try:
        return any("stages" in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) for file in files)
    except (OSError, TypeError, yaml.YAMLError):
        return False  # the parser will say what is wrong with the file


def _split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, list[tuple[list[str], Any]]]]:
    """Take `--stages.NAME.key value` and `--stages.NAME.key=value` out: jsonargparse cannot reach into a list."""
    rest: list[str] = []
    overrides: dict[str, list[tuple[list[str], Any]]] = {}
    left = iter(arguments)
    for argument in left:
        name, has_value, value = argument.partition("=")
        path = name.split(".")
        if path[0] != "--stages" or len(path) < 3:
            rest.append(argument)
            continue
        if not has_value:
            value = next(left, "")
        overrides.setdefault(path[1], []).append((path[2:], yaml.safe_load(value)))
    return rest, overrides


def _override(stages: list[Any], overrides: dict[str, list[tuple[list[str], Any]]]) -> list[Any]:
    changed = copy.deepcopy([stage if isinstance(stage, dict) else vars(stage) for stage in stages])
    by_name = {stage["name"]: stage for stage in changed} | {str(i): stage for i, stage in enumerate(changed)}
    for name, settings in overrides.items():
        if name not in by_name:
            known = ", ".join(stage["name"] for stage in changed)
            raise ValueError(f"--stages.{name}: the recipe has no stage of that name; its stages are {known}.")
        for path, value in settings:
            _set(by_name[name], path, value)
    return changed


def _set(node: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
    key = path[-1]
    # --stages.triplet.miner SemiHardMiner means the miner of that name with its default options
    is_component = isinstance(value, str) and key in ("sampler", "head", "loss", "miner", "optimizer")
    node[key] = {"name": value} if is_component else value


def _holds_a_run(folder: Path) -> bool:
    return (folder / RECIPE).exists()


def _new_folder(output: str | None, name: str) -> Path:
    if output is not None:
        folder = Path(output)
        if _holds_a_run(folder):
            raise ValueError(
                f"{folder} already holds a run. Give another --output, or go on with it by --resume {folder}."
            )
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output {folder} is a file; give a folder.")
        return folder
    number = 1
    while _holds_a_run(_numbered(name, number)):
        number += 1
    return _numbered(name, number)


def _old_folder(given: str | None, name: str) -> Path:
    if given:
        if not _holds_a_run(Path(given)):
            raise ValueError(f"--resume: {given} holds no run (no {RECIPE} in it).")
        return Path(given)
    number = 0
    while _holds_a_run(_numbered(name, number + 1)):
        number += 1
    if number == 0:
        raise ValueError(f"--resume: there is no run {_numbered(name, 1)}; say which folder: --resume FOLDER.")
    return _numbered(name, number)


def _numbered(name: str, number: int) -> Path:
    return RUNS / (name if number == 1 else f"{name}-{number}")


def _check_same(saved: Recipe, asked: Recipe, folder: Path) -> None:
    changed = [found for found in differences(saved, asked) if not found.startswith(FREE_ON_RESUME)]
    if changed:
        raise ValueError(
            f"The run in {folder} was started with other settings: {'; '.join(changed)}. Leave them out to go on with "
            "it, or start a new run in another --output."
        )
