import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from metricface.losses import range_loss as module
from metricface.losses.range_loss import RangeLoss, harmonic_means
from tests.largest import LargestTensor
from tests.vectors import case

VECTOR = case("A12.range_loss")
INPUTS = VECTOR["inputs"]
U6 = torch.tensor(INPUTS["X"], dtype=torch.float64)
LABELS = torch.tensor(INPUTS["labels"])
Rows = NDArray[np.float64]


def oracle(x: Rows, labels: list[int], k: int, margin: float) -> tuple[float, float]:
    """Both terms without weights, from lists of all pairs."""
    intra, means = 0.0, []
    for name in sorted(set(labels)):
        rows = [row for row, y in zip(x, labels, strict=True) if y == name]
        means.append(sum(rows) / len(rows))
        every = sorted((float(((a - b) ** 2).sum()) for i, a in enumerate(rows) for b in rows[:i]), reverse=True)[:k]
        intra += len(every) / sum(1 / d for d in every) if every else 0.0
    between = [float(((a - b) ** 2).sum()) for i, a in enumerate(means) for b in means[:i]]
    return intra, max(0.0, margin - min(between)) if between else 0.0


def terms(loss: RangeLoss) -> tuple[float, float]:
    assert loss.last is not None
    return loss.last["intra"].item(), loss.last["inter"].item()


def drawn(rows: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_both_terms_and_their_weighted_sum_are_the_published_ones() -> None:
    loss = RangeLoss(INPUTS["k"], margin=INPUTS["M"], intra_weight=INPUTS["alpha"], inter_weight=INPUTS["beta"])
    value = loss(U6, LABELS)
    assert terms(loss) == pytest.approx((VECTOR["expected"]["intra"], VECTOR["expected"]["inter"]), abs=1e-6)
    assert value.item() == pytest.approx(VECTOR["expected"]["paper_weighted"], abs=1e-9)
    assert (loss.intra_weight, loss.inter_weight) == (RangeLoss().intra_weight, RangeLoss().inter_weight)


def test_distances_are_squared_and_the_weights_not_exchanged() -> None:
    """gluon-face's: another intra term, and another sum."""
    loss = RangeLoss(2, margin=4.0)
    value = loss(U6, LABELS).item()
    plain = 0.0
    for name in (0, 1):
        rows = U6[LABELS.eq(name)]
        two = torch.pdist(rows).topk(2).values
        plain += 2 / float((1 / two).sum())
    assert terms(loss)[0] != pytest.approx(plain, rel=1e-2)
    assert value != pytest.approx(1e-4 * terms(loss)[0] + 5e-5 * terms(loss)[1], rel=1e-2)


@pytest.mark.parametrize("k", [1, 2, 3, 100])
@pytest.mark.parametrize(("rows", "numbers"), [(128, 1 << 20), (3, 1 << 20), (1, 1), (5, 60)])
def test_identities_of_all_sizes_in_any_order_agree_with_the_loop_oracle(
    k: int, rows: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TILE_ROWS", rows)
    monkeypatch.setattr(module, "TILE_NUMBERS", numbers)
    labels = torch.tensor([7] * 9 + [-3] * 2 + [5] + [1] * 4 + [0] * 3 + [2] * 2 + [9])
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    x = 10.0 + drawn(len(labels), 5)
    loss = RangeLoss(k, margin=3.0, intra_weight=1.0, inter_weight=10.0)
    value = loss(x, labels[mixed])
    expected = oracle(x.numpy(), labels[mixed].tolist(), k, 3.0)
    assert min(expected) > 0
    assert terms(loss) == pytest.approx(expected, rel=1e-10)
    assert value.item() == pytest.approx(expected[0] + 10 * expected[1], rel=1e-10)
    assert loss.last is not None
    assert loss.last["identities_without_pair"].item() == 2


def test_many_random_batches_agree_with_the_loop_oracle() -> None:
    for seed in range(30):
        labels = torch.randint(0, 6, (17,), generator=torch.Generator().manual_seed(seed))
        x, loss = drawn(17, 3, seed), RangeLoss(1 + seed % 4, margin=2.0)
        loss(x, labels)
        assert terms(loss) == pytest.approx(oracle(x.numpy(), labels.tolist(), loss.k, 2.0), rel=1e-10, abs=1e-12)


def test_gradient_is_that_of_finite_differences() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    for k in (1, 2, 10):
        loss = RangeLoss(k, margin=20.0, intra_weight=0.7, inter_weight=1.3)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, labels), (drawn(6, 4).requires_grad_(),))


