import multiprocessing
import pickle
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from metricface.data.contact_sheet import contact_sheet
from metricface.data.images import MemoryImages, Pixels, Preprocessing, keep
from metricface.data.synthetic import SyntheticFaces
from metricface.data.synthetic_faces.canvas import Canvas, block, disc
from metricface.data.synthetic_faces.draws import bells, stream, uniforms
from metricface.data.synthetic_faces.people import ARCHETYPES, archetypes, people

SIZE = Preprocessing(height=48, width=48)


def faces(num: int = 6, each: int = 5, preprocessing: Preprocessing = SIZE, **options: Any) -> SyntheticFaces:
    return SyntheticFaces(num, each, preprocessing, **options)


def _read(arguments: tuple[SyntheticFaces, list[int]]) -> Pixels:
    image_set, indices = arguments
    return image_set.read(indices)


# The same image whatever is around it


def test_an_image_does_not_depend_on_the_batch_or_the_order_it_is_painted_in() -> None:
    # 400 images of 48 x 48 fill more than one of the chunks that are painted at once.
    image_set = faces(50, 8)
    together = image_set.read(range(400))
    order = np.random.default_rng(0).permutation(400)
    np.testing.assert_array_equal(image_set.read(order), together[order])
    # Alone, a shape is painted on the smallest box of pixels: nothing of it may reach beyond.
    for index in range(0, 400, 7):
        np.testing.assert_array_equal(image_set.read([index])[0], together[index])


def test_an_image_does_not_depend_on_how_many_people_and_images_the_set_has() -> None:
    small, large = faces(3, 2), faces(50, 9)
    for label in range(3):
        for image in range(2):
            np.testing.assert_array_equal(small.read([label * 2 + image]), large.read([label * 9 + image]))


def test_first_identity_continues_the_same_world_of_people() -> None:
    later = faces(4, 5, first_identity=2)
    np.testing.assert_array_equal(later.read(range(20)), faces(6, 5).read(range(10, 30)))
    assert later.identities == ("person_000002", "person_000003", "person_000004", "person_000005")
    assert set(later.keys) & set(faces(2, 5).keys) == set()


def test_a_subset_and_a_set_in_memory_have_the_pixels_of_the_set() -> None:
    image_set = faces()
    chosen = [29, 3, 3, 11]
    np.testing.assert_array_equal(image_set.subset(chosen).read(range(4)), image_set.read(chosen))
    held = image_set.in_memory(threads=2)
    assert isinstance(held, MemoryImages)
    np.testing.assert_array_equal(held.pixels, image_set.read(range(30)))


def test_another_process_paints_the_same_pixels() -> None:
    image_set, indices = faces(), [4, 9, 28]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (there,) = pool.map(_read, [(image_set, indices)])
    np.testing.assert_array_equal(there, image_set.read(indices))


def test_a_loader_with_workers_streams_batches_in_order() -> None:
    image_set = faces()
    batches = [[0, 29], [7, 8], [1, 1]]
    loader = DataLoader(image_set, batch_sampler=batches, collate_fn=keep, num_workers=2)
    for wanted, batch in zip(batches, loader, strict=True):
        assert batch.indices.tolist() == wanted
        np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1).numpy(), image_set.read(wanted))


def test_a_large_set_costs_little_to_send_to_a_worker() -> None:
    image_set = faces(2, 2)
    image_set.read([0])
    assert len(pickle.dumps(image_set)) < 2_000


# What is in the images


@pytest.mark.parametrize("channels", ["rgb", "grey"])
@pytest.mark.parametrize(("height", "width"), [(48, 48), (56, 44), (24, 40), (1, 1), (7, 90)])
def test_pixels_are_bytes_of_the_size_asked_for(height: int, width: int, channels: Any) -> None:
    pixels = faces(4, 3, Preprocessing(height, width, channels)).read(range(12))
    assert pixels.shape == (12, height, width, 1 if channels == "grey" else 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


def test_pictures_use_the_range_from_dark_to_bright_without_being_clipped_flat() -> None:
    pixels = faces(20, 5).read(range(100)).astype(np.float64)
    assert 90 < pixels.mean() < 150
    assert pixels.std(axis=(1, 2, 3)).min() > 10
    assert (pixels == 0).mean() < 0.05
    assert (pixels == 255).mean() < 0.10


def test_nothing_read_is_an_empty_array_and_no_index_is_an_error() -> None:
    assert faces().read([]).shape == (0, 48, 48, 3)


def test_grey_pictures_show_the_colour_pictures_luma() -> None:
    colour = faces(10, 4).read(range(40)).astype(np.float64) @ [0.299, 0.587, 0.114]
    grey = faces(10, 4, Preprocessing(48, 48, "grey")).read(range(40))[..., 0].astype(np.float64)
    agreement = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(colour, grey, strict=True)]
    # The light's colour and the grain differ; the picture is the same.
    assert np.median(agreement) > 0.98
    assert min(agreement) > 0.85


