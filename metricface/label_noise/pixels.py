"""Whether two images are one picture, seen in the pixels: re-encoded, resized, shifted a little, or mirrored."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from numpy.typing import NDArray

from metricface.data.images import ImageSet, Pixels

Floats = NDArray[np.float64]
Index = NDArray[np.int64]

# What aligned faces have in common, and light, is smooth: it goes with the blurred image. A little noise goes, too.
COARSE_SHARE = 3.0 / 56.0  # sigma of the blur that is taken off, as a share of the shorter side
FINE_SHARE = 1.0 / 56.0  # and of the one that is applied
SHIFT_SHARE = 4.0 / 56.0  # how far pictures may be moved against one another
PAIRS_PER_BLOCK = 512
FLAT = 1e-3  # standard deviation, in grey levels, of a picture without detail


def pixel_likeness(first: ImageSet, a: Index, second: ImageSet, b: Index, *, threads: int | None = None) -> Floats:
    """The correlation of the details of image a[i] of `first` and b[i] of `second`, (T,) in [-1, 1].

    Details are what is left of the grey picture without its blurred form. The centre of either picture is moved over
    the other by up to 7% of its side, also mirrored, and the best place counts. 1 for one picture, also in other light;
    copies re-encoded or moved by a few percent reach 0.99. Two pictures without any detail have 1, one of them 0.
    Both sets must have one size. Raises UnreadableImageError where an image cannot be read, ValueError for other sizes.
    """
    if first.preprocessing.shape[1:] != second.preprocessing.shape[1:]:
        raise ValueError(
            f"images of {first.preprocessing.shape[1:]} and {second.preprocessing.shape[1:]} pixels (height, width) "
            "cannot be compared; open both sets with one preprocessing."
        )
    found = np.empty(len(a))
    with ThreadPoolExecutor(threads) as pool:
        starts = range(0, len(a), PAIRS_PER_BLOCK)
        blocks = pool.map(lambda start: _block(first, a, second, b, start), starts)
        for start, block in zip(starts, blocks, strict=True):
            found[start : start + len(block)] = block
    return found


def _block(first: ImageSet, a: Index, second: ImageSet, b: Index, start: int) -> Floats:
    end = start + PAIRS_PER_BLOCK
    details = zip(_details(first, a[start:end]), _details(second, b[start:end]), strict=True)
    return np.array([correlation(one, two) for one, two in details])


def _details(images: ImageSet, index: Index) -> Iterator[NDArray[np.float32]]:
    wanted, place = np.unique(index, return_inverse=True)  # an image is in several pairs
    details = [detail(pixels) for pixels in images.read(wanted)]
    return (details[i] for i in place)


def detail(pixels: Pixels) -> NDArray[np.float32]:
    """A picture (H, W, C) in grey (H, W), without what is coarse and what is finest."""
    grey = pixels[..., 0] if pixels.shape[2] == 1 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    side = min(grey.shape)
    wide = grey.astype(np.float32)
    sharp = wide - cv2.GaussianBlur(wide, (0, 0), max(COARSE_SHARE * side, 1.0))
    return np.asarray(cv2.GaussianBlur(sharp, (0, 0), max(FINE_SHARE * side, 0.3)), dtype=np.float32)


def correlation(one: NDArray[np.float32], two: NDArray[np.float32]) -> float:
    """The best correlation of the centre of one with a place in the other, either way round and mirrored."""
    margin = max(1, round(SHIFT_SHARE * min(one.shape)))
    if min(one.shape) <= 2 * margin:
        raise ValueError(f"pictures of {one.shape} pixels are too small to be compared.")
    inner = (slice(margin, -margin), slice(margin, -margin))
    flat = [picture[inner].std() < FLAT for picture in (one, two)]
    if any(flat):
        return float(all(flat))
    mirrored = np.ascontiguousarray(one[:, ::-1])
    places = ((two, one[inner]), (one, two[inner]), (two, mirrored[inner]))
    best = max(float(cv2.matchTemplate(whole, part, cv2.TM_CCOEFF_NORMED).max()) for whole, part in places)
    return min(best, 1.0)
