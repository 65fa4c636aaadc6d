"""Pairs of images to verify: same identity, or not."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

NO_FOLD = -1


class PairList(NamedTuple):
    """T pairs of images.

    first, second: int64 (T,) image indices. same: bool (T,), True for a genuine pair, False for an impostor pair.
    fold: int64 (T,). Pairs of fold 0 and up are what accuracy is measured on; those of fold -1 (NO_FOLD) count only
        where classes are measured apart, as TAR@FAR, ROC and EER are.
    missing: pairs of a list that were left out because their images are not there.
    """

    first: IntArray
    second: IntArray
    same: BoolArray
    fold: IntArray
    missing: int = 0


def make_pairs(
    labels: ArrayLike,
    *,
    genuine_per_identity: int = 20,
    impostors: int | None = None,
    folds: int = 10,
    seed: int = 0,
) -> PairList:
    """Draw genuine and impostor pairs from labelled images; no pair occurs twice, in either order.

    labels: (N,) whole numbers.
    genuine_per_identity: at most so many genuine pairs of one identity, drawn at random, so that one person with many
        images does not decide the result.
    impostors: how many impostor pairs, uniform over all pairs of images with different labels. Default: the larger of
        30,000 and ten times the genuine pairs (few impostors leave low FARs unmeasurable), or all where fewer exist.
    folds, seed: see below; the result depends on the arguments alone.

    Accuracy means little where one class outnumbers the other ten times, so it is measured on a balanced part: with n
    the size of the smaller class, n genuine and n impostor pairs get folds 0 to `folds` - 1 (fewer folds only where n
    is smaller than that), each with as many of one as of the other; the rest get fold -1. Genuine pairs of one
    identity lie in one fold, or in two or more where a boundary falls among them: their scores are alike, and spread
    over all folds they would make the accuracy look more certain than it is.

    Genuine pairs come first. Raises ValueError where no genuine or no impostor pair exists, or where more impostors
    are asked for than exist.
    """
    if genuine_per_identity < 1 or folds < 1:
        raise ValueError(f"genuine_per_identity and folds must be at least 1; got {genuine_per_identity} and {folds}.")
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"labels must be whole numbers of shape (N,); got {array.dtype} {array.shape}.")
    rng = np.random.default_rng(seed)
    order = np.argsort(array, kind="stable").astype(np.int64)  # images, identity by identity
    _, starts, counts = np.unique(array[order], return_index=True, return_counts=True)
    genuine = order[_genuine_positions(starts, counts, genuine_per_identity, rng)]
    impostor = order[_impostor_positions(starts, counts, len(genuine), impostors, rng)]
    balanced = min(len(genuine), len(impostor))
    fold_of = np.full(len(genuine) + len(impostor), NO_FOLD, dtype=np.int64)
    fold_of[:balanced] = contiguous_folds(balanced, min(folds, balanced))
    fold_of[len(genuine) : len(genuine) + balanced] = contiguous_folds(balanced, min(folds, balanced))
    pairs = np.concatenate([genuine, impostor])
    same = np.arange(len(pairs)) < len(genuine)
    return PairList(pairs[:, 0].copy(), pairs[:, 1].copy(), same, fold_of)


def contiguous_folds(number: int, folds: int) -> IntArray:
    """Fold of each of `number` things in order: equal parts, the first ones larger by one where it does not divide."""
    return np.repeat(np.arange(folds), [len(part) for part in np.array_split(np.arange(number), folds)]).astype(
        np.int64
    )


def _genuine_positions(starts: IntArray, counts: IntArray, cap: int, rng: np.random.Generator) -> IntArray:
    """(G, 2) positions in the sorted images, identity by identity in random order."""
    parts = []
    for identity in rng.permutation(len(counts)):
        existing = int(counts[identity]) * (int(counts[identity]) - 1) // 2
        if existing == 0:
            continue
        number = rng.choice(existing, cap, replace=False) if existing > cap else np.arange(existing)
        # Pair number p of images i < j is p = j (j - 1) / 2 + i.
        j = ((1 + np.sqrt(1 + 8 * number.astype(np.float64))) / 2).astype(np.int64)
        i = number - j * (j - 1) // 2
        parts.append(starts[identity] + np.stack([i, j], axis=1))
    if not parts:
        raise ValueError(
            f"no genuine pair exists: each of {len(counts):,} identities has a single image. Verification needs "
            "identities with at least two."
        )
    return np.concatenate(parts)


def _impostor_positions(
    starts: IntArray, counts: IntArray, genuine: int, wanted: int | None, rng: np.random.Generator
) -> IntArray:
    """(M, 2) positions in the sorted images, in random order."""
    ends = np.repeat(starts + counts, counts)
    partners = int(counts.sum()) - ends  # of each image: those of later identities, so that each pair counts once
    first_number = np.concatenate([[0], np.cumsum(partners)])
    existing = int(first_number[-1])
    if existing == 0:
        raise ValueError("no impostor pair exists: all images are of one identity. Verification needs at least two.")
    if wanted is not None and not 1 <= wanted <= existing:
        raise ValueError(f"{wanted:,} impostor pairs were asked for; from 1 to {existing:,} can be had.")
    size = min(max(10 * genuine, 30_000), existing) if wanted is None else wanted
    number = rng.choice(existing, size, replace=False)
    i = np.searchsorted(first_number, number, side="right") - 1
    return np.stack([i, ends[i] + number - first_number[i]], axis=1)
