"""The functions on tiles, against sorting and counting."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metricface.distances import Distance, pairwise
from metricface.identities import find_identities
from metricface.miners import kernels
from metricface.tuples import check_batch
from tests.vectors import case

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distances_with_ties(rows: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Few different values, zeros and +inf among them."""
    values = torch.tensor([0.0, 1e-30, 0.5, 1.0, 1.0 + 1e-7, 3.0, torch.inf], dtype=dtype)
    return values[torch.randint(len(values), (rows, columns), generator=seeded(seed))]


@DTYPES
def test_the_first_minimum_is_the_lowest_column_among_equal_ones(dtype: torch.dtype) -> None:
    tile = distances_with_ties(200, 3 * kernels.BLOCK, 0, dtype)
    tile[0] = torch.inf
    assert torch.equal(kernels.first_min(tile), torch.from_numpy(tile.numpy().argmin(axis=1)))


def test_the_farthest_is_the_lowest_allowed_column_among_equal_ones() -> None:
    dist = torch.tensor([[5.0, 2.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    allowed = torch.tensor([[False, True, True, True], [False, False, True, True]])
    assert kernels.farthest(dist, allowed).tolist() == [2, 2]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1e-9, 0.6, torch.inf]))
def test_the_semi_hard_negative_is_the_smallest_distance_inside_the_window(
    seed: int, dtype: torch.dtype, margin: float
) -> None:
    tile = distances_with_ties(8, 2 * kernels.BLOCK, seed, dtype)
    tile[:, seed % 128 :] = torch.inf  # also with few or no negatives
    sq_positive = distances_with_ties(8, 3, seed + 1, dtype).nan_to_num(posinf=2.0)
    negative, found = kernels.semi_hard(sq_positive, sq_positive + margin, tile)
    drawn, found_too = kernels.semi_hard(
        sq_positive, sq_positive + margin, tile, torch.rand(8, 3, generator=seeded(seed))
    )
    assert torch.equal(found, found_too)
    for i in range(8):
        for j in range(3):
            low, high = sq_positive[i, j], sq_positive[i, j] + margin
            window = [n for n in range(tile.shape[1]) if low < tile[i, n] < high]
            assert bool(found[i, j]) == bool(window)
            if window:
                assert negative[i, j] == min(window, key=lambda n: (float(tile[i, n]), n))
                assert drawn[i, j] in window


def test_a_window_whose_upper_end_is_rounded_below_its_lower_end_is_empty() -> None:
    tile = torch.linspace(0.0, 2.0, kernels.BLOCK)[None]
    low = torch.tensor([[1.0]])
    for high in (low, low.nextafter(torch.zeros(1))):
        for uniform in (None, torch.zeros(1, 1)):
            assert not kernels.semi_hard(low, high, tile, uniform)[1].any()


@pytest.mark.parametrize("weights", ["float", "bool"])
def test_draws_follow_the_weights_across_blocks(weights: str) -> None:
    columns, draws = 4 * kernels.BLOCK, 200_000
    chances = torch.rand(columns, generator=seeded(1)).square()
    chances[torch.rand(columns, generator=seeded(2)) < 0.5] = 0.0
    chances[kernels.BLOCK : 2 * kernels.BLOCK] = 0.0  # a block without weight
    row = chances > 0 if weights == "bool" else chances
    found, some = kernels.draw(row[None], torch.rand(1, draws, generator=seeded(3)))
    counts = np.bincount(found[0].numpy(), minlength=columns)
    possible = chances.numpy() > 0
    assert some.all()
    assert counts[~possible].sum() == 0
    expected = row.double().numpy()[possible] / row.double().sum().item() * draws
    assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


class FloatSums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts cumulative sums of floats, which GPUs refuse when asked to be deterministic."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += "cumsum" in str(func) and args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def test_draws_with_equal_chances_add_up_no_floats() -> None:
    allowed = torch.rand(5, 2 * kernels.BLOCK, generator=seeded(0)) < 0.3
    with FloatSums() as sums:  # type: ignore[no-untyped-call]
        kernels.draw(allowed, torch.rand(5, 3, generator=seeded(1)))
    assert sums.number == 0


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53, 1.0])
@pytest.mark.parametrize("column", [0, kernels.BLOCK - 1, kernels.BLOCK, 3 * kernels.BLOCK - 1])
def test_the_only_column_with_weight_is_drawn_even_at_the_ends_of_the_unit_interval(
    uniform: float, column: int
) -> None:
    weights = torch.zeros(2, 3 * kernels.BLOCK)
    weights[0, column] = 1e-30
    found, some = kernels.draw(weights, torch.full((2, 1), uniform, dtype=torch.float64))
    assert found[0].item() == column
    assert some.tolist() == [True, False]


