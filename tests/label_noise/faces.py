"""Small sets of painted faces with planted noise, and embeddings that tell the people apart."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metricface.data.images import ImageSet, MemoryImages, Pixels, Preprocessing
from metricface.data.synthetic import SyntheticFaces

Labels = NDArray[np.int64]
SIZE = Preprocessing(32, 32)


class Faces(NamedTuple):
    images: ImageSet
    embeddings: NDArray[np.float64]
    person: Labels


def painted(people: int = 40, images: int = 6, *, seed: int = 0, first: int = 0) -> Faces:
    """Keys are NAME/number. Embeddings are drawn, not seen: a centre for each person and noise for each image."""
    faces = SyntheticFaces(people, images, SIZE, seed=1, first_identity=first).in_memory()
    person = faces.labels + first
    centres = np.random.default_rng(99).normal(size=(1000, 24))
    embeddings = centres[person] + 0.5 * np.random.default_rng(seed).normal(size=(len(faces), 24))
    return Faces(faces, embeddings, person)


def changed(made: Faces, labels: dict[int, int], copies: dict[int, int]) -> Faces:
    """The set with other labels for some images, and copies (image: label) added at its end, a pixel to the right."""
    source = made.images
    index = np.array(list(copies), dtype=np.int64)
    new = source.labels.copy()
    for image, label in labels.items():
        new[image] = label
    all_labels = np.concatenate([new, list(copies.values())]).astype(np.int64)
    pixels: Pixels = np.concatenate([source.read(range(len(source))), np.roll(source.read(index), 1, axis=2)])
    keys = [f"{source.identities[label]}/{number:03d}.png" for number, label in enumerate(all_labels)]
    moved = made.embeddings[index] + 0.01 * np.random.default_rng(7).normal(size=(len(index), 24))
    images = MemoryImages(pixels, source.identities, all_labels, keys, SIZE)
    return Faces(images, np.concatenate([made.embeddings, moved]), np.concatenate([made.person, made.person[index]]))
