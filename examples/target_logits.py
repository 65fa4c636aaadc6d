"""What margins ask for: the target logit over the angle between an embedding and its class, for every head.

    python examples/target_logits.py --output examples/guides/figures/target_logits.png

Divided by what the other classes' cosines are multiplied with, so that no margin at all is cos(theta).
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from metricface import heads
from metricface.heads import target_curve
from metricface.heads.base import Head

# Panel -> curve -> a head and the length of the embedding.
PANELS: dict[str, dict[str, tuple[Head, float]]] = {
    "on the cosine, or around the angle": {
        "softmax, NormFace: cos": (heads.NormFace(10, 2), 1.0),
        "CosFace, 0.35": (heads.CosFace(10, 2), 1.0),
        "ArcFace, 0.5": (heads.ArcFace(10, 2), 1.0),
        "combined, 0.9, 0.4, 0.15": (heads.CombinedMargin(10, 2, m1=0.9, m2=0.4, m3=0.15), 1.0),
        "SphereFace, 4, lambda 5": (heads.SphereFace(10, 2, lambda_base=0.0), 1.0),
        "SphereFace, 4, lambda 0": (heads.SphereFace(10, 2, lambda_base=0.0, lambda_min=0.0), 1.0),
        "SphereFace2, 0.4": (heads.SphereFace2(10, 2), 1.0),
    },
    "ArcFace where theta + m > pi": {
        "no margin": (heads.NormFace(10, 2), 1.0),
        "monotone": (heads.ArcFace(10, 2), 1.0),
        "easy": (heads.ArcFace(10, 2, beyond_pi="easy"), 1.0),
        "none": (heads.ArcFace(10, 2, beyond_pi="none"), 1.0),
    },
    "by the length of the embedding": {
        "no margin": (heads.NormFace(10, 2), 1.0),
        "MagFace, length 10": (heads.MagFace(10, 2, beyond_pi="monotone"), 10.0),
        "MagFace, length 110": (heads.MagFace(10, 2, beyond_pi="monotone"), 110.0),
        "AdaFace, z = -1": (heads.AdaFace(10, 2, h=100.0), 0.0),
        "AdaFace, z = 0": (heads.AdaFace(10, 2), 20.0),
        "AdaFace, z = 1": (heads.AdaFace(10, 2, h=1000.0), 100.0),
    },
}
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)), (0, (7, 3))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("target_logits.png"))
    asked = parser.parse_args()
    theta = torch.linspace(0.0, torch.pi, 721)
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    for axes, (title, curves) in zip(panels, PANELS.items(), strict=True):
        for style, (name, (head, length)) in zip(STYLES, curves.items(), strict=False):
            axes.plot(theta.rad2deg(), target_curve(head, theta, length=length), linestyle=style, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("theta, degrees")
        axes.set_xticks(range(0, 181, 30))
        axes.set_ylim(-2.6, 1.1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower left", framealpha=0.5)
    panels[0].set_ylabel("target logit / scale")
    figure.savefig(asked.output, dpi=100)


if __name__ == "__main__":
    main()
