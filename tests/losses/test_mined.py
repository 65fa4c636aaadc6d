"""Losses that mine for themselves: the value and gradient of a miner and a loss, in one pass and little memory."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses as pml_losses
from torch import Tensor, nn

from metricface.diagnostics import mining_statistics
from metricface.losses import ContrastiveLoss, MarginBasedLoss, TripletLoss
from metricface.losses.mined import (
    AllPairsContrastiveLoss,
    AllPairsMarginBasedLoss,
    BatchAllTripletLoss,
    BatchHardTripletLoss,
    SemiHardTripletLoss,
)
from metricface.miners import BatchAllMiner, BatchHardMiner, SemiHardMiner
from metricface.tuples import Pairs
from tests.largest import LargestTensor
from tests.losses import oracles
from tests.vectors import case


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Separate(nn.Module):
    """A miner and a loss, called one after the other."""

    def __init__(self, miner: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.miner, self.loss = miner, loss

    def forward(self, embeddings: Tensor, labels: Tensor, **named: Tensor) -> Tensor:
        mined = self.miner(embeddings.detach(), labels, **{name: part.detach() for name, part in named.items()})
        named.pop("self_index", None)
        value: Tensor = self.loss(embeddings, labels, mined, **named)
        return value


def every_pair(labels: Tensor, ref_labels: Tensor, itself: Tensor) -> Pairs:
    same = labels[:, None] == ref_labels
    positive = same & (torch.arange(len(ref_labels)) != itself[:, None])
    return Pairs(*positive.nonzero().unbind(1), *(~same).nonzero().unbind(1))


class OnPairs(nn.Module):
    """A loss on the list of every pair."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, embeddings: Tensor, labels: Tensor, **named: Tensor) -> Tensor:
        itself = named.pop("self_index", torch.arange(len(labels)))
        pairs = every_pair(labels, named.get("ref_labels", labels), itself)
        value: Tensor = self.loss(embeddings, labels, pairs, **named)
        return value


Make = Callable[[], nn.Module]
# Each loss with what it must be equal to.
EQUAL: dict[str, tuple[Make, Make]] = {
    "batch all": (
        lambda: BatchAllTripletLoss(0.3),
        lambda: Separate(BatchAllMiner(), TripletLoss(0.3, reduction="active")),
    ),
    "batch all, plain, mean": (
        lambda: BatchAllTripletLoss(0.3, distance="euclidean", normalize=False, reduction="mean"),
        lambda: Separate(BatchAllMiner(), TripletLoss(0.3, distance="euclidean", normalize=False)),
    ),
    "batch all, soft": (
        lambda: BatchAllTripletLoss("soft", distance="euclidean", normalize=False),
        lambda: Separate(BatchAllMiner(), TripletLoss("soft", distance="euclidean", normalize=False)),
    ),
    "batch all, soft, squared, sum": (
        lambda: BatchAllTripletLoss("soft", reduction="sum"),
        lambda: Separate(BatchAllMiner(), TripletLoss("soft", reduction="sum")),
    ),
    "batch hard": (
        lambda: BatchHardTripletLoss(0.3),
        lambda: Separate(BatchHardMiner(), TripletLoss(0.3)),
    ),
    "batch all, cosine": (
        lambda: BatchAllTripletLoss(0.3, distance="cosine"),
        lambda: Separate(BatchAllMiner(), TripletLoss(0.3, distance="cosine", reduction="active")),
    ),
    "batch hard, cosine": (
        lambda: BatchHardTripletLoss(0.3, distance="cosine", normalize=False),
        lambda: Separate(BatchHardMiner(distance="cosine"), TripletLoss(0.3, distance="cosine")),
    ),
    "semi-hard, cosine": (
        lambda: SemiHardTripletLoss(0.2, distance="cosine"),
        lambda: Separate(SemiHardMiner(0.2, distance="cosine"), TripletLoss(0.2, distance="cosine")),
    ),
    "batch hard, soft": (
        lambda: BatchHardTripletLoss("soft", distance="euclidean", normalize=False),
        lambda: Separate(BatchHardMiner(normalize=False), TripletLoss("soft", distance="euclidean", normalize=False)),
    ),
    "semi-hard": (
        lambda: SemiHardTripletLoss(0.3),
        lambda: Separate(SemiHardMiner(0.3), TripletLoss(0.3)),
    ),
    "semi-hard, easiest, plain": (
        lambda: SemiHardTripletLoss(0.1, fallback="easiest", distance="euclidean", reduction="active"),
        lambda: Separate(
            SemiHardMiner(0.1, fallback="easiest", distance="euclidean"),
            TripletLoss(0.1, distance="euclidean", reduction="active"),
        ),
    ),
    "semi-hard, hardest, soft": (
        lambda: SemiHardTripletLoss("soft", window=0.2, fallback="hardest"),
        lambda: Separate(SemiHardMiner(0.2, fallback="hardest"), TripletLoss("soft")),
    ),
    "contrastive": (
        lambda: AllPairsContrastiveLoss(0.9, normalize=True),
        lambda: OnPairs(ContrastiveLoss(0.9, normalize=True)),
    ),
    "contrastive, raw, sum": (
        lambda: AllPairsContrastiveLoss(3.0, reduction="sum"),
        lambda: OnPairs(ContrastiveLoss(3.0, reduction="sum")),
    ),
    "contrastive, no tuple": (lambda: AllPairsContrastiveLoss(0.9), lambda: ContrastiveLoss(0.9)),
}
EVERY = pytest.mark.parametrize("name", EQUAL)
MARGIN_BASED: Make = lambda: AllPairsMarginBasedLoss(6, alpha=0.3, beta=1.1, nu=0.05)  # noqa: E731
ALL_LOSSES: dict[str, Make] = {name: ours for name, (ours, _) in EQUAL.items()} | {"margin based": MARGIN_BASED}
LOSSES = pytest.mark.parametrize("make", ALL_LOSSES.values(), ids=ALL_LOSSES)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], dict[str, Tensor]]:
    """20 images of up to 6 people, two images equal; half of the time with references, some of them anchors."""
    generator = seeded(seed)
    x = torch.randn(20, 5, generator=generator, dtype=dtype)
    labels = torch.randint(6, (20,), generator=generator)
    x[1] = x[0]
    if seed % 2:
        return [x, labels], {}
    y = torch.randn(33, 5, generator=generator, dtype=dtype)
    ref_labels = torch.randint(6, (33,), generator=generator)
    y[:4], ref_labels[:4] = x[:4], labels[:4]
    itself = torch.full((20,), -1)
    itself[:4] = torch.arange(4)
    return [x, labels], {"ref_emb": y, "ref_labels": ref_labels, "self_index": itself}


