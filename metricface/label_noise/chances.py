"""Where to draw the line: which share of findings beyond a score is to be expected among sound data.

Two situations. Either nearly everything is sound and the scores of sound data are known from the bulk (two images, two
people): `FalseAlarms` extends the bulk's tail. Or what a wrong label looks like is known, since wrong labels can be
simulated (an image among strangers): `wrong_odds` compares what was found with what was simulated.
Source: Efron 2008, Microarrays, Empirical Bayes and the Two-Groups Model; Benjamini and Hochberg 1995 for the shares.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression, isotonic_regression

Floats = NDArray[np.float64]

# The tail is an exponential through these upper quantiles of the scores: first one that many findings cannot reach, and
# then, without what was found, one that is farther out.
TAIL_FROM, SAFE_TAIL_TO, TAIL_TO = 0.5, 0.2, 0.05
SECOND_AT_FROM, SECOND_AT_TO = 1.6783, 0.3554  # 1 - (1 + x) exp(-x) is TAIL_FROM, TAIL_TO there
FEWEST = 20  # scores from which quantiles can be taken
MOST_ROUNDS = 20
# Odds are read where simulated wrong labels lie, but not at their last few, which are chance.
PURE = 0.9
SMALLEST_STEP = 30  # scores


class FalseAlarms(NamedTuple):
    """How many sound items score at least s: trials x TAIL_TO x exp(-(s - start) / scale), from `start` on.

    As for distances, where a score is minus the logarithm: nearest-neighbour distances have a power law as tail.
    """

    start: float
    scale: float

    def expected(self, scores: Floats, trials: int) -> Floats:
        """The expected number of sound items among `trials` that score at least as high, for each score."""
        beyond = np.maximum(scores - self.start, 0.0) / self.scale if self.scale > 0 else (scores <= self.start) * 0.0
        return np.asarray(trials * TAIL_TO * np.exp(-beyond), dtype=np.float64)

    def shares(self, scores: Floats, trials: int) -> Floats:
        """The expected share of sound items among all that score at least as high, (n,) in [0, 1].

        scores: (n,) of all that was found. Never falls as scores fall; 1 within the bulk.
        """
        order = np.argsort(-scores, kind="stable")
        ranked = scores[order]
        rank = np.searchsorted(-ranked, -ranked, side="right")  # equal scores count alike
        share = np.minimum(self.expected(ranked, trials) / rank, 1.0)
        share[ranked <= self.start] = 1.0
        least = np.minimum.accumulate(share[::-1])[::-1]  # a higher score is never worse
        found = np.empty(len(scores))
        found[order] = least
        return found

    def chances(self, scores: Floats, trials: int) -> Floats:
        """The chance of each that it is sound, (n,) in [0, 1]: as `shares`, but of the scores about as high alone."""
        order = np.argsort(-scores, kind="stable")
        ranked = scores[order]
        # For each score, how many sound ones are expected between the one above and it; taken as never falling.
        between = np.diff(self.expected(ranked, trials), prepend=0.0)
        between[ranked <= self.start] = 1.0
        found = np.empty(len(scores))
        found[order] = np.minimum(isotonic_regression(between), 1.0)
        return found


def fit_false_alarms(scores: Floats, *, share: float = 0.1) -> FalseAlarms:
    """Fit the tail of scores of which most, at least 80%, are sound.

    scores: (n,), one for each trial. The tail is fitted again and again without as many of the highest scores as it
    does not explain: those of which fewer than `share` are expected to be sound, less those that are. Raises ValueError
    for fewer than 20 scores: nothing can be said from them.
    """
    if len(scores) < FEWEST:
        raise ValueError(f"{len(scores)} scores are too few to tell usual from unusual ones; {FEWEST} are needed.")
    ranked = np.sort(scores)[::-1]
    tail = _tail(ranked, SAFE_TAIL_TO)
    beyond = 0
    for _ in range(MOST_ROUNDS):
        # Not all of them: a tail cut off at the threshold would seem to be steeper than it is.
        now = int((1.0 - share) * (tail.shares(ranked, len(ranked) - beyond) < share).sum())
        tail = _tail(ranked[now:], TAIL_TO)
        if now == beyond or len(ranked) - now < FEWEST:
            break
        beyond = now
    return tail


def fit_by_second_best(scores: Floats) -> FalseAlarms:
    """Fit the tail of best scores by the second-best score of each trial, which is sound even where the best is not.

    scores: (n,). If sound scores beyond s come at random, lambda(s) of them a trial, then the best is beyond s with the
    probability 1 - exp(-lambda), the second-best with 1 - (1 + lambda) exp(-lambda). lambda(s) is taken as exponential,
    through the two quantiles of `fit_false_alarms`. Raises ValueError for fewer than 20 scores.
    """
    if len(scores) < FEWEST:
        raise ValueError(f"{len(scores)} scores are too few to tell usual from unusual ones; {FEWEST} are needed.")
    low, high = np.quantile(scores, [1.0 - TAIL_FROM, 1.0 - TAIL_TO])
    scale = float(high - low) / float(np.log(SECOND_AT_FROM / SECOND_AT_TO))
    return FalseAlarms(float(high) + scale * float(np.log(SECOND_AT_TO / TAIL_TO)), scale)


def _tail(sound: Floats, share: float) -> FalseAlarms:
    """The exponential through two upper quantiles, from where TAIL_TO is beyond."""
    low, high = np.quantile(sound, [1.0 - TAIL_FROM, 1.0 - share])
    scale = float(high - low) / float(np.log(TAIL_FROM / share))
    return FalseAlarms(float(high) + scale * float(np.log(share / TAIL_TO)), scale)


class Odds(NamedTuple):
    """How likely each item is wrong, and what to expect of a threshold.

    probability: (n,) that the item is wrong, an upper estimate where the scores of sound and wrong items overlap
        everywhere. share: estimated share of wrong items among all. caught: (n,) share of simulated wrong items that
        score at least as high.
    """

    probability: Floats
    share: float
    caught: Floats


def wrong_odds(scores: Floats, simulated: Floats, *, bystanders: Floats | None = None) -> Odds:
    """Compare scores with those of simulated wrong items, and with the bulk of the scores themselves.

    scores: (n,), of sound and wrong items in an unknown proportion; simulated: (m,), of wrong ones; higher is worse.
    P(wrong | s) is the greater of two. share x f_simulated(s) / f_scores(s): the ratio is taken as never falling
    (isotonic regression), and the share as the largest with which there are nowhere more wrong items than items. It
    judges where sound and wrong items overlap, but falls short where true errors look less wrong than simulated ones,
    as with a network that has learnt them by heart. Those stand out from the bulk: 1 - the chance of a false alarm
    (`fit_false_alarms`).
    bystanders: (b,), of sound items that a wrong one spoils, one each; then the share is at most a half.
    Without scores or simulated ones all probabilities are 0.
    """
    if not len(scores) or not len(simulated):
        return Odds(np.zeros(len(scores)), 0.0, np.zeros(len(scores)))
    ratio, highest = _ratios(scores, simulated)
    share = min(1.0, 1.0 / highest)
    if bystanders is not None:
        _, highest = _ratios(scores, np.concatenate([simulated, bystanders]))
        share = min(share, 0.5 / highest)
    probability = np.minimum(share * ratio, 1.0)
    if bystanders is None and len(scores) >= FEWEST:  # bystanders stand out, too
        probability = np.maximum(probability, 1.0 - fit_false_alarms(scores).chances(scores, len(scores)))
    ranked = np.sort(simulated)
    caught = 1.0 - np.searchsorted(ranked, scores, side="left") / len(ranked)
    return Odds(probability, float(probability.mean()), np.asarray(caught, dtype=np.float64))


def _ratios(scores: Floats, simulated: Floats) -> tuple[Floats, float]:
    """f_simulated / f_scores at each score, never falling, and its height where wrong items are purest."""
    pooled = np.concatenate([scores, simulated])
    is_simulated = np.repeat([0.0, 1.0], [len(scores), len(simulated)])
    weight = np.repeat([1.0 / len(scores), 1.0 / len(simulated)], [len(scores), len(simulated)])
    model = IsotonicRegression(y_min=1e-6, y_max=1.0 - 1e-6, out_of_bounds="clip").fit(pooled, is_simulated, weight)
    # Not beyond the last few scores, where a single simulated item would be a step of its own.
    few = min(SMALLEST_STEP, len(scores))
    pure = min(float(np.partition(scores, -few)[-few]), float(np.quantile(simulated, PURE)))
    there = float(model.predict([max(pure, float(np.quantile(simulated, 0.5)))])[0])
    found = model.predict(scores)
    return np.asarray(found / (1.0 - found), dtype=np.float64), max(1.0, there / (1.0 - there))


class Group(NamedTuple):
    """Items of similar size, which share odds. most: None for no limit."""

    name: str
    least: int
    most: int | None
    items: NDArray[np.int64]


def by_size(sizes: NDArray[np.int64], bounds: Sequence[int], fewest: int) -> list[Group]:
    """Group items by their sizes: from each bound up to the next; groups of fewer items join the one below.

    sizes: (n,); bounds: ascending; items below the first are in no group. The lowest joins the next
    above; where all together are fewer than `fewest`, there is no group.
    """
    cuts: list[int] = []  # descending
    for bound in reversed(bounds):
        there = (sizes >= bound) & (sizes < cuts[-1] if cuts else True)
        if there.sum() >= fewest:
            cuts.append(bound)
        elif bound == bounds[0] and cuts:
            cuts[-1] = bound
    groups = []
    for place, least in reversed(list(enumerate(cuts))):
        most = cuts[place - 1] - 1 if place else None
        items = np.flatnonzero((sizes >= least) & (sizes <= most if most is not None else True))
        name = f"{least} or more" if most is None else f"{least}" if most == least else f"{least} to {most}"
        groups.append(Group(name, least, most, items))
    return groups
