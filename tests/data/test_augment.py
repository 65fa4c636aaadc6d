import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metricface.data.augment import Augmentation, augment
from metricface.data.images import Preprocessing

OFF = Augmentation.off()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int = 8, channels: int = 3, height: int = 12, width: int = 10) -> Tensor:
    pixels = torch.randint(0, 256, (count, height, width, channels), generator=generator(9), dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)  # channels_last strides, as image sets give them


def dots(count: int, height: int, width: int, x: float, y: float) -> Tensor:
    """A bright, soft dot at pixel position (x, y) on black, grey."""
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    dot = 255 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * 2.0**2))
    return torch.from_numpy(np.tile(dot.round().astype(np.uint8), (count, 1, 1, 1)))


def centres(images: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(B, 2) x, y of the centre of brightness over black (-1)."""
    light = images[:, 0].double().numpy() + 1
    rows, columns = np.mgrid[0 : light.shape[1], 0 : light.shape[2]] + 0.5
    total = light.sum(axis=(1, 2))
    return np.stack([(light * columns).sum(axis=(1, 2)) / total, (light * rows).sum(axis=(1, 2)) / total], axis=1)


# Nothing on


@pytest.mark.parametrize("channels", [1, 3])
def test_with_everything_off_images_are_only_normalised(channels: int) -> None:
    images = noise(channels=channels)
    before = images.clone()
    found = augment(images, OFF, generator())
    assert torch.equal(found, Preprocessing(12, 10).to_input(images))
    assert found.dtype == torch.float32
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", ["flip", "shift", "scale", "rotation_deg", "brightness", "contrast", "erase"])
def test_each_setting_alone_changes_images(name: str) -> None:
    value: Any = {"flip": True, "rotation_deg": 6.0}.get(name, 0.2)
    images = noise()
    changed = augment(images, dataclasses.replace(OFF, **{name: value}), generator())
    assert not torch.equal(changed, Preprocessing(12, 10).to_input(images))
    assert changed.min() >= -1
    assert changed.max() <= 1


def test_an_empty_batch_stays_empty() -> None:
    assert augment(noise(0), Augmentation(erase=0.2), generator()).shape == (0, 3, 12, 10)


# Chance


def test_the_generator_alone_decides() -> None:
    images, settings = noise(), Augmentation(erase=0.2)
    first = augment(images, settings, generator(1))
    torch.manual_seed(5)
    assert torch.equal(augment(images, settings, generator(1)), first)
    assert not torch.equal(augment(images, settings, generator(2)), first)


def test_a_generator_moves_on_by_as_much_whatever_is_switched_on() -> None:
    one, other = generator(), generator()
    augment(noise(), OFF, one)
    augment(noise(), Augmentation(erase=0.3), other)
    assert torch.equal(one.get_state(), other.get_state())


def test_images_of_a_batch_are_changed_differently() -> None:
    same = noise(1).expand(6, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    found = augment(same, Augmentation(flip=False), generator())
    assert len({image.numpy().tobytes() for image in found}) == 6


# Strides


@pytest.mark.parametrize("settings", [OFF, Augmentation(), Augmentation(shift=0, scale=0, rotation_deg=0, erase=0.1)])
def test_channels_last_images_stay_so_and_others_stay_contiguous(settings: Augmentation) -> None:
    images = noise()
    assert images.is_contiguous(memory_format=torch.channels_last)
    found = augment(images, settings, generator())
    assert found.is_contiguous(memory_format=torch.channels_last)
    plain = augment(images.contiguous(), settings, generator())
    assert plain.is_contiguous()
    torch.testing.assert_close(plain, found)


# Each change, measured


def test_flips_mirror_half_of_the_images_exactly() -> None:
    images = noise(400)
    plain = Preprocessing(12, 10).to_input(images)
    found = augment(images, dataclasses.replace(OFF, flip=True), generator())
    mirrored = np.array([torch.equal(a, b.flip(2)) for a, b in zip(found, plain, strict=True)])
    kept = np.array([torch.equal(a, b) for a, b in zip(found, plain, strict=True)])
    assert (mirrored ^ kept).all()
    assert 150 < mirrored.sum() < 250


def test_flips_mirror_also_when_pixels_are_resampled() -> None:
    # A shift far below a pixel resamples, and must leave the flip as it is without it.
    images = noise(50)
    exact = augment(images, dataclasses.replace(OFF, flip=True), generator())
    resampled = augment(images, dataclasses.replace(OFF, flip=True, shift=1e-7), generator())
    torch.testing.assert_close(resampled, exact, atol=1e-4, rtol=0)


def test_shifts_are_even_within_their_share_of_each_side() -> None:
    images = dots(600, 40, 60, x=30, y=20)
    moved = centres(augment(images, dataclasses.replace(OFF, shift=0.1), generator())) - [30, 20]
    for axis, limit in enumerate((6.0, 4.0)):
        assert np.abs(moved[:, axis]).max() == pytest.approx(limit, rel=0.05)
        assert moved[:, axis].std() == pytest.approx(limit / math.sqrt(3), rel=0.1)
        assert abs(moved[:, axis].mean()) < 0.1 * limit


@pytest.mark.parametrize(("height", "width"), [(60, 60), (80, 40)])
def test_rotation_turns_around_the_middle_without_distortion(height: int, width: int) -> None:
    middle_x, middle_y = width / 2, height / 2
    images = dots(300, height, width, x=middle_x + 12, y=middle_y)
    away = centres(augment(images, dataclasses.replace(OFF, rotation_deg=30.0), generator())) - [middle_x, middle_y]
    np.testing.assert_allclose(np.hypot(away[:, 0], away[:, 1]), 12, atol=0.15)
    angle = np.degrees(np.arctan2(away[:, 1], away[:, 0]))
    assert np.abs(angle).max() == pytest.approx(30, abs=1.0)
    assert angle.std() == pytest.approx(30 / math.sqrt(3), rel=0.1)


def test_scale_moves_points_towards_or_away_from_the_middle() -> None:
    images = dots(300, 60, 60, x=45, y=30)
    away = centres(augment(images, dataclasses.replace(OFF, scale=0.2), generator())) - [30, 30]
    np.testing.assert_allclose(away[:, 1], 0, atol=0.1)
    share = away[:, 0] / 15
    assert share.min() == pytest.approx(0.8, abs=0.02)
    assert share.max() == pytest.approx(1.2, abs=0.02)


def test_pixels_from_beyond_the_border_repeat_it() -> None:
    # Columns of one colour each: after a shift down or up nothing at all may change.
    images = torch.arange(0, 200, 20, dtype=torch.uint8).expand(20, 1, 12, 10).contiguous()
    found = augment(images, dataclasses.replace(OFF, shift=0.4), generator())
    assert found.min() >= -1
    assert found.max() <= (180 - 127.5) / 127.5 + 1e-4
    torch.testing.assert_close(found, found[:, :, :1].expand_as(found))
    # A shift to the right repeats the first column.
    lowest = Preprocessing(12, 10).to_input(images)[0, 0, 0, 0]
    assert (found[:, 0, 0, 0] == lowest).any()


def test_brightness_and_contrast_keep_their_limits_and_order_of_greys() -> None:
    images = torch.tensor([100, 127, 128, 155], dtype=torch.uint8).reshape(1, 1, 2, 2).repeat(500, 1, 1, 1)
    plain = Preprocessing(2, 2).to_input(images)
    lift = (augment(images, dataclasses.replace(OFF, brightness=0.1), generator()) - plain)[:, 0, 0, 0]
    assert lift.abs().max() == pytest.approx(0.2, rel=0.02)  # a tenth of the range from -1 to 1
    gain = (augment(images, dataclasses.replace(OFF, contrast=0.3), generator()) / plain)[:, 0, 0, 0]
    assert gain.min() == pytest.approx(0.7, abs=0.01)
    assert gain.max() == pytest.approx(1.3, abs=0.01)


def test_erasing_hides_a_box_of_middle_grey_in_half_of_the_images() -> None:
    images = torch.full((600, 3, 32, 24), 255, dtype=torch.uint8)
    found = augment(images, dataclasses.replace(OFF, erase=0.2), generator())
    assert set(np.unique(found.numpy()).tolist()) == {0.0, 1.0}
    hidden = (found == 0).double().mean(dim=(1, 2, 3)).numpy()
    # Boxes start and end at whole pixels: at most one row and one column more than asked.
    assert hidden.max() < 0.2 + 0.5 / 32 + 0.7 / 24
    assert hidden.max() > 0.15
    assert 230 < (hidden > 0).sum() < 320
    rows, columns = (found[:, 0] == 0).any(dim=2).sum(dim=1), (found[:, 0] == 0).any(dim=1).sum(dim=1)
    np.testing.assert_allclose((rows * columns).numpy() / (32 * 24), hidden)


# Wrong arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [("shift", -0.1), ("scale", 1.0), ("rotation_deg", 200.0), ("erase", 1.5), ("contrast", math.nan)],
)
def test_an_amount_outside_its_range_is_an_error_that_names_it(name: str, value: float) -> None:
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} is between 0"):
        Augmentation(**wrong)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_images_that_are_not_a_batch_of_bytes_are_an_error(images: Tensor) -> None:
    with pytest.raises(ValueError, match="uint8 images"):
        augment(images, OFF, generator())
