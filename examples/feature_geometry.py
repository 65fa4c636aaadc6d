"""Two-dimensional embeddings of the ten digits of scikit-learn under nine losses, in one picture.

    python examples/feature_geometry.py --output examples/guides/figures/feature_geometry.png

A small network ends in two numbers, so what a loss does to embeddings can be seen as it is. It takes a minute or two on
2 cores; examples/guides/losses_and_heads.md explains the picture.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from metricface.heads import ArcFace, CosFace, NormFace, Softmax, SphereFace
from metricface.heads.base import Head
from metricface.losses import CenterLoss, ContrastiveLoss, MarginBasedLoss, TripletLoss
from metricface.miners import DistanceWeightedMiner, PairMarginMiner, SemiHardMiner
from samplers import IdentityBalancedBatchSampler

C, D = 10, 2
# Petroff 2021, Accessible color sequences for data visualization: ten that colour-blind readers can tell apart.
COLORS = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadb"]
NAME: dict[str, Any] = {
    "fontsize": 8,
    "weight": "bold",
    "ha": "center",
    "va": "center",
    "bbox": {"boxstyle": "circle,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.7},
}
Points = NDArray[Any]


class Mined(nn.Module):
    """A loss on what a miner finds."""

    def __init__(self, miner: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.miner, self.loss = miner, loss

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, 2), (B,) -> scalar."""
        value: Tensor = self.loss(embeddings, labels, self.miner(embeddings, labels))
        return value


class SoftmaxAndCenter(nn.Module):
    """A head, and beside it the pull to the centre of the own class."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.head, self.center, self.weight = Softmax(C, D), CenterLoss(C, D), weight

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, 2), (B,) -> scalar."""
        value: Tensor = self.head(embeddings, labels) + self.weight * self.center(embeddings, labels)
        return value


class Method(NamedTuple):
    """A panel."""

    name: str
    build: Callable[[], nn.Module]
    on_circle: bool  # whether only directions count in the loss: they are drawn, and not lengths
    by_angle: bool  # how its embeddings are compared afterwards


# Ten classes on a circle are 36 degrees apart: cosine 0.81, distance 0.62, squared 0.38. So margins have to be smaller
# here than in many dimensions, where classes are 90 degrees apart: CosFace's below 1 - cos(36 deg) = 0.19, ArcFace's
# below 0.63 rad, FaceNet's below 0.38, beta + alpha below 0.62. And the scale has to be larger than its bound: for
# neighbours at cosine 0.81 to leave the own class 0.99, 27.
METHODS = [
    Method("softmax", lambda: Softmax(C, D, bias=False), on_circle=False, by_angle=True),
    Method("SphereFace", lambda: SphereFace(C, D, lambda_gamma=1.0, lambda_min=1.0), on_circle=False, by_angle=True),
    Method("softmax + center loss", lambda: SoftmaxAndCenter(0.1), on_circle=False, by_angle=False),
    Method("NormFace", lambda: NormFace(C, D, scale=30.0, learn_scale=False), on_circle=True, by_angle=True),
    Method("CosFace", lambda: CosFace(C, D, margin_cos=0.1, scale=30.0), on_circle=True, by_angle=True),
    Method("ArcFace", lambda: ArcFace(C, D, margin_rad=0.3, scale=30.0), on_circle=True, by_angle=True),
    Method(
        "contrastive",
        lambda: Mined(PairMarginMiner(0.0, 2.0, normalize=False), ContrastiveLoss(2.0)),
        on_circle=False,
        by_angle=False,
    ),
    Method("triplet, semi-hard", lambda: Mined(SemiHardMiner(0.2), TripletLoss(0.2)), on_circle=True, by_angle=True),
    Method(
        "margin-based",
        lambda: Mined(DistanceWeightedMiner(cutoff=0.1), MarginBasedLoss(alpha=0.1, beta=0.35)),
        on_circle=True,
        by_angle=True,
    ),
]


class Digits(NamedTuple):
    """Images with their labels."""

    images: Tensor  # (N, 64) grey levels in [0, 1]
    labels: Tensor  # (N,)


def load() -> tuple[Digits, Digits]:
    """Training and held-out digits, 1,257 and 540 of scikit-learn's."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.3, stratify=labels, random_state=0)
    images, held_out, labels, held_out_labels = (torch.from_numpy(part) for part in parts)
    return Digits(images.float(), labels), Digits(held_out.float(), held_out_labels)


def train(method: Method, digits: Digits, *, epochs: int, seed: int) -> tuple[nn.Module, nn.Module]:
    """The network and what it was trained with. An epoch of the sampler is one batch: 12 images of each digit."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        *(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU()),
        nn.Linear(256, D),
    )
    objective = method.build()
    if isinstance(objective, Head):
        # On a circle classes cannot pass each other: begin in the order that the network has them in.
        objective.class_weights_from(network(digits.images), digits.labels)
    groups: list[dict[str, Any]] = [{"params": list(network.parameters()), "lr": 3e-3}]
    if own := list(objective.parameters()):
        groups.append({"params": own, "lr": 1e-2, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], total_steps=epochs)
    batches = IdentityBalancedBatchSampler(digits.labels, identities_per_batch=C, images_per_identity=12, seed=seed)
    for _ in range(epochs):
        for rows in batches:
            images = digits.images[rows]
            embeddings = network(images + 0.1 * torch.randn_like(images))
            optimizer.zero_grad()
            objective(embeddings, digits.labels[rows]).backward()
            optimizer.step()
            rate.step()
    return network.eval(), objective