def value_and_gradients(loss: nn.Module, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tensors, named = batch(seed, dtype)
    leaves = [tensor.requires_grad_() for tensor in (*tensors, *named.values()) if tensor.is_floating_point()]
    value = loss(*tensors, **named)
    return [value.detach(), *torch.autograd.grad(3.0 * value, leaves)]


@EVERY
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tile_rows", [None, 1, 7])
def test_value_and_gradient_are_those_of_a_miner_and_a_loss(name: str, seed: int, tile_rows: int | None) -> None:
    ours, expected = (make() for make in EQUAL[name])
    setattr(ours, "tile_rows", tile_rows)  # noqa: B010
    for one, other in zip(value_and_gradients(ours, seed), value_and_gradients(expected, seed), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@EVERY
def test_blocks_of_references_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = value_and_gradients(EQUAL[name][0](), 2)
    monkeypatch.setattr("metricface.miners.tiles.RUN", 4)
    monkeypatch.setattr("metricface.miners.kernels.RUN", 4)
    monkeypatch.setattr("metricface.miners.tiles.CPU_BLOCK", 8)
    monkeypatch.setattr("metricface.miners.tiles.ROW_NUMBERS", 20)
    monkeypatch.setattr("metricface.losses.streaming.ROW_NUMBERS", 20)
    loss = EQUAL[name][0]()
    setattr(loss, "tile_rows", 2)  # noqa: B010
    for one, other in zip(value_and_gradients(loss, 2), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@LOSSES
def test_evaluation_needs_no_gradients(make: Make) -> None:
    x, labels = torch.randn(24, 6, generator=seeded(5)), torch.arange(24) // 4
    loss = make()
    expected = loss(x.clone().requires_grad_(), labels).item()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert loss(x, labels).item() == expected


@LOSSES
@pytest.mark.parametrize("kind", ["above 2^24", "negative", "uint8", "int32"])
def test_labels_of_any_integer_type_and_value_are_told_apart(make: Make, kind: str) -> None:
    x, labels = torch.randn(24, 6, generator=seeded(5)), torch.arange(24) // 4
    loss = make()
    expected = loss(x, labels).item()
    if isinstance(loss, MarginBasedLoss):
        for unsigned in (torch.uint8, torch.uint16, torch.uint32):
            itself = torch.arange(24).to(unsigned)
            assert loss(x, labels.to(unsigned), None, x, labels, self_index=itself).item() == expected
        return
    shift, dtype = {
        "above 2^24": (2**24, torch.int64),
        "negative": (-(2**40), torch.int64),
        "uint8": (250, torch.uint8),
        "int32": (-3, torch.int32),
    }[kind]
    assert loss(x, (labels + shift).to(dtype)).item() == expected


@LOSSES
def test_the_order_of_a_batch_changes_nothing(make: Make) -> None:
    x = torch.randn(30, 6, generator=seeded(), dtype=torch.float64)
    labels, order = torch.arange(30) // 5, torch.randperm(30, generator=seeded(1))
    loss = make()
    one, other = x.clone().requires_grad_(), x[order].requires_grad_()
    values = loss(one, labels), loss(other, labels[order])
    torch.testing.assert_close(*values)
    for value in values:
        value.backward()
    assert one.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(one.grad[order], other.grad)


@LOSSES
@pytest.mark.parametrize("references", ["the batch", "separate", "only theirs", "only the anchors'"])
def test_gradients_are_those_of_finite_differences(make: Make, references: str) -> None:
    generator = seeded(3)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    labels, ref_labels = torch.arange(9) // 3, torch.arange(11) % 4
    loss = make().double()
    if references == "the batch":
        assert torch.autograd.gradcheck(lambda x: loss(x, labels), x.requires_grad_())
        return
    x.requires_grad_(references != "only theirs")
    y.requires_grad_(references != "only the anchors'")
    assert torch.autograd.gradcheck(lambda x, y: loss(x, labels, None, y, ref_labels), (x, y))


def test_the_gradient_with_respect_to_beta_is_that_of_finite_differences() -> None:
    x, labels = torch.randn(12, 4, generator=seeded(1), dtype=torch.float64), torch.arange(12) % 4
    loss = AllPairsMarginBasedLoss(4, nu=0.3).double()

    def of_beta(beta: Tensor) -> Tensor:
        value: Tensor = torch.func.functional_call(loss, {"beta": beta}, (x, labels))
        return value

    beta = torch.tensor([1.0, 1.1, 1.2, 1.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of_beta, beta)
    whole = MarginBasedLoss(4, nu=0.3).double()
    assert torch.autograd.gradcheck(lambda b: torch.func.functional_call(whole, {"beta": b}, (x, labels)), beta)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.2]))
def test_margin_based_over_all_pairs_counts_each_once(seed: int, nu: float) -> None:
    generator = seeded(seed)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (8,), generator=generator)
    unit, alpha, beta = oracles.unit(x.numpy()), 0.2, [0.9, 1.2, 1.3]
    total, active = 0.0, 0
    for i in range(8):
        for j in range(8):
            if i == j:
                continue
            b, same = beta[int(labels[i])], bool(labels[i] == labels[j])
            gap = oracles.dist(unit[i], unit[j]) - b
            term = max(0.0, alpha + (gap if same else -gap))
            total += term + (nu * b if same else 0.0)
            active += term > 0
    loss = AllPairsMarginBasedLoss(3, alpha=alpha, nu=nu).double()
    with torch.no_grad():
        loss.beta.copy_(torch.tensor(beta, dtype=torch.float64))
        assert loss(x, labels).item() == pytest.approx(total / active if active else 0.0, rel=1e-6)


