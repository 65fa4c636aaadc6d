"""Verification: are two images of one identity? Scores of pairs to accuracy, TAR@FAR, ROC, AUC and EER.

A pair is accepted as genuine where its score is at least the threshold. FAR is the share of impostor pairs accepted,
TAR the share of genuine pairs accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import auc, roc_curve

from metricface.evaluation.pairs import BoolArray, IntArray, contiguous_folds

FloatArray = NDArray[np.float64]


class TarAtFar(NamedTuple):
    """TAR at one FAR. tar, threshold: None where the impostors are too few to measure that FAR."""

    far: float
    tar: float | None
    threshold: float | None


@dataclass(frozen=True, eq=False)
class VerificationReport:
    """Figures of one set of scored pairs.

    accuracy, accuracy_se: mean over folds of the accuracy at the threshold that is best on the other folds, and the
        standard error of that mean, std(ddof=1) / sqrt(folds).
    fold_accuracies, fold_thresholds: one for each fold.
    accuracy_genuine, accuracy_impostors: numbers of pairs that have a fold, which accuracy is measured on.
    threshold: the best over all these pairs, for use on new images. No accuracy is reported at it: it was chosen
        on the very pairs it would be measured on.
    tar_at_far: in the order asked for. auc, eer: of all pairs, as the ROC and TAR@FAR are.
    genuine, impostors: numbers of all pairs.
    roc_far, roc_tar: float64 (R,), both ascending from 0 to 1, a thinned ROC for plots; figures use all of it.
    """

    accuracy: float
    accuracy_se: float
    fold_accuracies: tuple[float, ...]
    fold_thresholds: tuple[float, ...]
    accuracy_genuine: int
    accuracy_impostors: int
    threshold: float
    tar_at_far: tuple[TarAtFar, ...]
    auc: float
    eer: float
    genuine: int
    impostors: int
    roc_far: FloatArray
    roc_tar: FloatArray

    def as_dict(self) -> dict[str, Any]:
        """Return all figures but the ROC, of types that JSON knows."""
        plain = {name: value for name, value in vars(self).items() if not name.startswith("roc_")}
        return plain | {
            "fold_accuracies": list(self.fold_accuracies),
            "fold_thresholds": list(self.fold_thresholds),
            "tar_at_far": [point._asdict() for point in self.tar_at_far],
        }


def evaluate(
    scores: ArrayLike,
    same: ArrayLike,
    *,
    fold: ArrayLike | None = None,
    folds: int = 10,
    far: Sequence[float] = (1e-1, 1e-2, 1e-3),
) -> VerificationReport:
    """Figures of scored pairs.

    scores: (T,), higher is more alike; pass distances negated. same: (T,) bool or 0/1, whether a pair is genuine.
    fold: (T,) fold of each pair, as in PairList; a negative fold keeps a pair out of the accuracy. Without it, each
        class is cut into `folds` equal parts in the order given, which for the pairs of LFW's pairs.txt gives its own
        folds; accuracy then weighs classes by their numbers.
    far: each in (0, 1].

    Thresholds for accuracy are exact: all ways to cut the sorted scores are tried, not a grid. Between equally
    accurate cuts the one with the widest gap between neighbouring scores wins, then the higher; the threshold lies in
    the middle of the gap.
    TAR at a FAR is conservative: the largest TAR of any threshold whose FAR does not exceed it. With fewer than 1 / FAR
    impostors it is None: such a FAR cannot be told from 0.
    EER is where the ROC, linearly interpolated between its points, has FAR = 1 - TAR.

    Raises ValueError for NaN or infinite scores, lengths that differ, one class only, fewer pairs of a class than
    folds, or a single fold.
    Sources: Huang et al. 2007, Labeled Faces in the Wild (folds, standard error).
    """
    values, is_same = _checked(scores, same)
    genuine, impostor = np.sort(values[is_same]), np.sort(values[~is_same])
    fold_of = _default_folds(is_same, folds) if fold is None else _checked_folds(fold, is_same)
    measured = fold_of >= 0
    accuracies, thresholds = _over_folds(values[measured], is_same[measured], fold_of[measured])
    # Every point of the curve: sklearn's default drops those on straight lines, which thinning does better.
    roc_far, roc_tar, _ = roc_curve(is_same, values, drop_intermediate=False)
    shown = _thinned(roc_far, roc_tar)
    return VerificationReport(
        accuracy=float(np.mean(accuracies)),
        accuracy_se=float(np.std(accuracies, ddof=1) / np.sqrt(len(accuracies))),
        fold_accuracies=tuple(accuracies),
        fold_thresholds=tuple(thresholds),
        accuracy_genuine=int(is_same[measured].sum()),
        accuracy_impostors=int((~is_same[measured]).sum()),
        threshold=best_threshold(values[measured], is_same[measured]),
        tar_at_far=tuple(_tar_at_far(genuine, impostor, target) for target in far),
        auc=float(auc(roc_far, roc_tar)),
        eer=_equal_error_rate(roc_far, roc_tar),
        genuine=len(genuine),
        impostors=len(impostor),
        roc_far=roc_far[shown],
        roc_tar=roc_tar[shown],
    )


def best_threshold(scores: FloatArray, same: BoolArray) -> float:
    """Return the threshold of highest accuracy when score >= threshold is accepted; the tie rule is `evaluate`'s.

    scores: (T,) finite, T >= 1. same: (T,) bool.
    """
    order = np.argsort(scores, kind="stable")
    ranked, genuine = scores[order], same[order]
    # Cut c rejects the c lowest scores: correct are the impostors below it and the genuine pairs from it upwards.
    rejected_impostors = np.concatenate([[0], np.cumsum(~genuine)])
    accepted_genuine = int(genuine.sum()) - np.concatenate([[0], np.cumsum(genuine)])
    correct = rejected_impostors + accepted_genuine
    # Equal scores cannot be cut apart. The outermost cuts have no gap and win only where they alone are best.
    gap = np.concatenate([[0.0], np.diff(ranked), [0.0]])
    possible = gap > 0
    possible[[0, -1]] = True
    correct = np.where(possible, correct, -1)
    best = np.flatnonzero(correct == correct.max())
    cut = int(best[gap[best] == gap[best].max()][-1])
    if cut == 0:
        return float(ranked[0])
    if cut == len(ranked):
        return float(np.nextafter(ranked[-1], np.inf))
    return _between(float(ranked[cut - 1]), float(ranked[cut]))


def _between(lower: float, upper: float) -> float:
    """Return a threshold that rejects `lower` and accepts `upper`, in their middle where floats allow."""
    middle = lower + (upper - lower) / 2
    return middle if middle > lower else upper


def _over_folds(scores: FloatArray, same: BoolArray, fold: IntArray) -> tuple[list[float], list[float]]:
    accuracies, thresholds = [], []
    for left_out in np.unique(fold):
        test = fold == left_out
        threshold = best_threshold(scores[~test], same[~test])
        accuracies.append(float(np.mean((scores[test] >= threshold) == same[test])))
        thresholds.append(threshold)
    return accuracies, thresholds


def _tar_at_far(genuine: FloatArray, impostor: FloatArray, far: float) -> TarAtFar:
    """genuine, impostor: ascending scores of each class."""
    if not 0.0 < far <= 1.0:
        raise ValueError(f"a FAR must lie above 0 and be at most 1; got {far}.")
    allowed = int(np.floor(len(impostor) * far + 1e-9))  # 1e-9: 1000 * 0.003 must allow 3, whatever it rounds to
    if allowed < 1:
        return TarAtFar(far, None, None)
    if allowed >= len(impostor):  # all may be accepted
        return TarAtFar(far, 1.0, float(min(impostor[0], genuine[0])))
    must_reject = impostor[-allowed - 1]
    first_genuine = int(np.searchsorted(genuine, must_reject, side="right"))
    first_impostor = int(np.searchsorted(impostor, must_reject, side="right"))
    above = [
        array[first] for array, first in ((genuine, first_genuine), (impostor, first_impostor)) if first < len(array)
    ]
    threshold = _between(float(must_reject), float(min(above))) if above else float(np.nextafter(must_reject, np.inf))
    return TarAtFar(far, 1.0 - first_genuine / len(genuine), threshold)


def _equal_error_rate(far: FloatArray, tar: FloatArray) -> float:
    """Walk the ROC's segments: FAR + TAR - 1 rises along it from -1 to 1."""
    excess = far + tar - 1.0
    after = int(np.searchsorted(excess, 0.0, side="left"))
    before = after - 1
    step = -excess[before] / (excess[after] - excess[before])
    return float(far[before] + step * (far[after] - far[before]))


