"""Tuples of pytorch-metric-learning's miners in our losses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml
from torch import nn

from metricface.losses import (
    AngularLoss,
    CircleLoss,
    ContrastiveLoss,
    DeepID2Loss,
    GeneralizedLiftedStructureLoss,
    LiftedStructureLoss,
    MarginBasedLoss,
    MultiSimilarityLoss,
    NPairLoss,
    TripletLoss,
)

MINERS: list[Callable[[], Any]] = [
    pml.AngularMiner,
    pml.BatchEasyHardMiner,
    pml.BatchHardMiner,
    pml.DistanceWeightedMiner,
    pml.HDCMiner,
    pml.MultiSimilarityMiner,
    lambda: pml.PairMarginMiner(pos_margin=0.2, neg_margin=1.3),
    lambda: pml.TripletMarginMiner(0.2, type_of_triplets="semihard"),
    pml.UniformHistogramMiner,
]
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "contrastive": ContrastiveLoss,
    "triplet": TripletLoss,
    "margin based": lambda: MarginBasedLoss(8),
    "generalised lifted": GeneralizedLiftedStructureLoss,
    "lifted": LiftedStructureLoss,
    "multi-similarity": MultiSimilarityLoss,
    "circle": CircleLoss,
    "n-pair": NPairLoss,
    "angular": AngularLoss,
    "deepid2": lambda: DeepID2Loss(8, 16),
}
LABELS = torch.arange(32) // 4


def batch() -> torch.Tensor:
    """Identities that overlap enough for every miner to find something."""
    generator = torch.Generator().manual_seed(12)
    return torch.randn(8, 16, generator=generator).repeat_interleave(4, 0) + torch.randn(32, 16, generator=generator)


@pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("make_miner", MINERS, ids=lambda make: getattr(make, "__name__", "miner"))
def test_any_pml_miner_feeds_any_of_our_losses(
    make_miner: Callable[[], Any], make_loss: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    x = batch().requires_grad_()
    mined = make_miner()(x, LABELS)
    assert sum(len(column) for column in mined) > 0
    value = make_loss()(x, LABELS, mined)
    value.backward()
    assert value.item() > 0
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_a_pml_miner_with_separate_references_feeds_our_loss_as_it_does_pmls() -> None:
    x, refs = batch(), batch().flip(0) + 0.1
    ref_labels = LABELS.flip(0)
    mined = pml.BatchHardMiner()(x, LABELS, refs, ref_labels)
    ours = TripletLoss(0.2, distance="euclidean", reduction="active")(x, LABELS, mined, refs, ref_labels)
    theirs = pml_losses.TripletMarginLoss(0.2)(x, LABELS, mined, refs, ref_labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_pairs_join_on_the_anchor_for_triplet_losses_as_in_pml() -> None:
    x = batch()
    mined = pml.MultiSimilarityMiner()(x, LABELS)
    ours = TripletLoss(0.05, distance="euclidean", reduction="active")(x, LABELS, mined)
    assert ours.item() == pytest.approx(pml_losses.TripletMarginLoss()(x, LABELS, mined).item(), rel=1e-5)


def test_our_losses_take_pmls_place_in_its_multiple_losses() -> None:
    combined = pml_losses.MultipleLosses([TripletLoss(), MarginBasedLoss(8)], weights=[1.0, 0.5])
    x = batch()
    expected = TripletLoss()(x, LABELS) + 0.5 * MarginBasedLoss(8)(x, LABELS)
    assert combined(x, LABELS).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("wrapper", [pml_losses.CrossBatchMemory, pml_losses.SelfSupervisedLoss])
def test_pmls_wrappers_take_the_losses_whose_names_they_know_and_refuse_the_others(wrapper: Any) -> None:
    sizes = (16, 64) if wrapper is pml_losses.CrossBatchMemory else ()
    for name, make in LOSSES.items():
        if name in ("triplet", "margin based", "n-pair", "deepid2"):
            with pytest.raises(Exception, match="not supported for"):
                wrapper(make(), *sizes)
            continue
        x = batch().requires_grad_()
        second = (LABELS,) if sizes else (batch() + 0.1,)
        value = wrapper(make(), *sizes)(x, *second)
        value.backward()
        assert value.item() > 0
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
