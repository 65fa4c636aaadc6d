"""Embeddings of people as the likeness model has them: normal around people who are normal around nobody."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


class Simulated(NamedTuple):
    embeddings: Floats  # (N, D)
    labels: Labels  # (N,)
    person: Labels  # (N,) whom each image shows

    def relabelled(self, images: Labels, labels: Labels | int) -> "Simulated":
        changed = self.labels.copy()
        changed[images] = labels
        return self._replace(labels=changed)


def simulate(people: int = 150, images: int = 8, *, dim: int = 32, within: float = 0.5, seed: int = 0) -> Simulated:
    """People who are easily told apart at within = 0.5, hardly at 1.5."""
    generator = np.random.default_rng(seed)
    person = np.repeat(np.arange(people), images)
    centres = generator.normal(size=(people, dim))
    embeddings = centres[person] + within * generator.normal(size=(len(person), dim))
    return Simulated(embeddings, person.copy(), person)


def flip(made: Simulated, share: float, *, seed: int = 1) -> tuple[Simulated, Labels]:
    """Give a share of the images the label of another person; returns which, too."""
    generator = np.random.default_rng(seed)
    flipped = np.sort(generator.permutation(len(made.labels))[: round(share * len(made.labels))])
    people = int(made.labels.max()) + 1
    new = (made.labels[flipped] + generator.integers(1, people, len(flipped))) % people
    return made.relabelled(flipped, new), flipped