def test_weights_of_distances_are_the_inverse_density_of_the_sphere() -> None:
    inputs, expected = case("C5.log_inv_q")["inputs"], case("C5.log_inv_q")["expected"]
    distances = torch.tensor(inputs["d"], dtype=torch.float64)
    for k, dim in enumerate(inputs["n"]):
        log_inverse = np.array(expected[k * len(distances) : (k + 1) * len(distances)])
        weights = kernels.distance_weights(distances.square()[None], dim, cutoff=0.5, nonzero_loss_cutoff=1.99)
        np.testing.assert_allclose(weights[0].log().numpy(), log_inverse - log_inverse.max(), atol=2e-6)


def test_cutoffs_bound_the_weights_on_both_sides() -> None:
    sq_dist = torch.tensor([[0.0, 0.1, 0.5, 0.7, 1.4, 2.0, torch.inf]]).square()
    weights = kernels.distance_weights(sq_dist.clone(), 128, cutoff=0.5, nonzero_loss_cutoff=1.39)[0]
    assert weights[:3].tolist() == [1.0, 1.0, 1.0]
    assert 0 < weights[3] < 1
    assert weights[4:].tolist() == [0.0, 0.0, 0.0]
    opposite = kernels.distance_weights(sq_dist.clone(), 128, cutoff=0.5, nonzero_loss_cutoff=torch.inf)[0]
    assert torch.isfinite(opposite).all()
    assert opposite[5] == 1.0
    assert opposite[6] == 0.0


@pytest.mark.parametrize(("distance", "upper"), [("euclidean", 6.25), ("squared_euclidean", 4.5), ("cosine", 5.0)])
def test_a_margin_is_measured_in_the_distance_it_belongs_to(distance: Distance, upper: float) -> None:
    assert kernels.sq_reach(torch.tensor([4.0]), 0.5, distance).item() == upper
    assert kernels.sq_reach(torch.tensor([4.0]), torch.inf, distance).item() == torch.inf


@DTYPES
@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
def test_tiles_hold_every_squared_distance_once_and_infinity_where_there_is_no_negative(
    distance: Distance, dtype: torch.dtype
) -> None:
    x, y = (torch.randn(n, 6, generator=seeded(n), dtype=dtype) for n in (11, 70))
    labels, ref_labels = (torch.randint(5, (n,), generator=seeded(n)) for n in (11, 70))
    y[3], ref_labels[3] = x[2], labels[2]
    self_index = torch.full((11,), -1).index_fill(0, torch.tensor(2), 3)
    batch = check_batch(x, labels, y, ref_labels, self_index)
    identities = find_identities(batch)
    expected = pairwise(x, y, "squared_euclidean") if distance != "cosine" else 2 * pairwise(x, y, "cosine")
    negatives, pairs, numbers, anchors = batch.negative_mask(), [], [], []
    for tile in kernels.tiles(batch, identities, distance, tile_rows=4):
        assert tile.sq_negative.shape[1] == 2 * kernels.BLOCK
        negative = negatives[tile.anchors]
        padded = torch.nn.functional.pad(negative, (0, 2 * kernels.BLOCK - 70))
        assert torch.equal(tile.sq_negative.isfinite(), padded)
        torch.testing.assert_close(tile.sq_negative[padded], expected[tile.anchors][negative])
        row, place = tile.is_positive.nonzero(as_tuple=True)
        torch.testing.assert_close(
            tile.sq_positive[row, place], expected[tile.anchors[row], tile.same[row, place]], atol=1e-5, rtol=1e-5
        )
        pairs += list(zip(tile.anchors[row].tolist(), tile.same[row, place].tolist(), strict=True))
        numbers += tile.pair[row, place].tolist()
        anchors += tile.anchors.tolist()
        sizes = identities.size[tile.anchors]
        assert tile.depths == [int((sizes > j).sum()) for j in range(int(sizes.max()))]
        assert all((sizes[:rows] > j).all() for j, rows in enumerate(tile.depths))
    every_pair = [tuple(pair) for pair in batch.positive_mask().nonzero().tolist()]
    assert sorted(pairs) == every_pair
    assert [every_pair[number] for number in numbers] == pairs
    assert identities.size[anchors].tolist() == sorted(identities.size[anchors].tolist(), reverse=True)


def test_tiles_leave_out_anchors_without_a_positive_or_without_a_negative() -> None:
    x, labels = torch.randn(6, 3, generator=seeded(0)), torch.tensor([5, 5, 5, 8, 9, 9])
    batch = check_batch(x, labels)
    found = [tile.anchors.tolist() for tile in kernels.tiles(batch, find_identities(batch), "euclidean")]
    assert found == [[0, 1, 2, 4, 5]]
    alike = check_batch(x, labels * 0)
    assert list(kernels.tiles(alike, find_identities(alike), "euclidean")) == []
