"""A set of labelled images: what every source of images offers to samplers, loaders and evaluation.

Pixels in arrays of this package are uint8, (H, W, C), and colour is always in the order red, green, blue.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, TypeVar, get_args

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

IntArray = NDArray[np.int64]
Pixels = NDArray[np.uint8]
Indices = Sequence[int] | IntArray
Progress = Callable[[int, int], None]
Channels = Literal["rgb", "grey"]
Batch = TypeVar("Batch")

CHUNK = 64  # images a thread reads at once: large enough to amortise the hand-over, small enough for even progress


@dataclass(frozen=True)
class Preprocessing:
    """How a decoded image becomes an array of fixed size; part of what an embedder is, and saved with it.

    height, width: of the result, in pixels.
    channels: "rgb" (3, a grey image is repeated) or "grey" (1, colour becomes luma, ITU-R BT.601).
    crop: in (0, 1], the share of the sides kept of the largest centred box that has the aspect ratio of the result.
        1.0 keeps that whole box; 0.7 of a 160 x 160 image keeps its central 112 x 112.
    """

    height: int
    width: int
    channels: Channels = "rgb"
    crop: float = 1.0

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"height and width must be at least 1 pixel; got {self.height} x {self.width}.")
        if self.channels not in get_args(Channels):
            raise ValueError(f"channels must be one of {', '.join(get_args(Channels))}; got {self.channels!r}.")
        if not 0.0 < self.crop <= 1.0:
            raise ValueError(f"crop is a share of the image's sides, above 0 and at most 1; got {self.crop}.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image as a network sees it."""
        return (3 if self.channels == "rgb" else 1, self.height, self.width)

    def apply(self, image: Pixels) -> Pixels:
        """Crop, resize and convert one image.

        image: uint8 (h, w), (h, w, 1) or (h, w, 3) RGB, of any size.
        Returns uint8 (H, W, C), contiguous, never a view of `image`. Raises ValueError for another shape or dtype.
        """
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
            raise ValueError(
                f"an image is a uint8 array (h, w), (h, w, 1) or (h, w, 3) RGB; got {image.dtype} {image.shape}."
            )
        if image.size == 0:
            raise ValueError(f"an image needs at least one pixel; got shape {image.shape}.")
        box = self._central_box(image)
        # Averaging over the source area avoids aliasing when shrinking; it blocks up when enlarging.
        shrinks = box.shape[0] >= self.height and box.shape[1] >= self.width
        resized = cv2.resize(
            box, (self.width, self.height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        )
        in_colour = resized.ndim == 3 and resized.shape[2] == 3
        if self.channels == "rgb":
            return np.array(resized if in_colour else cv2.cvtColor(resized, cv2.COLOR_GRAY2RGB), dtype=np.uint8)
        grey = cv2.cvtColor(resized, cv2.COLOR_RGB2GRAY) if in_colour else resized
        return np.array(grey, dtype=np.uint8).reshape(self.height, self.width, 1)

    def _central_box(self, image: Pixels) -> Pixels:
        h, w = image.shape[:2]
        scale = self.crop * min(h / self.height, w / self.width)
        box_h = min(h, max(1, round(self.height * scale)))
        box_w = min(w, max(1, round(self.width * scale)))
        top, left = (h - box_h) // 2, (w - box_w) // 2
        return image[top : top + box_h, left : left + box_w]

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) in [0, 255] -> float32 in [-1, 1]; memory layout (channels_last) is kept."""
        return images.to(torch.float32).sub_(127.5).div_(127.5)


class ImageBatch(NamedTuple):
    """images: uint8 (n, C, H, W), channels_last strides; labels, indices: int64 (n,), indices into the set."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class SkippedFile(NamedTuple):
    """A file left out of a set: its key (path relative to the root) and why."""

    key: str
    reason: str


class UnreadableImageError(ValueError):
    """An image of a set could not be decoded.

    With one argument that is the whole message: a loader's worker hands exceptions on in this form.
    """

    def __init__(self, key: str, reason: str | None = None) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        if self.reason is None:
            return self.key
        return (
            f"cannot read image {self.key}: {self.reason}. Remove or replace it, or use the set's verified() or "
            "in_memory(), which leave such images out and list them in .skipped."
        )


def keep(batch: Batch) -> Batch:
    """The collate_fn for an ImageSet in torch's DataLoader: batches are fetched whole and need no collating."""
    return batch


