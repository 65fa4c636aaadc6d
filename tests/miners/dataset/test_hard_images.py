import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from metricface.miners.dataset import hard_images
from metricface.miners.dataset.calibration import Found, Sample
from metricface.miners.dataset.hard_images import HardNegatives, hard_negatives, hardest_positives
from metricface.miners.dataset.index import EmbeddingIndex
from metricface.miners.dataset.rows import UnitRows
from tests.miners.dataset.faces import cosines, faces


def uneven(seed: int = 0, dim: int = 10) -> tuple[Any, NDArray[Any]]:
    """Identities of 1 to 8 images, shuffled."""
    rows, labels = faces(12, 8, dim, seed=seed, within=0.9)
    kept = np.flatnonzero(np.random.default_rng(seed).random(len(labels)) < 0.1 + 0.08 * ((labels + 3) // 7))
    return rows[kept], labels[kept]


def hard_negatives_by_loops(
    rows: NDArray[Any],
    labels: NDArray[Any],
    k: int,
    ranks: tuple[int, int],
    absolute: float | None,
    relative: float | None,
    max_cos: float | None,
) -> tuple[list[list[int]], list[int], list[tuple[int, int]]]:
    """Chosen images, numbers skipped as too close, and those skipped, of each anchor: one at a time in float64."""
    cos = cosines(rows, rows)
    chosen, skipped, twins = [], [], []
    for anchor in range(len(rows)):
        limit = np.inf if max_cos is None else max_cos
        positives = [cos[anchor, i] for i in range(len(rows)) if labels[i] == labels[anchor] and i != anchor]
        if positives:
            closest = max(positives)
            if absolute is not None:
                limit = min(limit, closest - absolute)
            if relative is not None:
                limit = min(limit, closest * (1 - relative) if closest > 0 else closest * (1 + relative))
        others = [i for i in np.argsort(-cos[anchor]).tolist() if labels[i] != labels[anchor]][: ranks[1]]
        close = [i for i in others if cos[anchor, i] > limit]
        chosen.append([i for i in others[ranks[0] - 1 :] if i not in close][:k])
        skipped.append(len(close))
        twins += [(anchor, i) for i in close[:k]]
    return chosen, skipped, twins


def check_negatives(found: HardNegatives, rows: NDArray[Any], expected: Any, k: int) -> None:
    chosen, skipped, twins = expected
    assert found.indices.tolist() == [row + [-1] * (k - len(row)) for row in chosen]
    assert found.too_close.tolist() == skipped
    assert list(zip(found.twins.anchor.tolist(), found.twins.image.tolist(), strict=True)) == twins
    cos = cosines(rows, rows)
    there = found.indices >= 0
    np.testing.assert_allclose(found.cos[there], np.take_along_axis(cos, found.indices, axis=1)[there], atol=2e-6)
    assert np.isneginf(found.cos[~there]).all()
    np.testing.assert_allclose(found.twins.cos, cos[found.twins.anchor, found.twins.image], atol=2e-6)


@pytest.mark.parametrize("tile", [1024, 3])
def test_the_hardest_positive_is_the_farthest_of_the_identity_by_a_loop(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hard_images, "TILE_ROWS", tile)
    if tile == 3:
        monkeypatch.setattr(hard_images, "BLOCK_NUMBERS", 150)
    rows, labels = uneven()
    assert {1, 2, 6} <= set(np.unique(labels, return_counts=True)[1].tolist())
    found = hardest_positives(rows, labels)
    cos = cosines(rows, rows)
    for anchor in range(len(rows)):
        others = [i for i in range(len(rows)) if labels[i] == labels[anchor] and i != anchor]
        if others:
            assert found.indices[anchor] == min(others, key=lambda i: cos[anchor, i])
            assert found.cos[anchor] == pytest.approx(min(cos[anchor, others]), abs=2e-6)
        else:
            assert found.indices[anchor] == -1
            assert np.isnan(found.cos[anchor])


def test_an_image_is_never_its_own_positive_but_its_copy_may_be() -> None:
    rows = np.repeat(faces(2, 1, 6)[0], [4, 2], axis=0)
    found = hardest_positives(rows, [9, 9, 9, 9, 4, 4])
    assert found.indices[4:].tolist() == [5, 4]
    assert (found.indices[:4] != np.arange(4)).all()
    assert (found.indices[:4] < 4).all()
    np.testing.assert_allclose(found.cos, 1.0, atol=1e-6)


def test_identities_of_one_image_alone_have_no_positive() -> None:
    found = hardest_positives(faces(5, 1, 6)[0], ["e", "d", "c", "b", "a"])
    assert found.indices.tolist() == [-1] * 5
    assert np.isnan(found.cos).all()


@pytest.mark.parametrize(
    ("k", "ranks", "absolute", "relative", "max_cos"),
    [
        (3, (1, 10), None, None, None),
        (3, (4, 10), None, None, None),
        (2, (1, 6), 0.1, None, None),
        (2, (3, 8), None, 0.3, None),
        (4, (2, 9), 0.05, 0.2, 0.4),
        (3, (1, 5), None, None, 0.0),
        (1, (1, 1), 0.0, None, None),
        (20, (1, 20), 0.0, 0.5, None),
        (60, (1, 60), 0.1, None, None),
    ],
)
def test_hard_negatives_are_those_of_a_loop(
    k: int, ranks: tuple[int, int], absolute: float | None, relative: float | None, max_cos: float | None
) -> None:
    rows, labels = uneven()
    found = hard_negatives(
        rows, labels, k, ranks=ranks, absolute_margin=absolute, relative_margin=relative, max_cos=max_cos
    )
    check_negatives(found, rows, hard_negatives_by_loops(rows, labels, k, ranks, absolute, relative, max_cos), k)
    assert found.cos.dtype == np.float32


def test_a_relative_margin_keeps_negatives_below_a_positive_of_negative_cosine() -> None:
    angles = np.radians([0.0, 100.0, 105.0, 95.0])  # cosines with the first: -0.17 its positive, -0.26, -0.09
    rows = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    found = hard_negatives(rows, [0, 0, 1, 2], 2, ranks=(1, 2), relative_margin=0.2)
    assert found.indices[0].tolist() == [2, -1]  # -0.26 <= 1.2 * -0.17; (1 - 0.2) * -0.17 would let -0.139 pass
    assert found.too_close[0] == 1
    found = hard_negatives(rows, [0, 0, 1, 2], 2, ranks=(1, 2), relative_margin=0.6)
    assert found.indices[0].tolist() == [-1, -1]
    assert found.too_close[0] == 2


def test_a_mislabelled_twin_is_skipped_and_returned() -> None:
    rows, labels = faces(20, 5, 16, within=0.4)
    rows[7] = rows[8] * 1.5 + 0.01  # one face
    assert labels[7] != labels[8]
    found = hard_negatives(rows, labels, 3, relative_margin=0.05)
    pairs = set(zip(found.twins.anchor.tolist(), found.twins.image.tolist(), strict=True))
    assert {(7, 8), (8, 7)} <= pairs
    assert not ((found.indices[7] == 8) | (found.indices[8] == 7)).any()


def test_a_crowd_of_own_images_does_not_hide_the_negatives_and_blocks_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crowd, _ = faces(1, 150, 8, within=0.05)
    rest, labels = faces(9, 3, 8, seed=1)
    rows, labels = np.concatenate((crowd, rest)), np.concatenate((np.full(150, 1000), labels))
    expected = hard_negatives_by_loops(rows, labels, 4, (1, 20), 0.1, None, None)
    check_negatives(hard_negatives(rows, labels, 4, ranks=(1, 20), absolute_margin=0.1), rows, expected, 4)
    monkeypatch.setattr("metricface.miners.dataset.other_identities.NEIGHBOURS_PER_BLOCK", 100)
    check_negatives(hard_negatives(rows, labels, 4, ranks=(1, 20), absolute_margin=0.1), rows, expected, 4)


def test_no_table_of_all_pairs_is_held() -> None:
    rows, labels = faces(1500, 4, 8)
    index = EmbeddingIndex(rows)
    tracemalloc.start()
    hard_negatives(rows, labels, 3, absolute_margin=0.1, index=index)
    hardest_positives(rows, labels)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * len(rows) ** 2 / 2  # of 144 MB; found: 18


def test_one_identity_has_no_negatives() -> None:
    found = hard_negatives(*faces(1, 6, 8), 2, absolute_margin=0.1)
    assert (found.indices == -1).all()
    assert len(found.twins.anchor) == 0
    assert found.too_close.tolist() == [0] * 6


def test_an_approximate_index_finds_nearly_the_same_negatives() -> None:
    rows, labels = faces(300, 6, 16, within=0.8)
    exact = hard_negatives(rows, labels, 5, ranks=(1, 10))
    index = EmbeddingIndex(rows, kind="ivf", target_recall=0.95)
    found = hard_negatives(rows, labels, 5, ranks=(1, 10), index=index)
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(exact.indices, found.indices, strict=True)]) > 0.93
    assert (labels[found.indices] != labels[:, None]).all()


