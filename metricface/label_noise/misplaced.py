"""Images that do not look like the others of their identity: labels that were flipped."""

from typing import NamedTuple

import numpy as np

from metricface.label_noise.chances import by_size, wrong_odds
from metricface.label_noise.people import Floats, Index, People

# An image among 1 other is judged by other odds than one among 100: numbers of others, each up to the next.
OTHERS = (1, 2, 4, 9)
SIMULATED = 4000  # flips for each of these groups
DEFAULT_PROBABILITY = 0.5
FEWEST_JUDGED = 50  # images, from which odds can be read


class Misplaced(NamedTuple):
    """All images that could be judged, the likeliest wrong first; the first `found` of them are findings.

    An image whose identity has two images is as far from the other as that from it: which of the two is wrong is told
    only by which is near to another identity.
    """

    images: Index  # (J,)
    probability: Floats  # (J,) that the label is wrong
    own: Floats  # (J,) evidence, in nats, that it shows the person of its identity's other images
    nearest: Index  # (J,) identity with the greatest evidence among all others; -1 where there is no other
    near: Floats  # (J,) that evidence
    found: int
    threshold: float
    alone: int  # images that are the only one of their identity
    unjudged: int  # images in groups too small to read odds from
    shares: dict[str, float]  # estimated share of wrong labels, by number of other images
    caught: dict[str, float]  # share of simulated flips beyond the threshold, likewise


def find_misplaced(
    people: People, *, probability: float = DEFAULT_PROBABILITY, seed: int = 0, simulated: int = SIMULATED
) -> Misplaced:
    """Compare each image with the rest of its identity and with all other identities.

    probability: above which an image is a finding. It is estimated by flipping labels: images drawn at random are
    compared with identities drawn at random (each as often as it has images), and what that looks like is looked for,
    separately for identities of 2, of 3 or 4, of 5 to 9 and of more images. It is an upper estimate where an embedder
    cannot tell people apart.
    Returns Misplaced. Raises ValueError for a probability outside (0, 1].
    """
    if not 0.0 < probability <= 1.0:
        raise ValueError(f"probability must lie above 0 and at most at 1; found {probability}.")
    own, nearest, near = _evidence(people)
    others = people.images[people.codes] - 1
    # Against the nearest other identity, or against nobody known where none is near at all.
    score = near[:, 0] - own
    chance = np.full(len(score), np.nan)
    generator = np.random.default_rng(seed)
    shares, caught = {}, {}
    for name, least, most, judged in by_size(others, OTHERS, FEWEST_JUDGED):
        flips = _flips(people, own, nearest, near, (least, most or len(people.rows)), simulated, generator)
        odds = wrong_odds(score[judged], flips.score, bystanders=flips.bystander if most == 1 else None)
        chance[judged] = odds.probability
        beyond = odds.probability >= probability
        shares[name], caught[name] = odds.share, float(odds.caught[beyond].max()) if beyond.any() else 0.0
    known = np.flatnonzero(np.isfinite(chance))
    order = known[np.lexsort((known, -score[known], -chance[known]))]
    return Misplaced(
        images=order,
        probability=chance[order],
        own=own[order],
        nearest=nearest[order, 0],
        near=near[order, 0],
        found=int((chance[order] >= probability).sum()),
        threshold=probability,
        alone=int((others == 0).sum()),
        unjudged=int(((others > 0) & ~np.isfinite(chance)).sum()),
        shares=shares,
        caught=caught,
    )


def _evidence(people: People) -> tuple[Floats, Index, Floats]:
    """Each image's evidence for its own identity without it (N,), and the two nearest other identities (N, 2)."""
    number = len(people.rows)
    own, nearest, near = np.full(number, -np.inf), np.full((number, 2), -1), np.full((number, 2), -np.inf)
    for index, coordinates in people.blocks():
        codes = people.codes[index].astype(np.int64)
        ones = np.ones(len(index), dtype=np.int64)
        found = people.nearest(coordinates, ones, 2, leave_out=codes)
        nearest[index], near[index] = found
        left = people.images[codes] - 1
        some = np.flatnonzero(left > 0)
        total = people.means[codes[some]] * people.images[codes[some], None].astype(np.float32)
        rest = np.asarray((total - coordinates[some]) / left[some, None], dtype=np.float32)
        own[index[some]] = people.model.evidence(coordinates[some], ones[some], rest, left[some])
    return own, nearest, near


class _Flips(NamedTuple):
    score: Floats  # (m,) of images put among strangers
    bystander: Floats  # (m,) of an image of the identity that got one


def _flips(
    people: People,
    own: Floats,
    nearest: Index,
    near: Floats,
    sizes: tuple[int, int],
    number: int,
    generator: np.random.Generator,
) -> _Flips:
    """Scores of images that are put into identities that had so many images, from and up to."""
    fits = np.flatnonzero((people.images >= sizes[0]) & (people.images <= sizes[1]))
    if not len(fits):
        return _Flips(np.empty(0), np.empty(0))
    weight = people.images[fits] / people.images[fits].sum()
    images = generator.integers(len(people.rows), size=number)
    among = generator.choice(fits, number, p=weight)
    strange = people.codes[images] != among
    images, among = images[strange], among[strange]
    coordinates, ones = people.coordinates(images), np.ones(len(images), dtype=np.int64)
    there = people.model.evidence(coordinates, ones, people.means[among], people.images[among])
    # Its own identity is one of the others now, and the one that it is put among no longer is.
    other = np.where(nearest[images, 0] == among, near[images, 1], near[images, 0])
    score = np.maximum(other, own[images]) - there
    witness = people.table.images[people.table.offsets[among]].astype(np.int64)  # the only one, where there is one
    return _Flips(score[np.isfinite(score)], (near[witness, 0] - there)[np.isfinite(near[witness, 0])])
