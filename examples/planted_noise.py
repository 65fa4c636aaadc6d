"""Plant label noise in a set of faces, train on it as one has to, and count what the noise report finds.

    python examples/planted_noise.py synthetic
    python examples/planted_noise.py LFW_FOLDER --recipe examples/recipes/lfw.yaml

Planted: 5% of the labels flipped, 1% of the images copied (as they are, re-encoded, or shifted; every second copy under
another label), 50 people split into two identities, and beyond that 25 pairs of people merged into one identity each,
and a test set of 50 people, half of whom are also in the training set under another name, with copies of 25 images.
The embedder is trained on the noisy set itself. `--way cross` trains two, each on half of the identities, so that no
label is judged only by a network that has learnt it: every image then has both embeddings, side by side.
"""

import argparse
import copy
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

import metricface
from metricface.data.folders import FolderImages
from metricface.data.images import ImageSet, Preprocessing
from metricface.data.synthetic import SyntheticFaces
from metricface.label_noise.findings import Findings, Source, find_all
from metricface.label_noise.report import write_report
from metricface.training.recipe import Recipe, as_dict

AGAIN = " again"  # the second name of a person
COPIES = ("exact", "re-encoded", "shifted")
QUALITY = 75  # of re-encoded JPEG


@dataclass
class Truth:
    """What was planted. Images go by their keys in the noisy folders, people by the names of the source's folders."""

    person: dict[str, str] = field(default_factory=dict)  # of every image, training and test
    copies: list[tuple[str, str, str]] = field(default_factory=list)  # key, key of the copy, how
    split: list[str] = field(default_factory=list)
    merged: dict[str, str] = field(default_factory=dict)  # second person -> the person whose label both have
    leaked: list[str] = field(default_factory=list)  # people of the test set who are in the training set, too

    def wrong(self, key: str) -> bool:
        """Whether the label of an image is not its person's."""
        label, person = owner(key), self.person[key]
        return label not in (person, self.merged.get(person))


def owner(key: str) -> str:
    return label_of(key).removesuffix(AGAIN)


def label_of(key: str) -> str:
    return key.rpartition("/")[0]


class Amounts(NamedTuple):
    """How much is planted: shares of the images for the first two, numbers of people for the others."""

    flipped: float = 0.05
    copied: float = 0.01
    split: int = 50
    merged: int = 25
    tested: int = 50


