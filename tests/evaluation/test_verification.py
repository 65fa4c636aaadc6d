import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc, roc_auc_score, roc_curve

from metricface.evaluation.pairs import BoolArray
from metricface.evaluation.verification import FloatArray, best_threshold, evaluate
from tests.vectors import case

# Few distinct values, so that ties are common.
PAIRS = st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=40)


def split(pairs: list[tuple[int, bool]]) -> tuple[FloatArray, BoolArray]:
    return np.array([score / 8 for score, _ in pairs]), np.array([same for _, same in pairs])


def correct_at(threshold: float, scores: FloatArray, same: BoolArray) -> int:
    return sum((score >= threshold) == genuine for score, genuine in zip(scores, same, strict=True))


def threshold_by_trying_all(scores: FloatArray, same: BoolArray) -> float:
    """Every cut in turn; most correct, then the widest gap, then the highest. Outside the scores there is no gap."""
    values = sorted(set(scores.tolist()))
    cuts = [(values[0], 0.0), (float(np.nextafter(values[-1], np.inf)), 0.0)]
    cuts += [((low + high) / 2, high - low) for low, high in pairwise(values)]
    ranked = sorted((correct_at(threshold, scores, same), gap, threshold) for threshold, gap in cuts)
    return float(ranked[-1][2])


@settings(max_examples=200, derandomize=True, deadline=None)
@given(pairs=PAIRS)
def test_the_best_threshold_is_that_of_trying_every_cut(pairs: list[tuple[int, bool]]) -> None:
    scores, same = split(pairs)
    assert best_threshold(scores, same) == pytest.approx(threshold_by_trying_all(scores, same), abs=1e-12)


def test_between_equally_good_cuts_the_widest_gap_wins() -> None:
    # Cuts at .15, .25 and .6 are wrong once; the gap from .3 to .9 is the widest.
    scores = np.array([0.1, 0.2, 0.3, 0.9])
    same = np.array([False, True, False, True])
    assert best_threshold(scores, same) == pytest.approx(0.6)


def test_a_threshold_between_neighbouring_floats_still_divides_them() -> None:
    low = 0.5
    high = float(np.nextafter(low, 1.0))
    threshold = best_threshold(np.array([low, high]), np.array([False, True]))
    assert low < threshold <= high


def test_spherefaces_example_finds_the_middle_of_the_gap() -> None:
    example = case("E1b.sphereface_threshold")
    scores, same = np.array(example["inputs"]["score"]), np.array(example["inputs"]["label"], dtype=bool)
    assert best_threshold(scores, same) == pytest.approx(example["expected"]["best"])


def folds_by_hand(scores: FloatArray, same: BoolArray, fold: list[int], choose: Any) -> list[float]:
    accuracies = []
    for left_out in sorted(set(fold)):
        train = np.array([f != left_out for f in fold])
        threshold = choose(scores[train], same[train])
        accuracies.append(correct_at(threshold, scores[~train], same[~train]) / int((~train).sum()))
    return accuracies


def test_facenets_fold_accuracies_come_out_of_the_same_folds_with_its_grid_and_tie_rule() -> None:
    """The published example takes thresholds 0, 0.01 .. 3.99 of squared distance, and the first of the best.

    Ours are exact, and of two equally accurate gaps take the wider: (1.203, 1.603) over (.903, 1.103) in the second
    fold and (.903, 1.103) over (.603, .703) in the fourth, which changes these two folds and not the mean.
    """
    example = case("E1.lfw_kfold")
    dist, same = np.array(example["inputs"]["d"]), np.array(example["inputs"]["same"], dtype=bool)
    fold = np.repeat(np.arange(4), 3)

    def grid(scores: FloatArray, genuine: BoolArray) -> float:
        thresholds = np.arange(0, 4, 0.01)
        correct = [int(((-scores < t) == genuine).sum()) for t in thresholds]
        return float(np.nextafter(-thresholds[int(np.argmax(correct))], np.inf))  # d < t is score > -t

    expected = example["expected"]
    by_grid = folds_by_hand(-dist, same, fold.tolist(), grid)
    assert by_grid == pytest.approx(expected["fold_acc"], abs=1e-6)
    report = evaluate(-dist, same, fold=fold, far=())
    exact = folds_by_hand(-dist, same, fold.tolist(), threshold_by_trying_all)
    assert exact == pytest.approx([2 / 3, 1 / 3, 1, 2 / 3])
    assert report.fold_accuracies == pytest.approx(exact)
    assert report.fold_thresholds[1] == pytest.approx(-1.403)
    assert report.accuracy == pytest.approx(expected["mean"], abs=1e-6)
    assert report.accuracy_se == pytest.approx(np.std(exact, ddof=1) / 2)
    assert np.std(by_grid, ddof=1) / 2 == pytest.approx(expected["sem_lfw"], abs=1e-6)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(pairs=PAIRS, seed=st.integers(0, 99))
