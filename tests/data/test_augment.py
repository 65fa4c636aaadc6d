import dataclasses
import itertools
import math
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from metricface.data.augment import Augmentation, augment
from metricface.data.images import Preprocessing

Array = NDArray[np.float64]

OFF = Augmentation.off()
ALL = Augmentation(erase=0.3, crop=0.4, low_resolution=0.3, gamma=0.5, saturation=0.6)
LATER = {"crop": 0.4, "low_resolution": 0.3, "gamma": 0.5, "saturation": 0.6}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def only(**settings: Any) -> Augmentation:
    return dataclasses.replace(OFF, **settings)


def noise(count: int = 8, channels: int = 3, height: int = 12, width: int = 10) -> Tensor:
    pixels = torch.randint(0, 256, (count, height, width, channels), generator=generator(9), dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)  # channels_last strides, as image sets give them


def normalised(images: Tensor) -> Tensor:
    return Preprocessing(images.shape[2], images.shape[3]).to_input(images)


def dots(count: int, height: int, width: int, x: float, y: float) -> Tensor:
    """A bright, soft dot at pixel position (x, y) on black, grey."""
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    dot = 255 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * 2.0**2))
    return torch.from_numpy(np.tile(dot.round().astype(np.uint8), (count, 1, 1, 1)))


def centres(images: Tensor) -> Array:
    """(B, 2) x, y of the centre of brightness over black (-1)."""
    light = images[:, 0].double().numpy() + 1
    rows, columns = np.mgrid[0 : light.shape[1], 0 : light.shape[2]] + 0.5
    total = light.sum(axis=(1, 2))
    return np.stack([(light * columns).sum(axis=(1, 2)) / total, (light * rows).sum(axis=(1, 2)) / total], axis=1)


# What augment must agree with: float64 and loops over images and pixels


def draws(count: int, seed: int = 0) -> tuple[Array, Array]:
    """(count, 11) in [0, 1) each: an image's random numbers, and what is left of them below 1/4096."""
    drawn = torch.rand(count, 11, generator=generator(seed)).double().numpy()
    return drawn, drawn * 4096 % 1


def moved(image: Array, settings: Augmentation, drawn: Array, fine: Array) -> Array:
    """(C, H, W): each pixel looked up where it comes from, between the four pixels around that place."""
    height, width = image.shape[1:]
    flip, turn, grow, right, down = (2 * drawn - 1)[:5]
    angle, size = math.radians(settings.rotation_deg * turn), 1 + settings.scale * grow
    side = math.sqrt(1 - settings.crop * fine[0])
    left, top = fine[1] * (1 - side) * width, fine[2] * (1 - side) * height
    out = np.zeros_like(image)
    for row, column in np.ndindex(height, width):
        x, y = column + 0.5 - width / 2, row + 0.5 - height / 2  # from the middle
        x, y = (math.cos(angle) * x - math.sin(angle) * y) / size, (math.sin(angle) * x + math.cos(angle) * y) / size
        x, y = x + settings.shift * right * width, y + settings.shift * down * height
        x = -x if settings.flip and flip < 0 else x
        x, y = left + side * (x + width / 2) - 0.5, top + side * (y + height / 2) - 0.5
        x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
        x0, y0 = int(x), int(y)
        for (i, j), weight in {
            (y0, x0): (1 - x + x0) * (1 - y + y0),
            (y0, x0 + 1): (x - x0) * (1 - y + y0),
            (y0 + 1, x0): (1 - x + x0) * (y - y0),
            (y0 + 1, x0 + 1): (x - x0) * (y - y0),
        }.items():
            out[:, row, column] += weight * image[:, min(i, height - 1), min(j, width - 1)]
    return out


def coarser(row: Array, count: int) -> Array:
    """A row averaged over `count` equal stretches, and straight lines between the middles of these."""
    size = len(row)
    small = np.zeros(count)
    for k in range(count):
        start, stop = k * size / count, (k + 1) * size / count
        for pixel in range(size):
            small[k] += row[pixel] * max(0.0, min(stop, pixel + 1) - max(start, pixel)) / (stop - start)
    enlarged: Array = np.interp(np.arange(size) + 0.5, (np.arange(count) + 0.5) * size / count, small)
    return enlarged


