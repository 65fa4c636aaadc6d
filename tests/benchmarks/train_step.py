"""Where the time of a training step goes: loader, augmentation, network, mining and loss, update of the weights.

    python -m tests.benchmarks.train_step                             # the whole table: about 15 minutes on 2 cores
    python -m tests.benchmarks.train_step --networks mobilefacenet --batches 128
    python -m tests.benchmarks.train_step --device cuda

One step as the trainer takes it: balanced batches of images in memory, 112 x 112 in colour, K = 4, into 512
dimensions. Parts are timed on their own clocks within the same steps, waiting for the device at each boundary; shares
are of their sum. "Bare" is the network's forward and backward pass alone, on a batch that is there, in that process.
Mining and loss is everything from embeddings to the gradient of the embeddings. Wanted: at most 5% for it, at most 3%
for the loader.
"""

import argparse
import statistics
import time
from functools import partial

import numpy as np
import torch

from metricface.data.augment import Augmentation, augment
from metricface.data.images import MemoryImages, Preprocessing
from metricface.models import build
from metricface.training import assemble, batches
from metricface.training.recipe import Component, Recipe, Stage
from metricface.training.throughput import bare_images_per_second
from metricface.training.update import embed

SIDE, DIM, PEOPLE, EACH = 112, 512, 400, 4
GOALS = {
    "batch-hard triplets": Stage(
        name="t", sampler=Component(""), miner=Component("BatchHardMiner"), loss=Component("TripletLoss")
    ),
    "distance-weighted triplets": Stage(
        name="t", sampler=Component(""), miner=Component("DistanceWeightedMiner"), loss=Component("TripletLoss")
    ),
    "semi-hard triplets": Stage(
        name="t", sampler=Component(""), miner=Component("SemiHardMiner"), loss=Component("TripletLoss")
    ),
    "CosFace, 10,000 classes": Stage(name="s", sampler=Component(""), head=Component("CosFace")),
}
PARTS = ("loader", "augmentation", "forward", "mining and loss", "backward", "update")


def faces() -> MemoryImages:
    """Noise: what a step costs does not depend on what the images show."""
    pixels = np.random.default_rng(0).integers(0, 256, (PEOPLE * EACH, SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.arange(PEOPLE).repeat(EACH)
    names = [f"{i:04d}" for i in range(PEOPLE)]
    keys = [f"{names[label]}/{i}.png" for i, label in enumerate(labels)]
    return MemoryImages(pixels, names, labels, keys, Preprocessing(SIDE, SIDE))


def measure(network: str, size: int, goal: str, device: torch.device, steps: int) -> dict[str, float]:
    """Median seconds of each part of a step, and of a bare pass."""
    recipe = Recipe()
    recipe.model.embedding_dim = DIM
    images = faces()
    torch.manual_seed(0)
    model = build(network, embedding_dim=DIM, channels=3, height=SIDE, width=SIDE)
    model = model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    objective = assemble.objective(GOALS[goal], recipe, 10_000).to(device)
    optimizer = assemble.optimizer(GOALS[goal], model, objective)
    sampler = Component(
        "IdentityBalancedBatchSampler", {"identities_per_batch": size // EACH, "images_per_identity": EACH}
    )
    loader = batches.loader(images, batches.sampler(Stage(name="t", sampler=sampler), images, 0), 0, device)
    generator = torch.Generator(device).manual_seed(0)
    precision = assemble.precision("auto", device)
    autocast = partial(assemble.autocast, precision, device)
    found: dict[str, list[float]] = {name: [] for name in PARTS}

    def lap(name: str, since: float) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        found[name].append(now - since)
        return now

    endless = iter(loader)
    for _ in range(steps + 2):
        now = time.perf_counter()
        try:
            batch = next(endless)
        except StopIteration:
            endless = iter(loader)
            batch = next(endless)
        now = lap("loader", now)
        inputs = augment(batch.images.to(device, non_blocking=True), Augmentation(), generator)
        labels = batch.labels.to(device)
        now = lap("augmentation", now)
        embedded = embed(model, inputs, autocast)
        now = lap("forward", now)
        # The gradient of the embeddings is where the objective ends and the network's backward pass begins.
        rows = embedded.embeddings.detach().requires_grad_()
        optimizer.zero_grad(set_to_none=True)
        objective(rows, labels).backward()
        now = lap("mining and loss", now)
        embedded.embeddings.backward(rows.grad)  # type: ignore[no-untyped-call]
        now = lap("backward", now)
        optimizer.step()
        lap("update", now)
    medians = {name: statistics.median(values[2:]) for name, values in found.items()}
    bare = bare_images_per_second(model, size, (3, SIDE, SIDE), device, precision)
    return medians | {"bare": size / bare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["sphereface20", "mobilefacenet"])
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--goals", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    precision = assemble.precision("auto", device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {precision}\n")
    head = ("network", "B", "objective", "step, ms", *(f"{name}, %" for name in PARTS), "bare pass, ms")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for network in arguments.networks:
        for size in arguments.batches:
            for goal in arguments.goals:
                found = measure(network, size, goal, device, arguments.steps)
                whole = sum(found[name] for name in PARTS)
                shares = [f"{100 * found[name] / whole:.1f}" for name in PARTS]
                cells = (network, str(size), goal, f"{1000 * whole:,.0f}", *shares, f"{1000 * found['bare']:,.0f}")
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