def test_folds_are_scored_at_the_threshold_of_the_others(pairs: list[tuple[int, bool]], seed: int) -> None:
    scores, same = split([*pairs, (3, True), (5, False)])
    fold = np.random.default_rng(seed).integers(0, 3, len(scores))
    fold[:2] = (0, 1)
    report = evaluate(scores, same, fold=fold)
    assert report.fold_accuracies == pytest.approx(folds_by_hand(scores, same, fold.tolist(), threshold_by_trying_all))


def test_pairs_without_a_fold_count_in_the_roc_but_not_in_the_accuracy() -> None:
    rng = np.random.default_rng(0)
    same = np.arange(200) < 100
    scores = rng.normal(size=200) + 2 * same
    fold = np.concatenate([np.arange(100) % 5, np.arange(100) % 5])
    alone = evaluate(scores, same, fold=fold)
    scores, same = np.append(scores, np.full(300, 9.0)), np.append(same, np.zeros(300, bool))
    joined = evaluate(scores, same, fold=np.append(fold, np.full(300, -1)))
    assert joined.fold_accuracies == alone.fold_accuracies
    assert joined.threshold == alone.threshold
    assert (joined.accuracy_genuine, joined.accuracy_impostors) == (100, 100)
    assert (joined.genuine, joined.impostors) == (100, 400)
    assert joined.auc < 0.3 < alone.auc


def test_without_folds_each_class_is_cut_in_order_which_for_lfw_gives_its_own_folds() -> None:
    rng = np.random.default_rng(1)
    same = np.tile(np.repeat([True, False], 30), 10)  # LFW's order: genuine then impostor pairs, fold by fold
    scores = rng.normal(size=600) + same
    named = evaluate(scores, same, fold=np.repeat(np.arange(10), 60))
    assert evaluate(scores, same).fold_accuracies == named.fold_accuracies


def tar_by_trying_all(scores: FloatArray, same: BoolArray, far: float) -> float:
    best = 0.0
    for threshold in [*scores.tolist(), float(scores.max()) + 1]:
        accepted = scores >= threshold
        if accepted[~same].mean() <= far:
            best = max(best, float(accepted[same].mean()))
    return best


def test_tar_at_far_is_conservative_on_the_published_example() -> None:
    example = case("E2.tar_at_far")
    scores, same = np.array(example["inputs"]["score"]), np.array(example["inputs"]["label"], dtype=bool)
    fars = [float(far) for far in example["expected"]]
    report = evaluate(scores, same, folds=2, far=fars)
    for point, expected in zip(report.tar_at_far, example["expected"].values(), strict=True):
        assert tar_by_trying_all(scores, same, point.far) == pytest.approx(expected)
        # Five impostors cannot show a FAR below 1 in 5.
        assert point.tar == (None if point.far < 0.2 else pytest.approx(expected))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(pairs=PAIRS, far=st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.75, 1.0]))
def test_tar_at_far_is_the_best_of_all_thresholds_within_the_far(pairs: list[tuple[int, bool]], far: float) -> None:
    scores, same = split([*pairs, (3, True), (5, False), (4, True), (4, False)])
    (point,) = evaluate(scores, same, folds=2, far=[far]).tar_at_far
    if (~same).sum() * far < 1 - 1e-9:
        assert point.tar is None
        assert point.threshold is None
        return
    assert point.tar == pytest.approx(tar_by_trying_all(scores, same, far))
    assert point.threshold is not None
    accepted = scores >= point.threshold  # the threshold does what it says
    assert accepted[~same].mean() <= far + 1e-12
    assert accepted[same].mean() == pytest.approx(point.tar)


@pytest.mark.parametrize(
    ("impostors", "far", "allowed"), [(1000, 0.003, 3), (100, 0.29, 29), (3000, 0.001, 3), (999, 0.001, 0)]
)
def test_a_far_that_the_impostors_just_reach_is_not_lost_to_rounding(impostors: int, far: float, allowed: int) -> None:
    scores = np.append(np.arange(impostors), impostors - allowed - 0.5)
    same = np.arange(impostors + 1) == impostors
    (point,) = evaluate(scores, same, fold=np.arange(impostors + 1) % 2, far=[far]).tar_at_far
    assert point.tar == (1.0 if allowed else None)
    scores[-1] -= 1
    (point,) = evaluate(scores, same, fold=np.arange(impostors + 1) % 2, far=[far]).tar_at_far
    assert point.tar == (0.0 if allowed else None)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(pairs=PAIRS)
def test_auc_counts_pairs_in_the_right_order_and_half_of_the_ties(pairs: list[tuple[int, bool]]) -> None:
    scores, same = split([*pairs, (3, True), (5, False), (4, True), (4, False)])
    right = [(g > i) + 0.5 * (g == i) for g in scores[same] for i in scores[~same]]
    assert evaluate(scores, same, folds=2).auc == pytest.approx(np.mean(right))


