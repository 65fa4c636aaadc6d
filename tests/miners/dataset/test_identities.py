from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from metricface.miners.dataset import identities as module
from metricface.miners.dataset.closest_pairs import ClosestPairs
from metricface.miners.dataset.identities import (
    IdentityNeighbours,
    centroids,
    neighbours_from_centroids,
    neighbours_from_images,
)
from metricface.miners.dataset.index import EmbeddingIndex
from samplers.groups import group_by_identity
from tests.miners.dataset.faces import cosines, faces, mean_direction


def closeness_of_images(rows: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    """(C, C) largest cosine of any pair of images of two identities, by loops; the diagonal is -2."""
    names = np.unique(labels)
    cos = cosines(rows, rows)
    found = np.full((len(names), len(names)), -2.0)
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            if i != j:
                found[i, j] = cos[labels == one][:, labels == other].max()
    return found


def check_neighbours(found: IdentityNeighbours, closeness: NDArray[np.float64], k: int, max_cos: float = 2.0) -> None:
    """Exactly the nearest by `closeness` (C, C), without those above max_cos, which are the twins."""
    twins = set()
    without = []
    for row, cos in enumerate(closeness):
        order = [j for j in np.argsort(-cos, kind="stable").tolist() if j != row and cos[j] > -2]
        twins |= {(min(row, j), max(row, j)) for j in order if cos[j] > max_cos}
        order = [j for j in order if cos[j] <= max_cos][:k]
        assert found.rows[row].tolist() == order + [-1] * (k - len(order))
        np.testing.assert_allclose(found.cos[row, : len(order)], cos[order], atol=2e-6)
        assert np.isneginf(found.cos[row, len(order) :]).all()
        without += [] if order else [row]
    pairs = list(zip(found.twins.first.tolist(), found.twins.second.tolist(), strict=True))
    assert pairs == sorted(twins)
    np.testing.assert_allclose(found.twins.cos, [closeness[pair] for pair in pairs], atol=2e-6)
    assert found.without.tolist() == without


def test_a_centroid_is_the_normalised_mean_of_unit_embeddings_whatever_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, labels = faces(17, 5, 12)
    expected = np.stack([mean_direction(rows[labels == name]) for name in np.unique(labels)])
    for numbers in (1 << 22, 12 * 7, 1):
        monkeypatch.setattr("metricface.miners.dataset.rows.BLOCK_NUMBERS", numbers)
        found = centroids(rows, labels)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_centroids_follow_the_table_for_any_labels_and_sources() -> None:
    rows, labels = faces(12, 3, 8)
    names = [f"person {label:+03d}" for label in labels]
    table = group_by_identity(names)
    expected = np.stack([mean_direction(rows[table.images_of(row)]) for row in range(12)])
    for given in (names, np.array(names), np.array(names, dtype=object)):
        np.testing.assert_allclose(centroids(rows, given), expected, atol=1e-6)
    half = torch.from_numpy(rows).half()
    by_label = np.stack([mean_direction(half.numpy()[labels == name]) for name in np.unique(labels)])
    np.testing.assert_allclose(centroids(half, torch.from_numpy(labels)), by_label, atol=1e-6)
    np.testing.assert_allclose(centroids(half, labels.astype(np.int8)), by_label, atol=1e-6)


def test_an_identity_whose_images_cancel_out_gets_its_first_image_and_a_warning() -> None:
    rows = np.array([[3.0, 0.0], [0.0, 2.0], [0.0, -4.0], [1.0, 0.0]], dtype=np.float32)
    with pytest.warns(UserWarning, match=r"images of 1 of 2 identities cancel out \(first: .*8"):
        found = centroids(rows, [5, 8, 8, 5])
    assert found.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_neighbours_from_centroids_are_the_nearest_by_a_loop() -> None:
    rows, labels = faces(50, 4, 10)
    directions = centroids(rows, labels)
    check_neighbours(neighbours_from_centroids(directions, 6), cosines(directions, directions), 6)
    check_neighbours(
        neighbours_from_centroids(torch.from_numpy(3 * directions), 60), cosines(directions, directions), 60
    )


@pytest.mark.parametrize("max_cos", [0.6, 0.3, 0.0, -1.0])
def test_identities_that_are_too_close_are_left_out_and_returned(max_cos: float) -> None:
    directions, _ = faces(40, 1, 6)
    check_neighbours(
        neighbours_from_centroids(directions, 5, max_cos=max_cos), cosines(directions, directions), 5, max_cos
    )


def test_more_twins_than_are_looked_for_leave_fewer_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TWINS", 8)
    directions = np.repeat(faces(4, 1, 6)[0], [30, 5, 1, 1], axis=0)
    found = neighbours_from_centroids(directions, 3, max_cos=0.999)
    assert (found.rows[:30] == -1).all()
    assert (found.rows[30:] >= 0).all()  # 4 twins: enough others are looked through
    assert found.without.tolist() == list(range(30))
    assert set(zip(*found.twins[:2], strict=True)) >= {(i, j) for i in range(30, 35) for j in range(i + 1, 35)}


@pytest.mark.parametrize("vectors", [2, 3])
def test_of_sub_centres_the_closest_pair_counts(vectors: int) -> None:
    weights, _ = faces(20 * vectors, 1, 6)
    cos = cosines(weights, weights).reshape(20, vectors, 20, vectors).max(axis=(1, 3))
    np.fill_diagonal(cos, -2.0)
    check_neighbours(neighbours_from_centroids(weights, 4, vectors_per_class=vectors), cos, 4)
    found = neighbours_from_centroids(weights, 4, vectors_per_class=vectors, max_cos=0.7)
    check_neighbours(found, cos, 4, 0.7)
    assert len(found.twins.cos)


def test_neighbours_from_images_are_the_closest_pairs_by_a_loop() -> None:
    rows, labels = faces(25, 4, 8)
    closeness = closeness_of_images(rows, labels)
    check_neighbours(neighbours_from_images(rows, labels, 5, images=96), closeness, 5)
    check_neighbours(neighbours_from_images(rows, labels, 30, images=96), closeness, 30)
    found = neighbours_from_images(rows, labels, 5, images=96, max_cos=0.5)
    check_neighbours(found, closeness, 5, 0.5)
    assert len(found.twins.cos)


def test_few_images_looked_up_give_true_closest_pairs_of_the_nearest() -> None:
    rows, labels = faces(60, 5, 12)
    closeness = closeness_of_images(rows, labels)
    found = neighbours_from_images(rows, labels, 3, images=4)
    assert found.rows[:, 0].tolist() == closeness.argmax(axis=1).tolist()
    assert (found.rows >= 0).all()
    np.testing.assert_allclose(found.cos, np.take_along_axis(closeness, found.rows, axis=1), atol=2e-6)


def test_a_crowd_of_own_images_does_not_hide_the_others() -> None:
    crowd, _ = faces(1, 200, 8, within=0.05)
    rest, labels = faces(9, 3, 8, seed=1)
    rows, labels = np.concatenate((crowd, rest)), np.concatenate((np.full(200, 1000), labels))
    found = neighbours_from_images(rows, labels, 1, images=2)
    closeness = closeness_of_images(rows, labels)
    assert found.rows[-1, 0] == closeness[-1].argmax()
    assert found.without.tolist() == []


def test_identities_short_of_neighbours_look_once_more_for_more_images() -> None:
    # Nine copies of one face under label 0 stand between label 1 and the others, who see each other only.
    near, far = [[1.0, 0.0, 0.0]] * 9 + [[1.0, 0.1, 0.0]], [[0.0, 1.0, 0.1 * place] for place in range(5)]
    found = neighbours_from_images(np.array(near + far), [0] * 9 + [1, 2, 3, 4, 5, 6], 2, images=3)
    assert found.rows[1].tolist() == [0, 2]
    assert found.without.tolist() == []


def test_one_identity_has_no_neighbours_and_is_reported() -> None:
    rows, labels = faces(1, 6, 8)
    for found in (neighbours_from_images(rows, labels, 2), neighbours_from_centroids(centroids(rows, labels), 2)):
        assert found.rows.tolist() == [[-1, -1]]
        assert np.isneginf(found.cos).all()
        assert found.without.tolist() == [0]
        assert len(found.twins.first) == 0


def test_an_index_given_is_used_and_must_be_over_the_same_rows() -> None:
    rows, labels = faces(20, 4, 8)
    index = EmbeddingIndex(rows, kind="hnsw")
    found = neighbours_from_images(rows, labels, 3, index=index)
    expected = neighbours_from_images(rows, labels, 3, kind="flat")
    assert (found.rows == expected.rows).mean() > 0.9
    with pytest.raises(ValueError, match=r"index holds \(80, 8\) embeddings, but these are \(79, 8\)"):
        neighbours_from_images(rows[1:], labels[1:], 3, index=index)
    neighbours_from_images(rows.copy(), labels, 3, index=index)
    with pytest.raises(ValueError, match="other embeddings than these"):
        neighbours_from_images(rows[::-1].copy(), labels, 3, index=index)
    with pytest.raises(ValueError, match="kind: options of an index"):
        neighbours_from_images(rows, labels, 3, index=index, kind="flat")


def test_pairs_gathered_bit_by_bit_keep_the_largest_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metricface.miners.dataset.closest_pairs.WAITING", 10)
    rng = np.random.default_rng(0)
    pairs, largest = ClosestPairs(9), dict[tuple[int, int], float]()
    for _ in range(30):
        one = rng.integers(0, 9, 5)
        other = (one + rng.integers(1, 9, 5)) % 9
        cos = rng.uniform(-1, 1, 5).astype(np.float32)
        pairs.add(one, other, cos)
        for a, b, c in zip(one.tolist(), other.tolist(), cos.tolist(), strict=True):
            largest[min(a, b), max(a, b)] = max(c, largest.get((min(a, b), max(a, b)), -2.0))
    found = pairs.all()
    assert (
        dict(zip(zip(found.first.tolist(), found.second.tolist(), strict=True), found.cos.tolist(), strict=True))
        == largest
    )
    assert list(largest) != sorted(largest)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == sorted(largest)


@pytest.mark.parametrize("arguments", [{"k": 0}, {"k": 2, "max_cos": 1.5}, {"k": 2, "max_cos": float("nan")}])
def test_wrong_arguments_are_errors(arguments: dict[str, Any]) -> None:
    rows, labels = faces(5, 2, 4)
    with pytest.raises(ValueError, match=r"must be|is a cosine"):
        neighbours_from_centroids(rows, **arguments)
    with pytest.raises(ValueError, match=r"must be|is a cosine"):
        neighbours_from_images(rows, labels, **arguments)


def test_wrong_shapes_are_errors() -> None:
    rows, labels = faces(5, 2, 4)
    with pytest.raises(ValueError, match="10 rows are not a multiple of vectors_per_class=3"):
        neighbours_from_centroids(rows, 2, vectors_per_class=3)
    with pytest.raises(ValueError, match="vectors_per_class must be"):
        neighbours_from_centroids(rows, 2, vectors_per_class=0)
    with pytest.raises(ValueError, match="images must be"):
        neighbours_from_images(rows, labels, 2, images=0)
    with pytest.raises(ValueError, match="10 embeddings need as many labels; found 9"):
        centroids(rows, labels[1:])
    with pytest.raises(ValueError, match="10 embeddings need as many labels; found 9"):
        neighbours_from_images(rows, labels[1:], 2)
