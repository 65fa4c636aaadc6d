"""Identities whose images part into two groups that do not belong together: two people under one label."""

from typing import NamedTuple

import numpy as np

from metricface.label_noise.chances import fit_false_alarms, wrong_odds
from metricface.label_noise.likeness import Likeness
from metricface.label_noise.misplaced import DEFAULT_PROBABILITY
from metricface.label_noise.people import Floats, Index, People
from metricface.miners.dataset.rows import Rows

SMALLEST_SIDE = 2  # a single image on its own side is a misplaced image, not a second person
SIMULATED = 1000  # pairs of identities put under one label
FEWEST_JUDGED = 30
MOST_ROUNDS = 10
# Means of very many images differ without doubt, of one person at two times, too.
MOST_WEIGHT = 16  # images of a side
MOST_IMAGES = 2000  # of one identity that are looked at; evenly taken


class Side(NamedTuple):
    """The images of one identity in two groups, and single ones that fit neither. Indices into the set."""

    larger: Index
    smaller: Index
    apart: Index


class Parted(NamedTuple):
    """All identities that could be judged, the likeliest two people first; the first `found` are findings."""

    identities: Index  # (J,) rows
    probability: Floats  # (J,) that they are two people; an upper estimate where the embedder is weak
    false_share: Floats  # (J,) expected share of one person up to this one, if most identities are; a strict estimate
    evidence: Floats  # (J,) in nats, against both sides being one person
    sides: list[Side]  # (J,)
    found: int
    threshold: float
    unjudged: int  # identities that are too small to part; all, where fewer than 30 are not
    share: float  # estimated share of two people among those judged
    caught: float  # share of simulated ones beyond the threshold


def find_parted(
    people: People, *, probability: float = DEFAULT_PROBABILITY, seed: int = 0, simulated: int = SIMULATED
) -> Parted:
    """Part the images of each identity in two, and compare the two sides as if they were two identities.

    Any set of images can be parted. So pairs of identities, drawn at random, are put under one label and parted, too,
    and the probability is read from how much an identity looks like those; beside it stands what the bulk of the
    identities lets expect. probability: above which an identity is a
    finding. Identities of fewer than 4 images are not judged. Of more than 2,000 images every n-th is looked at.
    Returns Parted. Raises ValueError for a probability outside (0, 1].
    """
    if not 0.0 < probability <= 1.0:
        raise ValueError(f"probability must lie above 0 and at most at 1; found {probability}.")
    large = np.flatnonzero(people.images >= 2 * SMALLEST_SIDE)
    rows, evidence, sides = [], [], []
    for row, images, coordinates in people.by_identity(large):
        parts = part(people.model, coordinates)
        if parts is not None:
            rows.append(row)
            evidence.append(-parts.likeness)
            sides.append(Side(images[parts.larger], images[parts.smaller], images[parts.apart]))
    identities, score = np.array(rows, dtype=np.int64), np.array(evidence, dtype=np.float64)
    chance, strict = np.zeros(len(score)), np.ones(len(score))
    share, caught = 0.0, 0.0
    judged = len(score) >= FEWEST_JUDGED
    if judged:
        odds = wrong_odds(score, _merged(people, simulated, np.random.default_rng(seed)))
        chance, share = odds.probability, odds.share
        caught = float(odds.caught[chance >= probability].max(initial=0.0))
        strict = fit_false_alarms(score).shares(score, len(score))
    order = np.lexsort((identities, -score)) if judged else np.empty(0, dtype=np.int64)
    return Parted(
        identities=identities[order],
        probability=chance[order],
        false_share=strict[order],
        evidence=score[order],
        sides=[sides[at] for at in order],
        found=int((chance[order] >= probability).sum()),
        threshold=probability,
        unjudged=len(people.images) - len(order),
        share=share,
        caught=caught,
    )


class Parts(NamedTuple):
    """Places (within one identity) on each side, and the evidence that both sides are one person."""

    larger: Index
    smaller: Index
    apart: Index
    likeness: float


def part(model: Likeness, coordinates: Rows) -> Parts | None:
    """Part images (n, d) in two groups of at least 2, leaving out single images that would be a group of their own.

    By the direction in which they vary most, then two means. None where no two such groups are left.
    """
    places = np.arange(0, len(coordinates), -(-len(coordinates) // MOST_IMAGES))
    scaled = model.for_search(coordinates)
    apart = np.empty(0, dtype=np.int64)
    while len(places) >= 2 * SMALLEST_SIDE:
        side = _two_means(scaled[places])
        one, two = places[side], places[~side]
        if min(len(one), len(two)) >= SMALLEST_SIDE:
            larger, smaller = (one, two) if len(one) >= len(two) else (two, one)
            sizes = np.minimum([[len(larger)], [len(smaller)]], MOST_WEIGHT)
            a, b = (coordinates[p].mean(axis=0, dtype=np.float64)[None] for p in (larger, smaller))
            likeness = model.evidence(a, sizes[0], b, sizes[1])
            return Parts(larger, smaller, np.sort(apart), float(likeness[0]))
        alone, places = (one, two) if len(one) < len(two) else (two, one)
        if not len(alone):  # all images are equal
            return None
        apart = np.concatenate([apart, alone])
    return None


def _two_means(rows: Rows) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of the rows (n, d) lie on one side."""
    centred = rows - rows.mean(axis=0)
    if len(rows) <= rows.shape[1]:
        _, vectors = np.linalg.eigh(centred @ centred.T)
        side = vectors[:, -1] > 0
    else:
        _, vectors = np.linalg.eigh(centred.T @ centred)
        side = centred @ vectors[:, -1] > 0
    for _ in range(MOST_ROUNDS):
        if side.all() or not side.any():
            break
        one, two = rows[side].mean(axis=0), rows[~side].mean(axis=0)
        now = ((rows - one) ** 2).sum(axis=1) < ((rows - two) ** 2).sum(axis=1)
        if np.array_equal(now, side):
            break
        side = now
    return side


def _merged(people: People, number: int, generator: np.random.Generator) -> Floats:
    """Evidence against one person for pairs of identities, of at least 2 images each, under one label."""
    several = np.flatnonzero(people.images >= SMALLEST_SIDE)
    found = []
    for one, two in generator.choice(several, (number, 2)):
        if one != two:
            images = np.concatenate([people.table.images_of(one), people.table.images_of(two)])
            parts = part(people.model, people.coordinates(images))
            if parts is not None:
                found.append(-parts.likeness)
    return np.array(found)
