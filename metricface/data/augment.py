"""Random changes of training images, a whole batch at once, on whatever device the batch is."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Chance that an image loses a box to `erase`: half of them stay whole, so that the network sees complete faces too.
_ERASE_CHANCE = 0.5
# Likewise for `low_resolution`: half of them stay as sharp as they are.
_LOW_RESOLUTION_CHANCE = 0.5
# Each image gets this many random numbers whatever is switched on: leaving one change out does not alter the others.
_DRAWS = 11
# torch.rand gives 24 bits. A number as a whole decides one change, its last 12 bits alone, worth less than 1/4096 of
# the first, another: further changes neither alter those before them nor move the generator on by more.
_FINE = 1 << 12
# Rec. 601: what red, green and blue add to the brightness that is seen.
_LUMA = (0.299, 0.587, 0.114)
_LARGEST = {
    "shift": 0.5,
    "scale": 0.9,
    "rotation_deg": 180.0,
    "brightness": 1.0,
    "contrast": 1.0,
    "erase": 1.0,
    "crop": 0.99,
    "low_resolution": 1.0,
    "gamma": 2.0,
    "saturation": 1.0,
}


@dataclass(frozen=True)
class Augmentation:
    """How far images may be changed: an amount is drawn evenly from [-x, x] unless said otherwise; 0 or False is off.

    flip: mirror half of the images left to right.
    shift: share of the width across and of the height down.
    scale: relative change of size: 0.08 is 8% smaller to 8% larger.
    rotation_deg: degrees around the middle.
    brightness: added, as a share of the range from black to white.
    contrast: relative change of the distance to middle grey.
    erase: largest share of the area that a grey box hides; half of the images get one.
    crop: largest share of the area that is cut away, drawn evenly from [0, x]. What is left is a window with the ratio
        of the image's sides, evenly anywhere within it, shown at full size. Flip, shift, scale and rotation then act
        as if the window were the image, but for pixels beyond its edge, which are the image's own. It is no second
        way to scale and shift: these go both ways and show what is beyond the border, the window never does.
    low_resolution: smallest share of its height and width that an image is reduced to, drawn evenly from [x, 1], before
        it is enlarged again; half of the images are. The smaller the stronger: 0.25 is as little as a quarter.
    gamma: pixels as shares of the range from black to white are raised to the power 2^a; a is drawn.
    saturation: relative change of the distance to each pixel's own grey (luma, Rec. 601); nothing where C is not 3.

    Raises ValueError for an amount outside its range.
    """

    flip: bool = True
    shift: float = 0.06
    scale: float = 0.08
    rotation_deg: float = 6.0
    brightness: float = 0.1
    contrast: float = 0.15
    erase: float = 0.0
    crop: float = 0.0
    low_resolution: float = 0.0
    gamma: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if not 0.0 <= value <= largest:
                raise ValueError(f"{name} is between 0 (off) and {largest:g}; got {value}.")

    @classmethod
    def off(cls) -> "Augmentation":
        """No change at all."""
        return cls(flip=False, shift=0.0, scale=0.0, rotation_deg=0.0, brightness=0.0, contrast=0.0, erase=0.0)


def augment(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Change each image of a batch in its own way, and normalise it as Preprocessing.to_input does.

    The order: crop, flip, shift, scale and rotation as one resampling; low resolution; gamma, saturation, contrast,
    brightness; the range is limited to [-1, 1], once; erase.
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
    fine = (drawn * _FINE).frac_()  # (B, 11) in [0, 1) as well
    if images.numel() == 0:
        return images.to(torch.float32, copy=True)
    # Mixing colours is 2.4 times as fast on contiguous planes on a CPU, more than the two conversions cost.
    coloured = settings.saturation > 0 and images.shape[1] == len(_LUMA)
    pixels = _moved(images, settings, drawn, fine, torch.contiguous_format if coloured else layout)
    if settings.low_resolution > 0:
        _lower_resolution_(pixels, settings, fine)
    pixels = _exposed(pixels, settings, drawn, fine).contiguous(memory_format=layout)
    if settings.erase > 0:
        pixels.masked_fill_(_boxes(images, settings, drawn), 0.0)
    return pixels


def _moved(images: Tensor, settings: Augmentation, drawn: Tensor, fine: Tensor, layout: torch.memory_format) -> Tensor:
    """New float32 (B, C, H, W) in [0, 255]: contiguous planes where pixels are resampled, else in `layout`."""
    even = drawn * 2 - 1  # (B, 11) in [-1, 1)
    if settings.shift > 0 or settings.scale > 0 or settings.rotation_deg > 0 or settings.crop > 0:
        # grid_sample is 1.4 times as fast on contiguous planes on a CPU, more than the two conversions cost.
        planes = images.to(torch.float32, memory_format=torch.contiguous_format)
        grid = _source_grid(images, settings, even, fine)
        return F.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    pixels = images.to(torch.float32, memory_format=layout, copy=True)
    if settings.flip:
        mirrored = even[:, 0] < 0
        pixels[mirrored] = pixels[mirrored].flip(3)
    return pixels


def _source_grid(images: Tensor, settings: Augmentation, even: Tensor, fine: Tensor) -> Tensor:
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
    if settings.crop > 0:
        side = (1 - settings.crop * fine[:, 0]).sqrt()  # (B,) of the window, as a share of the image's
        middle = torch.complex(fine[:, 1] * 2 - 1, fine[:, 2] * 2 - 1) * (1 - side)
        per_x, per_y, start = per_x * side, per_y * side, middle + start * side
    columns = per_x[:, None] * x  # (B, W)
    rows = per_y[:, None] * y + start[:, None]  # (B, H)
    return torch.view_as_real(columns[:, None, :] + rows[:, :, None])


def _lower_resolution_(pixels: Tensor, settings: Augmentation, fine: Tensor) -> None:
    """Reduce the chosen images and enlarge them again, in place. pixels: float32 (B, C, H, W)."""
    chosen = torch.nonzero(fine[:, 3] < _LOW_RESOLUTION_CHANCE)[:, 0]  # (b,)
    # What is left of the draw below the chance is even again.
    share = 1 - (1 - settings.low_resolution) * fine[chosen, 3] / _LOW_RESOLUTION_CHANCE
    height, width = pixels.shape[2:]
    rows = _coarsening(share, height)  # (b, H, H)
    columns = rows if width == height else _coarsening(share, width)  # (b, W, W)
    with torch.autocast(pixels.device.type, enabled=False):
        sharp = pixels[chosen]  # (b, C, H, W)
        across = sharp.flatten(1, 2) @ columns.mT  # (b, C H, W)
        pixels[chosen] = rows[:, None] @ across.reshape(sharp.shape)


def _coarsening(share: Tensor, size: int) -> Tensor:
    """What each pixel of a row takes from each other once the row is reduced and enlarged again; it is linear.

    share: (b,) of its length that a row is reduced to, in whole pixels, at least one. size: its length, in pixels.
    Returns (b, size, size); each row of it sums to 1. As Preprocessing does it, a reduced pixel is the average over the
    area that it covers, and between the middles of reduced pixels an enlarged row is a straight line.
    """
    left = (share * size).round_().clamp_(min=1.0)[:, None, None]  # (b, 1, 1)
    covers = size / left  # pixels of the row that a reduced one stands for
    at = torch.arange(size, device=share.device, dtype=torch.float32)
    begin = at[:, None] * covers  # (b, reduced, 1)
    # (b, reduced, size); rows beyond the last reduced pixel are not used below.
    reduce = (torch.minimum(begin + covers, at + 1) - torch.maximum(begin, at)).clamp_(min=0.0) / covers
    place = torch.minimum(((at[:, None] + 0.5) / covers - 0.5).clamp_(min=0.0), left - 1)  # (b, size, 1)
    enlarge = (1 - (place - at).abs_()).clamp_(min=0.0)  # (b, size, reduced)
    with torch.autocast(share.device.type, enabled=False):
        return enlarge @ reduce


def _exposed(pixels: Tensor, settings: Augmentation, drawn: Tensor, fine: Tensor) -> Tensor:
    """Gamma, saturation, contrast, brightness and normalisation: [0, 255] -> [-1, 1]; `pixels` may be overwritten."""
    if settings.gamma > 0:
        power = torch.exp2(settings.gamma * (fine[:, 4] * 2 - 1))
        # 255 (x / 255)^power.
        pixels.pow_(_each(power)).mul_(_each(255.0 ** (1 - power)))
    if settings.saturation > 0 and pixels.shape[1] == len(_LUMA):
        red, green, blue = pixels[:, 0:1], pixels[:, 1:2], pixels[:, 2:3]
        grey = (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])  # (B, 1, H, W)
        pixels = torch.lerp(grey, pixels, _each(1 + settings.saturation * (fine[:, 5] * 2 - 1)))
    if settings.contrast > 0 or settings.brightness > 0:
        even = drawn * 2 - 1
        gain, lift = 1 + settings.contrast * even[:, 5], 2 * settings.brightness * even[:, 6]
        # Normalising, contrast and brightness in one: gain (x - 127.5) / 127.5 + lift.
        return pixels.mul_(_each(gain / 127.5)).add_(_each(lift - gain)).clamp_(-1.0, 1.0)
    pixels.sub_(127.5).div_(127.5)
    if settings.low_resolution > 0 or settings.gamma > 0 or settings.saturation > 0:
        pixels.clamp_(-1.0, 1.0)
    return pixels


def _each(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1): one value for each image."""
    return values[:, None, None, None]


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
