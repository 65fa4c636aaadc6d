"""The functions on blocks of distances, against sorting and counting."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metricface.distances import Distance
from metricface.miners import kernels
from metricface.miners.tiles import RUN, Block
from tests.vectors import case

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distances_with_ties(rows: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Few different values, zeros and +inf among them."""
    values = torch.tensor([0.0, 1e-30, 0.5, 1.0, 1.0 + 1e-7, 3.0, torch.inf], dtype=dtype)
    return values[torch.randint(len(values), (rows, columns), generator=seeded(seed))]


@DTYPES
def test_the_first_extremes_are_the_lowest_columns_among_equal_ones(dtype: torch.dtype) -> None:
    block = distances_with_ties(200, 3 * RUN, 0, dtype)
    block[0] = torch.inf
    for find, expected in (
        (kernels.first_min, block.numpy().argmin(axis=1)),
        (kernels.first_max, block.numpy().argmax(axis=1)),
    ):
        value, column = find(block)
        assert column.tolist() == expected.tolist()
        assert torch.equal(value, block.gather(1, column[:, None])[:, 0])


def test_the_farthest_and_the_closest_are_the_lowest_allowed_columns_among_equal_ones() -> None:
    dist = torch.tensor([[5.0, 2.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    allowed = torch.tensor([[False, True, True, True, True], [False, False, True, True, True]])
    assert kernels.farthest(dist, allowed).tolist() == [2, 2]
    assert kernels.closest(dist, allowed).tolist() == [1, 2]


def in_blocks(row: Tensor, order: list[int]) -> list[Block]:
    """Three blocks of equal width, in an order."""
    width = row.shape[1] // 3
    return [Block(k * width, row[:, k * width : (k + 1) * width].clone()) for k in order]


ORDERS = pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [2, 1, 0]])


@ORDERS
@DTYPES
def test_what_was_best_so_far_does_not_depend_on_the_order_in_which_blocks_arrive(
    order: list[int], dtype: torch.dtype
) -> None:
    row = distances_with_ties(200, 3 * RUN, 4, dtype)
    row[0] = torch.inf
    anchors = torch.arange(200)
    nearest, farthest = kernels.Nearest(anchors, dtype), kernels.Farthest(anchors, dtype)
    for block in in_blocks(row, order):
        nearest.see(block)
        farthest.see(block)
    assert nearest.column[1:].tolist() == row[1:].argmin(dim=1).tolist()
    finite = row.masked_fill(row == torch.inf, -1.0)
    assert farthest.column[1:].tolist() == finite[1:].argmax(dim=1).tolist()
    assert nearest.sq_dist[0] == torch.inf


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([1e-9, 0.6, torch.inf]),
    st.permutations([0, 1, 2]),
    st.booleans(),
)
def test_the_semi_hard_negative_is_the_smallest_distance_inside_the_window(
    seed: int, dtype: torch.dtype, margin: float, order: list[int], at_least: bool
) -> None:
    row = distances_with_ties(8, 3 * RUN, seed, dtype)
    row[:, seed % 192 :] = torch.inf  # also with few or no negatives
    sq_positive = distances_with_ties(8, 3, seed + 1, dtype).nan_to_num(posinf=2.0)
    state = kernels.SemiHard(sq_positive, sq_positive + margin, [8, 8, 5], at_least=at_least)
    for block in in_blocks(row, order):
        state.see(block)
    for j, rows in enumerate([8, 8, 5]):
        inside = state.inside(Block(0, row), j)
        for i in range(rows):
            low, high = sq_positive[i, j], sq_positive[i, j] + margin
            window = [
                n
                for n in range(row.shape[1])
                if (low < row[i, n] or (at_least and low == row[i, n])) and row[i, n] < high
            ]
            assert bool(state.found[i, j]) == bool(window)
            assert inside[i].nonzero()[:, 0].tolist() == window
            if window:
                assert state.column[i, j] == min(window, key=lambda n: (float(row[i, n]), n))
    assert not state.found[5:, 2].any()


def test_a_window_whose_upper_end_is_rounded_below_its_lower_end_is_empty() -> None:
    block = Block(0, torch.linspace(0.0, 2.0, RUN)[None])
    low = torch.tensor([[1.0]])
    for high in (low, low.nextafter(torch.zeros(1))):
        state = kernels.SemiHard(low, high, [1])
        state.see(block)
        assert not state.found.any()
        assert not state.inside(block, 0).any()


@pytest.mark.parametrize("weights", ["float", "bool"])
def test_draws_follow_the_weights_across_blocks(weights: str) -> None:
    columns, draws = 4 * RUN, 200_000
    chances = torch.rand(columns, generator=seeded(1)).square()
    chances[torch.rand(columns, generator=seeded(2)) < 0.5] = 0.0
    chances[RUN : 2 * RUN] = 0.0  # a block without weight
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
    allowed = torch.rand(5, 2 * RUN, generator=seeded(0)) < 0.3
    with FloatSums() as sums:  # type: ignore[no-untyped-call]
        kernels.draw(allowed, torch.rand(5, 3, generator=seeded(1)))
    assert sums.number == 0


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53, 1.0])
@pytest.mark.parametrize("column", [0, RUN - 1, RUN, 3 * RUN - 1])
def test_the_only_column_with_weight_is_drawn_even_at_the_ends_of_the_unit_interval(
    uniform: float, column: int
) -> None:
    weights = torch.zeros(2, 3 * RUN)
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
