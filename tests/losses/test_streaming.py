"""Every pair and triplet without a list of them: the same in any chunks, and small."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metricface.losses import ContrastiveLoss, MarginBasedLoss, TripletLoss, streaming
from metricface.losses.streaming import Sum, streamed

LOSSES: list[Callable[[], nn.Module]] = [
    ContrastiveLoss,
    lambda: TripletLoss(reduction="active"),
    lambda: TripletLoss("soft", squared=False, normalize=False),
    lambda: MarginBasedLoss(20, nu=0.1),
]
EVERY_LOSS = pytest.mark.parametrize("make", LOSSES, ids=["contrastive", "facenet", "hermans", "margin based"])


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the most numbers that any operation under it put into one tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@EVERY_LOSS
def test_the_size_of_chunks_changes_nothing(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.randint(0, 8, (30,), generator=torch.Generator().manual_seed(7))
    values, grads = [], []
    for numbers in (1 << 21, 200, 60):
        monkeypatch.setattr(streaming, "CHUNK_NUMBERS", numbers)
        x = torch.randn(30, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64).requires_grad_()
        value = make().double()(x, labels)
        (3 * value).backward()
        values.append(value.item())
        assert x.grad is not None
        grads.append(x.grad)
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-12)
    assert torch.allclose(grads[0], grads[1], rtol=1e-10, atol=1e-12)
    assert torch.allclose(grads[0], grads[2], rtol=1e-10, atol=1e-12)


@EVERY_LOSS
def test_no_tensor_outgrows_a_chunk_however_many_triplets_there_are(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CHUNK_NUMBERS", 10_000)
    size, images = 256, 32  # 65 thousand pairs, 1.8 million triplets
    x = torch.randn(size, 16, generator=torch.Generator().manual_seed(9)).requires_grad_()
    with LargestTensor() as largest:
        make()(x, torch.arange(size) // images).backward()
    assert largest.numbers <= 10_000


@EVERY_LOSS
def test_evaluation_without_gradients_works(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(10))
    loss, labels = make(), torch.arange(12) // 3
    with torch.no_grad():
        value = loss(x, labels)
    assert not value.requires_grad
    assert value.item() == loss(x.requires_grad_(), labels).item()


def test_no_gradient_is_computed_where_none_can_be_asked_for() -> None:
    def contribution(_: int, x: Tensor) -> Sum:
        assert not x.requires_grad
        return Sum(x.sum(), torch.tensor(1))

    with torch.no_grad():
        assert streamed(contribution, [0], torch.ones(3).requires_grad_()).total.item() == 3


def test_only_the_inputs_that_ask_for_a_gradient_get_one() -> None:
    x = torch.arange(3.0).requires_grad_()
    fixed = torch.ones(3)

    def contribution(chunk: int, x: Tensor, fixed: Tensor) -> Sum:
        assert not fixed.requires_grad
        return Sum((chunk * x * fixed).sum(), torch.tensor(1))

    total, number = streamed(contribution, [1, 2], x, fixed)
    total.backward()  # type: ignore[no-untyped-call]
    assert (total.item(), number.item()) == (9.0, 2)
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 3.0, 3.0]
    assert fixed.grad is None