@pytest.mark.parametrize("sizes", [np.full(20, 200), np.r_[600, 300, np.full(300, 4)]])
def test_own_images_which_are_found_easily_do_not_count_as_recall(sizes: Any) -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = generator.normal(size=(len(sizes), 48))[labels] + 0.7 * generator.normal(size=(len(labels), 48))
    index = EmbeddingIndex(rows, kind="ivf", target_recall=0.9)
    assert index.effort < index._engine.efforts[-1]
    found = hard_negatives(rows, labels, 10, ranks=(1, 10), index=index)
    exact = hard_negatives(rows, labels, 10, ranks=(1, 10), kind="flat")
    assert (found.cos >= exact.cos[:, -1:] - 2e-6).mean() >= 0.89


def test_a_sample_knows_the_nearest_of_other_identities_by_a_loop() -> None:
    rows, labels = faces(30, 5, 8, within=1.0)
    codes = np.unique(labels, return_inverse=True)[1]
    exact = cosines(rows, rows)
    for own, known in ((np.eye(150, dtype=bool), None), (codes[:, None] == codes, codes)):
        sample = Sample(UnitRows(rows), seed=0, codes=known)
        order = np.argsort(-np.where(own, -2.0, exact), axis=1)
        every, hidden = list(range(150)), set(range(0, 150, 7))

        def search(queries: Any, k: int, every: list[int] = every, hidden: set[int] = hidden) -> Found:
            cos = cosines(queries, rows)
            cos[:, list(hidden)] = -np.inf
            near = np.argsort(-cos, axis=1)[:, :k]
            return Found(near, np.take_along_axis(cos, near, axis=1).astype(np.float32))

        expected = [np.mean([other not in hidden for other in order[row, :6]]) for row in sample.at]
        np.testing.assert_allclose(sample.shares(search, 6), expected)
    one = Sample(UnitRows(rows), seed=0, codes=np.zeros(150, dtype=np.int64))
    assert one.shares(search, 6).tolist() == [1.0] * 150  # nobody else to find