class ImageSet(Dataset[ImageBatch], ABC):
    """N labelled images of one size. A subclass says where pixels come from by defining `read`.

    identities: name of each label, all distinct.
    labels: int64 (N,), each in [0, len(identities)); every identity has at least one image.
    keys: what each image is called in reports, for instance its path relative to the root of a folder.
    preprocessing: what was done to the pixels.
    skipped: what was found at the source and left out, each with a reason.

    Works as a map-style dataset: DataLoader(image_set, batch_sampler=..., collate_fn=keep) fetches a batch by one call.
    """

    def __init__(
        self,
        identities: Sequence[str],
        labels: Indices,
        keys: Sequence[str],
        preprocessing: Preprocessing,
        skipped: Sequence[SkippedFile] = (),
    ) -> None:
        self.identities = tuple(identities)
        self.labels: IntArray = np.asarray(labels, dtype=np.int64)
        self.keys = tuple(keys)
        self.preprocessing = preprocessing
        self.skipped = tuple(skipped)
        if self.labels.shape != (len(self.keys),):
            raise ValueError(f"{len(self.keys)} keys need as many labels; got labels of shape {self.labels.shape}.")
        if len(set(self.identities)) != len(self.identities):
            raise ValueError("identities must be distinct names; some occur more than once.")
        present = np.unique(self.labels)
        if not np.array_equal(present, np.arange(len(self.identities))):
            raise ValueError(
                f"labels of {len(self.identities):,} identities must use every number from 0 to "
                f"{len(self.identities) - 1} and no other; {present.size:,} different numbers were found."
            )

    @abstractmethod
    def read(self, indices: Indices) -> Pixels:
        """Pixels of the images at `indices`: uint8 (n, H, W, C), RGB or grey, a fresh contiguous array.

        Raises UnreadableImageError where a file cannot be decoded, IndexError for an index outside the set.
        """

    def __len__(self) -> int:
        return len(self.keys)

    def __getitems__(self, indices: list[int]) -> ImageBatch:
        index = np.asarray(indices, dtype=np.int64)
        images = torch.from_numpy(self.read(index)).permute(0, 3, 1, 2)  # (n, C, H, W), the memory stays (n, H, W, C)
        return ImageBatch(images, torch.from_numpy(self.labels[index]), torch.from_numpy(index))

    def __getitem__(self, index: int) -> ImageBatch:
        return self.__getitems__([index])

    def counts(self) -> IntArray:
        """Number of images of each identity, int64 (len(identities),)."""
        return np.bincount(self.labels, minlength=len(self.identities)).astype(np.int64)

    @property
    def num_genuine_pairs(self) -> int:
        """How many pairs of images of the same identity exist; 0 where every identity has one image."""
        counts = self.counts()
        return int((counts * (counts - 1) // 2).sum())

    @property
    def nbytes(self) -> int:
        """What the pixels take, or would take, in memory."""
        return len(self) * int(np.prod(self.preprocessing.shape))

    def describe(self) -> str:
        """One line for a report: identities, images, those with a single image, files left out."""
        single = int((self.counts() == 1).sum())
        text = f"{len(self.identities):,} identities, {len(self):,} images"
        text += f", {single:,} identities with a single image" if single else ""
        return text + (f", {len(self.skipped):,} files left out" if self.skipped else "")

    def subset(self, indices: Indices) -> "ImageSet":
        """The images at `indices`, in that order, without copying pixels.

        Labels are renumbered to the identities that are left, which keep their order. `skipped` starts empty.
        Raises ValueError for an empty selection, a boolean mask, or an index outside [0, len).
        """
        return _Subset(self, _checked(indices, len(self)))

    def select(self, identity_labels: Indices) -> "ImageSet":
        """All images of the given labels (say, one side of split_identities), in the order of this set."""
        wanted = _checked(identity_labels, len(self.identities), what="identities")
        return self.subset(np.flatnonzero(np.isin(self.labels, wanted)))

    def verified(self, *, threads: int | None = None, progress: Progress | None = None) -> "ImageSet":
        """Read each image once and leave out those that cannot be read; nothing is kept in memory.

        threads: default one per usable core. progress: called as progress(done, total).
        Returns this very set where all is well. Raises ValueError where no image can be read.
        """
        failures = self._read_all(lambda start, pixels: None, threads, progress)
        return self if not failures else self._without(self, failures)

    def in_memory(self, *, threads: int | None = None, progress: Progress | None = None) -> "ImageSet":
        """Read all pixels once and hold them (`nbytes`); images that cannot be read are left out and listed.

        Arguments and errors as in `verified`. The pixels are the same as `read` gives, to the bit.
        """
        channels, height, width = self.preprocessing.shape
        pixels: Pixels = np.empty((len(self), height, width, channels), dtype=np.uint8)

        def store(start: int, chunk: Pixels) -> None:
            pixels[start : start + len(chunk)] = chunk

        failures = self._read_all(store, threads, progress)
        held = MemoryImages(pixels, self.identities, self.labels, self.keys, self.preprocessing, self.skipped)
        return held if not failures else self._without(held, failures)

    def _read_all(
        self, sink: Callable[[int, Pixels], None], threads: int | None, progress: Progress | None
    ) -> dict[int, SkippedFile]:
        """Read every image in chunks, hand them to `sink(first index, pixels)`; return what failed, by index."""

        def read_chunk(start: int) -> dict[int, SkippedFile]:
            indices = range(start, min(start + CHUNK, len(self)))
            try:
                sink(start, self.read(indices))
                return {}
            except UnreadableImageError:
                pass
            failures = {}
            for index in indices:  # one by one, so that one bad file does not cost its neighbours
                try:
                    sink(index, self.read([index]))
                except UnreadableImageError as error:
                    failures[index] = SkippedFile(error.key, error.reason or "")
            return failures

        failures: dict[int, SkippedFile] = {}
        with ThreadPoolExecutor(threads or _usable_cores()) as pool:
            for number, failed in enumerate(pool.map(read_chunk, range(0, len(self), CHUNK)), start=1):
                failures |= failed
                if progress is not None:
                    progress(min(number * CHUNK, len(self)), len(self))
        return failures

    def _without(self, source: "ImageSet", failures: dict[int, SkippedFile]) -> "ImageSet":
        left = [index for index in range(len(self)) if index not in failures]
        if not left:
            first = next(iter(failures.values()))
            raise ValueError(
                f"none of {len(self):,} images can be read; the first is {first.key}: {first.reason}. "
                "Check that these are whole image files."
            )
        rest = source.subset(left)
        rest.skipped = self.skipped + tuple(failures.values())
        return rest


class MemoryImages(ImageSet):
    """Images held as one array, for instance by `ImageSet.in_memory`; pixels: uint8 (N, H, W, C), not copied."""

    def __init__(
        self,
        pixels: Pixels,
        identities: Sequence[str],
        labels: Indices,
        keys: Sequence[str],
        preprocessing: Preprocessing,
        skipped: Sequence[SkippedFile] = (),
    ) -> None:
        super().__init__(identities, labels, keys, preprocessing, skipped)
        channels, height, width = preprocessing.shape
        if pixels.dtype != np.uint8 or pixels.shape != (len(self), height, width, channels):
            raise ValueError(
                f"pixels must be uint8 {(len(self), height, width, channels)}; got {pixels.dtype} {pixels.shape}."
            )
        self.pixels = pixels

    def read(self, indices: Indices) -> Pixels:
        """Copies of the pixels at `indices`: uint8 (n, H, W, C)."""
        return self.pixels[np.asarray(indices, dtype=np.int64)]

    def in_memory(self, *, threads: int | None = None, progress: Progress | None = None) -> Self:
        """Return the set itself: it is in memory."""
        return self


class _Subset(ImageSet):
    """A selection of another set's images."""

    _source: ImageSet
    _index: IntArray

    def __init__(self, source: ImageSet, index: IntArray) -> None:
        names, labels_before = source.identities, source.labels[index]
        keys = [source.keys[i] for i in index]
        self._source, self._index = source, index
        if isinstance(source, _Subset):  # a subset of a subset looks its images up once, not twice
            self._source, self._index = source._source, source._index[index]
        present, labels = np.unique(labels_before, return_inverse=True)
        super().__init__([names[label] for label in present], labels, keys, source.preprocessing)

    def read(self, indices: Indices) -> Pixels:
        return self._source.read(self._index[np.asarray(indices, dtype=np.int64)])

    def in_memory(self, *, threads: int | None = None, progress: Progress | None = None) -> ImageSet:
        if isinstance(self._source, MemoryImages):
            return self
        return super().in_memory(threads=threads, progress=progress)


def _checked(indices: Indices, size: int, what: str = "images") -> IntArray:
    array = np.asarray(indices)
    if array.dtype == np.bool_:
        raise ValueError(f"a selection of {what} is a list of numbers, not a boolean mask; use np.flatnonzero(mask).")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"a selection needs at least one of the {size:,} {what}; got an array of shape {array.shape}.")
    index = array.astype(np.int64)
    if index.min() < 0 or index.max() >= size:
        raise ValueError(
            f"there are {size:,} {what}, numbered from 0; the selection asks for {index.min()} to {index.max()}."
        )
    return index


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
