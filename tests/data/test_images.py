import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from metricface.data.images import (
    ImageSet,
    Indices,
    MemoryImages,
    Pixels,
    Preprocessing,
    UnreadableImageError,
    keep,
)

SIZE = Preprocessing(height=4, width=6)


class Numbered(ImageSet):
    """Image i is filled with i; those in `bad` cannot be read."""

    def __init__(self, labels: list[int], bad: tuple[int, ...] = (), preprocessing: Preprocessing = SIZE) -> None:
        names = [f"person{label}" for label in range(max(labels) + 1)]
        super().__init__(names, labels, [f"image{i}" for i in range(len(labels))], preprocessing)
        self.bad = bad

    def read(self, indices: Indices) -> Pixels:
        for index in indices:
            if index in self.bad:
                raise UnreadableImageError(self.keys[index], "it is bad")
        channels, height, width = self.preprocessing.shape
        rows = np.asarray(indices, dtype=np.uint8)[:, None, None, None]
        return np.tile(rows, (1, height, width, channels))


def values(pixels: Pixels) -> list[int]:
    return [int(image.flat[0]) for image in pixels]


# Preprocessing


def test_crop_keeps_the_central_share_of_the_largest_box_of_the_targets_shape() -> None:
    image = np.zeros((160, 160, 3), dtype=np.uint8)
    image[24:136, 24:136] = 200  # the central 112 x 112, and nothing of it lost
    assert (Preprocessing(56, 56, crop=0.7).apply(image) == 200).all()
    image[24, 24:136] = 0
    assert (Preprocessing(56, 56, crop=0.7).apply(image) != 200).any()


def test_a_tall_image_loses_only_top_and_bottom() -> None:
    image = np.zeros((112, 92), dtype=np.uint8)
    image[10:102] = 255
    assert (Preprocessing(46, 46, "grey").apply(image) == 255).all()


def test_an_image_of_the_right_size_passes_unchanged_and_is_a_copy() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    result = SIZE.apply(image)
    assert np.array_equal(result, image)
    assert not np.shares_memory(result, image)


def test_shrinking_averages_the_area() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    mean = image.reshape(4, 2, 6, 2, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(SIZE.apply(image) - mean).max() <= 0.5


def test_colour_becomes_grey_by_the_weights_of_red_green_and_blue_in_that_order() -> None:
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        image = np.zeros((4, 6, 3), dtype=np.uint8)
        image[..., channel] = 255
        result = Preprocessing(4, 6, "grey").apply(image)
        assert result.shape == (4, 6, 1)
        assert abs(float(result[0, 0, 0]) - 255 * weight) <= 1


def test_grey_is_repeated_where_colour_is_asked_for() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert np.array_equal(SIZE.apply(image), np.stack([image] * 3, axis=2))


def test_an_image_smaller_than_a_pixel_of_the_crop_still_gives_an_image() -> None:
    assert Preprocessing(5, 5, crop=0.01).apply(np.full((1, 2, 3), 9, dtype=np.uint8)).shape == (5, 5, 3)


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4)), np.zeros((0, 4), np.uint8)])
def test_what_is_not_an_image_is_refused(bad: Pixels) -> None:
    with pytest.raises(ValueError, match="an image"):
        SIZE.apply(bad)


def test_wrong_settings_say_what_is_right() -> None:
    with pytest.raises(ValueError, match="rgb, grey"):
        Preprocessing(4, 4, "gray")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 pixel"):
        Preprocessing(0, 4)
    for crop in (0.0, 1.1):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            Preprocessing(4, 4, crop=crop)