@pytest.mark.parametrize("margin", ["absolute_margin", "relative_margin"])
def test_a_copy_under_another_label_is_no_nearer_than_a_copy_under_the_same(margin: str) -> None:
    rows = np.repeat(faces(200, 1, 32)[0], 3, axis=0)
    labels = np.arange(600) // 3 * 2 + (np.arange(600) % 3 == 2)
    margins: dict[str, Any] = {margin: 0.0}
    found = hard_negatives(rows, labels, 1, ranks=(1, 5), **margins)
    twice = np.flatnonzero(np.arange(600) % 3 < 2)  # anchors that have a positive, a copy of theirs
    assert (found.too_close[twice] == 0).all()


def test_ranks_beyond_the_set_are_all_there_are() -> None:
    rows, labels = faces(6, 3, 8)
    expected = hard_negatives(rows, labels, 2, ranks=(2, 15))
    found = hard_negatives(rows, labels, 2, ranks=(2, 10**9))
    np.testing.assert_array_equal(found.indices, expected.indices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be"),
        ({"k": 3, "ranks": 5}, "ranks are"),
        ({"k": 3, "ranks": None}, "ranks are"),
        ({"k": 3, "ranks": (1, 2)}, r"must hold k=3 images; found \(1, 2\)"),
        ({"k": 3, "ranks": (0, 9)}, "counted from 1"),
        ({"k": 3, "absolute_margin": -0.1}, "absolute_margin must be"),
        ({"k": 3, "relative_margin": float("nan")}, "relative_margin must be"),
        ({"k": 3, "max_cos": 2.0}, "max_cos is a cosine"),
    ],
)
def test_wrong_arguments_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hard_negatives(*faces(5, 2, 4), **arguments)
