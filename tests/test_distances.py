import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metricface.distances import Distance, centred, paired, pairwise, safe_sqrt, unit_rows
from tests import oracles
from tests.vectors import case

EVERY_DISTANCE = pytest.mark.parametrize("distance", get_args(Distance))


def rows(seed: int, count: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(get_args(Distance)), st.integers(0, 5), st.integers(0, 5), st.integers(1, 6), st.integers(0, 99))
def test_pairwise_is_the_definition_for_every_shape(distance: Distance, q: int, r: int, dim: int, seed: int) -> None:
    x, y = rows(seed, q, dim), rows(seed + 1, r, dim)
    if q and r:
        y[0] = x[0]
        x[-1] = 0
    expected = oracles.distances(x.numpy(), y.numpy(), distance)
    np.testing.assert_allclose(pairwise(x, y, distance).numpy(), expected, atol=1e-7)


@EVERY_DISTANCE
def test_paired_is_the_diagonal_of_pairwise(distance: Distance) -> None:
    x, y = rows(0, 20, 16), rows(1, 20, 16)
    torch.testing.assert_close(paired(x, y, distance), pairwise(x, y, distance).diagonal())


@EVERY_DISTANCE
def test_no_pairs_give_an_empty_result_that_still_has_a_gradient(distance: Distance) -> None:
    x = rows(0, 0, 8).requires_grad_()
    found = paired(x, x, distance)
    assert found.shape == (0,)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None


def test_identical_rows_are_at_distance_zero_with_gradient_zero() -> None:
    inputs, expected = case("A0.zero_distance")["inputs"], case("A0.zero_distance")["expected"]
    x = torch.tensor([inputs["x"]], dtype=torch.float64, requires_grad=True)
    found = paired(x, torch.tensor([inputs["y"]], dtype=torch.float64), "euclidean")
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert [found.item(), gradient.norm().item()] == expected["cdist"]


@EVERY_DISTANCE
def test_gradients_are_finite_between_duplicates_and_zero_rows(distance: Distance) -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    (pairwise(x, x, distance).sum() + paired(x, x.flip(0), distance).sum()).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@EVERY_DISTANCE
def test_gradients_are_those_of_the_definition(distance: Distance) -> None:
    x, y = rows(0, 3, 4).requires_grad_(), rows(1, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: pairwise(a, b, distance), (x, y))
    assert torch.autograd.gradcheck(lambda a, b: paired(a, b[:3], distance), (x, y))


def test_the_gradient_of_unit_rows_is_that_of_the_definition() -> None:
    assert torch.autograd.gradcheck(unit_rows, (rows(0, 4, 3).requires_grad_(),))


def test_unit_rows_have_length_one_and_a_zero_row_stays_zero_with_gradient_zero() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    unit = unit_rows(x)
    torch.testing.assert_close(unit.detach(), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    (unit * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1.0, 1e15])
def test_unit_rows_hold_over_thirty_powers_of_ten(scale: float) -> None:
    x = rows(0, 5, 128, torch.float32) * scale
    torch.testing.assert_close(unit_rows(x).norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EVERY_DISTANCE
def test_half_precision_rows_are_measured_in_float32(distance: Distance, dtype: torch.dtype) -> None:
    x = rows(0, 9, 512, dtype)
    for found in (pairwise(x, x, distance), paired(x, x.flip(0), distance)):
        assert found.dtype == torch.float32
    torch.testing.assert_close(pairwise(x, x, distance), pairwise(x.float(), x.float(), distance))


@EVERY_DISTANCE
def test_autocast_does_not_touch_distances(distance: Distance) -> None:
    x = unit_rows(rows(0, 9, 512, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, inside_paired = pairwise(x, x, distance), paired(x, x.flip(0), distance)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, pairwise(x, x, distance), rtol=0, atol=0)
    torch.testing.assert_close(inside_paired, paired(x, x.flip(0), distance), rtol=0, atol=0)


def test_cancellation_never_gives_a_negative_square_or_nan() -> None:
    x = unit_rows(rows(0, 64, 512, torch.float32))
    squares = pairwise(x, x, "squared_euclidean")
    assert squares.min() >= 0
    assert torch.isfinite(pairwise(x, x, "euclidean")).all()
    assert squares.diagonal().max() < 1e-6  # what the docstring promises: sqrt of this is below 1e-3


def test_the_safe_root_is_the_root_above_zero_and_zero_below() -> None:
    torch.testing.assert_close(safe_sqrt(torch.tensor([-1e-9, 0.0, 4.0])), torch.tensor([0.0, 0.0, 2.0]))


def test_opposite_and_right_angled_rows_have_the_distances_of_school_geometry() -> None:
    x, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[-3.0, 0.0], [0.0, 1.0]])
    assert pairwise(x, y, "cosine").tolist() == [[2.0, 1.0]]
    torch.testing.assert_close(pairwise(x, y, "euclidean"), torch.tensor([[5.0, math.sqrt(5.0)]]))


def test_an_unknown_distance_is_an_error_that_lists_the_right_ones() -> None:
    with pytest.raises(ValueError, match=r"'manhattan'.*'euclidean', 'squared_euclidean', 'cosine'"):
        pairwise(torch.ones(1, 1), torch.ones(1, 1), "manhattan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'cosine'"):
        paired(torch.ones(1, 1), torch.ones(1, 1), "cos")  # type: ignore[arg-type]


@EVERY_DISTANCE
@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_rows_close_together_far_from_the_origin_keep_their_distances(distance: Distance, offset: float) -> None:
    x, y = rows(0, 40, 64, torch.float32) + offset, rows(1, 50, 64, torch.float32) + offset
    prepared = [(unit_rows(a) if distance == "cosine" else a).double().numpy() for a in (x, y)]
    expected = oracles.distances(prepared[0], prepared[1], distance)
    rounding = 1e-6 * expected.mean()
    np.testing.assert_allclose(pairwise(x, y, distance).numpy(), expected, atol=rounding, rtol=1e-5)
    np.testing.assert_allclose(
        paired(x, y[:40], distance).numpy(), expected[:, :40].diagonal(), atol=rounding, rtol=1e-5
    )


def test_centring_leaves_a_grid_on_its_grid_and_moves_all_rows_alike() -> None:
    grid = torch.randint(-3, 4, (50, 6), generator=torch.Generator().manual_seed(0)) + torch.tensor(1000.3).round()
    x, y = centred(grid[:20], grid)
    assert torch.equal(x, x.round())
    assert y.mean(dim=0).abs().max() <= y.std()
    raw = rows(2, 50, 6, torch.float32) + 100.0
    moved, _ = centred(raw, raw)
    shift = raw.double() - moved.double()
    assert torch.equal(shift, shift[:1].expand_as(shift))
    assert moved.abs().max() < 10


@pytest.mark.parametrize(
    "rows_", [torch.full((4, 3), 0.1), torch.zeros(4, 3), torch.full((4, 3), 1e-30), torch.full((4, 3), 1e18)]
)
def test_centring_stays_finite_where_all_rows_are_equal(rows_: Tensor) -> None:
    x, y = centred(rows_, rows_)
    assert torch.equal(x, y)
    assert not y.any()


def test_centring_on_no_rows_moves_nothing() -> None:
    x = torch.ones(2, 3)
    assert centred(x, x[:0])[0] is x
