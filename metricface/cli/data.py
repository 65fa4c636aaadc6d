"""`metricface-data`: what can be said about the images of a data set, beside training on them."""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import metricface
from metricface.cli.train import INTERRUPTED
from metricface.data.folders import FolderImages
from metricface.data.images import ImageSet, keep
from metricface.label_noise.findings import Source, Thresholds, find_all
from metricface.label_noise.proposal import CONFIDENT, check_confident
from metricface.label_noise.report import GALLERY, SUMMARY, write_report
from metricface.miners.dataset.embedding_file import embed_to_file
from metricface.models.embedder import CARD, Embedder
from metricface.training.assemble import device

NOISE = """Look for wrong labels and repeated images in a folder of people: likely duplicates, images far from their own
identity, one person under two labels, two people under one label, and what the folder shares with a test set. The
report is a folder of tables (CSV), pictures (gallery/*.png), a summary and a proposed filter, which training applies
with --data.filter once you have looked through it."""


TAG_LETTERS = 12  # of a tag, in the name of a file of embeddings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns 0; 1 where it failed; 2 for wrong arguments; 130 where it was interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        run: Callable[[argparse.Namespace], None] = arguments.run
        run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"metricface-data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("metricface-data: stopped; embeddings that were made are kept.", file=sys.stderr)
        return INTERRUPTED
    return 0