def eer_by_bisection(scores: FloatArray, same: BoolArray) -> float:
    """Follow the ROC by its length from (0, 0); FAR - (1 - TAR) rises along it."""
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    along = np.arange(len(far))
    low, high = 0.0, float(len(far) - 1)
    for _ in range(80):
        middle = (low + high) / 2
        if np.interp(middle, along, far) + np.interp(middle, along, tar) < 1:
            low = middle
        else:
            high = middle
    return float(np.interp(high, along, far))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(pairs=PAIRS)
def test_eer_is_where_the_roc_crosses_the_diagonal(pairs: list[tuple[int, bool]]) -> None:
    scores, same = split([*pairs, (3, True), (5, False), (4, True), (4, False)])
    assert evaluate(scores, same, folds=2).eer == pytest.approx(eer_by_bisection(scores, same), abs=1e-9)


def test_auc_and_eer_of_the_published_example() -> None:
    for name in ("auc", "eer"):
        example = case(f"E3.{name}")
        report = evaluate(example["inputs"]["score"], example["inputs"]["label"], folds=2)
        assert getattr(report, name) == pytest.approx(example["expected"])


def test_perfect_and_reversed_scores_give_the_ends_of_every_scale() -> None:
    same = np.arange(40) < 20
    perfect = evaluate(same.astype(float), same, far=[0.1])
    assert (perfect.accuracy, perfect.accuracy_se, perfect.auc, perfect.eer) == (1.0, 0.0, 1.0, 0.0)
    assert perfect.tar_at_far[0].tar == 1.0
    assert perfect.threshold == 0.5
    reverse = evaluate(-same.astype(float), same, far=[0.1])
    assert (reverse.auc, reverse.eer, reverse.tar_at_far[0].tar) == (0.0, 1.0, 0.0)


def test_equal_scores_everywhere_say_nothing() -> None:
    same = np.arange(40) < 20
    report = evaluate(np.zeros(40), same, far=[0.1])
    assert (report.accuracy, report.auc, report.eer, report.tar_at_far[0].tar) == (0.5, 0.5, 0.5, 0.0)


def test_the_drawn_roc_is_short_rises_from_end_to_end_and_lies_on_the_whole_one() -> None:
    rng = np.random.default_rng(0)
    same = np.arange(30_000) < 3000
    scores = rng.normal(size=30_000) + 2 * same
    report = evaluate(scores, same)
    assert len(report.roc_far) <= 402
    assert (report.roc_far[0], report.roc_tar[0], report.roc_far[-1], report.roc_tar[-1]) == (0, 0, 1, 1)
    assert (np.diff(report.roc_far) >= 0).all()
    assert (np.diff(report.roc_tar) >= 0).all()
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    whole = set(zip(far.tolist(), tar.tolist(), strict=True))
    assert set(zip(report.roc_far.tolist(), report.roc_tar.tolist(), strict=True)) <= whole
    assert auc(report.roc_far, report.roc_tar) == pytest.approx(roc_auc_score(same, scores), abs=2e-3)
    for far_limit in (1e-3, 1e-2):  # low FARs are drawn as finely as high ones
        assert ((report.roc_far > far_limit / 10) & (report.roc_far <= far_limit)).sum() >= 20


def test_float32_scores_are_taken_as_they_are() -> None:
    rng = np.random.default_rng(0)
    same = np.arange(400) % 2 == 0
    scores = (rng.normal(size=400) + same).astype(np.float32)
    assert evaluate(scores, same).as_dict() == evaluate(scores.astype(np.float64), same.astype(int)).as_dict()


def test_the_report_goes_into_json() -> None:
    same = np.arange(40) < 20
    figures = evaluate(np.linspace(1, 0, 40), same).as_dict()
    assert json.loads(json.dumps(figures))["tar_at_far"][2] == {"far": 0.001, "tar": None, "threshold": None}
    assert "roc_far" not in figures


@pytest.mark.parametrize(
    ("scores", "same", "options", "message"),
    [
        ([0.1, np.nan, 0.3, np.inf], [1, 0, 1, 0], {}, "2 of 4 scores are NaN or infinite"),
        ([0.1, 0.2], [1, 1], {}, "2 genuine and 0 impostor"),
        ([0.1, 0.2], [0, 0], {}, "0 genuine and 2 impostor"),
        ([], [], {}, "0 genuine and 0 impostor"),
        ([0.1, 0.2], [1], {}, r"one length.*\(2,\) and \(1,\)"),
        ([0.1, 0.2], [1, 2], {}, "True and False"),
        ([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], {}, "10 folds need"),
        ([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], {"folds": 1}, "at least 2 folds"),
        ([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], {"fold": [0, 0, 0, -1]}, "at least 2 folds.*4 pairs have 1"),
        ([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], {"fold": [0, 1]}, r"fold must be whole numbers of shape \(4,\)"),
        ([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], {"folds": 2, "far": [0.0]}, "above 0"),
        ([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], {"folds": 2, "far": [1.5]}, "at most 1"),
    ],
)
def test_what_cannot_be_measured_says_why(
    scores: list[float], same: list[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(scores, same, **options)
