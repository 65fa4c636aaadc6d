"""The command line of `metricface-train`: a recipe, dotted overrides, an output folder."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from metricface.training import checkpoint
from metricface.training.comparison import check_same
from metricface.training.recipe import Recipe, as_dict, from_dict
from metricface.training.run import RECIPE

RUNS = Path("runs")
PARTS = ("sampler", "head", "loss", "miner", "optimizer")

DESCRIPTION = """Train a face embedder and score it on people it never saw.

Without arguments: the built-in faces and the default recipe. Give a recipe file first, then any setting by its dotted
name. Settings of a stage go by the stage's name, those of a further term of its sum by the term's, and a schedule by
the number that follows it: --stages.triplet.miner.name SemiHardMiner --stages.triplet.plus.center.weight 0.01
--stages.softmax.schedules.head.margin_cos '{shape: ramp, points: [[0, 0], [0.5, 0.35]]}'"""


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
        shows = "--print_config" in arguments
        arguments, overrides = _split_overrides([a for a in arguments if a != "--print_config"])
        # The stages and terms of a run that goes on are those of its own recipe, not yet read.
        later = not shows and any(argument.partition("=")[0] == "--resume" for argument in arguments)
        recipe, output, resume = _read(arguments, {} if later else overrides)
        if shows:
            print(yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True), end="")
            parser.exit(0)
        if resume is None:
            return Command(recipe, _new_folder(output, recipe.name), resume=False)
        if resume and output:
            raise ValueError(f"--resume {resume} and --output {output}: a run goes on in its own folder; give one.")
        folder = _old_folder(resume or output)
        saved, *_ = _read(["--recipe", str(folder / RECIPE)], {})
        asked, *_ = _read(["--recipe", str(folder / RECIPE), *arguments], overrides)
        check_same(as_dict(saved), as_dict(asked), folder)
        return Command(asked, folder, resume=True)
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))


def _parser(*, default_stages: bool) -> ArgumentParser:
    parser = ArgumentParser(prog="metricface-train", description=DESCRIPTION)
    parser.add_argument("--recipe", action="config", help="A recipe file (YAML); also as the first argument.")
    parser.add_class_arguments(Recipe, None)
    # As plain values, so that --print_config can show them.
    parser.set_defaults({"stages": as_dict(Recipe())["stages"] if default_stages else []})
    parser.add_argument("--output", type=str | None, default=None, help="Folder for the run (default: runs/NAME).")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        default=None,
        help="Go on with the run in this folder (default: the last in runs/).",
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
    return from_dict(plain), output, resume


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
            value = next(left, "--")
            if value.startswith("--"):
                raise ValueError(f"{name} has no value; write {name}=VALUE.")
        overrides.setdefault(path[1], []).append((path[2:], yaml.safe_load(value)))
    return rest, overrides


def _override(stages: list[Any], overrides: dict[str, list[tuple[list[str], Any]]]) -> list[Any]:
    changed = copy.deepcopy([stage if isinstance(stage, dict) else vars(stage) for stage in stages])
    by_name = {stage["name"]: stage for stage in changed} | {str(i): stage for i, stage in enumerate(changed)}
    for name, settings in overrides.items():
        if name not in by_name:
            known = ", ".join(stage["name"] for stage in changed)
            raise ValueError(f"--stages.{name}: the recipe has no stage of that name; its stages are {known}.")
        for path, value in sorted(settings, key=_rank):
            try:
                _set_in_stage(by_name[name], path, value)
            except ValueError as error:
                raise ValueError(f"--stages.{name}.{'.'.join(path)}: {error}") from error
    return changed


def _rank(setting: tuple[list[str], Any]) -> int:
    """Whole lists first, then names: a part that is replaced starts without the options of the one before it."""
    path, _ = setting
    return 0 if path in (["plus"], ["schedules"]) else 1 if path[-1] in ("name", *PARTS) else 2


def _set_in_stage(stage: dict[str, Any], path: list[str], value: Any) -> None:
    """As `_set`, where a term goes by its name, and a schedule by PART.NUMBER."""
    match path:
        case ["plus", name, *rest] if rest:
            _set(_term(stage, name, new=rest[0] in ("head", "loss")), rest, value)
        case ["plus", name] if value is None:
            stage["plus"] = [term for term in _inner(stage, "plus", list) if term is not _term(stage, name, new=False)]
        case ["plus", name]:
            raise ValueError(f"say which setting of the term, such as plus.{name}.weight, or null to take it out.")
        case ["schedules", part, number, *rest] if rest:
            _set(_inner(_inner(stage, "schedules", dict), f"{part}.{number}", dict), rest, value)
        case ["schedules", part, number] if value is None:
            _inner(stage, "schedules", dict).pop(f"{part}.{number}", None)
        case ["schedules", part, number] if isinstance(value, dict):
            _inner(stage, "schedules", dict)[f"{part}.{number}"] = value
        case ["schedules", *_] if len(path) > 1:
            raise ValueError(
                "a schedule has a shape and points: give {shape: ramp, points: [[0, 0], [1, 0.5]]} to "
                "schedules.PART.NUMBER, or null to take it out."
            )
        case _:
            _set(stage, path, value)


def _inner(node: dict[str, Any], key: str, kind: type[Any]) -> Any:
    """The list or dict there; an empty one is put where there is none, or null."""
    if node.get(key) is None:
        node[key] = kind()
    if not isinstance(node[key], kind):
        raise ValueError(f"{key} is {node[key]!r}; it must be a {kind.__name__} to have settings of its own.")
    return node[key]


def _term(stage: dict[str, Any], name: str, *, new: bool) -> dict[str, Any]:
    """The term of that name; giving a head or loss to a name that is not there yet adds a term."""
    terms: list[dict[str, Any]] = _inner(stage, "plus", list)
    for term in terms:
        if term.get("name") == name:
            return term
    if not new:
        known = ", ".join(str(term.get("name")) for term in terms) or "none"
        raise ValueError(
            f"the stage has no further term of that name (it has: {known}). To add it, "
            f"give it a head or a loss: plus.{name}.loss NAME."
        )
    terms.append({"name": name})
    return terms[-1]


def _set(node: dict[str, Any], path: list[str], value: Any) -> None:
    *way, key = path
    if way and way[-1] in PARTS and key == "name":
        *way, key = way
    for step in way:
        if not isinstance(node.setdefault(step, {}), dict | None):
            raise ValueError(f"{step} holds one value and has no settings of its own.")
        if node[step] is None:
            node[step] = {}
        node = node[step]
    # --stages.triplet.miner SemiHardMiner means the miner of that name with its default options.
    node[key] = {"name": value} if key in PARTS and isinstance(value, str) else value


def _holds_a_run(folder: Path) -> bool:
    return checkpoint.newest(folder) is not None


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
    while True:
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)  # makes it ours: a run started at the same moment takes the next number
            return folder
        except FileExistsError:
            number += 1


def _old_folder(given: str | None) -> Path:
    if given:
        if not _holds_a_run(Path(given)):
            raise ValueError(f"--resume: {given} holds no run that can go on (no checkpoint in it); start it again.")
        return Path(given)
    saved = [file for folder in RUNS.glob("*") if (file := checkpoint.newest(folder)) is not None]
    runs = sorted(saved, key=lambda file: file.stat().st_mtime)
    if not runs:
        raise ValueError(f"--resume: there is no run in {RUNS}/; say which folder: --resume FOLDER.")
    return runs[-1].parent.parent
