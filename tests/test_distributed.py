from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metricface.distributed import (
    gather,
    gather_plain,
    logsumexp_over_ranks,
    max_over_ranks,
    own_rows,
    raise_on_all_ranks,
    rank,
    row_counts,
    sum_over_ranks,
    summed_gradient,
    world_size,
)
from tests.ranks import on_ranks

COUNTS = {1: [5], 2: [3, 0], 4: [2, 0, 4, 1]}  # rows of each rank
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
WORLDS = pytest.mark.parametrize("ranks", COUNTS)


def rows_of(ranks: int, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (3,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [(10 * torch.randn(count, *shape, generator=generator)).to(dtype) for count in COUNTS[ranks]]


def mixed(joined: Tensor) -> Tensor:
    """A loss of the joined rows in which every two of them meet."""
    return (joined @ joined.T).tanh().sum() + joined.square().sum()


def partial_loss(x: Tensor, number: int) -> Tensor:
    """What a rank makes of the same x: (N,)."""
    return (x * (number + 1)).sin().sum(dim=1) - number


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((7, 4), (3, 4)))
    return x, weight


def trunk() -> nn.Linear:
    layer = nn.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(batch()[1])
        layer.bias.fill_(0.25)
    return layer


def message(act: Callable[[], object]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def logsumexp_inputs(number: int) -> Tensor:
    infinity = torch.inf
    rows = torch.tensor(
        [[1.0, 2.0, 3.0, 4.0], [900.0, 1000.0, 990.0, 1.0], [-1000.0, -999.0, -infinity, -infinity], [-infinity] * 4],
        dtype=torch.float64,
    )
    return rows[:, number]


def everything(ranks: int) -> dict[str, Any]:
    """What one of so many ranks sees, in each of the tests below."""
    mine = rank()
    found: dict[str, Any] = {"rank": mine, "world_size": world_size()}
    for dtype in TYPES:
        for shape in ((), (3,), (2, 2)):
            found[f"plain {dtype} {shape}"] = gather_plain(rows_of(ranks, dtype, shape)[mine])
    found["counts"] = row_counts(rows_of(ranks)[mine])
    for averaged in (True, False):
        x = rows_of(ranks)[mine].requires_grad_()
        joined = gather(x, averaged=averaged)
        torch.autograd.backward([mixed(joined)])
        found[f"gather {averaged}"] = (joined.detach(), x.grad)
    x = rows_of(ranks)[mine].requires_grad_(mine == 0)
    joined = gather(x, averaged=False)
    torch.autograd.backward([mixed(summed_gradient(joined) / ranks)])  # waits for ranks without a gradient of their own
    found["only rank 0 needs a gradient"] = x.grad
    found["none needs a gradient"] = gather(rows_of(ranks)[mine], averaged=True).requires_grad

    x = batch()[0].requires_grad_()
    total = sum_over_ranks(partial_loss(summed_gradient(x), mine))
    torch.autograd.backward([total.square().sum()])
    found["sum"] = (total.detach(), x.grad)
    y = logsumexp_inputs(mine).requires_grad_()
    value = logsumexp_over_ranks(y)
    torch.autograd.backward([(value[:3] * torch.tensor([1.0, 2.0, 3.0])).sum()])
    found["logsumexp"] = (value.detach(), y.grad)
    found["nan"] = logsumexp_over_ranks(torch.tensor([torch.nan if mine == ranks - 1 else 0.0]))
    found["max"] = max_over_ranks(torch.tensor([[mine, -mine]]))

    layer = DistributedDataParallel(trunk())
    joined = gather(layer(batch()[0].tensor_split(ranks)[mine]), averaged=True)
    torch.autograd.backward([mixed(joined)])
    found["ddp"] = [parameter.grad for parameter in layer.parameters()]

    found["other widths"] = message(lambda: gather(torch.ones(2, 1 + mine), averaged=True))
    found["other types"] = message(lambda: gather_plain(torch.ones(2, dtype=torch.int64 if mine else torch.float64)))
    found["refused"] = message(
        lambda: raise_on_all_ranks(ValueError(f"mine, {mine}") if mine % 2 else None, torch.device("cpu"))
    )
    found["not refused"] = message(lambda: raise_on_all_ranks(None, torch.device("cpu")))
    return found


@cache
def seen(ranks: int) -> list[dict[str, Any]]:
    return on_ranks(ranks, everything, ranks)


@WORLDS
def test_ranks_know_their_number_and_how_many_they_are(ranks: int) -> None:
    assert [(one["rank"], one["world_size"]) for one in seen(ranks)] == [(r, ranks) for r in range(ranks)]


@WORLDS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_rows_of_every_type_and_number_are_joined_in_rank_order(
    ranks: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    expected = torch.cat(rows_of(ranks, dtype, shape))
    for one in seen(ranks):
        found = one[f"plain {dtype} {shape}"]
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        assert one["counts"] == COUNTS[ranks]


@WORLDS
@pytest.mark.parametrize("averaged", [True, False])
def test_a_replicated_loss_has_the_slice_of_the_joined_gradient_times_the_ranks_where_they_are_averaged(
    ranks: int, averaged: bool
) -> None:
    whole = torch.cat(rows_of(ranks)).requires_grad_()
    torch.autograd.backward([mixed(whole)])
    assert whole.grad is not None
    for own, one in zip(torch.split(whole.grad, COUNTS[ranks]), seen(ranks), strict=True):
        joined, gradient = one[f"gather {averaged}"]
        assert torch.equal(joined, whole.detach())
        assert torch.allclose(gradient, own * (ranks if averaged else 1), rtol=1e-12)


@WORLDS
def test_ranks_whose_rows_need_no_gradient_take_part_in_the_backward_pass_of_the_others(ranks: int) -> None:
    whole = torch.cat(rows_of(ranks)).requires_grad_()
    torch.autograd.backward([mixed(whole / ranks)])
    assert whole.grad is not None
    gradients = [one["only rank 0 needs a gradient"] for one in seen(ranks)]
    assert torch.allclose(gradients[0], ranks * whole.grad[: COUNTS[ranks][0]], rtol=1e-12)
    assert all(gradient is None for gradient in gradients[1:])
    assert not any(one["none needs a gradient"] for one in seen(ranks))


@WORLDS
def test_through_ddp_a_replicated_loss_gives_the_gradients_of_one_process_on_the_joined_batch(ranks: int) -> None:
    layer = trunk()
    torch.autograd.backward([mixed(layer(batch()[0]))])
    for one in seen(ranks):
        for mine, parameter in zip(one["ddp"], layer.parameters(), strict=True):
            assert parameter.grad is not None
            assert torch.allclose(mine, parameter.grad, rtol=1e-10)


@WORLDS
def test_parts_summed_over_ranks_have_value_and_gradient_of_the_sum(ranks: int) -> None:
    x = batch()[0].requires_grad_()
    total = torch.stack([partial_loss(x, number) for number in range(ranks)]).sum(dim=0)
    torch.autograd.backward([total.square().sum()])
    assert x.grad is not None
    for one in seen(ranks):
        value, gradient = one["sum"]
        assert torch.allclose(value, total, rtol=1e-12)
        assert torch.allclose(gradient, x.grad, rtol=1e-12)


@WORLDS
def test_log_sum_exp_over_ranks_neither_overflows_nor_loses_what_is_far_below_zero(ranks: int) -> None:
    inputs = torch.stack([logsumexp_inputs(number) for number in range(ranks)]).requires_grad_()
    expected = inputs[:, :3].logsumexp(dim=0)
    torch.autograd.backward([(expected * torch.tensor([1.0, 2.0, 3.0])).sum()])
    assert inputs.grad is not None
    for number, one in enumerate(seen(ranks)):
        value, gradient = one["logsumexp"]
        assert torch.allclose(value[:3], expected, rtol=1e-12)
        assert value[3] == -torch.inf
        assert torch.allclose(gradient, inputs.grad[number], rtol=1e-12)
        assert one["nan"].isnan().all()


@WORLDS
def test_the_maximum_is_taken_place_by_place(ranks: int) -> None:
    for one in seen(ranks):
        assert one["max"].tolist() == [[ranks - 1, 0]]


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_that_do_not_fit_together_are_refused_on_every_rank(ranks: int) -> None:
    start = "gather joins rows of one size and type; this rank's are "
    for number, one in enumerate(seen(ranks)):
        assert one["other widths"].startswith(
            f"gather joins rows of one size and type; this rank's are ({1 + number},)"
        )
        assert one["other types"].startswith(f"{start}() torch.")


@WORLDS
def test_an_error_on_one_rank_is_raised_on_all_and_each_tells_its_own(ranks: int) -> None:
    for number, one in enumerate(seen(ranks)):
        if number % 2:
            assert one["refused"] == f"mine, {number}"
        elif ranks > 1:
            assert one["refused"].startswith("Rank 1 refused its batch")
        assert one["not refused"] == "nothing was raised"


def test_without_a_process_group_everything_is_the_identity() -> None:
    x = batch()[0].requires_grad_()
    assert (rank(), world_size(), row_counts(x), own_rows([7])) == (0, 1, [7], slice(0, 7))
    for same in (gather(x, averaged=True), summed_gradient(x), sum_over_ranks(x), logsumexp_over_ranks(x)):
        assert same is x
    assert torch.equal(gather_plain(x), x)
    assert torch.equal(max_over_ranks(x), x)
    assert not gather_plain(x).requires_grad
    assert not max_over_ranks(x).requires_grad
    raise_on_all_ranks(None, x.device)
    with pytest.raises(ValueError, match=r"^mine$"):
        raise_on_all_ranks(ValueError("mine"), x.device)


def test_own_rows_lie_after_those_of_the_ranks_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metricface.distributed.rank", lambda: 2)
    assert own_rows([2, 0, 4, 1]) == slice(2, 6)


def test_integers_have_no_gradient_to_gather() -> None:
    with pytest.raises(ValueError, match="Use gather_plain"):
        gather(torch.arange(3), averaged=True)


def test_what_fails_on_a_rank_of_a_test_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"rank 0: (?s:.*)division by zero"):
        on_ranks(2, divided_by_rank)


def divided_by_rank() -> float:
    return 1.0 / rank()
