import cv2
import numpy as np
import pytest

from metricface.data.images import MemoryImages, Pixels, Preprocessing
from metricface.data.synthetic import SyntheticFaces
from metricface.label_noise.pixels import correlation, detail, pixel_likeness

FACES = SyntheticFaces(12, 4, Preprocessing(56, 56), seed=3).in_memory()
PIXELS = FACES.read(range(48))


def copies(pixels: Pixels) -> dict[str, Pixels]:
    """One picture (56, 56, 3) as it may be met again."""
    encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    moved = cv2.warpAffine(
        pixels, np.array([[1, 0, 1], [0, 1, -2]], dtype=np.float32), (56, 56), borderMode=cv2.BORDER_REPLICATE
    )
    small = cv2.resize(cv2.resize(pixels, (40, 40), interpolation=cv2.INTER_AREA), (56, 56))
    return {
        "exact": pixels,
        "re-encoded": np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), dtype=np.uint8),
        "shifted": np.asarray(moved, dtype=np.uint8),
        "smaller": np.asarray(small, dtype=np.uint8),
        "mirrored": np.ascontiguousarray(pixels[:, ::-1]),
        "darker": (pixels * 0.6).astype(np.uint8),
    }


@pytest.mark.parametrize("how", ["exact", "re-encoded", "shifted", "smaller", "mirrored", "darker"])
def test_copies_of_a_picture_correlate_and_other_pictures_do_not(how: str) -> None:
    same = [correlation(detail(PIXELS[i]), detail(copies(PIXELS[i])[how])) for i in range(12)]
    other = [correlation(detail(PIXELS[i]), detail(copies(PIXELS[j])[how])) for i in range(12) for j in range(12, 24)]
    assert min(same) > 0.95
    assert max(other) < 0.9


def test_a_picture_without_detail_is_like_another_without_and_like_no_picture() -> None:
    flat, grey = np.full((56, 56, 3), 90, dtype=np.uint8), np.full((56, 56, 3), 200, dtype=np.uint8)
    assert correlation(detail(flat), detail(grey)) == 1.0
    assert correlation(detail(flat), detail(PIXELS[0])) == 0.0


def test_pairs_are_compared_in_their_order_across_blocks_and_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metricface.label_noise.pixels.PAIRS_PER_BLOCK", 5)
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 48, 17), generator.integers(0, 24, 17)
    other = FACES.subset(np.arange(24, 48))
    found = pixel_likeness(FACES, a, other, b)
    expected = [correlation(detail(PIXELS[i]), detail(PIXELS[24 + j])) for i, j in zip(a, b, strict=True)]
    assert found.tolist() == expected


def test_grey_sets_and_no_pairs_are_compared_too() -> None:
    grey = MemoryImages(PIXELS[..., :1], FACES.identities, FACES.labels, FACES.keys, Preprocessing(56, 56, "grey"))
    assert pixel_likeness(grey, np.array([3]), grey, np.array([3]))[0] == pytest.approx(1.0, abs=1e-5)
    assert len(pixel_likeness(grey, np.empty(0, dtype=np.int64), grey, np.empty(0, dtype=np.int64))) == 0


def test_sets_of_other_sizes_are_an_error() -> None:
    small = SyntheticFaces(2, 2, Preprocessing(40, 56))
    with pytest.raises(ValueError, match="one preprocessing"):
        pixel_likeness(FACES, np.array([0]), small, np.array([0]))
