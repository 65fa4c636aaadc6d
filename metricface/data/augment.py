"""Random changes of training images, a whole batch at once, on whatever device the batch is."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

# Chance that an image loses a box to `erase`: half of them stay whole, so that the network sees complete faces too.
_ERASE_CHANCE = 0.5
# Each image gets this many random numbers whatever is switched on: leaving one change out does not alter the others.
_DRAWS = 11


@dataclass(frozen=True)
class Augmentation:
    """How far images may be changed; every amount is drawn evenly from [-x, x], and 0 (or False) switches it off.

    flip: mirror half of the images left to right.
    shift: share of the width across and of the height down.
    scale: relative change of size: 0.08 is 8% smaller to 8% larger.
    rotation_deg: degrees around the middle.
    brightness: added, as a share of the range from black to white.
    contrast: relative change of the distance to middle grey.
    erase: largest share of the area that a grey box hides; half of the images get one.
    """

    flip: bool = True
    shift: float = 0.06
    scale: float = 0.08
    rotation_deg: float = 6.0
    brightness: float = 0.1
    contrast: float = 0.15
    erase: float = 0.0

    def __post_init__(self) -> None:
        limits = {"shift": 0.5, "scale": 0.9, "rotation_deg": 180.0, "brightness": 1.0, "contrast": 1.0, "erase": 1.0}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in limits and not 0.0 <= value <= limits[field.name]:
                raise ValueError(f"{field.name} is between 0 (off) and {limits[field.name]:g}; got {value}.")

    @classmethod
    def off(cls) -> "Augmentation":
        """No change at all."""
        return cls(flip=False, shift=0.0, scale=0.0, rotation_deg=0.0, brightness=0.0, contrast=0.0, erase=0.0)


def augment(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Change each image of a batch in its own way, and normalise it as Preprocessing.to_input does.

    images: uint8 (B, C, H, W), not changed. generator: on the CPU or on the device of the images; it alone decides.
    Returns float32 (B, C, H, W) on that device, in channels_last strides where the images have them. Pixels that come
    from beyond the border repeat it. With everything off this is exactly Preprocessing.to_input.
    Raises ValueError for another dtype or number of dimensions.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"augment takes uint8 images (B, C, H, W); got {images.dtype} {tuple(images.shape)}.")
    layout = torch.contiguous_format
    if images.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    drawn = torch.rand(len(images), _DRAWS, generator=generator, device=generator.device).to(images.device)
    even = drawn * 2 - 1  # (B, 11) in [-1, 1)
    # grid_sample is 1.4 times as fast on contiguous planes on a CPU, more than the two conversions cost.
    moves = settings.shift > 0 or settings.scale > 0 or settings.rotation_deg > 0
    if moves and images.numel() > 0:
        planes = images.to(torch.float32, memory_format=torch.contiguous_format)
        pixels = F.grid_sample(planes, _source_grid(images, settings, even), padding_mode="border", align_corners=False)
        pixels = pixels.contiguous(memory_format=layout)
    else:
        pixels = images.to(torch.float32, memory_format=layout, copy=True)
        if settings.flip:
            mirrored = even[:, 0] < 0
            pixels[mirrored] = pixels[mirrored].flip(3)
    if settings.contrast > 0 or settings.brightness > 0:
        gain, lift = 1 + settings.contrast * even[:, 5], 2 * settings.brightness * even[:, 6]
        # Normalising, contrast and brightness in one: gain (x - 127.5) / 127.5 + lift.
        pixels.mul_((gain / 127.5)[:, None, None, None]).add_((lift - gain)[:, None, None, None]).clamp_(-1.0, 1.0)
    else:
        pixels.sub_(127.5).div_(127.5)
    if settings.erase > 0:
        pixels.masked_fill_(_boxes(images, settings, drawn), 0.0)
    return pixels


def _source_grid(images: Tensor, settings: Augmentation, even: Tensor) -> Tensor:
    """Where each pixel comes from: (B, H, W, 2) as grid_sample reads it, x and y in [-1, 1] from edge to edge."""
    height, width = images.shape[2:]
    angle = even[:, 1] * math.radians(settings.rotation_deg)
    grow = 1 + settings.scale * even[:, 2]
    cos, sin = torch.cos(angle) / grow, torch.sin(angle) / grow
    mirror = torch.where(even[:, 0] < 0, -1.0, 1.0) if settings.flip else torch.ones_like(angle)
    x = (torch.arange(width, device=images.device, dtype=torch.float32) * 2 + 1) / width - 1
    y = (torch.arange(height, device=images.device, dtype=torch.float32) * 2 + 1) / height - 1
    away_x, away_y = 2 * settings.shift * even[:, 3], 2 * settings.shift * even[:, 4]
    # A turn is a turn in pixels; in units of half a side, x and y stretch by the aspect ratio. The pair (x, y) is one
    # complex number: its sum over rows and columns is 6 to 12 times as fast as that of the two parts.
    per_x = torch.complex(mirror * cos, sin * (width / height))
    per_y = torch.complex(mirror * sin * (-height / width), cos)
    start = torch.complex(mirror * away_x, away_y)
    columns = per_x[:, None] * x  # (B, W)
    rows = per_y[:, None] * y + start[:, None]  # (B, H)
    return torch.view_as_real(columns[:, None, :] + rows[:, :, None])


def _boxes(images: Tensor, settings: Augmentation, drawn: Tensor) -> Tensor:
    """(B, 1, H, W) True where an image is hidden: boxes up to `erase` of the area, 1:2 to 2:1 in units of the sides."""
    height, width = images.shape[2:]
    chosen = drawn[:, 7] < _ERASE_CHANCE
    # One more draw is saved by spreading what is left of the first: below the chance it is even again.
    area = settings.erase * drawn[:, 7] / _ERASE_CHANCE * chosen
    aspect = torch.exp2(drawn[:, 8] * 2 - 1)
    wide, high = (area * aspect).sqrt().clamp_(max=1.0), (area / aspect).sqrt().clamp_(max=1.0)
    left, top = drawn[:, 9] * (1 - wide), drawn[:, 10] * (1 - high)
    x = (torch.arange(width, device=images.device) + 0.5) / width
    y = (torch.arange(height, device=images.device) + 0.5) / height
    in_x = (x >= left[:, None]) & (x < (left + wide)[:, None])
    in_y = (y >= top[:, None]) & (y < (top + high)[:, None])
    return (in_y[:, :, None] & in_x[:, None, :])[:, None]
