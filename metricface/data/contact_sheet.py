"""A picture of a set: one row for each identity, one column for each of its images."""

import operator

import numpy as np

from metricface.data.images import ImageSet, Pixels

_GAP = 2  # pixels between images, before scaling
_PAPER = 255


def contact_sheet(image_set: ImageSet, identities: int = 8, images: int = 10, scale: int = 2) -> Pixels:
    """The first `images` images of the first `identities` identities, side by side.

    Rows are identities in the order of their labels; a place whose identity has fewer images stays white. Look at other
    people by passing `image_set.select(labels)`.
    scale: each pixel becomes scale x scale pixels.
    Returns uint8 (height, width, 3), RGB also for grey sets. Raises ValueError for a number below 1.
    """
    rows, columns, scale = operator.index(identities), operator.index(images), operator.index(scale)
    if min(rows, columns, scale) < 1:
        raise ValueError(f"identities, images and scale are at least 1; got {identities}, {images} and {scale}.")
    _, height, width = image_set.preprocessing.shape
    rows = min(rows, len(image_set.identities))
    members = [np.flatnonzero(image_set.labels == label)[:columns] for label in range(rows)]
    columns = max(len(row) for row in members)
    sheet = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), _PAPER, dtype=np.uint8)
    for row, indices in enumerate(members):
        top = _GAP + row * (height + _GAP)
        for column, pixels in enumerate(image_set.read(indices)):
            left = _GAP + column * (width + _GAP)
            sheet[top : top + height, left : left + width] = pixels  # a grey image fills all three channels
    return sheet.repeat(scale, axis=0).repeat(scale, axis=1)