def lower_resolution(image: Array, settings: Augmentation, fine: Array) -> Array:
    """(C, H, W): half of the images, down the columns and then along the rows."""
    if settings.low_resolution == 0 or fine[3] >= 0.5:
        return image
    share = 1 - (1 - settings.low_resolution) * fine[3] * 2
    rows, columns = (max(1, round(share * side)) for side in image.shape[1:])
    shorter = np.array([[coarser(column, rows) for column in channel.T] for channel in image]).transpose(0, 2, 1)
    return np.array([[coarser(row, columns) for row in channel] for channel in shorter])


def exposed(image: Array, settings: Augmentation, drawn: Array, fine: Array) -> Array:
    """(C, H, W) in [0, 255] -> [-1, 1], pixel by pixel."""
    out = np.zeros_like(image)
    even, fine_even = 2 * drawn - 1, 2 * fine - 1
    for row, column in np.ndindex(image.shape[1:]):
        pixel = (image[:, row, column] / 255) ** (2 ** (settings.gamma * fine_even[4]))
        if len(pixel) == 3:
            grey = 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]
            pixel = grey + (1 + settings.saturation * fine_even[5]) * (pixel - grey)
        pixel = (2 * pixel - 1) * (1 + settings.contrast * even[5]) + 2 * settings.brightness * even[6]
        out[:, row, column] = np.clip(pixel, -1, 1)
    return out


def expected(images: Tensor, settings: Augmentation, seed: int = 0) -> Tensor:
    """Everything but boxes: float64 (B, C, H, W)."""
    drawn, fine = draws(len(images), seed)
    found = []
    for image, a, b in zip(images.double().numpy(), drawn, fine, strict=True):
        image = moved(image, settings, a, b)
        found.append(exposed(lower_resolution(image, settings, b), settings, a, b))
    return torch.from_numpy(np.stack(found))


def as_it_was(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """What version 1 computed, operation by operation, for contiguous images, before crop and those after it came."""
    height, width = images.shape[2:]
    drawn = torch.rand(len(images), 11, generator=generator)
    even = drawn * 2 - 1
    if settings.shift > 0 or settings.scale > 0 or settings.rotation_deg > 0:
        angle, grow = even[:, 1] * math.radians(settings.rotation_deg), 1 + settings.scale * even[:, 2]
        cos, sin = torch.cos(angle) / grow, torch.sin(angle) / grow
        mirror = torch.where(even[:, 0] < 0, -1.0, 1.0) if settings.flip else torch.ones_like(angle)
        x = (torch.arange(width, dtype=torch.float32) * 2 + 1) / width - 1
        y = (torch.arange(height, dtype=torch.float32) * 2 + 1) / height - 1
        start = torch.complex(mirror * (2 * settings.shift * even[:, 3]), 2 * settings.shift * even[:, 4])
        columns = torch.complex(mirror * cos, sin * (width / height))[:, None] * x
        rows = torch.complex(mirror * sin * (-height / width), cos)[:, None] * y + start[:, None]
        grid = torch.view_as_real(columns[:, None, :] + rows[:, :, None])
        pixels = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    else:
        pixels = images.float()
        if settings.flip:
            pixels[even[:, 0] < 0] = pixels[even[:, 0] < 0].flip(3)
    if settings.contrast > 0 or settings.brightness > 0:
        gain, lift = 1 + settings.contrast * even[:, 5], 2 * settings.brightness * even[:, 6]
        pixels.mul_((gain / 127.5)[:, None, None, None]).add_((lift - gain)[:, None, None, None]).clamp_(-1.0, 1.0)
    else:
        pixels.sub_(127.5).div_(127.5)
    area = settings.erase * drawn[:, 7] / 0.5 * (drawn[:, 7] < 0.5)
    aspect = torch.exp2(drawn[:, 8] * 2 - 1)
    wide, high = (area * aspect).sqrt().clamp_(max=1.0), (area / aspect).sqrt().clamp_(max=1.0)
    left, top = drawn[:, 9] * (1 - wide), drawn[:, 10] * (1 - high)
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    in_x = (x >= left[:, None]) & (x < (left + wide)[:, None])
    in_y = (y >= top[:, None]) & (y < (top + high)[:, None])
    return pixels.masked_fill((in_y[:, :, None] & in_x[:, None, :])[:, None], 0.0)


# Nothing on


@pytest.mark.parametrize("channels", [1, 3])
def test_with_everything_off_images_are_only_normalised(channels: int) -> None:
    images = noise(channels=channels)
    before = images.clone()
    found = augment(images, OFF, generator())
    assert torch.equal(found, normalised(images))
    assert found.dtype == torch.float32
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Augmentation)])
def test_each_setting_alone_changes_images(name: str) -> None:
    value: Any = {"flip": True, "rotation_deg": 6.0}.get(name, 0.2)
    images = noise()
    before = images.clone()
    changed = augment(images, only(**{name: value}), generator())
    assert not torch.equal(changed, normalised(images))
    assert changed.min() >= -1
    assert changed.max() <= 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("settings", [OFF, Augmentation(erase=0.2), ALL, *(only(**{n: LATER[n]}) for n in LATER)])
