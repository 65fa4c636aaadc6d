"""Half precision, autocast, and distances that cancel: every loss, with and without a tuple."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from metricface.distances import Distance
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
    gathering,
)
from metricface.losses.gathering import distance_matrix, distances_of, products_of
from metricface.miners import BatchAllMiner
from metricface.tuples import check_batch
from tests.largest import LargestTensor
from tests.losses import oracles

LABELS = torch.arange(16) // 4
ALL = tuple(torch.tensor(oracles.all_triplets(LABELS.tolist())).unbind(1))
LOSSES: list[Callable[[], nn.Module]] = [
    ContrastiveLoss,
    TripletLoss,
    lambda: TripletLoss("soft", distance="euclidean", normalize=False),
    lambda: MarginBasedLoss(4),
    lambda: TripletLoss(distance="cosine"),
    lambda: TripletLoss(swap=True),
    # Raw rows of 512 random numbers are too far apart for exponentials of their distances.
    lambda: GeneralizedLiftedStructureLoss(normalize=True),
    lambda: LiftedStructureLoss(normalize=True),
    MultiSimilarityLoss,
    CircleLoss,
    NPairLoss,
    AngularLoss,
]
NAMES = ["contrastive", "facenet", "hermans", "margin based", "cosine", "swap", "generalised lifted", "lifted"]
NAMES += ["multi-similarity", "circle", "n-pair", "angular"]
EVERY_LOSS = pytest.mark.parametrize("make", LOSSES, ids=NAMES)
BOTH = pytest.mark.parametrize("indices", [None, ALL], ids=["streamed", "given"])


def batch(dim: int = 512) -> Tensor:
    return torch.randn(16, dim, generator=torch.Generator().manual_seed(6))


@EVERY_LOSS
@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_give_a_float32_loss_and_a_gradient_of_their_own_type(
    make: Callable[[], nn.Module], indices: tuple[Tensor, ...] | None, dtype: torch.dtype
) -> None:
    half = batch().to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    loss = make()
    value, expected = loss(half, LABELS, indices), loss(full, LABELS, indices)
    value.backward()
    expected.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert half.grad is not None
    assert full.grad is not None
    assert half.grad.dtype == dtype
    assert torch.allclose(half.grad.float(), full.grad, rtol=1e-2, atol=1e-6)


@EVERY_LOSS
@BOTH
def test_autocast_changes_neither_loss_nor_gradient(
    make: Callable[[], nn.Module], indices: tuple[Tensor, ...] | None
) -> None:
    results = []
    for enabled in (False, True):
        x = batch().requires_grad_()
        loss = make()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = loss(x, LABELS, indices)
        value.backward()
        assert value.dtype == torch.float32
        results.append((value.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is not None
    assert results[1][1] is not None
    assert torch.equal(results[0][1], results[1][1])


@EVERY_LOSS
@BOTH
def test_zero_embeddings_stay_finite(make: Callable[[], nn.Module], indices: tuple[Tensor, ...] | None) -> None:
    x = torch.zeros(16, 8).requires_grad_()
    value = make()(x, LABELS, indices)
    value.backward()
    assert torch.isfinite(value)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean"])
def test_a_batch_close_together_far_from_the_origin_keeps_its_distances(distance: Distance) -> None:
    x = batch() * 1e-3 + 7.0
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    exact = exact.square() if distance == "squared_euclidean" else exact
    assert torch.allclose(distance_matrix(x, x, distance).double(), exact, rtol=1e-3)


@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
@pytest.mark.parametrize("numbers", [1 << 21, 3 * 16, 1])
def test_many_named_pairs_are_read_from_tiles_with_the_same_result(
    distance: Distance, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = torch.randperm(len(ALL[0]), generator=torch.Generator().manual_seed(1))
    anchor, positive = ALL[0][mixed], ALL[1][mixed]
    monkeypatch.setattr(gathering, "TILE_NUMBERS", numbers)
    results = []
    for small in (1 << 24, 0):
        monkeypatch.setattr(gathering, "SMALL", small)
        x = (batch(32) / 6).requires_grad_()
        dist = distances_of(check_batch(x, LABELS), anchor, positive, distance)
        dist.sin().sum().backward()  # type: ignore[no-untyped-call]
        results.append((dist.detach(), x.grad))
    assert len(anchor) * 32 > 16 * 16  # so that SMALL = 0 takes tiles
    assert not torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert results[0][1] is not None
    assert results[1][1] is not None
    assert torch.allclose(results[0][1], results[1][1], atol=1e-4)


def test_many_named_dot_products_are_read_from_tiles_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    anchor, positive = ALL[0].flip(0), ALL[1].flip(0)
    monkeypatch.setattr(gathering, "TILE_NUMBERS", 3 * 16)
    results = []
    for small in (1 << 24, 0):
        monkeypatch.setattr(gathering, "SMALL", small)
        x = (batch(32) / 6).requires_grad_()
        dots = products_of(check_batch(x, LABELS), anchor, positive)
        results.append((dots, torch.autograd.grad(dots.sin().sum(), x)[0]))
    assert torch.allclose(results[0][0], (x[anchor] * x[positive]).sum(dim=1), atol=1e-5)
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_a_long_list_of_triplets_needs_no_table_of_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "SMALL", 0)
    monkeypatch.setattr(gathering, "TILE_NUMBERS", 16 * 400)
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    labels = torch.arange(400) // 4
    triplets = BatchAllMiner(max_triplets=4000, generator=torch.Generator().manual_seed(3))(x.detach(), labels)
    with LargestTensor() as largest:
        TripletLoss()(x, labels, triplets).backward()
    assert largest.numbers <= 400 * 64  # the embeddings themselves; all distances are 160,000


def test_duplicates_are_at_distance_exactly_zero_in_a_matrix() -> None:
    x = torch.nn.functional.normalize(batch(), dim=1)
    x = torch.cat([x, x])
    dist = distance_matrix(x, x, "euclidean")
    assert torch.equal(dist.diagonal(), torch.zeros(32))
    assert torch.equal(dist.diagonal(16), torch.zeros(16))
    assert int((dist == 0).sum()) == 64


@EVERY_LOSS
@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-7])
def test_near_duplicates_count_the_same_with_a_tuple_and_without(make: Callable[[], nn.Module], gap: float) -> None:
    x = torch.nn.functional.normalize(batch(), dim=1)
    x[0, 0] = x[4, 0] = 0.01  # so that so small a gap is no rounding
    x[0, 1:] = x[4, 1:]
    x[4, 0] += gap
    found = []
    pairs = positive_and_negative_pairs()
    for indices in (None, pairs if make is ContrastiveLoss else ALL):
        leaf = x.clone().requires_grad_()
        value = make()(leaf, LABELS, indices)
        value.backward()
        assert leaf.grad is not None
        found.append((value.item(), leaf.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-4 * float(found[1][1].abs().max()))


def positive_and_negative_pairs() -> tuple[Tensor, ...]:
    same = LABELS[:, None] == LABELS
    return *(same & ~torch.eye(16, dtype=torch.bool)).nonzero().unbind(1), *(~same).nonzero().unbind(1)


def test_close_pairs_are_subtracted_slice_by_slice_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = 1e-4 * batch(32)
    x[:8] += 5.0  # two clusters: everything within one is close
    found = []
    for numbers in (1 << 21, 100):
        monkeypatch.setattr(gathering, "CLOSE_NUMBERS", numbers)
        leaf = x.clone().requires_grad_()
        dist = distance_matrix(leaf, leaf, "euclidean")
        dist.sum().backward()  # type: ignore[no-untyped-call]
        found.append((dist.detach(), leaf.grad))
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.allclose(found[0][0].double(), exact, rtol=1e-3)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] is not None
    assert found[1][1] is not None
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-4)