def noise(arguments: argparse.Namespace) -> None:
    """Embed, look for everything, write the report and print a summary."""
    thresholds = Thresholds(arguments.false_share, arguments.probability)
    _check(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    embedder = metricface.load(arguments.model, device=device(arguments.device))
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    training = _source("training", arguments.data, embedder, arguments)
    test = None if arguments.test is None else _source("test", arguments.test, embedder, arguments)
    findings = find_all(training, test, thresholds=thresholds, pixels=not arguments.no_pixels, seed=arguments.seed)
    summary = write_report(findings, output, confident=arguments.confident)
    print(_summary(summary, output))


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for arguments that would fail, or do harm, after everything is read and embedded."""
    check_confident(arguments.confident)
    for name, least in (("threads", 1), ("seed", 0), ("memory_mib", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; found {value}.")
    output = Path(arguments.output).resolve()
    for name in ("data", "test"):
        folder = getattr(arguments, name)
        if folder is not None and output.is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"--output {arguments.output} lies in --{name} {folder}: its pictures would be taken for people there. "
                "Give a folder elsewhere."
            )


def _source(name: str, folder: str, embedder: Embedder, arguments: argparse.Namespace) -> Source:
    found = FolderImages(folder, embedder.preprocessing)
    fits = found.nbytes <= arguments.memory_mib * 2**20
    with tqdm(total=len(found), desc=f"reading {name}", leave=False) as bar:
        read = found.in_memory if fits else found.verified

        def advance(done: int, total: int) -> None:
            bar.update(done - bar.n)

        images = read(progress=advance)
    print(f"{name:<10} {images.describe()}")
    tag = _tag(Path(arguments.model), found, images, arguments.flip)
    path = Path(arguments.output) / f"embeddings_{name}_{tag[:TAG_LETTERS]}.npy"
    for old in path.parent.glob(f"embeddings_{name}_{'[0-9a-f]' * TAG_LETTERS}.npy*"):  # of other weights or images
        if old.name.removesuffix(".json").endswith(".npy") and not old.name.startswith(path.name):
            old.unlink()
    model = _Mirrored(embedder.model) if arguments.flip else embedder.model
    with tqdm(total=len(images), desc=f"embedding {name}", leave=False) as bar:

        def prepare(batch: Any) -> Tensor:
            bar.update(len(batch.images))
            return embedder.preprocessing.to_input(batch.images)

        embeddings = embed_to_file(
            model, images, path, collate_fn=keep, prepare=prepare, device=device(arguments.device), tag=tag
        )
    return Source(images, embeddings)


class _Mirrored(nn.Module):
    """The sum of the embeddings of an image and of its mirror image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.model(images) + self.model(images.flip(3))
        return embeddings


def _tag(model: Path, folder: FolderImages, images: ImageSet, flip: bool) -> str:
    """Changes with the weights, the images' names, sizes and times, and whether they are mirrored."""
    found = hashlib.sha256(json.dumps(json.loads((model / CARD).read_text())["weights"]).encode())
    found.update(f"{flip} {images.preprocessing}\n".encode())
    for key in images.keys:
        file = (folder.root / key).stat()
        found.update(f"{key} {file.st_size} {file.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return found.hexdigest()


def _summary(summary: dict[str, Any], output: Path) -> str:
    duplicates, misplaced, parted = summary["duplicates"], summary["misplaced"], summary["two_people"]
    rows = [
        ("duplicates", duplicates["found"], f"pairs, {duplicates['under_two_labels']:,} of them under two labels"),
        ("misplaced", misplaced["found"], f"images of {misplaced['judged']:,} judged"),
        ("two labels", summary["two_labels"]["found"], "pairs of identities that are one person"),
        ("two people", parted["found"], f"identities of {parted['judged']:,} judged are two people"),
    ]
    if "overlap_images" in summary:
        rows.append(("overlap", summary["overlap_images"]["found"], "images of the test set are in the training set"))
        rows.append(("overlap", summary["overlap_people"]["found"], "people of the test set are in the training set"))
    lines = [f"{name:<10} {found:>7,} {what}" for name, found, what in rows]
    alone, few = misplaced["not_judged_alone_in_their_identity"], misplaced["not_judged_too_few_alike"]
    lines.append(
        f"not judged {alone:,} images alone in their identity, {few:,} with too few alike; "
        f"{parted['not_judged']:,} identities not parted (too few images, or too few identities with enough)"
    )
    if duplicates["confirmed_by"] != "pixels":
        lines.append("duplicates were told by their embeddings alone: pictures of one moment are among them")
    proposed = summary["proposed_filter"]
    lines.append(f"Look at {output / GALLERY}, then edit {output / proposed['file']} ({proposed['lines']:,} lines)")
    lines.append(f"and train with --data.filter {output / proposed['file']}. Figures: {output / SUMMARY}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="metricface-data", description="Look into data sets of labelled images.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("noise", help="wrong labels and repeated images", description=NOISE)
    command.set_defaults(run=noise)
    command.add_argument("--data", required=True, help="folder with one sub-folder of images per identity")
    command.add_argument("--model", required=True, help="folder of an embedder, as runs/NAME/model")
    command.add_argument("--test", help="folder of test people, to look for in the data")
    command.add_argument("--output", required=True, help="folder for the report")
    thresholds = Thresholds()
    command.add_argument(
        "--false-share",
        type=float,
        default=thresholds.false_share,
        help="of duplicates, pairs of identities, overlaps: share that may be wrong (default %(default)s)",
    )
    command.add_argument(
        "--probability",
        type=float,
        default=thresholds.probability,
        help="from which a misplaced image, or two people under one label, is a finding (default %(default)s)",
    )
    command.add_argument(
        "--confident", type=float, default=CONFIDENT, help="from which the filter has it (default %(default)s)"
    )
    command.add_argument("--no-pixels", action="store_true", help="tell duplicates by their embeddings alone")
    command.add_argument(
        "--flip", action="store_true", help="embed mirror images, too: better for faces, twice the time"
    )
    command.add_argument("--seed", type=int, default=0, help="of the simulated errors")
    command.add_argument("--device", default="cpu", help="auto, cpu, cuda, ...")
    command.add_argument("--threads", type=int, help="CPU threads of torch")
    command.add_argument(
        "--memory-mib", type=int, default=4096, help="decoded images up to this size stay in memory (default 4096)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