class Planter:
    """Copies images of a source folder into noisy training and test folders."""

    def __init__(self, source: Path, target: Path, seed: int) -> None:
        self.source, self.training, self.test = source, target / "training", target / "test"
        self.generator = np.random.default_rng(seed)
        self.truth = Truth()
        people = sorted(path for path in source.iterdir() if path.is_dir())
        self.files = {path.name: sorted(file.name for file in path.iterdir()) for path in people}

    def plant(self, flipped: float, copied: float, split: int, merged: int, tested: int) -> Truth:
        """Plant these `Amounts`."""
        several = [name for name, files in self.files.items() if len(files) >= 4]
        chosen = [several[i] for i in self.generator.permutation(len(several))]
        label = {f"{name}/{file}": name for name, files in self.files.items() for file in files}
        for name in take(chosen, split):
            self.truth.split.append(name)
            label |= {f"{name}/{file}": name + AGAIN for file in self.half(name)}
        for one, two in zip(take(chosen, merged), take(chosen, merged), strict=True):
            self.truth.merged[two] = one
            label |= {f"{two}/{file}": one for file in self.files[two]}
        for number, name in enumerate(take(chosen, tested)):
            leaks = number % 2 == 0
            moved = self.half(name) if leaks else self.files[name]
            self.truth.leaked += [name] * leaks
            for file in moved:
                self.write(f"{name}/{file}", self.test / name / file)
                del label[f"{name}/{file}"]
            for file in set(self.files[name]) - set(moved):
                label[f"{name}/{file}"] = name + AGAIN
        keys = sorted(label)
        names = sorted(set(label.values()))
        for i in self.generator.permutation(len(keys))[: round(flipped * len(keys))]:
            label[keys[i]] = self.stranger(keys[i], label[keys[i]], names)
        placed = {key: self.write(key, self.free(self.training / label[key], key)) for key in keys}
        for number, i in enumerate(self.generator.permutation(len(keys))[: round(copied * len(keys))]):
            key, how = keys[i], COPIES[number % len(COPIES)]
            under = label[key] if number % 2 else self.stranger(key, label[key], names)
            self.copy(key, self.training / under, placed[key], how)
        tests = sorted(path.name for path in self.test.iterdir())
        for number, i in enumerate(self.generator.permutation(len(keys))[: tested // 2]):
            self.copy(keys[i], self.test / tests[number % len(tests)], placed[keys[i]], COPIES[number % len(COPIES)])
        return self.truth

    def half(self, name: str) -> list[str]:
        """A random half of the files of a person."""
        files = [self.files[name][i] for i in self.generator.permutation(len(self.files[name]))]
        return files[: len(files) // 2]

    def stranger(self, key: str, label: str, names: list[str]) -> str:
        """A label that is neither the image's person's nor its own."""
        person = label_of(key)
        while True:
            name = names[self.generator.integers(len(names))]
            if name.removesuffix(AGAIN) not in (person, label.removesuffix(AGAIN), self.truth.merged.get(person)):
                return name

    def free(self, folder: Path, key: str) -> Path:
        """A path in the folder for an image; its own name, as detection never looks at names."""
        name = Path(key).name
        return folder / name if not (folder / name).exists() else folder / f"{label_of(key)}_{name}"

    def write(self, key: str, path: Path) -> str:
        """Put an image in its place; return its key there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.source / key, path)
        return self.note(key, path)

    def copy(self, key: str, folder: Path, placed: str, how: str) -> None:
        """Put a copy of an image, whose key is now `placed`, into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{Path(key).stem}_copy{Path(key).suffix if how == 'exact' else '.jpg'}"
        if how == "exact":
            shutil.copyfile(self.source / key, path)
        else:
            image = cv2.imread(str(self.source / key))
            assert image is not None
            if how == "shifted":
                by = max(1, round(image.shape[1] / 80))
                moved = np.array([[1, 0, by], [0, 1, -by]], dtype=np.float32)
                image = cv2.warpAffine(image, moved, image.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
            cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        self.truth.copies.append((placed, self.note(key, path), how))

    def note(self, key: str, path: Path) -> str:
        """Remember whom an image shows; return its key."""
        placed = f"{path.parent.name}/{path.name}"
        self.truth.person[placed] = label_of(key)
        return placed


def take(names: list[str], number: int) -> list[str]:
    taken = names[:number]
    del names[:number]
    return taken


def write_synthetic(folder: Path, people: int = 1000, images: int = 12) -> Path:
    faces = SyntheticFaces(people, images, Preprocessing(64, 64))
    for start in range(0, len(faces), 600):
        index = range(start, min(start + 600, len(faces)))
        for i, pixels in zip(index, faces.read(index), strict=True):
            name = faces.identities[faces.labels[i]]
            (folder / name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / name / f"{faces.keys[i].replace('/', '_')}.png"), pixels[:, :, ::-1])
    return folder


def train(recipe: Path | None, data: Path, epochs: float, folder: Path, settings: list[str]) -> Path:
    """Train in a process of its own; return the embedder's folder. Few people are held out: their labels count, too."""
    if not (folder / "report.json").exists():
        changed = copy.deepcopy(yaml.safe_load(recipe.read_text()) if recipe else as_dict(Recipe()))
        changed["budget"] = None  # epochs: a busy machine then trains longer, not less
        for stage in changed["stages"]:
            stage["epochs"] = round(epochs * stage.pop("share"), 2)
        changed["data"] |= {"train": str(data), "test_share": 0.05, "validation_share": 0.05}
        folder.parent.mkdir(parents=True, exist_ok=True)
        written = folder.with_suffix(".yaml")
        written.write_text(yaml.safe_dump(changed, sort_keys=False))
        command = [sys.executable, "-m", "metricface.cli.train", str(written), "--output", str(folder), *settings]
        subprocess.run(command, check=True)
    return folder / "model"


def halves(data: Path, folder: Path, seed: int) -> list[Path]:
    """Two folders of links, each to half of the identities."""
    names = sorted(path.name for path in data.iterdir())
    order = np.random.default_rng(seed).permutation(len(names))
    for half in (0, 1):
        (folder / f"half{half}").mkdir(parents=True, exist_ok=True)
        for i in order[half::2]:
            link = folder / f"half{half}" / names[i]
            if not link.exists():
                link.symlink_to((data / names[i]).resolve(), target_is_directory=True)
    return [folder / "half0", folder / "half1"]


def embed(models: list[Path], folder: Path) -> Source:
    """A set and its embeddings; those of several networks side by side, so that a cosine is the mean of theirs."""
    embedders = [metricface.load(model) for model in models]
    images = FolderImages(folder, embedders[0].preprocessing).in_memory()
    files = [folder / key for key in images.keys]
    return Source(images, np.concatenate([embedder.embed(files, flip=True) for embedder in embedders], axis=1))


class Score(NamedTuple):
    """One kind of finding. right: of all that was ranked, best first; the first `found` are findings."""

    kind: str
    planted: int
    detectable: int
    found: int
    right: NDArray[np.bool_]
    note: str = ""

    def row(self) -> str:
        """A row of a Markdown table."""
        hits, ranked = int(self.right[: self.found].sum()), np.cumsum(self.right)
        precision = f"{hits / self.found:.3f}" if self.found else "-"
        average = (ranked / np.arange(1, len(ranked) + 1))[self.right].sum() / max(1, self.detectable)
        recalls = [f"{hits / number:.3f}" if number else "-" for number in (self.planted, self.detectable)]
        cells = (self.kind, self.planted, self.detectable, self.found, precision, *recalls, f"{average:.3f}", self.note)
        return f"| {' | '.join(str(cell) for cell in cells)} |"


HEAD = "| kind | planted | detectable | found | precision | recall | of detectable | average precision | |"


def scores(findings: Findings, truth: Truth) -> Iterator[Score]:
    images, test = findings.images, findings.test
    pairs = {frozenset(pair[:2]): pair[2] for pair in truth.copies}
    yield _of_images("duplicates", findings.duplicates, images, images, pairs)
    yield from _of_labels(findings, truth)
    yield from _of_people(findings, truth)
    yield _parted(findings, truth)
    if test is not None and findings.overlap_images is not None:
        yield _of_images("test images in training", findings.overlap_images, images, test, pairs)


def _of_people(findings: Findings, truth: Truth) -> Iterator[Score]:
    """Pairs of labels most of whose images show one person: those planted, and a few that flips have made."""
    shown = [_shown(images, truth) for images in (findings.images, findings.test or findings.images)]
    for kind, found, other in (
        ("one person, two labels", findings.same_person, shown[0]),
        ("test people in training", findings.overlap_people, shown[1]),
    ):
        if found is None:
            continue
        people = [shown[0][a] for a in found.first], [other[b] for b in found.second]
        right = np.array([one is not None and one == two for one, two in zip(*people, strict=True)], dtype=bool)
        counts = [Counter(name for name in names if name is not None) for names in (shown[0], other)]
        within = other is shown[0]
        total = sum(number * (counts[1][name] - within) for name, number in counts[0].items()) // (1 + within)
        yield Score(kind, total, total, found.found, right)


def _shown(images: ImageSet, truth: Truth) -> list[str | None]:
    """Whom most of the images of each identity show; None where nobody has more than half."""
    people: list[Counter[str]] = [Counter() for _ in images.identities]
    for key, label in zip(images.keys, images.labels, strict=True):
        people[label][truth.person[key]] += 1
    tops = [count.most_common(1)[0] for count in people]
    return [name if 2 * number > count.total() else None for (name, number), count in zip(tops, people, strict=True)]


def _of_images(kind: str, found: Any, one: ImageSet, two: ImageSet, pairs: dict[frozenset[str], str]) -> Score:
    placed = {pair for pair in pairs if len(pair & set(one.keys) | pair & set(two.keys)) == 2}
    across = {pair for pair in placed if (pair <= set(one.keys)) == (one is two)}
    right = [frozenset((one.keys[a], two.keys[b])) in across for a, b in zip(found.first, found.second, strict=True)]
    hits = Counter(
        pairs[frozenset((one.keys[a], two.keys[b]))]
        for a, b, hit in zip(found.first[: found.found], found.second, right, strict=False)
        if hit
    )
    total = Counter(pairs[pair] for pair in across)
    note = ", ".join(f"{how} {hits[how]}/{total[how]}" for how in COPIES)
    return Score(kind, len(across), len(across), found.found, np.array(right, dtype=bool), note)


def _of_labels(findings: Findings, truth: Truth) -> Iterator[Score]:
    """Wrong labels: of all images, and of those with at least two others, which are a majority against it."""
    images, found = findings.images, findings.misplaced
    wrong = np.array([truth.wrong(key) for key in images.keys])
    others = images.counts()[images.labels] - 1
    named = {name: row for row, name in enumerate(images.identities)}
    homes = [{named.get(truth.person[key], -1), named.get(truth.person[key] + AGAIN, -1)} - {-1} for key in images.keys]
    hits = [i for i in range(found.found) if wrong[found.images[i]] and homes[found.images[i]]]
    right = sum(int(found.nearest[i]) in homes[found.images[i]] for i in hits)
    note = f"nearest is the person: {right}/{len(hits)}"
    for kind, least in (("misplaced, by 1 other image", 1), ("by 2 or more others", 2)):
        judged = others[found.images] >= least
        detectable = int((wrong & (others >= least)).sum())
        yield Score(
            kind, int(wrong.sum()), detectable, int(judged[: found.found].sum()), wrong[found.images][judged], note
        )
        note = ""


def _parted(findings: Findings, truth: Truth) -> Score:
    """An identity is right where at least two images each of two people are in it; merged ones, and a few by chance."""
    images, found = findings.images, findings.parted
    people: dict[str, Counter[str]] = {name: Counter() for name in images.identities}
    for key in images.keys:
        people[label_of(key)][truth.person[key]] += 1
    two = {name for name, count in people.items() if len(count) > 1 and count.most_common(2)[1][1] >= 2}
    names = [images.identities[row] for row in found.identities]
    right = np.array([name in two for name in names], dtype=bool)
    return Score("two people, one label", len(two), int(right.sum()), found.found, right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="synthetic, or a folder with one sub-folder of images per person")
    parser.add_argument("--recipe", type=Path, help="what to train by (default: the built-in recipe)")
    parser.add_argument("--epochs", type=float, default=30, help="shared among the recipe's stages")
    parser.add_argument("--way", nargs="+", choices=("plain", "cross"), default=["plain"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", default="2")
    parser.add_argument("--known", nargs="*", default=[], help="true duplicates, FILE=FILE, to be looked for")
    parser.add_argument("--output", type=Path, default=Path("runs/planted_noise"))
    given = parser.parse_args()
    folder: Path = given.output
    truth = prepared(given.source, folder, given.seed)
    settings = ["--seed", str(given.seed), "--threads", given.threads]
    for way in given.way:
        parts = [folder / "training"] if way == "plain" else halves(folder / "training", folder / "halves", given.seed)
        models = [
            train(given.recipe, part, given.epochs, folder / f"{way}-{number}", settings)
            for number, part in enumerate(parts)
        ]
        training, test = embed(models, folder / "training"), embed(models, folder / "test")
        findings = find_all(training, test, seed=given.seed)
        write_report(findings, folder / f"report-{way}")
        print(f"\n{way}: {training.images.describe()}\n\n{HEAD}\n|{'---|' * 9}")
        for score in scores(findings, truth):
            print(score.row())
        for pair in given.known:
            print(known(findings, *pair.split("=")))


def prepared(source: str, folder: Path, seed: int, amounts: Amounts | None = None) -> Truth:
    """Plant once; a study that is continued goes on with what is there."""
    record = folder / "truth.json"
    if not record.exists():
        clean = write_synthetic(folder / "source") if source == "synthetic" else Path(source)
        for name in ("training", "test"):
            shutil.rmtree(folder / name, ignore_errors=True)  # of a study that was interrupted here
        planted = Planter(clean, folder, seed).plant(*(amounts or Amounts()))
        record.write_text(json.dumps(asdict(planted)))
    loaded = json.loads(record.read_text())
    loaded["copies"] = [tuple(pair) for pair in loaded["copies"]]
    return Truth(**loaded)


def known(findings: Findings, one: str, two: str) -> str:
    found, keys = findings.duplicates, findings.images.keys
    for rank, (a, b) in enumerate(zip(found.first, found.second, strict=True)):
        if {keys[a].rpartition("/")[2], keys[b].rpartition("/")[2]} == {one, two}:
            return f"{one} = {two}: {'found' if rank < found.found else 'not found'}, rank {rank + 1} of the pairs"
    return f"{one} = {two}: not among the pairs that were looked at"


if __name__ == "__main__":
    main()