def _thinned(far: FloatArray, tar: FloatArray, points: int = 200) -> IntArray:
    """Indices of points to draw: even in TAR, even in the logarithm of FAR, and both ends."""
    lowest = far[far > 0].min()
    by_far = np.searchsorted(far, np.geomspace(lowest, 1.0, points), side="right") - 1  # the top of each vertical step
    by_tar = np.searchsorted(tar, np.linspace(0.0, 1.0, points))
    chosen = np.concatenate([by_far, by_tar, [0, len(far) - 1]])
    return np.unique(np.clip(chosen, 0, len(far) - 1)).astype(np.int64)


def _checked(scores: ArrayLike, same: ArrayLike) -> tuple[FloatArray, BoolArray]:
    values, is_same = np.asarray(scores, dtype=np.float64), np.asarray(same)
    if values.ndim != 1 or values.shape != is_same.shape:
        raise ValueError(f"scores and same must be of one length (T,); got {values.shape} and {is_same.shape}.")
    if not np.isin(is_same, (0, 1)).all():
        raise ValueError("same must hold only True and False, or 1 and 0.")
    is_same = is_same.astype(np.bool_)
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise ValueError(
            f"{wrong:,} of {len(values):,} scores are NaN or infinite. Look for NaN in the embeddings: training "
            "may have diverged."
        )
    genuine = int(is_same.sum())
    if genuine in (0, len(values)):
        raise ValueError(
            f"verification needs genuine and impostor pairs; there are {genuine:,} genuine and "
            f"{len(values) - genuine:,} impostor pairs."
        )
    return values, is_same


def _default_folds(same: BoolArray, folds: int) -> IntArray:
    genuine, impostors = int(same.sum()), int((~same).sum())
    if not 2 <= folds <= min(genuine, impostors):
        raise ValueError(
            f"{folds} folds need at least 2 folds and as many pairs of each class; there are {genuine:,} genuine and "
            f"{impostors:,} impostor pairs. Pass fewer folds, or more pairs."
        )
    fold = np.empty(len(same), dtype=np.int64)
    fold[same] = contiguous_folds(genuine, folds)
    fold[~same] = contiguous_folds(impostors, folds)
    return fold


def _checked_folds(fold: ArrayLike, same: BoolArray) -> IntArray:
    array = np.asarray(fold)
    if array.shape != same.shape or array.dtype.kind not in "iu":
        raise ValueError(f"fold must be whole numbers of shape {same.shape}; got {array.dtype} {array.shape}.")
    found = np.unique(array[array >= 0])
    if len(found) < 2:
        raise ValueError(
            f"accuracy needs pairs in at least 2 folds, to choose the threshold on other pairs than it is measured on; "
            f"these {len(same):,} pairs have {len(found)}. Add pairs, or leave fold out."
        )
    return array.astype(np.int64)
