"""Pairs of identities that show one person: within a set, or across a training and a test set."""

from typing import NamedTuple

import numpy as np

from metricface.label_noise.chances import FEWEST, FalseAlarms, fit_by_second_best
from metricface.label_noise.people import ROWS_PER_BLOCK, Floats, Index, Nearest, People

DEFAULT_FALSE_SHARE = 0.1
PARTNERS = 10  # of each identity that are looked at


class SamePerson(NamedTuple):
    """Pairs of identities, the highest score first; the first `found` of them are findings.

    After those with evidence above 0 come those without, which are no findings whatever their score. Pairs beyond the
    findings are listed for those who want to draw the line elsewhere.
    """

    first: Index  # (P,) rows of the set's identities
    second: Index  # (P,) likewise, first < second; across sets, rows of the other set's
    score: Floats  # (P,) how far the evidence stands out
    evidence: Floats  # (P,) that both are one person, in nats
    false_share: Floats  # (P,) expected share of different people among the pairs up to this one
    found: int
    threshold: float  # least score of a finding; infinite where there is none
    tail: FalseAlarms | None  # how different people score; None where there are too few identities to say


def find_same_person(
    people: People,
    other: People | None = None,
    *,
    false_share: float = DEFAULT_FALSE_SHARE,
    least: float | None = None,
) -> SamePerson:
    """Compare each identity with those near it: how far the evidence that two identities are one person stands out.

    The score of a pair is its evidence less that of either's second to tenth nearest identity, by their standard
    deviation (at least 1 nat), averaged over the two: some people have many look-alikes (adaptive score normalisation;
    Matejka et al. 2017, Analysis of Score Normalization in Multilingual Speaker Recognition).
    other: a second set (say, of test people) with the model of the first, `People(..., model=people.model)`; then each
    of its identities is compared with those of the first.
    false_share: findings are the pairs up to which at most this share is expected to be two people. What to expect is
    taken from `people`: the score of each identity with its second nearest, a stranger also where the nearest is not,
    whose upper half is continued as an exponential. least: draws the line at this score instead.
    Returns SamePerson. Raises ValueError for a share outside (0, 1), or a model that is not the first set's.
    """
    if not 0.0 < false_share < 1.0:
        raise ValueError(f"false_share is a share of the findings, above 0 and below 1; found {false_share}.")
    if other is not None and other.model is not people.model:
        raise ValueError("the other set has a model of its own; make it with People(..., model=people.model).")
    near = _partners(people, people)
    usual = _usual(near)
    within = _pairs(near, usual, usual)
    strangers = _second_best(near, usual)
    tail = fit_by_second_best(strangers) if len(strangers) >= FEWEST else None
    if other is None:
        pairs = _once(within)
        trials = len(people.images) // 2  # two people who stand out are one another's nearest
    else:
        theirs = _partners(other, people)
        # Of a test person who is in the set, the nearest is that person, and the others are strangers, too.
        pairs = _pairs(theirs, _usual(theirs), usual)
        pairs = _Pairs(pairs.second, pairs.first, pairs.score, pairs.evidence)
        trials = len(other.images)
    against = pairs.evidence <= 0.0
    order = np.lexsort((pairs.second, pairs.first, -pairs.score, against))
    first, second, score, evidence = pairs.first[order], pairs.second[order], pairs.score[order], pairs.evidence[order]
    shares = np.ones(len(order))
    likely = len(order) - int(against.sum())
    if tail is not None:
        shares[:likely] = tail.shares(score[:likely], trials)
    found = int((shares[:likely] <= false_share if least is None else score[:likely] >= least).sum())
    threshold = float(score[found - 1]) if found else float("inf")
    return SamePerson(first, second, score, evidence, shares, found, threshold, tail)


class _Usual(NamedTuple):
    """Mean and standard deviation of the evidence for an identity's second to tenth nearest other: (C,) each."""

    mean: Floats
    spread: Floats


class _Pairs(NamedTuple):
    first: Index  # the query
    second: Index
    score: Floats
    evidence: Floats


def _partners(queries: People, people: People) -> Nearest:
    """The identities of `people` with the greatest evidence for each of the queries', block by block."""
    parts = []
    for start in range(0, len(queries.images), ROWS_PER_BLOCK):
        rows = np.arange(start, min(start + ROWS_PER_BLOCK, len(queries.images)))
        itself = rows if queries is people else None
        parts.append(people.nearest(queries.means[rows], queries.images[rows], PARTNERS, leave_out=itself))
    return Nearest(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _usual(near: Nearest, rank: int = 0) -> _Usual:
    """What is usual beyond the neighbour of this rank."""
    beyond = near.evidence[:, rank + 1 :]
    there = np.isfinite(beyond)
    number = np.maximum(there.sum(axis=1), 1)
    mean = np.where(there, beyond, 0.0).sum(axis=1) / number
    variance = np.where(there, (beyond - mean[:, None]) ** 2, 0.0).sum(axis=1) / number
    return _Usual(mean, np.maximum(np.sqrt(variance), 1.0))


def _pairs(near: Nearest, queries: _Usual, people: _Usual) -> _Pairs:
    there = near.rows >= 0
    first, second = np.nonzero(there)[0], near.rows[there]
    evidence = near.evidence[there]
    score = 0.5 * (
        (evidence - queries.mean[first]) / queries.spread[first]
        + (evidence - people.mean[second]) / people.spread[second]
    )
    return _Pairs(first, second, score, evidence)


def _second_best(near: Nearest, people: _Usual) -> Floats:
    """The score of each identity with its second nearest, as if that were its nearest."""
    second = Nearest(near.rows[:, 1:2], near.evidence[:, 1:2])
    return _pairs(second, _usual(near, rank=1), people).score


def _once(pairs: _Pairs) -> _Pairs:
    """Each pair once, first < second."""
    low, high = np.minimum(pairs.first, pairs.second), np.maximum(pairs.first, pairs.second)
    _, index = np.unique(np.stack([low, high]), axis=1, return_index=True)
    return _Pairs(low[index], high[index], pairs.score[index], pairs.evidence[index])
