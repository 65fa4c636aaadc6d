"""Mining over a whole data set: time to build an index, neighbours/s, recall against exact search, peak memory.

    python -m tests.benchmarks.dataset_mining                                  # the whole table
    python -m tests.benchmarks.dataset_mining --sizes 100000 --only ivf images

Embeddings are made up, but shaped like a network's half-way through training: identities of 10 images on average (1 to
about 25). Centres are Gaussian with a variance that falls as 1 / i over the axes, so that the 128 dimensions count as
about 18 (faces' embeddings have about 16: Gong et al. 2019, On the Intrinsic Dimensionality of Image Representations),
and lean towards one of 100 groups; an image is its identity's unit centre plus noise of the same shape and length 0.6.
The median cosine is then 0.7 within an identity, and 0.6 with the nearest image of another among 100,000.

Each cell is measured in a process of its own. Memory is the most that was held beyond the embeddings. Recall is that of
500 queries (images, identities, anchors) drawn with another seed than the index calibrates itself with, against
comparing them with everything. Run it with nothing else running.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from metricface.miners.dataset.hard_images import hard_negatives, hardest_positives
from metricface.miners.dataset.identities import centroids, neighbours_from_centroids, neighbours_from_images
from metricface.miners.dataset.index import EmbeddingIndex
from tests.benchmarks.meter import Meter

K = 10
IDENTITIES = 20  # neighbours of each identity
DIM = 128
BAND = (1, 50)
MARGIN = 0.05
SAMPLED = 500

Float32 = NDArray[np.float32]
Labels = NDArray[np.int64]
Figures = dict[str, Any]


def faces(images: int, dim: int = DIM, seed: int = 0) -> tuple[Float32, Labels]:
    """Unit embeddings (images, dim) as described above, sorted by label."""
    rng = np.random.default_rng(seed)
    identities = images // 10
    labels = np.sort(np.concatenate((np.arange(identities), rng.integers(0, identities, images - identities))))
    scale = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    scale *= np.sqrt(dim / np.square(scale).sum())
    groups = 0.6 * rng.standard_normal((100, dim), dtype=np.float32)
    centres = rng.standard_normal((identities, dim), dtype=np.float32)
    centres += groups[rng.integers(0, 100, identities)]
    centres *= scale
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rows = rng.standard_normal((images, dim), dtype=np.float32)
    rows *= scale * np.float32(0.6 / np.sqrt(dim))
    rows += centres[labels]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows, labels


def shared(mine: NDArray[Any], true: NDArray[Any]) -> float:
    """Share of what is in the rows of `true` that is in the same row of `mine` too; -1 counts in neither."""
    wanted = [set(row.tolist()) - {-1} for row in true]
    hits = sum(len(row & set(found.tolist())) for row, found in zip(wanted, mine, strict=True))
    return hits / max(1, sum(len(row) for row in wanted))


def drawn(number: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(1234).choice(number, min(SAMPLED, number), replace=False))


def neighbours(kind: Any) -> Callable[[Float32, Labels], Figures]:
    """An index, and the 10 nearest others of every image."""

    def measure(rows: Float32, labels: Labels) -> Figures:
        since = time.perf_counter()
        index = EmbeddingIndex(rows, kind=kind, k=K)
        built = time.perf_counter()
        found = index.search(rows, K + 1)
        searched = time.perf_counter()

        def recall() -> float:
            sample = drawn(len(rows))
            _, true = faiss.knn(rows[sample], rows, K + 1, metric=faiss.METRIC_INNER_PRODUCT)
            return shared(found.indices[sample], np.where(true == sample[:, None], -1, true))

        return {
            "setting": f"{index.kind}, effort {index.effort}, measures {index.recall:.3f}",
            "build": built - since,
            "search": searched - built,
            "answers": len(rows),
            "recall": recall,
        }

    return measure


def identities_from_centroids(rows: Float32, labels: Labels) -> Figures:
    """Centroids, and the 20 nearest identities of each."""
    since = time.perf_counter()
    directions = centroids(rows, labels)
    built = time.perf_counter()
    found = neighbours_from_centroids(directions, IDENTITIES)
    searched = time.perf_counter()

    def recall() -> float:
        sample = drawn(len(directions))
        _, true = faiss.knn(directions[sample], directions, IDENTITIES + 1, metric=faiss.METRIC_INNER_PRODUCT)
        return shared(found.rows[sample], np.where(true == sample[:, None], -1, true))

    return {
        "setting": f"{len(directions):,} identities",
        "build": built - since,
        "search": searched - built,
        "answers": len(directions),
        "recall": recall,
    }


def identities_from_images(rows: Float32, labels: Labels) -> Figures:
    """The 20 nearest identities of each, by the closest pairs of images; "build" is the index."""
    since = time.perf_counter()
    index = EmbeddingIndex(rows, k=2 * IDENTITIES)
    built = time.perf_counter()
    found = neighbours_from_images(rows, labels, IDENTITIES, index=index)
    searched = time.perf_counter()

    def recall() -> float:
        first = np.flatnonzero(np.diff(labels, prepend=-1))  # labels are sorted and without gaps
        true = []
        for identity in drawn(len(first)):
            closest = np.maximum.reduceat((rows[labels == identity] @ rows.T).max(axis=0), first)
            closest[identity] = -2.0
            true.append(np.argsort(-closest)[:IDENTITIES])
        return shared(found.rows[drawn(len(first))], np.array(true))

    return {
        "setting": f"{index.kind}, {len(found.rows):,} identities, {(found.rows < 0).mean():.1%} of places empty",
        "build": built - since,
        "search": searched - built,
        "answers": len(rows),
        "recall": recall,
    }


def negatives(rows: Float32, labels: Labels) -> Figures:
    """10 hard negatives of every image, at least 5% below its closest positive; "build" is the index."""
    since = time.perf_counter()
    index = EmbeddingIndex(rows, k=BAND[1])
    built = time.perf_counter()
    found = hard_negatives(rows, labels, K, ranks=BAND, relative_margin=MARGIN, index=index)
    searched = time.perf_counter()

    def recall() -> float:
        true = []
        for anchor in drawn(len(rows)):
            cos = rows @ rows[anchor]
            own = np.flatnonzero(labels == labels[anchor])
            closest = np.max(cos[own[own != anchor]], initial=-2.0)
            cos[own] = -2.0
            near = np.argsort(-cos)[: BAND[1]]
            near = near[cos[near] <= (1 - MARGIN) * closest][:K] if closest > 0 else near[:K]
            true.append(np.pad(near, (0, K - len(near)), constant_values=-1))
        return shared(found.indices[drawn(len(rows))], np.array(true))

    return {
        "setting": f"{index.kind}, {found.too_close.mean():.1f} too close an image",
        "build": built - since,
        "search": searched - built,
        "answers": len(rows),
        "recall": recall,
    }


def positives(rows: Float32, labels: Labels) -> Figures:
    """The hardest positive of every image."""
    since = time.perf_counter()
    hardest_positives(rows, labels)
    return {"setting": "exact", "build": 0.0, "search": time.perf_counter() - since, "answers": len(rows)}


# What, how, and up to how many images it is measured unless it is named.
CASES: dict[str, tuple[Callable[[Float32, Labels], Figures], int]] = {
    "neighbours, flat": (neighbours("flat"), 100_000),
    "neighbours, ivf": (neighbours("ivf"), 1_000_000),
    "neighbours, ivf-pq": (neighbours("ivf-pq"), 1_000_000),
    "neighbours, hnsw": (neighbours("hnsw"), 100_000),
    "identities from centroids": (identities_from_centroids, 1_000_000),
    "identities from images": (identities_from_images, 1_000_000),
    "hard negatives": (negatives, 100_000),
    "hardest positives": (positives, 1_000_000),
}


def cell(name: str, folder: str, threads: int) -> str:
    """One row of the table, as JSON."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    rows, labels = np.load(f"{folder}/rows.npy"), np.load(f"{folder}/labels.npy")
    EmbeddingIndex(rows[:1000])  # libraries load on first use
    figures: Figures = {}
    memory = Meter(torch.device("cpu")).memory(lambda: figures.update(CASES[name][0](rows, labels)))
    figures["recall"] = figures["recall"]() if "recall" in figures else None
    return json.dumps({**figures, "memory": memory})


