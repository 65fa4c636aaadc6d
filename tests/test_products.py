import pytest
import torch
from torch import Tensor

from metricface import products
from metricface.products import nearest_others, others_logsumexp, reduce_others
from tests.largest import LargestTensor

SMALL_BLOCKS = pytest.mark.parametrize(("block", "rows"), [(1 << 19, 512), (24, 4), (7, 3)])


def example(queries: int = 9, references: int = 13) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (queries, references))
    return x.requires_grad_(), y.requires_grad_()


def in_loops(x: Tensor, y: Tensor, left_out: list[list[int]]) -> Tensor:
    rows = []
    for query, out in zip(x, left_out, strict=True):
        kept = [query @ reference for j, reference in enumerate(y) if j not in out]
        rows.append(torch.stack(kept).logsumexp(0) if kept else query.new_tensor(-torch.inf))
    return torch.stack(rows)


@SMALL_BLOCKS
def test_log_sum_exp_over_all_but_some_references_is_that_of_loops(
    block: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "CPU_BLOCK", block)
    monkeypatch.setattr(products, "CPU_ROWS", rows)
    x, y = example()
    left_out = [
        [0, 12, -1],
        [-1, -1, -1],
        [5, 6, 7],
        [0, 0, 0],
        [3, -1, 3],
        [11, 12, 0],
        [1, 2, -1],
        [6, 6, 6],
        [8, 2, 5],
    ]
    found = others_logsumexp(x, y, torch.tensor(left_out))
    expected = in_loops(x, y, left_out)
    assert torch.allclose(found, expected, rtol=1e-12)
    weights = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), (x, y)),
        torch.autograd.grad((expected * weights).sum(), (x, y)),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-14)


def test_a_row_with_nothing_left_has_minus_infinity_and_no_gradient() -> None:
    x, y = example(2, 3)
    found = others_logsumexp(x, y, torch.tensor([[0, 1, 2], [0, -1, -1]]))
    assert found[0].item() == -torch.inf
    (by_x,) = torch.autograd.grad(torch.nn.functional.softplus(found).sum(), x)
    assert not by_x[0].any()
    assert by_x[1].any()


@pytest.mark.parametrize(("queries", "references"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sides_give_empty_results_and_gradients_of_zeros(queries: int, references: int) -> None:
    x, y = example(queries, references)
    found = others_logsumexp(x, y, torch.full((queries, 1), -1))
    assert found.shape == (queries,)
    assert (found == -torch.inf).all()
    by_x, by_y = torch.autograd.grad(found.sum(), (x, y))
    assert not by_x.any()
    assert not by_y.any()


def test_large_products_neither_overflow_nor_lose_the_small_ones() -> None:
    x = torch.tensor([[1.0]], requires_grad=True)
    y = torch.tensor([[500.0], [499.0], [-500.0], [0.0]])
    found = others_logsumexp(x, y, torch.tensor([[-1]]))
    assert found.item() == pytest.approx(500.0 + torch.tensor([1.0]).exp().reciprocal().log1p().item())
    assert torch.isfinite(torch.autograd.grad(found.sum(), x)[0]).all()
    assert others_logsumexp(x, y, torch.tensor([[0]])).item() == pytest.approx(499.0)


@SMALL_BLOCKS
def test_the_nearest_others_are_those_of_a_sort(block: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CPU_BLOCK", block)
    monkeypatch.setattr(products, "CPU_ROWS", rows)
    x, y = example()
    own = torch.arange(9) % 13
    for k in (1, 3, 12, 13):
        found = nearest_others(x, y, own[:, None], k, unit_references=True)
        values = (x @ torch.nn.functional.normalize(y).T).scatter(1, own[:, None], -torch.inf)
        expected = values.sort(dim=1, descending=True).indices[:, :k]
        assert torch.equal(found[:, :12], expected[:, :12])
        assert (found[:, 12:] == -1).all()  # the own one is none


def test_no_tensor_holds_all_products() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, 2, generator=generator).requires_grad_() for n in (1500, 3000))
    with LargestTensor() as largest:
        torch.autograd.backward([others_logsumexp(x, y, torch.arange(1500)[:, None]).sum()])
    assert largest.numbers <= products.CPU_BLOCK


def test_references_of_length_zero_have_product_zero_and_no_gradient() -> None:
    x, y = example(3, 4)
    with torch.no_grad():
        y[2] = 0.0
    labels = torch.tensor([0, 1, 2])
    found = reduce_others(x, y, labels[:, None], labels, unit_references=True)
    assert found.own[2].item() == 0.0
    torch.autograd.backward([found.reduced.sum(), found.own.sum()])
    assert y.grad is not None
    assert not y.grad[2].any()
    assert torch.isfinite(y.grad).all()


def test_autocast_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(n, 64, generator=generator) for n in (5, 30))
    plain = others_logsumexp(x, y, torch.full((5, 1), -1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(others_logsumexp(x, y, torch.full((5, 1), -1)), plain)


@pytest.mark.parametrize("unit", [False, True])
def test_rows_without_an_own_reference_have_own_products_of_zero_without_gradient(unit: bool) -> None:
    x, y = example(4, 6)
    rows = torch.tensor([2, -1, 0, -1])
    found = reduce_others(x, y, rows[:, None], rows, unit_references=unit)
    vectors = torch.nn.functional.normalize(y) if unit else y
    own = torch.stack([(x[0] * vectors[2]).sum(), x.new_zeros(()), (x[2] * vectors[0]).sum(), x.new_zeros(())])
    out = torch.nn.functional.one_hot(rows.clamp_min(0), 6).bool() & (rows >= 0)[:, None]
    logits = (x @ vectors.T).masked_fill(out, -torch.inf)
    expected = (logits.logsumexp(dim=1), own)
    for mine, theirs in zip((found.reduced, found.own), expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12)
        weights = torch.linspace(-1, 2, 4, dtype=torch.float64)
        for one, other in zip(
            torch.autograd.grad((mine * weights).sum(), (x, y), retain_graph=True),
            torch.autograd.grad((theirs * weights).sum(), (x, y), retain_graph=True),
            strict=True,
        ):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)
    assert found.own_length[1].item() == 0.0


def test_own_products_that_are_given_reach_the_transform_and_have_its_gradient() -> None:
    x, y = example(3, 5)
    own = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    nothing = torch.full((3, 1), -1)
    found = reduce_others(x, y, nothing, None, own=own, transform=lambda products, own: products * own, reduction="sum")
    expected = ((x @ y.T) * own[:, None]).sum(dim=1)
    assert torch.allclose(found.reduced, expected, rtol=1e-12)
    assert torch.equal(found.own, own)
    for mine, theirs in zip(
        torch.autograd.grad((found.reduced.square() + found.own).sum(), (x, y, own)),
        torch.autograd.grad((expected.square() + own).sum(), (x, y, own)),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=1e-10)