def test_only_the_chosen_pairs_and_the_closest_two_identities_have_a_gradient() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0], [10.0], [10.5], [100.0], [101.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    for weights, touched in (((1.0, 0.0), [0, 2, 3, 4, 5, 6]), ((0.0, 1.0), [0, 1, 2, 3, 4])):
        leaf = x.clone().requires_grad_()
        loss = RangeLoss(1, margin=200.0, intra_weight=weights[0], inter_weight=weights[1])
        loss(leaf, labels).backward()
        assert leaf.grad is not None
        assert leaf.grad[:, 0].nonzero()[:, 0].tolist() == touched


def test_means_beyond_the_margin_have_no_inter_term() -> None:
    x = U6.clone().requires_grad_()
    loss = RangeLoss(margin=1.5, intra_weight=0.0)
    value = loss(x, LABELS)
    value.backward()
    assert value.item() == 0.0
    assert loss.last is not None
    assert loss.last["closest_means"].item() == pytest.approx(4 - VECTOR["expected"]["inter"], abs=1e-6)
    assert x.grad is not None
    assert not x.grad.any()


def test_pairs_close_together_in_float32_far_from_the_origin_are_told_apart() -> None:
    """Two identities 200 apart, each within 1e-3: the k largest are chosen around the identity's own mean."""
    x = torch.cat([1e-3 * drawn(8, 64), 1e-3 * drawn(8, 64, 1) + 25.0]).float()
    labels = torch.arange(16) // 8
    loss = RangeLoss(3)
    loss(x, labels)
    assert terms(loss)[0] == pytest.approx(oracle(x.double().numpy(), labels.tolist(), 3, 1.0)[0], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_are_computed_in_float32(dtype: torch.dtype) -> None:
    labels = torch.arange(32) // 4
    half = drawn(32, 512).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    loss = RangeLoss(margin=2000.0, intra_weight=0.01, inter_weight=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half, labels)
    expected = loss(full, labels)
    value.backward()
    expected.backward()
    assert value.dtype == torch.float32
    assert value.item() == expected.item()
    assert half.grad is not None
    assert full.grad is not None
    assert half.grad.dtype == dtype
    assert torch.allclose(half.grad.float(), full.grad, rtol=1e-2, atol=1e-6)


BATCHES: dict[str, Any] = {
    "zeros": torch.zeros(8, 8),
    "equal": torch.full((8, 8), 0.37),
    "antipodal": torch.tensor([[1.0] * 8, [-1.0] * 8] * 4),
    "nearly equal": torch.full((8, 8), 1.0) + 1e-7 * drawn(8, 8).float(),
    "tiny": 1e-20 * drawn(8, 8).float(),
    "one duplicate": torch.cat([drawn(7, 8).float(), drawn(7, 8).float()[:1]]),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("labels", [[0] * 8, [0, 1] * 4, [0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3, 4, 5, 6, 0]])
def test_degenerate_batches_have_a_finite_loss_and_gradient(name: str, labels: list[int]) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16):
        x = BATCHES[name].detach().to(dtype).requires_grad_()
        value = RangeLoss(2, margin=4.0, intra_weight=1.0, inter_weight=1.0)(x, torch.tensor(labels))
        value.backward()
        assert x.grad is not None
        assert torch.isfinite(value)
        assert torch.isfinite(x.grad).all()


def test_identical_embeddings_have_intra_0_and_inter_the_whole_margin() -> None:
    loss = RangeLoss(margin=4.0)
    loss(torch.full((8, 16), 0.37), torch.arange(8) // 2)
    intra, inter = terms(loss)
    assert 0.0 <= intra < 1e-30
    assert inter == pytest.approx(4.0, rel=1e-6)


def test_one_identity_has_no_inter_term_and_single_images_no_intra_term() -> None:
    for labels, k in ((torch.zeros(6, dtype=torch.long), 2), (torch.arange(6), 2)):
        loss = RangeLoss(k, margin=9.0)
        x = U6.clone().requires_grad_()
        loss(x, labels).backward()
        assert x.grad is not None
        expected = oracle(U6.numpy(), labels.tolist(), k, 9.0)
        assert terms(loss) == pytest.approx(expected)
        assert 0.0 in expected
    assert loss.last is not None
    assert loss.last["identities_without_pair"].item() == 6


@pytest.mark.parametrize("size", [0, 1])
def test_no_pair_of_anything_is_zero_with_zero_gradient(size: int) -> None:
    x = torch.ones(size, 4, requires_grad=True)
    loss = RangeLoss()
    value = loss(x, torch.arange(size))
    value.backward()
    assert value.item() == 0.0
    assert x.grad is not None
    assert not x.grad.any()
    assert loss.last is not None
    assert loss.last["closest_means"].item() == math.inf
    assert loss.last["identities_without_pair"].item() == size


@pytest.mark.parametrize("images", [4, 2048])
def test_no_tensor_holds_all_distances_of_a_batch(images: int) -> None:
    x, labels = drawn(2048, 16).float().requires_grad_(), torch.arange(2048) // images
    with LargestTensor() as largest:
        RangeLoss()(x, labels).backward()
    allowed = 2048 * 16 if images == 4 else 128 * 2048
    assert largest.numbers <= max(allowed, 512 * 512)  # P x P means; B x B would be 2048 x 2048


def test_means_are_compared_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_NUMBERS", 40 * 600)
    x, labels = drawn(1200, 8), torch.arange(1200) // 2
    loss = RangeLoss(margin=5.0)
    with LargestTensor() as largest:
        loss(x, labels)
    means = x.view(600, 2, 8).mean(dim=1)
    assert loss.last is not None
    assert loss.last["closest_means"].item() == pytest.approx(float(torch.pdist(means).min()) ** 2, rel=1e-10)
    assert largest.numbers <= 40 * 600


def test_harmonic_means_are_zero_without_a_pair_and_where_a_distance_is_zero() -> None:
    sq_dist = torch.tensor([4.0, 1.0, 2.0, 0.0, 5.0], requires_grad=True)
    found = harmonic_means(sq_dist, torch.tensor([0, 0, 2, 3, 3]), 4)
    assert found.tolist() == pytest.approx([1.6, 0.0, 2.0, 0.0])
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert sq_dist.grad is not None
    assert sq_dist.grad.tolist() == pytest.approx([0.08, 1.28, 1.0, 0.0, 0.0])


def test_wrong_batches_are_refused_by_name() -> None:
    loss = RangeLoss()
    with pytest.raises(ValueError, match="RangeLoss looks at every embedding and takes no miner's tuple"):
        loss(U6, LABELS, (LABELS, LABELS, LABELS))
    with pytest.raises(ValueError, match="RangeLoss compares a batch with nothing outside of it; found ref_emb"):
        loss(U6, LABELS, None, U6, LABELS)
    with pytest.raises(ValueError, match="labels must be integers"):
        loss(U6, LABELS.double())
    with pytest.raises(ValueError, match="NaN or infinity"):
        loss(U6 * math.nan, LABELS)


def test_wrong_settings_say_what_is_allowed() -> None:
    for k in (0, 1.5, True, None):
        with pytest.raises(ValueError, match="k must be a whole number, at least 1"):
            RangeLoss(k)  # type: ignore[arg-type]
    for margin in (0.0, -1.0, math.nan, math.inf, "1"):
        with pytest.raises(ValueError, match="margin must be positive and finite"):
            RangeLoss(margin=margin)  # type: ignore[arg-type]
    for name in ("intra_weight", "inter_weight"):
        for weight in (-1.0, math.nan, "1"):
            with pytest.raises(ValueError, match=f"{name} must be 0 or more and finite"):
                RangeLoss(**{name: weight})  # type: ignore[arg-type]