HEAD = (
    "| what | images | setting | build, s | search, s | answers/s | recall | MiB |\n|---|---|---|---|---|---|---|---|"
)


def line(name: str, images: int, row: Figures) -> str:
    """A row of a Markdown table."""
    cells = [name, f"{images:,}", row["setting"], f"{row['build']:,.1f}", f"{row['search']:,.1f}"]
    cells += [f"{row['answers'] / row['search']:,.0f}", "" if row["recall"] is None else f"{row['recall']:.4f}"]
    cells.append(f"{row['memory'] / 2**20:,.0f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--only", nargs="+", help="parts of names of what to measure, at all sizes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    print(f"faiss {faiss.__version__}, {asked.threads} threads, D = {DIM}\n\n{HEAD}", flush=True)
    start = multiprocessing.get_context("spawn")
    for images in asked.sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows, labels = faces(images)
            np.save(Path(folder) / "rows.npy", rows)
            np.save(Path(folder) / "labels.npy", labels)
            del rows
            for name, (_, most) in CASES.items():
                if any(part in name for part in asked.only) if asked.only else images <= most:
                    with ProcessPoolExecutor(1, mp_context=start) as pool:  # raises where the process is killed
                        found = json.loads(pool.submit(cell, name, folder, asked.threads).result())
                    print(line(name, images, found), flush=True)


if __name__ == "__main__":
    main()
