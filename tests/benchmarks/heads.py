"""Time and peak memory of classification heads: ours, pytorch-metric-learning's, a plain linear layer, side by side.

    python -m tests.benchmarks.heads                                  # the whole table: 40 minutes on 2 cores
    python -m tests.benchmarks.heads --classes 100000 --only ArcFace
    python -m tests.benchmarks.heads --all-heads --classes 100000 --batches 128
    python -m tests.benchmarks.heads --device cuda

A call is the forward and the backward pass from raw embeddings to the gradients of embeddings and weights, D = 512.
Memory is the most that is held during a first call beyond what was held before it, the weights' gradient included,
each in a process of its own (resident memory on a CPU, allocated memory on a GPU). Then one process takes plain and
ours in turns, and another PML's: times are medians, ratios medians of the ratios within a turn. PML holds about
16 x B x C x 4 bytes
and is left out, saying so, where that exceeds 12 GiB.
"""

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor, nn
from torch.nn import functional as F

from metricface import heads
from tests.benchmarks.meter import GIB, LIMIT, Meter

DIM = 512
PML: dict[str, Callable[[int], nn.Module]] = {
    "ArcFace": lambda classes: pml.ArcFaceLoss(classes, DIM),
    "CosFace": lambda classes: pml.CosFaceLoss(classes, DIM),
}
TABLE = ["ArcFace", "CosFace", "Softmax"]
EVERY = [name for name in heads.__all__ if isinstance(getattr(heads, name), type)]


class Plain(nn.Module):
    """A linear layer without bias and PyTorch's cross-entropy."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, DIM) * 0.01)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, D), (B,) -> scalar."""
        return F.cross_entropy(F.linear(embeddings, self.weight), labels)


def made(kind: str, name: str, classes: int, device: torch.device) -> nn.Module:
    """kind: plain, held, streaming or pml. Plain softmax without a bias, as the layer that it is compared with."""
    if kind == "plain":
        return Plain(classes).to(device)
    if kind == "pml":
        return PML[name](classes).to(device)
    options: dict[str, Any] = {"bias": False} if name == "Softmax" else {}
    head: nn.Module = getattr(heads, name)(classes, DIM, streaming=kind == "streaming", **options)
    return head.to(device)


def calls(kinds: list[str], name: str, classes: int, batch: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """A step of each kind, libraries loaded."""
    torch.manual_seed(0)
    embeddings = torch.randn(batch, DIM, device=device).requires_grad_()
    labels = torch.randint(0, classes, (batch,), device=device)

    def step(head: nn.Module, labels: Tensor = labels) -> None:
        embeddings.grad = None
        head.zero_grad(set_to_none=True)
        head(embeddings, labels).backward()

    for kind in kinds:
        step(made(kind, name, 100, device), labels % 100)
    found = {kind: made(kind, name, classes, device) for kind in kinds}
    first = next(iter(found.values()))
    for head in found.values():  # one matrix for all: a million classes are 2 GiB, and their gradient 2 more
        if kinds != ["pml"] and head.get_parameter("weight").shape == first.get_parameter("weight").shape:
            head.register_parameter("weight", first.get_parameter("weight"))
    return {kind: partial(step, head) for kind, head in found.items()}


def memory(kind: str, name: str, classes: int, batch: int, device_name: str, threads: int) -> int:
    """Bytes that a step holds at most."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    return Meter(device).memory(calls([kind], name, classes, batch, device)[kind])


def times(kinds: list[str], name: str, classes: int, batch: int, device_name: str, threads: int) -> str:
    """Seconds of each kind, turn after turn, as JSON."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    meter, steps = Meter(device), calls(kinds, name, classes, batch, device)
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(12):
        for kind, step in steps.items():
            seconds = meter.once(step)
            if turn:  # the first one pays for fresh memory
                found[kind].append(seconds)
        if sum(map(sum, found.values())) > 45.0 and len(found[kinds[0]]) >= 3:
            break
    return json.dumps(found)


def rows(name: str, classes: int, batch: int, forms: list[str], device: str, threads: int) -> Iterator[str]:
    """Rows of a Markdown table, one for each form of the head."""
    predicted = 16.0 * 4.0 * batch * classes
    with_pml = ["pml"] if name in PML and predicted <= LIMIT else []
    start = multiprocessing.get_context("spawn")

    def alone(call: Callable[..., Any], *arguments: Any) -> Any:
        with ProcessPoolExecutor(1, mp_context=start) as pool:  # raises where the process is killed
            return pool.submit(call, *arguments, name, classes, batch, device, threads).result()

    held = {kind: alone(memory, kind) for kind in ["plain", *forms, *with_pml]}
    found = json.loads(alone(times, ["plain", *forms]))
    if with_pml:
        found |= json.loads(alone(times, with_pml))
    mib, gradient = 1 << 20, 4.0 * classes * DIM
    for form in forms:
        ratio = statistics.median(a / b for a, b in zip(found[form], found["plain"], strict=True))
        cells = [f"{name}{', streaming' if form == 'streaming' else ''}", f"{classes:,}", str(batch)]
        cells += [f"{1e3 * statistics.median(found[kind]):,.0f}" for kind in ("plain", form)] + [f"{ratio:.2f}"]
        cells += [f"{held[kind] / mib:,.0f}" for kind in ("plain", form)] + [f"{held[form] / held['plain']:.2f}"]
        cells += [f"{max(0.0, held[form] - gradient) / mib:,.0f}"]
        if with_pml:
            cells += [f"{1e3 * statistics.median(found['pml']):,.0f}", f"{held['pml'] / mib:,.0f}"]
        else:
            cells += [f"skipped: about {predicted / GIB:,.0f} GiB" if name in PML else "-", ""]
        yield f"| {' | '.join(cells)} |"


HEAD = (
    "| head | C | B | plain, ms | ours, ms | x plain | plain, MiB | ours, MiB | x plain | beyond the gradient of the "
    "weights, MiB | PML, ms | PML, MiB |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--only", nargs="+", default=TABLE, choices=EVERY, help="heads to measure")
    parser.add_argument("--all-heads", action="store_true")
    parser.add_argument("--forms", nargs="+", choices=["held", "streaming"], default=["held", "streaming"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    print(f"torch {torch.__version__}, {asked.device}, {asked.threads} threads, D = {DIM}\n\n{HEAD}", flush=True)
    for classes in asked.classes:
        for batch in asked.batches:
            for name in EVERY if asked.all_heads else asked.only:
                for row in rows(name, classes, batch, asked.forms, asked.device, asked.threads):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
