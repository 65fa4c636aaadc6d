"""Everything that is looked for in a set of images, in one go."""

from dataclasses import dataclass

import numpy as np

from metricface.choices import is_number
from metricface.data.images import ImageSet
from metricface.label_noise.duplicates import Duplicates, find_duplicates
from metricface.label_noise.misplaced import DEFAULT_PROBABILITY, Misplaced, find_misplaced
from metricface.label_noise.parted import Parted, find_parted
from metricface.label_noise.people import People
from metricface.label_noise.same_person import DEFAULT_FALSE_SHARE, SamePerson, find_same_person
from metricface.miners.dataset.rows import Embeddings


@dataclass(frozen=True)
class Thresholds:
    """Where findings begin.

    false_share: of duplicates, of pairs of identities and of overlaps: the share of the findings that is expected to
        be sound. probability: of misplaced images and of identities that are two people: that the finding is right.
    """

    false_share: float = DEFAULT_FALSE_SHARE
    probability: float = DEFAULT_PROBABILITY

    def __post_init__(self) -> None:
        if not is_number(self.false_share) or not 0.0 < self.false_share < 1.0:
            raise ValueError(f"false_share lies between 0 and 1; found {self.false_share!r}.")
        if not is_number(self.probability) or not 0.0 < self.probability <= 1.0:
            raise ValueError(f"probability lies above 0 and at most at 1; found {self.probability!r}.")


@dataclass(frozen=True)
class Source:
    """A set of images and their embeddings, (N, D), row by row."""

    images: ImageSet
    embeddings: Embeddings


@dataclass(frozen=True)
class Findings:
    """What was found; identities are rows of `images.identities`. The last two are None without a test set."""

    images: ImageSet
    test: ImageSet | None
    thresholds: Thresholds
    duplicates: Duplicates
    misplaced: Misplaced
    same_person: SamePerson
    parted: Parted
    overlap_images: Duplicates | None = None
    overlap_people: SamePerson | None = None


def find_all(
    source: Source,
    test: Source | None = None,
    *,
    thresholds: Thresholds | None = None,
    pixels: bool = True,
    seed: int = 0,
) -> Findings:
    """Look for all kinds of noise in a training set, and for what it shares with a test set.

    pixels: compare the pixels of likely duplicates (reads as many pairs of images as there are images).
    Raises ValueError where embeddings and images do not fit, and where a set says nothing (`fit_likeness`);
    UnreadableImageError where an image cannot be read.
    """
    drawn = thresholds or Thresholds()
    people = People(source.embeddings, np.asarray(source.images.labels))
    shown = source.images if pixels else None
    overlap_images, overlap_people = None, None
    if test is not None:
        others = People(test.embeddings, np.asarray(test.images.labels), model=people.model)
        test_shown = test.images if pixels else None
        overlap_images = find_duplicates(people, shown, others, test_shown, false_share=drawn.false_share)
        overlap_people = find_same_person(people, others, false_share=drawn.false_share)
    return Findings(
        images=source.images,
        test=None if test is None else test.images,
        thresholds=drawn,
        duplicates=find_duplicates(people, shown, false_share=drawn.false_share),
        misplaced=find_misplaced(people, probability=drawn.probability, seed=seed),
        same_person=find_same_person(people, false_share=drawn.false_share),
        parted=find_parted(people, probability=drawn.probability, seed=seed),
        overlap_images=overlap_images,
        overlap_people=overlap_people,
    )
