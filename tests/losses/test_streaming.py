"""Every pair and triplet without a list of them: the same in any blocks, and small."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from metricface import products
from metricface.identities import find_identities
from metricface.losses import (
    AngularLoss,
    CircleLoss,
    ContrastiveLoss,
    GeneralizedLiftedStructureLoss,
    LiftedStructureLoss,
    MarginBasedLoss,
    MultiSimilarityLoss,
    NPairLoss,
    TripletLoss,
    n_pair,
    positive_pairs,
    streaming,
)
from metricface.losses.every_triplet import every_triplet
from metricface.losses.streaming import Gradients, Totals, streamed
from metricface.miners import tiles
from metricface.tuples import Batch, check_batch
from tests.largest import LargestTensor

LOSSES: list[Callable[[], nn.Module]] = [
    ContrastiveLoss,
    lambda: TripletLoss(reduction="active"),
    lambda: TripletLoss("soft", distance="euclidean", normalize=False),
    lambda: MarginBasedLoss(20, nu=0.1),
    lambda: TripletLoss(distance="cosine"),
    lambda: TripletLoss(swap=True),
    GeneralizedLiftedStructureLoss,
    LiftedStructureLoss,
    MultiSimilarityLoss,
    CircleLoss,
    NPairLoss,
    AngularLoss,
]
NAMES = ["contrastive", "facenet", "hermans", "margin based", "cosine", "swap", "generalised lifted", "lifted"]
NAMES += ["multi-similarity", "circle", "n-pair", "angular"]
EVERY_LOSS = pytest.mark.parametrize("make", LOSSES, ids=NAMES)


def make_other_blocks(monkeypatch: pytest.MonkeyPatch, numbers: int, rows: int) -> None:
    """Those of positive pairs and of products, as small as the tiles' blocks."""
    monkeypatch.setattr(positive_pairs, "RUN_NUMBERS", numbers)
    monkeypatch.setattr(n_pair, "RUN_NUMBERS", numbers)
    monkeypatch.setattr(products, "CPU_BLOCK", numbers)
    monkeypatch.setattr(products, "CPU_ROWS", rows)


@EVERY_LOSS
def test_the_size_of_blocks_changes_nothing(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.randint(0, 8, (150,), generator=torch.Generator().manual_seed(7))
    values, grads = [], []
    for numbers, rows in ((1 << 19, 512), (64 * 64, 64), (64, 1)):  # all references in a block, then 64 in one
        monkeypatch.setattr(tiles, "CPU_BLOCK", numbers)
        monkeypatch.setattr(tiles, "CPU_ROWS", rows)
        make_other_blocks(monkeypatch, numbers, rows)
        x = torch.randn(150, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64).requires_grad_()
        value = make().double()(x, labels)
        (3 * value).backward()
        values.append(value.item())
        assert x.grad is not None
        grads.append(x.grad)
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-12)
    assert torch.allclose(grads[0], grads[1], rtol=1e-10, atol=1e-12)
    assert torch.allclose(grads[0], grads[2], rtol=1e-10, atol=1e-12)


@EVERY_LOSS
def test_no_tensor_outgrows_a_block_however_many_triplets_there_are(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CPU_BLOCK", 64 * 64)
    monkeypatch.setattr(tiles, "CPU_ROWS", 64)
    monkeypatch.setattr(tiles, "ROW_NUMBERS", 64 * 64)
    monkeypatch.setattr(streaming, "ROW_NUMBERS", 64 * 64)
    make_other_blocks(monkeypatch, 64 * 64, 64)
    size, images = 256, 32  # 8 thousand pairs, 1.8 million triplets
    x = torch.randn(size, 16, generator=torch.Generator().manual_seed(9)).requires_grad_()
    with LargestTensor() as largest:
        make()(x, torch.arange(size) // images).backward()
    assert largest.numbers <= max(64 * 64, size * (16 + 4))  # the widest copy of the rows: of cosines, with lengths


@EVERY_LOSS
def test_evaluation_without_gradients_works(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(10))
    loss, labels = make(), torch.arange(12) // 3
    with torch.no_grad():
        value = loss(x, labels)
    assert not value.requires_grad
    assert value.item() == loss(x.requires_grad_(), labels).item()


def small_batch(**settings: bool) -> Batch:
    rows = [torch.randn(6, 3, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    x, y = (row.requires_grad_(settings.get(name, False)) for row, name in zip(rows, ("x", "y"), strict=True))
    return check_batch(x, torch.arange(6) // 2, y, torch.arange(6) // 2)


def test_no_gradient_is_computed_where_none_can_be_asked_for() -> None:
    asked = []

    def run(gradients: Gradients) -> Totals:
        asked.append((gradients.wanted, gradients.result()))
        return Totals(torch.tensor(3.0), None, "found")

    batch = small_batch(x=True, y=True)
    with torch.no_grad():
        total, found = streamed(batch, run, squared=True)
    assert (total.item(), found) == (3.0, "found")
    assert asked == [((False, False), (None, None))]


@pytest.mark.parametrize("wanted", ["x", "y"])
def test_only_the_inputs_that_ask_for_a_gradient_get_one(wanted: str) -> None:
    batch = small_batch(**{wanted: True})
    every_triplet(batch, find_identities(batch), margin=0.2, squared=True)[0].backward()  # type: ignore[no-untyped-call]
    grads = {"x": batch.embeddings.grad, "y": batch.ref_emb.grad}
    found = grads.pop(wanted)
    assert found is not None
    assert found.abs().sum() > 0
    assert list(grads.values()) == [None]


def test_a_second_derivative_is_an_error_and_not_silently_wrong() -> None:
    batch = small_batch(x=True)
    total, _ = every_triplet(batch, find_identities(batch), margin="soft", squared=True)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(total, batch.embeddings, create_graph=True)