def test_an_empty_batch_stays_empty(settings: Augmentation) -> None:
    found = augment(noise(0), settings, generator())
    assert found.shape == (0, 3, 12, 10)
    assert found.dtype == torch.float32


# Chance


def test_the_generator_alone_decides() -> None:
    images = noise()
    first = augment(images, ALL, generator(1))
    torch.manual_seed(5)
    assert torch.equal(augment(images, ALL, generator(1)), first)
    assert not torch.equal(augment(images, ALL, generator(2)), first)


@pytest.mark.parametrize("settings", [Augmentation(erase=0.3), ALL])
def test_a_generator_moves_on_by_as_much_whatever_is_switched_on(settings: Augmentation) -> None:
    one, other = generator(), generator()
    augment(noise(), OFF, one)
    augment(noise(), settings, other)
    assert torch.equal(one.get_state(), other.get_state())


def test_images_of_a_batch_are_changed_differently() -> None:
    same = noise(1).expand(40, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    settings = [Augmentation(flip=False), *(only(**{name: LATER[name]}) for name in ("crop", "gamma", "saturation"))]
    for each in settings:
        assert len({image.numpy().tobytes() for image in augment(same, each, generator())}) == 40


@pytest.mark.parametrize(
    "settings",
    [
        Augmentation(),
        Augmentation(erase=0.3),
        only(flip=True),
        only(shift=0.2),
        only(rotation_deg=20.0, scale=0.3, flip=True),
        only(brightness=0.3),
        only(contrast=0.5, flip=True, erase=0.5),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_recipes_older_than_crop_give_the_same_images_to_the_bit(settings: Augmentation, channels: int) -> None:
    images = noise(60, channels, 23, 31)
    one, other = generator(4), generator(4)
    for _ in range(3):  # the third batch depends on what the first two drew
        found = augment(images, settings, one)
        assert torch.equal(found, as_it_was(images.contiguous(), settings, other))


def test_the_second_change_that_a_number_decides_knows_nothing_of_the_first() -> None:
    drawn, fine = draws(40_000)
    both = np.concatenate([drawn, fine], axis=1)
    assert fine.min() >= 0
    assert fine.max() < 1
    shares = np.stack([np.histogram(column, bins=16, range=(0, 1))[0] for column in fine.T]) / len(fine)
    np.testing.assert_allclose(shares, 1 / 16, atol=0.006)  # 5 standard deviations
    correlated = np.corrcoef(both.T) - np.eye(22)
    assert np.abs(correlated).max() < 0.025  # 5 standard deviations


@pytest.mark.parametrize("names", [names for n in range(5) for names in itertools.combinations(LATER, n)], ids="-".join)
def test_each_change_is_the_same_whichever_others_are_on(names: tuple[str, ...]) -> None:
    # The loops give each change numbers of its own, so that a draw that moved with a setting would not fit them.
    images, settings = noise(10, 3, 9, 7), only(**{name: LATER[name] for name in names})
    found = augment(images, settings, generator(6))
    torch.testing.assert_close(found.double(), expected(images, settings, 6), atol=2e-4, rtol=0)


# Strides and devices


@pytest.mark.parametrize(
    "settings",
    [
        OFF,
        Augmentation(),
        Augmentation(shift=0, scale=0, rotation_deg=0, erase=0.1),
        ALL,
        *(only(**{name: LATER[name]}) for name in LATER),
        only(flip=True, **{name: LATER[name] for name in ("low_resolution", "gamma", "saturation")}),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_images_stay_so_and_others_stay_contiguous(settings: Augmentation, channels: int) -> None:
    images = noise(channels=channels)
    assert images.is_contiguous(memory_format=torch.channels_last)
    found = augment(images, settings, generator())
    assert found.is_contiguous(memory_format=torch.channels_last)
    plain = augment(images.contiguous(), settings, generator())
    assert plain.is_contiguous()
    torch.testing.assert_close(plain, found)


def test_inside_autocast_images_are_the_same() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = augment(noise(), ALL, generator())
    assert torch.equal(found, augment(noise(), ALL, generator()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [Augmentation(), ALL, only(**LATER)])
def test_a_gpu_gives_the_images_of_the_cpu_from_a_generator_of_the_cpu(settings: Augmentation) -> None:
    found = augment(noise(64).cuda(), settings, generator())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), augment(noise(64), settings, generator()), atol=1e-3, rtol=0)
    own = torch.Generator("cuda").manual_seed(0)
    assert augment(noise(64).cuda(), settings, own).is_cuda


# All at once


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(13, 9), (8, 8), (1, 5), (7, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_all_changes_together_are_those_of_loops_in_the_order_that_is_promised(
    channels: int, height: int, width: int, flip: bool
) -> None:
    images = noise(12, channels, height, width)
    settings = dataclasses.replace(ALL, erase=0.0, flip=flip, rotation_deg=25.0, scale=0.3, shift=0.2)
    found = augment(images, settings, generator(3))
    torch.testing.assert_close(found.double(), expected(images, settings, 3), atol=2e-4, rtol=0)


def test_boxes_come_last_and_are_middle_grey_whatever_else_is_on() -> None:
    images = torch.full((200, 3, 32, 24), 250, dtype=torch.uint8)
    hidden = augment(images, only(erase=0.4), generator()) == 0
    found = augment(images, dataclasses.replace(ALL, erase=0.4), generator())
    assert hidden.any()
    assert (found[hidden] == 0).all()


# Each change, measured


def test_flips_mirror_half_of_the_images_exactly() -> None:
    images = noise(400)
    plain = normalised(images)
    found = augment(images, only(flip=True), generator())
    mirrored = np.array([torch.equal(a, b.flip(2)) for a, b in zip(found, plain, strict=True)])
    kept = np.array([torch.equal(a, b) for a, b in zip(found, plain, strict=True)])
    assert (mirrored ^ kept).all()
    assert 150 < mirrored.sum() < 250


def test_flips_mirror_also_when_pixels_are_resampled() -> None:
    # A shift far below a pixel resamples, and must leave the flip as it is without it.
    images = noise(50)
    exact = augment(images, only(flip=True), generator())
    resampled = augment(images, only(flip=True, shift=1e-7), generator())
    torch.testing.assert_close(resampled, exact, atol=1e-4, rtol=0)


def test_shifts_are_even_within_their_share_of_each_side() -> None:
    images = dots(600, 40, 60, x=30, y=20)
    moved = centres(augment(images, only(shift=0.1), generator())) - [30, 20]
    for axis, limit in enumerate((6.0, 4.0)):
        assert np.abs(moved[:, axis]).max() == pytest.approx(limit, rel=0.05)
        assert moved[:, axis].std() == pytest.approx(limit / math.sqrt(3), rel=0.1)
        assert abs(moved[:, axis].mean()) < 0.1 * limit


@pytest.mark.parametrize(("height", "width"), [(60, 60), (80, 40)])
def test_rotation_turns_around_the_middle_without_distortion(height: int, width: int) -> None:
    middle_x, middle_y = width / 2, height / 2
    images = dots(300, height, width, x=middle_x + 12, y=middle_y)
    away = centres(augment(images, only(rotation_deg=30.0), generator())) - [middle_x, middle_y]
    np.testing.assert_allclose(np.hypot(away[:, 0], away[:, 1]), 12, atol=0.15)
    angle = np.degrees(np.arctan2(away[:, 1], away[:, 0]))
    assert np.abs(angle).max() == pytest.approx(30, abs=1.0)
    assert angle.std() == pytest.approx(30 / math.sqrt(3), rel=0.1)


def test_scale_moves_points_towards_or_away_from_the_middle() -> None:
    images = dots(300, 60, 60, x=45, y=30)
    away = centres(augment(images, only(scale=0.2), generator())) - [30, 30]
    np.testing.assert_allclose(away[:, 1], 0, atol=0.1)
    share = away[:, 0] / 15
    assert share.min() == pytest.approx(0.8, abs=0.02)
    assert share.max() == pytest.approx(1.2, abs=0.02)


def test_pixels_from_beyond_the_border_repeat_it() -> None:
    # Columns of one colour each: after a shift down or up nothing at all may change.
    images = torch.arange(0, 200, 20, dtype=torch.uint8).expand(20, 1, 12, 10).contiguous()
    found = augment(images, only(shift=0.4), generator())
    assert found.min() >= -1
    assert found.max() <= (180 - 127.5) / 127.5 + 1e-4
    torch.testing.assert_close(found, found[:, :, :1].expand_as(found))
    # A shift to the right repeats the first column.
    lowest = normalised(images)[0, 0, 0, 0]
    assert (found[:, 0, 0, 0] == lowest).any()


def test_brightness_and_contrast_keep_their_limits_and_order_of_greys() -> None:
    images = torch.tensor([100, 127, 128, 155], dtype=torch.uint8).reshape(1, 1, 2, 2).repeat(500, 1, 1, 1)
    plain = normalised(images)
    lift = (augment(images, only(brightness=0.1), generator()) - plain)[:, 0, 0, 0]
    assert lift.abs().max() == pytest.approx(0.2, rel=0.02)  # a tenth of the range from -1 to 1
    gain = (augment(images, only(contrast=0.3), generator()) / plain)[:, 0, 0, 0]
    assert gain.min() == pytest.approx(0.7, abs=0.01)
    assert gain.max() == pytest.approx(1.3, abs=0.01)


def test_erasing_hides_a_box_of_middle_grey_in_half_of_the_images() -> None:
    images = torch.full((600, 3, 32, 24), 255, dtype=torch.uint8)
    found = augment(images, only(erase=0.2), generator())
    assert set(np.unique(found.numpy()).tolist()) == {0.0, 1.0}
    hidden = (found == 0).double().mean(dim=(1, 2, 3)).numpy()
    # Boxes start and end at whole pixels: at most one row and one column more than asked.
    assert hidden.max() < 0.2 + 0.5 / 32 + 0.7 / 24
    assert hidden.max() > 0.15
    assert 230 < (hidden > 0).sum() < 320
    rows, columns = (found[:, 0] == 0).any(dim=2).sum(dim=1), (found[:, 0] == 0).any(dim=1).sum(dim=1)
    np.testing.assert_allclose((rows * columns).numpy() / (32 * 24), hidden)


# Crop


def ramps(count: int, height: int, width: int) -> Tensor:
    """Red is the number of the column, green that of the row: each pixel says where it comes from."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows, torch.zeros_like(rows)]).to(torch.uint8).repeat(count, 1, 1, 1)


def test_a_crop_is_a_window_within_the_image_evenly_placed_with_an_evenly_drawn_area() -> None:
    height, width = 40, 60
    found = (augment(ramps(2000, height, width), only(crop=0.6), generator()).double() * 127.5 + 127.5).numpy()
    # Two pixels well inside, 16 columns and 8 rows apart, tell the window; those at the edge would repeat the border.
    side = (found[:, 0, 20, 38] - found[:, 0, 20, 22]) / 16
    np.testing.assert_allclose((found[:, 1, 24, 30] - found[:, 1, 16, 30]) / 8, side, atol=1e-3)  # not distorted
    middle = np.stack([found[:, 0, 20, 30] + 0.5 - side / 2, found[:, 1, 20, 30] + 0.5 - side / 2], axis=1)
    room = (1 - side)[:, None] * [width, height]
    left = middle - side[:, None] * [width / 2, height / 2]
    assert left.min() > -1e-2
    assert (left - room).max() < 1e-2
    area = side**2
    assert area.min() == pytest.approx(0.4, abs=0.01)
    assert area.max() == pytest.approx(1.0, abs=0.01)
    assert area.mean() == pytest.approx(0.7, abs=0.02)
    place = (left / room)[area < 0.9]
    np.testing.assert_allclose(place.mean(axis=0), 0.5, atol=0.03)
    np.testing.assert_allclose(place.std(axis=0), 1 / math.sqrt(12), atol=0.02)


# Low resolution


def test_a_lower_resolution_is_averages_of_stretches_and_lines_between_their_middles() -> None:
    # Four pixels become two ((0 + 100) / 2 and (200 + 100) / 2) or three ((0 + 100 / 3) / (4 / 3), ...) or stay.
    images = torch.tensor([0, 100, 200, 100], dtype=torch.uint8).repeat(200, 1, 1, 1)
    found = augment(images, only(low_resolution=0.5), generator()) * 127.5 + 127.5
    rows = {tuple(round(value, 1) for value in row) for row in found[:, 0, 0].tolist()}
    assert rows == {(0, 100, 200, 100), (50, 75, 125, 150), (25, 103.1, 140.6, 125)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(12, 10), (11, 11), (31, 17), (1, 9)])
def test_half_of_the_images_are_as_preprocessing_shrinks_and_enlarges_them(
    channels: int, height: int, width: int
) -> None:
    images = noise(60, channels, height, width)
    found = augment(images, only(low_resolution=0.2), generator(2)) * 127.5 + 127.5
    _, fine = draws(60, 2)
    assert 0.3 < np.mean(fine[:, 3] < 0.5) < 0.7
    for index, image in enumerate(images.permute(0, 2, 3, 1).float().numpy()):
        if fine[index, 3] < 0.5:
            share = 1 - 0.8 * 2 * fine[index, 3]
            small = max(1, round(share * width)), max(1, round(share * height))
            image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        theirs = torch.from_numpy(image).reshape(height, width, channels).permute(2, 0, 1)
        torch.testing.assert_close(found[index], theirs, atol=0.02, rtol=0)


def test_images_that_keep_their_resolution_keep_their_bits() -> None:
    images = noise(200)
    plain = normalised(images)
    found = augment(images, only(low_resolution=0.1), generator())
    kept = np.array([torch.equal(a, b) for a, b in zip(found, plain, strict=True)])
    assert 70 < kept.sum() < 130
    assert torch.equal(augment(images, only(low_resolution=1.0), generator()), plain)  # reduced to all of its size


@pytest.mark.parametrize("value", [0, 77, 255])
@pytest.mark.parametrize(("height", "width"), [(12, 10), (112, 112), (7, 3)])
def test_a_lower_resolution_leaves_images_of_one_colour_as_they_are(value: int, height: int, width: int) -> None:
    images = torch.full((20, 3, height, width), value, dtype=torch.uint8)
    found = augment(images, only(low_resolution=0.05), generator())
    torch.testing.assert_close(found, normalised(images), atol=1e-5, rtol=0)


def test_a_lower_resolution_removes_fine_stripes_and_never_makes_them_coarse() -> None:
    # Stripes of one pixel, reduced without averaging, would come back as wide bands of full contrast.
    stripes = (torch.arange(112) % 2 * 255).to(torch.uint8).expand(100, 1, 112, 112).contiguous()
    found = augment(stripes, only(low_resolution=0.1), generator())[:, 0]
    _, fine = draws(100)
    low = torch.from_numpy((fine[:, 3] < 0.5) & (1 - 0.9 * 2 * fine[:, 3] < 0.5))
    assert low.sum() > 10
    assert found[low].abs().max() < 0.35  # three of them, two of one kind, average to a third
    assert (found[~low].abs().amax(dim=(1, 2)) > 0.5).any()


# Gamma and saturation


def test_gamma_raises_shares_of_the_range_to_powers_of_two() -> None:
    images = torch.tensor([0, 64, 128, 255], dtype=torch.uint8).reshape(1, 1, 2, 2).repeat(3000, 1, 1, 1)
    found = (augment(images, only(gamma=1.0), generator()).double() + 1) / 2
    assert (found[:, 0, 0, 0] == 0).all()
    torch.testing.assert_close(found[:, 0, 1, 1], torch.ones(3000, dtype=torch.float64), atol=1e-6, rtol=0)
    powers = (torch.log(found[:, 0, 0, 1]) / math.log(64 / 255)).numpy()
    np.testing.assert_allclose(torch.log(found[:, 0, 1, 0]) / math.log(128 / 255), powers, rtol=1e-4)
    octaves = np.log2(powers)
    assert octaves.min() == pytest.approx(-1, abs=0.01)  # the square root
    assert octaves.max() == pytest.approx(1, abs=0.01)  # the square
    assert octaves.std() == pytest.approx(1 / math.sqrt(3), rel=0.05)


def test_gamma_of_a_known_draw() -> None:
    # The fifth number of the first image, 0.3074...: what is left of it below 1/4096 decides.
    drawn = torch.rand(1, 11, generator=generator())[0, 4].item()
    fraction = drawn * 4096 - math.floor(drawn * 4096)
    power = 2 ** (1.5 * (2 * fraction - 1))
    found = augment(torch.full((1, 3, 1, 1), 100, dtype=torch.uint8), only(gamma=1.5), generator())
    assert found[0, 0, 0, 0].item() == pytest.approx(2 * (100 / 255) ** power - 1, abs=1e-6)


def test_saturation_moves_colours_towards_and_away_from_their_own_grey() -> None:
    images = torch.tensor([120, 100, 90], dtype=torch.uint8).reshape(1, 3, 1, 1).repeat(3000, 1, 1, 1)
    grey = 0.299 * 120 + 0.587 * 100 + 0.114 * 90
    found = (augment(images, only(saturation=0.5), generator()).double() * 127.5 + 127.5)[:, :, 0, 0].numpy()
    np.testing.assert_allclose(found @ [0.299, 0.587, 0.114], grey, atol=1e-3)
    factors = (found - grey) / (np.array([120, 100, 90]) - grey)
    np.testing.assert_allclose(factors, factors[:, :1].repeat(3, axis=1), atol=1e-3)
    assert factors.min() == pytest.approx(0.5, abs=0.01)
    assert factors.max() == pytest.approx(1.5, abs=0.01)
    assert factors[:, 0].std() == pytest.approx(0.5 / math.sqrt(3), rel=0.05)


def test_saturation_leaves_greys_as_they_are() -> None:
    one_channel = noise(20, 1)
    assert torch.equal(augment(one_channel, only(saturation=1.0), generator()), normalised(one_channel))
    three = one_channel.expand(-1, 3, -1, -1)
    found = augment(three, only(saturation=1.0), generator())
    torch.testing.assert_close(found, normalised(three), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["gamma", "saturation"])
def test_gamma_and_saturation_alone_are_those_of_loops(name: str) -> None:
    images, settings = noise(20), only(**{name: 1.0})
    found = augment(images, settings, generator(7))
    torch.testing.assert_close(found.double(), expected(images, settings, 7), atol=2e-6, rtol=0)


def test_at_their_largest_all_changes_together_give_finite_numbers_in_range() -> None:
    settings = Augmentation(True, 0.5, 0.9, 180.0, 1.0, 1.0, 1.0, 0.99, 0.001, 2.0, 1.0)
    extremes = torch.cat([noise(100), torch.zeros(20, 3, 12, 10).byte(), torch.full((20, 3, 12, 10), 255).byte()])
    found = augment(extremes, settings, generator())
    assert found.isfinite().all()
    assert found.min() >= -1
    assert found.max() <= 1


# Wrong arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shift", -0.1),
        ("scale", 1.0),
        ("rotation_deg", 200.0),
        ("erase", 1.5),
        ("contrast", math.nan),
        ("crop", 1.0),
        ("crop", -0.1),
        ("low_resolution", 1.1),
        ("low_resolution", -0.5),
        ("gamma", 3.0),
        ("gamma", math.nan),
        ("saturation", 1.5),
        ("saturation", -1.0),
    ],
)
def test_an_amount_outside_its_range_is_an_error_that_names_it(name: str, value: float) -> None:
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} is between 0"):
        Augmentation(**wrong)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_images_that_are_not_a_batch_of_bytes_are_an_error(images: Tensor) -> None:
    with pytest.raises(ValueError, match="uint8 images"):
        augment(images, OFF, generator())