def test_the_worked_examples_of_hermans() -> None:
    hard, every = case("A3.batch_hard"), case("A3.batch_all")
    x = torch.tensor(hard["inputs"]["X"], dtype=torch.float64)
    labels = torch.tensor(hard["inputs"]["labels"])
    plain: dict[str, Any] = {"distance": "euclidean", "normalize": False}
    margin = every["inputs"]["margin"]
    for loss, expected in (
        (BatchHardTripletLoss(margin, **plain), 0.717946),
        (BatchHardTripletLoss("soft", **plain), 0.998172),
        (BatchAllTripletLoss(margin, **plain), every["expected"]["mean_nonzero"]),
        (BatchAllTripletLoss(margin, reduction="mean", **plain), every["expected"]["mean_all"]),
        (BatchAllTripletLoss("soft", **plain), every["expected"]["soft_mean"]),
        (BatchAllTripletLoss(margin, normalize=False), 1.241250),
        (BatchHardTripletLoss(margin, normalize=False), 1.245000),
    ):
        assert loss(x, labels).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["C1.tfa_semihard_fallback", "C1.tfa_semihard_U6"])
def test_without_a_limit_and_with_the_easiest_fallback_semi_hard_is_tensorflow_addons(name: str) -> None:
    inputs, expected = case(name)["inputs"], case(name)["expected"]
    x = torch.tensor(inputs["X"], dtype=torch.float64)
    loss = SemiHardTripletLoss(inputs["margin"], window=math.inf, fallback="easiest", normalize=False)
    assert loss(x, torch.tensor(inputs["labels"])).item() == pytest.approx(expected, abs=1e-6)