def test_a_rectangle_is_the_middle_of_the_square_picture() -> None:
    square = faces(8, 1, Preprocessing(48, 48)).read(range(8)).astype(np.float64)
    narrow = faces(8, 1, Preprocessing(48, 36)).read(range(8)).astype(np.float64)
    # Background slopes and grain are laid out anew; the person is not.
    middle = square[:, 8:40, 14:34].reshape(8, -1)
    for wanted, found in zip(middle, narrow[:, 8:40, 8:28].reshape(8, -1), strict=True):
        assert np.corrcoef(wanted, found)[0, 1] > 0.9


def test_a_tighter_crop_enlarges_the_face() -> None:
    # Half the sides of a 96-pixel picture are the middle 48 pixels of it.
    whole = faces(12, 1, Preprocessing(96, 96)).read(range(12))[:, 24:72, 24:72].astype(np.float64)
    close = faces(12, 1, Preprocessing(48, 48, crop=0.5)).read(range(12)).astype(np.float64)
    agreement = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(whole, close, strict=True)]
    assert np.median(agreement) > 0.9


# Same and different


def test_images_of_a_person_differ_and_people_differ_and_seeds_differ() -> None:
    pixels = faces(5, 4).read(range(20))
    assert len({image.tobytes() for image in pixels}) == 20
    assert not np.array_equal(faces(5, 4, seed=1).read([0]), pixels[:1])


def test_images_of_one_person_are_closer_than_images_of_two_on_average() -> None:
    image_set = faces(40, 6, Preprocessing(24, 24))
    flat = image_set.read(range(240)).reshape(240, -1).astype(np.float64)
    distance = np.stack([np.linalg.norm(flat - image, axis=1) for image in flat])
    same = image_set.labels[:, None] == image_set.labels[None]
    np.fill_diagonal(distance, np.nan)
    assert np.nanmean(distance[same]) < 0.95 * np.nanmean(distance[~same])


