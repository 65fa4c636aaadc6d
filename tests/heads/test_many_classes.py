import pytest
import torch
from torch import Tensor

from metricface import heads
from metricface.heads.base import Head
from metricface.products import CPU_BLOCK
from tests.heads.kinds import EVERY_KIND, Kind, filled
from tests.largest import LargestTensor

CLASSES = 1_000_000


def one_step(head: Head, x: Tensor, labels: Tensor) -> int:
    """Numbers in the largest tensor of a forward and backward pass."""
    with LargestTensor() as largest:
        head(x, labels).backward()
    return int(largest.numbers)


@EVERY_KIND
def test_streaming_makes_no_tensor_as_large_as_the_logits(kind: Kind) -> None:
    classes, batch = 60_000, 32
    head = kind.make(classes, 4, streaming=True)
    labels = torch.arange(batch) * 1_000
    x = torch.randn(batch, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert batch * classes > 2 * max(CPU_BLOCK, head.weight.numel())
    assert one_step(head, x, labels) <= max(CPU_BLOCK, head.weight.numel())


def test_a_margin_makes_no_tensor_as_large_as_the_logits_beside_them() -> None:
    # Held in blocks, so even the largest of all tensors is a block or the weights' gradient.
    head = heads.ArcFace(60_000, 4)
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert one_step(head, x, torch.arange(32)) <= CPU_BLOCK


@pytest.mark.parametrize("streaming", [False, True])
def test_a_million_classes_give_the_cross_entropy_of_a_million_classes(streaming: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    head = heads.CosFace(CLASSES, 4, margin_cos=0.2, scale=20.0, streaming=streaming, generator=generator)
    x = torch.randn(3, 4, generator=generator).requires_grad_()
    labels = torch.tensor([0, 500_000, CLASSES - 1])
    loss = head(x, labels)
    loss.backward()
    y = x.detach().double().requires_grad_()
    w = head.weight.detach().double().requires_grad_()
    cos = torch.nn.functional.normalize(y) @ torch.nn.functional.normalize(w).T
    margin = torch.zeros_like(cos).scatter_(1, labels[:, None], 0.2)
    expected = torch.nn.functional.cross_entropy(20.0 * (cos - margin), labels)
    torch.autograd.backward([expected])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in ((x.grad, y.grad), (head.weight.grad, w.grad)):
        assert mine is not None
        assert theirs is not None
        assert torch.allclose(mine.double(), theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())


@EVERY_KIND
def test_labels_at_the_edges_of_blocks_are_left_out_of_the_others(kind: Kind) -> None:
    # Blocks on a CPU hold CPU_BLOCK / 512 classes for 512 rows: the labels lie on both sides of every edge.
    batch, columns = 512, CPU_BLOCK // 512
    head = filled(kind.make(3 * columns + 5, 3)).eval()
    edges = torch.tensor([0, columns - 1, columns, 2 * columns - 1, 2 * columns, 3 * columns, 3 * columns + 4])
    labels = edges.repeat(74)[:batch]
    x = 9.0 * torch.randn(batch, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    few = torch.arange(0, batch, 37)
    assert head(x, labels).item() == pytest.approx(
        sum(head(x[i : i + 1], labels[i : i + 1]).item() for i in range(batch)) / batch, rel=1e-9
    )
    assert head(x[few], labels[few]).item() == pytest.approx(kind.expected(x[few], head, labels[few]), rel=1e-8)
