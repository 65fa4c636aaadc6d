"""A filter proposed from confident findings, for a person to edit."""

from functools import partial
from typing import NamedTuple

import numpy as np

from metricface.choices import is_number
from metricface.data.images import IntArray
from metricface.label_noise.filter import Decision
from metricface.label_noise.findings import Findings
from metricface.label_noise.likeness import Floats

CONFIDENT = 0.9  # probability of findings that a decision is proposed for; the others are in the report alone


class Proposed(NamedTuple):
    """A decision and the finding it comes from."""

    decision: Decision
    kind: str
    score: float  # probability, or 1 - expected false share


class _OnePerson(NamedTuple):
    """Which identities are to become one."""

    head: IntArray  # (C,) the largest of those that are one person with each
    share: Floats  # (C,) expected to be false


def propose(findings: Findings, *, confident: float = CONFIDENT) -> list[Proposed]:
    """Decide on the confident findings, at most once an image: by the first of these that applies.

    duplicates: of copies under one label all but the first are dropped; of copies under two labels the one that fits
        its identity worse, if that can be told, else none. One copy of a picture always stays.
    misplaced images: relabelled to the nearest identity where the evidence for it outweighs that there are so many
        identities (above log C nats), else dropped.
    two people under one label, where the strict estimate says so, too: the smaller side gets a name of its own,
        NAME (2).
    one person under two labels: the images of the smaller identity get the larger one's name, however long the chain;
        a misplaced image whose nearest identity is such a smaller one, too.
    Images that overlap with a test set are dropped; identities that do are not touched, for names tell nothing about
    which set is wrong. Raises ValueError for `confident` outside (0, 1].
    """
    check_confident(confident)
    found: dict[int, Proposed] = {}
    people = _one_person(findings, confident)
    kinds = (_overlap, _duplicates, partial(_misplaced, people=people), _parted, partial(_same_person, people=people))
    for propose_some in kinds:
        for image, proposed in propose_some(findings, confident, frozenset(found)):
            found.setdefault(image, proposed)
    return [found[image] for image in sorted(found)]


_Found = list[tuple[int, Proposed]]


def _overlap(findings: Findings, confident: float, taken: frozenset[int]) -> _Found:
    pairs = findings.overlap_images
    if pairs is None:
        return []
    sure = range(int((pairs.false_share[: pairs.found] <= 1.0 - confident).sum()))
    return [
        (int(pairs.first[i]), _drop(findings, int(pairs.first[i]), "in test set", 1.0 - pairs.false_share[i]))
        for i in sure
    ]


def _duplicates(findings: Findings, confident: float, taken: frozenset[int]) -> _Found:
    pairs, labels = findings.duplicates, findings.images.labels
    doubt = np.full(len(labels), np.nan)
    doubt[findings.misplaced.images] = findings.misplaced.near - findings.misplaced.own
    gone = set(taken)
    dropped: _Found = []
    for i in range(int((pairs.false_share[: pairs.found] <= 1.0 - confident).sum())):
        one, two = int(pairs.first[i]), int(pairs.second[i])
        if one in gone or two in gone:  # the other copy is then the only one left
            continue
        if labels[one] == labels[two]:
            worse = two
        elif np.isfinite(doubt[one]) and np.isfinite(doubt[two]):
            worse = one if doubt[one] > doubt[two] else two
        else:  # an identity with this image alone says nothing about it
            continue
        gone.add(worse)
        dropped.append((worse, _drop(findings, worse, "duplicate", 1.0 - pairs.false_share[i])))
    return dropped


def _misplaced(findings: Findings, confident: float, taken: frozenset[int], *, people: _OnePerson) -> _Found:
    found, images = findings.misplaced, findings.images
    least = float(np.log(len(images.identities)))
    head = people.head
    decided: _Found = []
    for i in range(int((found.probability[: found.found] >= confident).sum())):
        image = int(found.images[i])
        if found.near[i] > least:
            if head[found.nearest[i]] == head[images.labels[image]]:  # both are one person: it is not misplaced
                continue
            name = images.identities[head[found.nearest[i]]]
            decision = Decision(images.keys[image], "relabel", name)
            decided.append((image, Proposed(decision, "misplaced", float(found.probability[i]))))
        else:
            decided.append((image, _drop(findings, image, "misplaced", found.probability[i])))
    return decided


def _parted(findings: Findings, confident: float, taken: frozenset[int]) -> _Found:
    found, images = findings.parted, findings.images
    names = set(images.identities)
    decided: _Found = []
    sure = (found.probability >= confident) & (found.false_share <= 1.0 - confident)
    for i in np.flatnonzero(sure[: found.found]).tolist():
        name = _free(images.identities[found.identities[i]], names)
        names.add(name)
        for image in found.sides[i].smaller.tolist():
            decision = Decision(images.keys[image], "relabel", name)
            decided.append((image, Proposed(decision, "two people", float(found.probability[i]))))
    return decided


def _same_person(findings: Findings, confident: float, taken: frozenset[int], *, people: _OnePerson) -> _Found:
    images, (head, share) = findings.images, people
    decided: _Found = []
    for row in np.flatnonzero(head != np.arange(len(head))).tolist():
        for image in np.flatnonzero(images.labels == row).tolist():
            decision = Decision(images.keys[image], "relabel", images.identities[head[row]])
            decided.append((image, Proposed(decision, "one person", float(1.0 - share[row]))))
    return decided


def _one_person(findings: Findings, confident: float) -> _OnePerson:
    """Merge the confident pairs of identities, chain by chain."""
    pairs, sizes = findings.same_person, findings.images.counts()
    head = np.arange(len(sizes))
    share = np.ones(len(sizes))
    for i in range(int((pairs.false_share[: pairs.found] <= 1.0 - confident).sum())):
        one, two = int(pairs.first[i]), int(pairs.second[i])
        group = (head == head[one]) | (head == head[two])
        members = np.flatnonzero(group)
        largest = members[np.argmax(sizes[members])]
        head[group] = largest
        for merged in (one, two):
            share[merged] = min(share[merged], pairs.false_share[i])
    return _OnePerson(head, share)


def check_confident(confident: float) -> None:
    """Raise ValueError unless this is a probability above 0."""
    if not is_number(confident) or not 0.0 < confident <= 1.0:
        raise ValueError(f"confident is a probability, above 0 and at most 1; found {confident!r}.")


def _drop(findings: Findings, image: int, kind: str, score: float) -> Proposed:
    return Proposed(Decision(findings.images.keys[image], "drop"), kind, float(score))


def _free(name: str, names: set[str]) -> str:
    number = 2
    while f"{name} ({number})" in names:
        number += 1
    return f"{name} ({number})"