def test_raw_pixels_recognise_people_better_than_chance_and_badly() -> None:
    image_set = faces(100, 6, Preprocessing(32, 32))
    flat = image_set.read(range(600)).reshape(600, -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    cos = flat @ flat.T
    np.fill_diagonal(cos, -2)
    rank_1 = (image_set.labels[cos.argmax(axis=1)] == image_set.labels).mean()
    assert 0.05 < rank_1 < 0.35  # chance is 0.0083


def test_people_of_one_type_resemble_each_other_and_nobody_has_a_double() -> None:
    identities = np.arange(400)
    kind = archetypes(0, identities)
    assert kind.min() >= 0
    assert kind.max() < ARCHETYPES
    assert len(np.unique(kind)) > 0.9 * ARCHETYPES
    who = people(0, identities)
    traits = np.stack(list(vars(who).values()), axis=1).astype(np.float64)
    traits = (traits - traits.mean(axis=0)) / traits.std(axis=0)
    distance = np.linalg.norm(traits[:, None] - traits[None], axis=2)
    alike = kind[:, None] == kind[None]
    np.fill_diagonal(alike, False)
    others = ~alike & ~np.eye(400, dtype=bool)
    assert distance[alike].mean() < 0.8 * distance[others].mean()
    assert distance[alike].min() > 1.0


def test_labels_names_and_keys_follow_people_and_images() -> None:
    image_set = faces(3, 2)
    assert image_set.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert image_set.identities == ("person_000000", "person_000001", "person_000002")
    assert image_set.keys[3] == "person_000001/0001"


# The parts


def test_hashed_numbers_are_even_bell_shaped_and_unrelated() -> None:
    keys = stream(3, 7, np.arange(5_000), np.arange(5_000) % 4)
    even = uniforms(keys, 4).astype(np.float64)
    assert even.min() >= 0
    assert even.max() < 1
    np.testing.assert_allclose(even.mean(axis=0), 0.5, atol=0.02)
    np.testing.assert_allclose(np.quantile(even, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.01)
    bell = bells(keys, 4).astype(np.float64)
    np.testing.assert_allclose(bell.std(axis=0), 1, atol=0.03)
    for numbers in (even, bell):
        # Next slot, next person: no correlation beyond chance (5,000 numbers: 0.014 is one deviation).
        assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.06
        assert abs(np.corrcoef(numbers[1:, 0], numbers[:-1, 0])[0, 1]) < 0.06


def test_streams_differ_by_seed_purpose_and_order_of_names() -> None:
    three, five = np.array([3]), np.array([5])
    keys = [stream(0, 1, three, five), stream(0, 1, five, three), stream(1, 1, three, five), stream(0, 2, three, five)]
    assert len({int(key[0]) for key in keys}) == 4


def test_a_disc_covers_its_area_and_nothing_beyond_its_edge() -> None:
    canvas = Canvas(2, 1, 40, 40)
    f32 = np.float32
    at, half_p, half_q = np.array([20, 13], f32), np.array([9, 4], f32), np.array([5, 4], f32)
    patch = canvas.patch(at, at, half_p, half_q, np.array([0.5, 0], f32))
    assert patch is not None
    canvas.blend(patch, disc(patch), np.ones((2, 1), f32))
    y, x = np.mgrid[0:40, 0:40] + 0.5
    for number in range(2):
        painted = canvas.pixels[number, 0]
        area = np.pi * half_p[number] * half_q[number]
        assert painted.sum() == pytest.approx(area, rel=0.05)
        away = np.hypot(x - at[number], y - at[number])
        assert painted[away > half_p[number] + 1.5].max() == 0
        assert painted[away < half_q[number] - 1].min() == 1


def test_a_shape_that_only_some_pictures_have_leaves_the_others_alone() -> None:
    canvas = Canvas(3, 3, 16, 16)
    middle, half = np.full(3, 8, np.float32), np.full(3, 4, np.float32)
    only = np.array([False, True, False])
    patch = canvas.patch(middle, middle, half, half, np.zeros(3, np.float32), only=only)
    assert patch is not None
    canvas.blend(patch, block(patch), np.tile(np.array([0.2, 0.4, 0.6], np.float32), (3, 1)))
    assert canvas.pixels[[0, 2]].max() == 0
    np.testing.assert_allclose(canvas.pixels[1, :, 8, 8], [0.2, 0.4, 0.6], atol=1e-6)
    assert canvas.patch(middle, middle, half, half, half, only=np.zeros(3, bool)) is None
    assert canvas.patch(middle - 100, middle, half, half, half) is None


# Contact sheets


def test_a_contact_sheet_shows_people_in_rows() -> None:
    image_set = faces(5, 4, Preprocessing(20, 16))
    sheet = contact_sheet(image_set, identities=3, images=2, scale=2)
    assert sheet.shape == (2 * (3 * 22 + 2), 2 * (2 * 18 + 2), 3)
    assert sheet.dtype == np.uint8
    small = sheet[::2, ::2]
    np.testing.assert_array_equal(sheet[1::2, 1::2], small)
    for row in range(3):
        for column in range(2):
            cell = small[2 + 22 * row : 22 + 22 * row, 2 + 18 * column : 18 + 18 * column]
            np.testing.assert_array_equal(cell, image_set.read([row * 4 + column])[0])


def test_a_contact_sheet_leaves_places_white_where_an_identity_has_few_images() -> None:
    some = faces(2, 3, Preprocessing(10, 10, "grey")).subset([0, 3, 4, 5])
    sheet = contact_sheet(some, identities=9, images=9, scale=1)
    assert sheet.shape == (2 * 12 + 2, 3 * 12 + 2, 3)
    assert (sheet[2:12, 14:] == 255).all()
    np.testing.assert_array_equal(sheet[2:12, 2:12], np.repeat(some.read([0])[0], 3, axis=2))


# Wrong arguments


@pytest.mark.parametrize(("people_wanted", "images_wanted"), [(0, 5), (5, 0), (-1, 5)])
def test_counts_below_one_are_an_error_that_names_them(people_wanted: int, images_wanted: int) -> None:
    with pytest.raises(ValueError, match=f"num_identities={people_wanted}, images_per_identity={images_wanted}"):
        faces(people_wanted, images_wanted)


def test_a_negative_seed_or_first_identity_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 or more; got -1 and 0"):
        faces(seed=-1)
    with pytest.raises(ValueError, match="0 or more; got 0 and -3"):
        faces(first_identity=-3)


def test_a_fraction_of_a_person_is_an_error() -> None:
    with pytest.raises(TypeError):
        SyntheticFaces(2.5, 3, SIZE)  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [-1, 30])
def test_an_index_outside_the_set_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match="numbered 0 to 29"):
        faces().read([0, index])


def test_a_contact_sheet_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        contact_sheet(faces(), images=0)
