"""Time and peak memory of mining: ours, pytorch-metric-learning's, and the bare tiled product, side by side.

    python -m tests.benchmarks.mining                      # the whole table: hours on 2 cores
    python -m tests.benchmarks.mining --sizes 2048 8192 --dims 128 --images 4
    python -m tests.benchmarks.mining --device cuda --precision bfloat16 --sizes 8192 65536 262144 --dims 512

Each row is measured in a process of its own, first the bare product, then ours, then PML's, so that the ratios in a row
belong together. Time is the median of a few calls after one to warm up; memory is the most that was held during the
first call beyond what was held before it (resident memory on a CPU, allocated memory on a GPU). What PML would need is
predicted, and left out, saying so, where it exceeds 12 GiB.
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning.distances import LpDistance
from torch import Tensor
from torch.nn import functional as F

from metricface.losses import TripletLoss
from metricface.losses.mined import (
    AllPairsContrastiveLoss,
    AllPairsMarginBasedLoss,
    BatchAllTripletLoss,
    BatchHardTripletLoss,
    SemiHardTripletLoss,
)
from metricface.miners import (
    BatchHardMiner,
    DistanceWeightedMiner,
    EasyPositiveMiner,
    MultiSimilarityMiner,
    RandomHardMiner,
    SemiHardMiner,
)
from tests.benchmarks.meter import GIB, LIMIT, Meter

BARE_ROWS = 256

Call = Callable[[Tensor, Tensor], Any]


def with_gradient(loss: torch.nn.Module, miner: torch.nn.Module | None = None) -> Call:
    """A step's forward and backward pass."""

    def call(embeddings: Tensor, labels: Tensor) -> None:
        embeddings.grad = None
        loss.to(embeddings.device)  # a margin-based loss has boundaries
        mined = None if miner is None else miner(embeddings.detach(), labels)
        loss(embeddings, labels, mined).backward()

    return call


SQUARED = LpDistance(power=2)
# What, ours, PML's (or none), and the memory in bytes that PML's is known to need at B, K.
CASES: dict[str, tuple[Call, Call | None, Callable[[int, int], float]]] = {
    "batch-hard miner": (BatchHardMiner(), pml_miners.BatchHardMiner(), lambda b, k: 28.0 * b * b),
    "semi-hard miner": (
        SemiHardMiner(),
        pml_miners.TripletMarginMiner(0.2, type_of_triplets="semihard", distance=SQUARED),
        lambda b, k: _triplets(b, k),
    ),
    "semi-hard miner, random": (SemiHardMiner(negative="random"), None, lambda b, k: 0.0),
    "distance-weighted miner": (
        DistanceWeightedMiner(),
        pml_miners.DistanceWeightedMiner(),
        lambda b, k: 4.0 * b * b * b / k,
    ),
    "random-hard miner": (RandomHardMiner(), None, lambda b, k: 0.0),
    "easy-positive miner": (
        EasyPositiveMiner(),
        pml_miners.BatchEasyHardMiner("easy", "semihard"),
        lambda b, k: 28.0 * b * b,
    ),
    "multi-similarity miner": (
        MultiSimilarityMiner(),
        pml_miners.MultiSimilarityMiner(),
        lambda b, k: 60.0 * b * b,
    ),
    "batch-all triplet loss + grad": (
        with_gradient(BatchAllTripletLoss(distance="euclidean")),
        with_gradient(pml_losses.TripletMarginLoss(0.2)),
        lambda b, k: _triplets(b, k),
    ),
    "batch-all soft triplet loss + grad": (with_gradient(BatchAllTripletLoss("soft")), None, lambda b, k: 0.0),
    "semi-hard triplet loss + grad": (
        with_gradient(SemiHardTripletLoss()),
        with_gradient(
            pml_losses.TripletMarginLoss(0.2, distance=SQUARED),
            pml_miners.TripletMarginMiner(0.2, type_of_triplets="semihard", distance=SQUARED),
        ),
        lambda b, k: _triplets(b, k),
    ),
    "batch-hard triplet loss + grad": (
        with_gradient(BatchHardTripletLoss(distance="euclidean")),
        with_gradient(pml_losses.TripletMarginLoss(0.2), pml_miners.BatchHardMiner()),
        lambda b, k: 28.0 * b * b,
    ),
    "batch-hard miner, then triplet loss + grad": (
        with_gradient(TripletLoss(distance="euclidean"), BatchHardMiner()),
        None,
        lambda b, k: 0.0,
    ),
    "contrastive loss, all pairs + grad": (
        with_gradient(AllPairsContrastiveLoss(normalize=True)),
        with_gradient(pml_losses.ContrastiveLoss()),
        lambda b, k: 80.0 * b * b,
    ),
    "margin-based loss, all pairs + grad": (
        with_gradient(AllPairsMarginBasedLoss()),
        None,
        lambda b, k: 0.0,
    ),
}


