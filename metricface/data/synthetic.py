"""A built-in set of faces: thousands of people without a file, each image drawn when it is asked for."""

import operator

import numpy as np

from metricface.data.images import ImageSet, Indices, IntArray, Pixels, Preprocessing
from metricface.data.synthetic_faces.camera import expose
from metricface.data.synthetic_faces.canvas import Canvas
from metricface.data.synthetic_faces.conditions import conditions
from metricface.data.synthetic_faces.easel import Easel
from metricface.data.synthetic_faces.face import paint_face
from metricface.data.synthetic_faces.in_front import paint_in_front
from metricface.data.synthetic_faces.people import people
from metricface.data.synthetic_faces.scene import paint_behind, paint_hair, paint_head

# Float32 pixels painted at once: few enough to stay in a core's cache, enough to spread NumPy's cost per call.
_PIXELS_AT_ONCE = 300_000


class SyntheticFaces(ImageSet):
    """Painted faces of `num_identities` people, `images_per_identity` each, with pose, expression, light and more.

    An image depends on (seed, number of the person, number of the image) and on preprocessing alone: not on the batch
    it is read in, on the process, or on how many people and images the set has. Another seed is another world.
    first_identity: number of the first person, so that two sets with one seed can hold different people of one world.
    preprocessing: the size to paint at. A square photograph is imagined, and cut as Preprocessing cuts photographs: a
        picture that is not square is its largest centred box of that aspect ratio, and crop < 1 comes closer.
        Grey pictures are painted in luma, which is the grey of the colour picture but for rounding and colour cast.

    Raises ValueError for counts below 1, a negative first_identity or seed.
    """

    def __init__(
        self,
        num_identities: int,
        images_per_identity: int,
        preprocessing: Preprocessing,
        *,
        seed: int = 0,
        first_identity: int = 0,
    ) -> None:
        people_wanted, images_wanted = operator.index(num_identities), operator.index(images_per_identity)
        if people_wanted < 1 or images_wanted < 1:
            raise ValueError(
                f"SyntheticFaces needs at least 1 identity with at least 1 image; got num_identities={people_wanted}, "
                f"images_per_identity={images_wanted}."
            )
        self.seed, self.first_identity = operator.index(seed), operator.index(first_identity)
        if self.seed < 0 or self.first_identity < 0:
            raise ValueError(f"seed and first_identity are 0 or more; got {self.seed} and {self.first_identity}.")
        self.images_per_identity = images_wanted
        names = [f"person_{self.first_identity + number:06d}" for number in range(people_wanted)]
        super().__init__(
            names,
            np.repeat(np.arange(people_wanted), images_wanted),
            [f"{name}/{image:04d}" for name in names for image in range(images_wanted)],
            preprocessing,
        )

    def read(self, indices: Indices) -> Pixels:
        """Paint the images at `indices`: uint8 (n, H, W, C). Raises IndexError for an index outside the set."""
        index = np.asarray(indices, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"images are numbered 0 to {len(self) - 1:,}; got {index.min()} to {index.max()}.")
        channels, height, width = self.preprocessing.shape
        pixels = np.empty((len(index), height, width, channels), dtype=np.uint8)
        step = max(1, _PIXELS_AT_ONCE // (height * width))
        for start in range(0, len(index), step):
            pixels[start : start + step] = self._paint(index[start : start + step])
        return pixels

    def _paint(self, index: IntArray) -> Pixels:
        channels, height, width = self.preprocessing.shape
        identity = self.first_identity + index // self.images_per_identity
        how = conditions(self.seed, identity, index % self.images_per_identity)
        canvas = Canvas(len(index), channels, height, width)
        easel = Easel(people(self.seed, identity), how, canvas, self.preprocessing.crop)
        paint_behind(easel)
        paint_head(easel)
        paint_face(easel)
        paint_hair(easel)
        paint_in_front(easel)
        return expose(canvas.pixels, how)
