"""Batch samplers at scale: construction, first batch, indices a second and memory, beside pytorch-metric-learning's.

    python -m tests.benchmarks.samplers
    python -m tests.benchmarks.samplers --identities 10000 100000

Labels are int32, drawn evenly, ten images an identity; batches are 32 identities x 4 images. Each cell is measured in
a process of its own: time to construct and to the first batch, the rate over at least two seconds of batches, the first
included, and the most memory held beyond the labels. PML's MPerClassSampler plans a whole pass before its first
batch, so its rate is that of whole passes: of its default length, 100,000 indices, or of 10,000 at a million
identities, where that would take minutes. Coverage is the share of images seen in an epoch, and in as many of
PML's indices.
"""

import argparse
import itertools
import json
import logging
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_metric_learning.samplers import MPerClassSampler

from samplers import (
    IdentityBalancedBatchSampler,
    IdentityTable,
    ImageBatchSampler,
    LookAlikeBatchSampler,
    PairBatchSampler,
    group_by_identity,
)

P, K = 32, 4
SECONDS = 2.0
MIB = 1 << 20
Labels = NDArray[np.int32]


def pml(labels: Labels) -> torch.utils.data.BatchSampler:
    """PML's sampler gives indices one by one, and torch's BatchSampler makes lists of them; so do we here."""
    length = 100_000 if len(labels) < 5_000_000 else 10_000
    return torch.utils.data.BatchSampler(MPerClassSampler(labels, K, P * K, length), P * K, drop_last=True)


def neighbours(labels: Labels) -> NDArray[np.int32]:
    identities = group_by_identity(labels).num_identities
    return np.random.default_rng(1).integers(0, identities, (identities, 20), dtype=np.int32)


def cameras(labels: Labels) -> NDArray[np.int8]:
    return np.random.default_rng(1).integers(0, 5, len(labels), dtype=np.int8)


def nothing(_: Labels) -> None:
    """Most samplers need labels alone."""


# What is made outside of the time, and the sampler from labels and that.
CASES: dict[str, tuple[Callable[[Labels], Any], Callable[[Labels, Any], Any]]] = {
    "table of identities": (nothing, lambda labels, _: group_by_identity(labels)),
    "PML MPerClassSampler": (nothing, lambda labels, _: pml(labels)),
    "IdentityBalanced": (nothing, lambda labels, _: IdentityBalancedBatchSampler(labels, P, K)),
    "IdentityBalanced, by count": (
        nothing,
        lambda labels, _: IdentityBalancedBatchSampler(labels, P, K, identity_weights="count"),
    ),
    "IdentityBalanced, groups": (
        cameras,
        lambda labels, groups: IdentityBalancedBatchSampler(labels, P, K, groups=groups),
    ),
    "LookAlike": (neighbours, lambda labels, table: LookAlikeBatchSampler(labels, P, K, table)),
    "Pair": (nothing, lambda labels, _: PairBatchSampler(labels, P * K // 2)),
    "Image": (nothing, lambda labels, _: ImageBatchSampler(len(labels), P * K)),
}


def held(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(case: str, identities: int) -> dict[str, float]:
    logging.disable(logging.WARNING)
    labels = np.random.default_rng(0).integers(0, identities, 10 * identities, dtype=np.int32)
    prepare, make = CASES[case]
    given = prepare(labels)
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    since = time.perf_counter()
    sampler = make(labels, given)
    found = {"construction": time.perf_counter() - since}
    if not isinstance(sampler, IdentityTable):
        found |= rates(sampler)
    return {**found, "memory": float(held("VmHWM") - before)}


def rates(sampler: Any) -> dict[str, float]:
    """Seconds to the first batch, and indices a second."""
    count, passed, first = 0, 0.0, None
    since = time.perf_counter()
    while passed < SECONDS:
        for batch in sampler:
            count += len(batch)
            passed = time.perf_counter() - since
            first = passed if first is None else first
            if passed >= SECONDS and not isinstance(sampler, torch.utils.data.BatchSampler):
                break
    assert first is not None
    return {"first": first, "rate": count / passed}


def coverage(identities: int) -> dict[str, float]:
    """Share of all images that an epoch by count sees, and PML in as many indices."""
    logging.disable(logging.WARNING)
    labels = np.random.default_rng(0).integers(0, identities, 10 * identities, dtype=np.int32)
    ours = IdentityBalancedBatchSampler(labels, P, K, identity_weights="count")
    seen, theirs = (np.zeros(len(labels), dtype=bool) for _ in range(2))
    for batch in ours:
        seen[batch] = True
    passes = itertools.chain.from_iterable(itertools.repeat(pml(labels)))
    for batch in itertools.islice(passes, len(ours)):
        theirs[batch] = True
    return {"epoch": len(ours) * P * K / len(labels), "ours": float(seen.mean()), "PML": float(theirs.mean())}


def isolated(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--identities", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--only", default="", help="cases whose name contains this, beside PML's")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, NumPy {np.__version__}; batches of {P} x {K}, ten images an identity\n")
    print("| sampler | identities | construction, s | first batch, ms | indices/s | x PML's | memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    rows: dict[str, dict[str, float]] = {}
    for identities in arguments.identities:
        base = 0.0
        for case in CASES:
            if arguments.only not in case and "PML" not in case:
                continue
            found = rows[f"{case}, {identities}"] = isolated(measure, case, identities)
            rate = found.get("rate")
            base = rate if rate and "PML" in case else base
            cells = [f"{1e3 * found['first']:,.1f}", f"{rate:,.0f}", f"{rate / base:,.0f}"] if rate else ["-"] * 3
            print(
                f"| {case} | {identities:,} | {found['construction']:.3f} | {' | '.join(cells)} | "
                f"{found['memory'] / MIB:,.0f} |",
                flush=True,
            )
    seen = isolated(coverage, 10_000)
    print(
        f"\nOf 10,000 identities an epoch by count ({seen['epoch']:.2f} indices an image) shows {seen['ours']:.1%} of "
        f"the images; as many of PML's indices {seen['PML']:.1%}."
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