def test_network_input_runs_from_minus_one_to_one_in_the_same_memory_layout() -> None:
    images = torch.tensor([0, 255, 127], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(2, 3, 4, 6)
    images = images.contiguous(memory_format=torch.channels_last)
    result = SIZE.to_input(images)
    assert result.dtype == torch.float32
    assert result[0, :, 0, 0].tolist() == pytest.approx([-1, 1, -0.5 / 127.5])
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert images[0, 1, 0, 0] == 255  # the input is left alone


# Sets


def test_a_batch_is_fetched_whole_with_channels_last_strides() -> None:
    batch = Numbered([0, 0, 1]).__getitems__([2, 0])
    assert batch.images.shape == (2, 3, 4, 6)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images[:, 0, 0, 0].tolist() == [2, 0]
    assert batch.labels.tolist() == [1, 0]
    assert batch.indices.tolist() == [2, 0]
    assert batch.labels.dtype == batch.indices.dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_with_a_batch_sampler_gives_the_batches_of_the_set(workers: int) -> None:
    plan = [[0, 3], [1], [2, 1, 0]]
    loader = DataLoader(Numbered([0, 0, 1, 1]).in_memory(), batch_sampler=plan, collate_fn=keep, num_workers=workers)
    batches = list(loader)
    assert [batch.indices.tolist() for batch in batches] == plan
    assert [batch.images[:, 0, 0, 0].tolist() for batch in batches] == plan
    assert batches[2].images.stride()[1] == 1


def test_sets_can_be_pickled() -> None:
    subset = pickle.loads(pickle.dumps(Numbered([0, 0, 1]).subset([2])))
    assert values(subset.read([0])) == [2]


def test_a_subset_keeps_the_order_asked_for_and_renumbers_labels_in_the_old_order_of_names() -> None:
    subset = Numbered([0, 0, 1, 2, 2]).subset([4, 0, 3])
    assert subset.identities == ("person0", "person2")
    assert subset.labels.tolist() == [1, 0, 1]
    assert subset.keys == ("image4", "image0", "image3")
    assert values(subset.read([0, 1, 2])) == [4, 0, 3]


def test_a_subset_of_a_subset_finds_the_right_images() -> None:
    subset = Numbered([0, 0, 1, 2, 2]).subset([4, 0, 3]).subset([2, 1])
    assert values(subset.read([0, 1])) == [3, 0]
    assert subset.keys == ("image3", "image0")
    assert subset.identities == ("person0", "person2")


def test_a_subset_of_images_in_memory_shares_the_pixels() -> None:
    held = Numbered([0, 0, 1]).in_memory()
    subset = held.subset([1, 2])
    assert subset.in_memory() is subset
    assert isinstance(held, MemoryImages)
    held.pixels[2] = 77
    assert values(subset.read([0, 1])) == [1, 77]


def test_select_takes_all_images_of_identities_in_the_order_of_the_set() -> None:
    chosen = Numbered([1, 0, 1, 2]).select([2, 1])
    assert chosen.keys == ("image0", "image2", "image3")
    assert chosen.identities == ("person1", "person2")


def test_a_wrong_selection_is_refused() -> None:
    images = Numbered([0, 0, 1])
    for bad, message in (([], "at least one"), ([3], "numbered from 0"), ([-1], "numbered from 0")):
        with pytest.raises(ValueError, match=message):
            images.subset(bad)
    with pytest.raises(ValueError, match="flatnonzero"):
        images.subset(np.array([True, False, True]))
    with pytest.raises(ValueError, match="identities, numbered"):
        images.select([2])


@pytest.mark.parametrize("threads", [1, 3])
def test_in_memory_gives_the_same_pixels_and_reports_progress_to_the_end(threads: int) -> None:
    images = Numbered([i // 3 for i in range(200)])
    seen: list[tuple[int, int]] = []
    held = images.in_memory(threads=threads, progress=lambda done, total: seen.append((done, total)))
    everything = list(range(200))
    assert np.array_equal(held.read(everything), images.read(everything))
    assert held.labels.tolist() == images.labels.tolist()
    assert seen == sorted(seen)
    assert seen[-1] == (200, 200)
    assert images.nbytes == held.read(everything).nbytes


@pytest.mark.parametrize("how", ["in_memory", "verified"])
def test_images_that_cannot_be_read_are_left_out_and_listed_and_so_are_people_left_without_any(how: str) -> None:
    labels = [i // 2 for i in range(150)]
    bad = (3, 70, 71, 149)  # 70 and 71 are all that person35 has
    rest = getattr(Numbered(labels, bad), how)()
    assert [skipped.key for skipped in rest.skipped] == ["image3", "image70", "image71", "image149"]
    assert rest.skipped[0].reason == "it is bad"
    assert len(rest) == 146
    assert "person35" not in rest.identities
    assert len(rest.identities) == 74
    left = [i for i in range(150) if i not in bad]
    assert values(rest.read(list(range(146)))) == left
    assert [rest.identities[label] for label in rest.labels] == [f"person{labels[i]}" for i in left]


def test_verified_returns_the_set_itself_where_all_is_well() -> None:
    images = Numbered([0, 1])
    assert images.verified() is images


def test_a_set_of_which_nothing_can_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"none of 2 images can be read; the first is image0: it is bad"):
        Numbered([0, 1], bad=(0, 1)).in_memory()


def test_other_errors_while_reading_are_not_mistaken_for_bad_images() -> None:
    class Broken(Numbered):
        def read(self, indices: Indices) -> Pixels:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Broken([0, 1]).in_memory()


def test_counts_say_what_a_set_is_good_for() -> None:
    images = Numbered([0, 0, 0, 1, 2, 2])
    assert images.counts().tolist() == [3, 1, 2]
    assert images.num_genuine_pairs == 4
    assert images.describe() == "3 identities, 6 images, 1 identities with a single image"
    assert Numbered([0, 1, 2]).num_genuine_pairs == 0


def test_labels_that_skip_a_number_or_keys_that_do_not_fit_are_refused() -> None:
    pixels = np.zeros((2, 4, 6, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="every number from 0 to 1"):
        MemoryImages(pixels, ["a", "b"], [1, 1], ["x", "y"], SIZE)
    with pytest.raises(ValueError, match="1 keys need as many labels"):
        MemoryImages(pixels, ["a"], [0, 0], ["x"], SIZE)
    with pytest.raises(ValueError, match="distinct"):
        MemoryImages(pixels, ["a", "a"], [0, 1], ["x", "y"], SIZE)
    with pytest.raises(ValueError, match="pixels must be uint8"):
        MemoryImages(pixels[:, :2], ["a"], [0, 0], ["x", "y"], SIZE)