def test_batch_all_is_pmls_triplet_margin_loss_over_all_triplets() -> None:
    x, labels = torch.randn(24, 6, generator=seeded(5)), torch.arange(24) // 4
    ours = BatchAllTripletLoss(0.2, distance="euclidean")(x, labels)
    assert ours.item() == pytest.approx(pml_losses.TripletMarginLoss(0.2)(x, labels).item(), rel=1e-5)


@LOSSES
@pytest.mark.parametrize("kind", ["one identity", "all distinct", "one image", "no image", "no references"])
def test_where_there_is_nothing_to_mine_the_loss_is_zero_and_has_a_gradient_of_zeros(make: Make, kind: str) -> None:
    x, labels = torch.randn(6, 3, generator=seeded()).requires_grad_(), torch.arange(6)
    loss = make()
    if kind == "one identity":
        labels = torch.zeros(6).long()
    arguments: list[Any] = [x, labels]
    if kind == "one image":
        arguments = [x[:1], labels[:1]]
    if kind == "no image":
        arguments = [x[:0], labels[:0]]
    if kind == "no references":
        arguments += [None, x.detach()[:0], labels[:0]]
    value = loss(*arguments)
    value.backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    pairs = isinstance(loss, (ContrastiveLoss, MarginBasedLoss)) and kind in ("one identity", "all distinct")
    if not pairs:
        assert value.item() == 0.0
        assert (x.grad == 0).all()
    assert loss.last is not None