def _triplets(batch: int, images: int) -> float:
    """PML lists them: one byte for every B x B x B, or from 2^31 of these on about 64 bytes a triplet."""
    cube = float(batch) ** 3
    return cube if cube < 2**31 else 64.0 * batch * (images - 1) * (batch - images)


def bare(embeddings: Tensor, _: Tensor) -> None:
    """The product of all rows, 256 of them at a time, into the same memory."""
    rows = embeddings.detach().float()
    made = rows.new_empty(min(BARE_ROWS if rows.device.type == "cpu" else 8192, len(rows)), len(rows))
    for start in range(0, len(rows), len(made)):
        some = rows[start : start + len(made)]
        torch.mm(some, rows.T, out=made[: len(some)])


def faces(batch: int, dim: int, images: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings half way through training: identities overlap, some negatives are closer than positives."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(batch // images, dim, generator=generator))
    noise = F.normalize(torch.randn(batch, dim, generator=generator))
    rows = F.normalize(centres.repeat_interleave(images, 0) + 0.9 * noise).to(device, dtype)
    return rows.requires_grad_(), torch.arange(batch // images, device=device).repeat_interleave(images)


def measure(name: str, batch: int, dim: int, images: int, device_name: str, precision: str, threads: int) -> str:
    """One row of the table, as JSON."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device(device_name)
    embeddings, labels = faces(batch, dim, images, device, getattr(torch, precision))
    meter = Meter(device)
    ours, pml, predicted = CASES[name]
    for part in (ours, pml):
        if isinstance(part, torch.nn.Module):
            part.to(device)
    small = faces(8 * images, dim, images, device, getattr(torch, precision))
    for part in (bare, ours):
        part(*small)  # libraries load on first use
    row: dict[str, Any] = {"bare": meter.both(lambda: bare(embeddings, labels))}
    row["ours"] = meter.both(lambda: ours(embeddings, labels))
    row["pml"] = None
    if pml is not None and predicted(batch, images) > LIMIT:
        row["pml"] = f"skipped: needs {predicted(batch, images) / GIB:,.0f} GiB"
    elif pml is not None:
        try:
            pml(*small)
            row["pml"] = meter.both(lambda: pml(embeddings, labels))
        except RuntimeError as error:
            row["pml"] = f"fails: {str(error).splitlines()[0][:60]}"
    return json.dumps(row)


def line(name: str, batch: int, dim: int, images: int, row: dict[str, Any]) -> str:
    """A row of a Markdown table."""
    (bare_time, _), (time_, memory), pml = row["bare"], row["ours"], row["pml"]
    cells = [name, f"{batch:,}", str(dim), str(images), f"{1e3 * bare_time:,.1f}", f"{1e3 * time_:,.1f}"]
    cells += [f"{time_ / bare_time:.2f}", f"{memory / 2**20:,.0f}"]
    if isinstance(pml, list):
        cells += [f"{1e3 * pml[0]:,.0f}", f"{pml[1] / 2**20:,.0f}", f"{pml[0] / time_:,.1f}"]
        cells += [f"{pml[1] / max(memory, 2**20):,.0f}"]
    else:
        cells += [pml or "-", "", "", ""]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| what | B | D | K | bare, ms | ours, ms | x bare | ours, MiB | PML, ms | PML, MiB | x faster | x less memory |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 2048, 8192, 32768, 65536])
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--images", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--only", nargs="+", default=list(CASES), help="parts of names of what to measure")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    print(
        f"torch {torch.__version__}, {asked.device}, {asked.threads} threads, {asked.precision}\n\n{HEAD}", flush=True
    )
    start = multiprocessing.get_context("spawn")
    for batch in asked.sizes:
        for dim in asked.dims:
            for images in asked.images:
                for name in (case for case in CASES if any(part in case for part in asked.only)):
                    cell = (name, batch, dim, images, asked.device, asked.precision, asked.threads)
                    with ProcessPoolExecutor(1, mp_context=start) as pool:  # raises where the process is killed
                        found = json.loads(pool.submit(measure, *cell).result())
                    print(line(name, batch, dim, images, found), flush=True)


if __name__ == "__main__":
    main()