@torch.no_grad()
def draw(
    axes: Axes, method: Method, network: nn.Module, objective: nn.Module, digits: Digits, held_out: Digits
) -> None:
    """One panel: training and held-out embeddings together, in the title how well the latter are told apart."""
    old, new = network(digits.images), network(held_out.images)
    if method.by_angle:
        old, new = F.normalize(old), F.normalize(new)
    means = torch.stack([old[digits.labels == c].mean(dim=0) for c in range(C)])  # (C, 2)
    accuracy = float((torch.cdist(new, means).argmin(dim=1) == held_out.labels).float().mean())
    told = f"{method.name}\n{accuracy:.1%} by {'angle' if method.by_angle else 'distance'}"
    if method.by_angle:
        off = F.cosine_similarity(new, means[held_out.labels]).clamp(max=1.0).arccos().rad2deg().median()
        told += f", {off:.1f}° off the mean"
    axes.set_title(told, fontsize=9, y=1.0)  # given, or polar axes put theirs higher
    embeddings = network(torch.cat([digits.images, held_out.images])).numpy()
    labels = torch.cat([digits.labels, held_out.labels]).numpy()
    vectors = next((part.weight.numpy() for part in objective.modules() if isinstance(part, Head)), None)
    (draw_directions if method.on_circle else draw_points)(axes, embeddings, labels, vectors)
    axes.axis("off")


def draw_points(axes: Axes, embeddings: Points, labels: Points, vectors: Points | None) -> None:
    """The plane as it is. vectors: of the classes, drawn as rays."""
    reach = 1.05 * np.abs(embeddings).max()
    axes.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    axes.scatter(embeddings[:, 0], embeddings[:, 1], s=5, c=[COLORS[label] for label in labels], linewidths=0)
    for x, y in () if vectors is None else vectors / np.linalg.norm(vectors, axis=1, keepdims=True):
        axes.plot([0.0, reach * x], [0.0, reach * y], color="black", linewidth=0.5, alpha=0.5, zorder=0)
    axes.plot(0.0, 0.0, "k+", markersize=7)
    for c in range(C):
        axes.annotate(str(c), np.median(embeddings[labels == c], axis=0), **NAME)


def draw_directions(axes: Axes, embeddings: Points, labels: Points, vectors: Points | None) -> None:
    """Polar axes: each image inside the circle, radii random so that more are seen; each class's shares outside."""
    angles = np.arctan2(embeddings[:, 1], embeddings[:, 0])
    radii = np.random.default_rng(0).uniform(0.85, 0.97, len(angles))
    axes.scatter(angles, radii, s=3, c=[COLORS[label] for label in labels], linewidths=0)
    axes.plot(np.linspace(0.0, 2.0 * np.pi, 200), np.ones(200), color="black", linewidth=0.5)
    edges = np.linspace(-np.pi, np.pi, 181)  # bars of 2 degrees
    for c in range(C):
        own = angles[labels == c]
        share = np.histogram(own, edges)[0] / len(own)
        axes.bar(edges[:-1], 1.2 * share, np.diff(edges), bottom=1.0, align="edge", color=COLORS[c])
        x, y = embeddings[labels == c].mean(axis=0)
        axes.annotate(str(c), (np.arctan2(y, x), 0.7), **NAME)
    for x, y in () if vectors is None else vectors:
        axes.plot(np.arctan2(y, x) * np.ones(2), [0.0, 1.0], color="black", linewidth=0.5, alpha=0.5, zorder=0)
    axes.set_ylim(0.0, 1.65)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("feature_geometry.png"))
    parser.add_argument("--epochs", type=int, default=1000, help="batches that each network is trained on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    digits, held_out = load()
    figure = plt.figure(figsize=(8.4, 9.6))
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.01, top=0.95, wspace=0.05, hspace=0.18)
    for place, method in enumerate(METHODS, start=1):
        network, objective = train(method, digits, epochs=arguments.epochs, seed=arguments.seed)
        axes = figure.add_subplot(3, 3, place, projection="polar" if method.on_circle else None)
        draw(axes, method, network, objective, digits, held_out)
        print(" ".join(axes.get_title().split()))
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    # 64 colours are enough, and a third of the bytes.
    picture = Image.open(drawn).convert("RGB").quantize(64)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(arguments.output, optimize=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the network is too small to share
    main()