@LOSSES
def test_duplicates_zero_rows_and_a_collapsed_batch_have_finite_gradients(make: Make) -> None:
    rows = torch.randn(12, 8, generator=seeded())
    rows[3], rows[7], rows[8] = rows[0], rows[6], 0.0
    for x in (rows, torch.zeros(12, 8), torch.ones(12, 8), rows[:1].expand(12, 8), 1e-20 * rows):
        leaf = x.clone().requires_grad_()
        make()(leaf, torch.arange(12) // 3 % 6).backward()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()


# The semi-hard ones choose others where distances differ by rounding only.
@pytest.mark.parametrize("name", [name for name in EQUAL if "semi" not in name])
@pytest.mark.parametrize("apart", [1e-3, 1e-5])
def test_near_duplicates_of_two_identities_have_the_gradient_of_their_difference(name: str, apart: float) -> None:
    x = torch.nn.functional.normalize(torch.randn(40, 64, generator=seeded(), dtype=torch.float64))
    labels = torch.arange(40) // 4
    for k in range(0, 36, 4):  # each identity has an image nearly the same as one of the next
        x[k + 4] = x[k + 3] + apart * torch.randn(64, generator=seeded(k), dtype=torch.float64) / 8
    gradients = []
    for loss, rows in ((EQUAL[name][0](), x.float()), (EQUAL[name][1](), x.float().double())):
        leaf = rows.clone().requires_grad_()
        loss(leaf, labels).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.double())
    assert (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[1].norm()


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_change_no_more_than_the_input_does(make: Make, dtype: torch.dtype) -> None:
    x, labels = torch.randn(24, 16, generator=seeded()).to(dtype), torch.arange(24) // 4
    expected = x.float().requires_grad_()
    value = make()(expected, labels)
    value.backward()
    for autocast in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = make()(leaf, labels)
        found.backward()
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(value.item(), rel=1e-6)
        assert leaf.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(leaf.grad, expected.grad.to(dtype))


@LOSSES
def test_no_tensor_outgrows_a_block_however_many_triplets_there_are(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metricface.miners.tiles.CPU_BLOCK", 64 * 64)
    monkeypatch.setattr("metricface.miners.tiles.ROW_NUMBERS", 64 * 64)
    monkeypatch.setattr("metricface.losses.streaming.ROW_NUMBERS", 64 * 64)
    x, labels = torch.randn(512, 6, generator=seeded()).requires_grad_(), torch.arange(512) // 32 % 6
    loss = make()
    setattr(loss, "tile_rows", 16)  # noqa: B010
    with LargestTensor() as largest:
        loss(x, labels).backward()
    # The positives of a tile, identities being large here; or the widest copy of the rows: of cosines, with lengths.
    assert largest.numbers <= max(16 * 512 // 2, 512 * (6 + 4))


STATISTICS = ("batch all", "batch all, plain, mean", "batch hard", "semi-hard", "semi-hard, easiest, plain")


@pytest.mark.parametrize("name", STATISTICS)
def test_last_says_what_the_statistics_of_the_listed_triplets_say(name: str) -> None:
    loss, separate = EQUAL[name][0](), EQUAL[name][1]()
    assert isinstance(loss, TripletLoss)
    assert isinstance(separate, Separate)
    tensors, _ = batch(1)
    loss(*tensors)
    found: Any = loss.last
    x, labels = tensors
    triplets = separate.miner(x, labels)
    expected = mining_statistics(
        x, labels, triplets, margin=loss.margin, distance=loss.distance, normalize=loss.normalize
    )
    assert expected["triplets"] > 0
    for key, value in expected.items():
        assert float(found[key]) == pytest.approx(float(value), rel=1e-6), key
    alone = sum(int((labels == label).sum()) == 1 for label in labels)
    assert int(found["anchors_without_positive"]) == alone
    assert int(found["anchors_dropped"]) == len(labels) - alone - int(found["anchors"])


def test_last_of_pair_losses_counts_pairs_and_those_with_a_loss() -> None:
    x = torch.tensor([[0.0, 0.0], [0.3, 0.4], [3.0, 4.0], [3.0, 5.5]])
    loss = AllPairsContrastiveLoss(5.0)
    loss(x, torch.tensor([0, 0, 1, 1]))
    assert loss.last is not None
    assert int(loss.last.pop("anchors_without_positive")) == int(loss.last.pop("anchors_without_negative")) == 0
    found = {key: round(float(value), 5) for key, value in loss.last.items()}
    apart = [math.dist(x[i].tolist(), x[j].tolist()) for i in (0, 1) for j in (2, 3)]
    assert found == {
        "positive_pairs": 4.0,
        "negative_pairs": 8.0,
        "active_positive_share": 1.0,
        "active_negative_share": sum(d < 5.0 for d in apart) / 4,
        "d_ap_mean": 1.0,
        "d_an_mean": pytest.approx(sum(apart) / 4, rel=1e-5),
    }


def test_they_take_pmls_place_in_its_multiple_losses() -> None:
    x, labels = torch.randn(24, 6, generator=seeded(5)), torch.arange(24) // 4
    parts = [BatchAllTripletLoss(), AllPairsContrastiveLoss()]
    combined = pml_losses.MultipleLosses(parts)(x, labels)
    assert combined.item() == pytest.approx(sum(part(x, labels).item() for part in parts), rel=1e-6)


@LOSSES
def test_a_miners_tuple_is_an_error(make: Make) -> None:
    x, labels = torch.randn(8, 3, generator=seeded()), torch.arange(8) // 2
    with pytest.raises(ValueError, match=r"mines for itself and takes no miner's tuple; found one of 3 tensors"):
        make()(x, labels, BatchHardMiner()(x, labels))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchAllTripletLoss(-0.1), "margin must be a finite number"),
        (lambda: SemiHardTripletLoss(0.0), "window > 0"),
        (lambda: SemiHardTripletLoss(window=-1.0), "window > 0"),
        (lambda: SemiHardTripletLoss(fallback="random"), "'skip', 'easiest', 'hardest'"),  # type: ignore[arg-type]
        (lambda: BatchHardTripletLoss(tile_rows=0), "tile_rows must be a whole number"),
        (lambda: AllPairsContrastiveLoss(0.0), "margin must be positive"),
        (lambda: AllPairsMarginBasedLoss(alpha=-1.0), "alpha must be 0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_errors(make: Make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_are_shown() -> None:
    common = "distance='squared_euclidean', normalize=True, reduction='mean'"
    assert repr(SemiHardTripletLoss("soft", window=0.3)) == (
        f"SemiHardTripletLoss(margin='soft', {common}, window=0.3, fallback='skip')"
    )


def test_the_semi_hard_window_follows_a_margin_that_is_changed_later() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 8
    x = torch.randn(8, 6, generator=generator)[labels] + torch.randn(40, 6, generator=generator)
    for margin in (0.05, 0.6):
        changed = SemiHardTripletLoss(0.2)
        changed.margin = margin
        assert changed(x, labels).item() == SemiHardTripletLoss(margin)(x, labels).item()
