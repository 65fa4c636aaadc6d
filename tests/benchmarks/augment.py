"""Time of each change of training images, beside the plain conversion to floats and the changes that are on by default.

    python -m tests.benchmarks.augment
    python -m tests.benchmarks.augment --batch 512 --sizes 112 --device cuda

Images are uint8 noise in channels_last strides, as image sets give them. Every case runs once in each turn; times are
medians over the turns, ratios medians of the ratios within a turn. A change stands alone, all others off, except where
its row says "default". Nothing else may run meanwhile: short calls escape other work and long ones do not, which makes
ratios to the plain conversion, of a millisecond, several times too large.
"""

import argparse
import dataclasses
import statistics
from typing import Any

import torch

from metricface.data.augment import Augmentation, augment
from metricface.data.images import Preprocessing
from tests.benchmarks.meter import Meter

DEFAULT = Augmentation()
LATER: dict[str, Any] = {"crop": 0.4, "low_resolution": 0.25, "gamma": 0.5, "saturation": 0.5}
VALUES: dict[str, Any] = {
    "flip": True,
    "shift": 0.06,
    "scale": 0.08,
    "rotation_deg": 6.0,
    "brightness": 0.1,
    "contrast": 0.15,
}
CASES = {
    "nothing": Augmentation.off(),
    **{name: dataclasses.replace(Augmentation.off(), **{name: value}) for name, value in (VALUES | LATER).items()},
    "erase": dataclasses.replace(Augmentation.off(), erase=0.2),
    "default": DEFAULT,
    "default, erase": dataclasses.replace(DEFAULT, erase=0.2),
    **{f"default, {name}": dataclasses.replace(DEFAULT, **{name: value}) for name, value in LATER.items()},
    "everything": dataclasses.replace(DEFAULT, erase=0.2, **LATER),
}
PLAIN = "Preprocessing.to_input"


def turn(images: torch.Tensor, meter: Meter, generator: torch.Generator) -> dict[str, float]:
    """Seconds of each case, once."""
    height, width = images.shape[2:]
    found = {PLAIN: meter.once(lambda: Preprocessing(height, width).to_input(images))}
    for name, settings in CASES.items():
        found[name] = meter.once(lambda settings=settings: augment(images, settings, generator))  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="+", default=[112, 56], help="height and width in pixels")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"torch {torch.__version__}, {device}, {arguments.threads} threads, batches of {arguments.batch}\n")
    print("| images | change | ms | x plain | x default |\n|---|---|---|---|---|")
    for size in arguments.sizes:
        pixels = torch.randint(0, 256, (arguments.batch, size, size, 3), dtype=torch.uint8, device=device)
        images, generator = pixels.permute(0, 3, 1, 2), torch.Generator(device)
        turns = [turn(images, Meter(device), generator) for _ in range(arguments.turns + 2)][2:]
        for name in turns[0]:
            middle = statistics.median(found[name] for found in turns)
            plain, default = (
                statistics.median(found[name] / found[base] for found in turns) for base in (PLAIN, "default")
            )
            print(f"| 3 x {size} x {size} | {name} | {1e3 * middle:.2f} | {plain:.2f} | {default:.2f} |", flush=True)


if __name__ == "__main__":
    main()
