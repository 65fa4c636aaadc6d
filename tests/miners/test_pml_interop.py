"""Beside pytorch-metric-learning: the same choices where it follows the definitions, and who is right where not."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from pytorch_metric_learning import distances as pml_distances
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from torch import Tensor, nn

from metricface.distances import unit_rows
from metricface.miners import (
    BatchAllMiner,
    BatchHardMiner,
    CurriculumMiner,
    DistanceWeightedMiner,
    EasyPositiveMiner,
    MultiSimilarityMiner,
    PairMarginMiner,
    RandomHardMiner,
    RandomMiner,
    SemiHardMiner,
)

MINERS = [
    BatchAllMiner(),
    BatchHardMiner(),
    DistanceWeightedMiner(),
    EasyPositiveMiner(),
    RandomHardMiner(),
    RandomMiner(),
    SemiHardMiner(),
    SemiHardMiner(negative="all"),
    CurriculumMiner(SemiHardMiner(), BatchHardMiner(), start=0, end=1000),
]
EVERY_MINER = pytest.mark.parametrize(
    "miner", [*MINERS, MultiSimilarityMiner(), PairMarginMiner()], ids=lambda miner: type(miner).__name__
)


def rows(indices: Any) -> list[tuple[int, ...]]:
    return list(zip(*(index.tolist() for index in indices), strict=True))


def faces(dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """40 images of 12 people in mixed order, two of them with one image."""
    labels = torch.tensor([*range(10), 10, 11, *[k for k in range(10) for _ in range(2 + k % 3)][:28]])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    generator = torch.Generator().manual_seed(seed + 1)
    centres = torch.randn(12, dim, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(len(labels), dim, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_batch_hard_gives_pmls_triplets(normalize: bool, references: bool) -> None:
    x, labels = faces(16)
    batch = (x[:15], labels[:15], x[15:], labels[15:]) if references else (x, labels)
    theirs = pml_miners.BatchHardMiner(distance=pml_distances.LpDistance(normalize_embeddings=normalize))
    assert sorted(rows(BatchHardMiner(normalize=normalize)(*batch))) == sorted(rows(theirs(*batch)))


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("power", [1, 2])
def test_semi_hard_takes_one_of_pmls_candidates_for_each_pair_that_has_any(power: int, references: bool) -> None:
    x, labels = faces(16)
    batch = (x[:15], labels[:15], x[15:], labels[15:]) if references else (x, labels)
    distance = pml_distances.LpDistance(power=power)
    theirs = pml_miners.TripletMarginMiner(margin=0.3, type_of_triplets="semihard", distance=distance)
    candidates: dict[tuple[int, int], set[int]] = defaultdict(set)
    for a, p, n in rows(theirs(*batch)):
        candidates[a, p].add(n)
    for negative in ("hardest", "random"):
        miner = SemiHardMiner(0.3, negative=negative, distance="squared_euclidean" if power == 2 else "euclidean")
        ours = rows(miner(*batch))
        assert [(a, p) for a, p, _ in ours] == sorted(candidates)
        assert all(n in candidates[a, p] for a, p, n in ours)
        drawn: dict[tuple[int, int], set[int]] = defaultdict(set)
        if negative == "random":
            for _ in range(100):
                for a, p, n in rows(miner(*batch)):
                    drawn[a, p].add(n)
            small = {pair: window for pair, window in candidates.items() if len(window) <= 8}
            assert small
            assert {pair: drawn[pair] for pair in small} == small


def test_distance_weighting_draws_from_the_same_negatives_as_pml() -> None:
    x, labels = (part[:16] for part in faces(3))
    torch.manual_seed(1)
    drawn: list[dict[int, set[int]]] = []
    for miner in (pml_miners.DistanceWeightedMiner(), DistanceWeightedMiner()):
        negatives: dict[int, set[int]] = defaultdict(set)
        for _ in range(120):
            for a, _, n in rows(miner(x, labels)):
                negatives[a].add(n)
        drawn.append(negatives)
    assert len(drawn[0]) > 8
    assert drawn[0] == drawn[1]


def near_duplicate(dim: int) -> tuple[Tensor, Tensor]:
    x = unit_rows(torch.randn(128, dim, generator=torch.Generator().manual_seed(0)) + 0.5)
    x[4] = x[0] + 1e-4
    return x, torch.arange(128) // 4


def test_one_near_duplicate_empties_pmls_other_anchors_and_none_of_ours() -> None:
    x, labels = near_duplicate(512)
    torch.manual_seed(0)
    assert len(set(pml_miners.DistanceWeightedMiner()(x, labels)[0].tolist())) < 10
    assert len(set(DistanceWeightedMiner()(x, labels).anchor.tolist())) == 128


def test_pml_draws_positives_with_replacement_and_we_take_each_pair_once() -> None:
    x, labels = faces(8)
    every_pair = {(a, p) for a in range(40) for p in range(40) if a != p and labels[a] == labels[p]}
    torch.manual_seed(0)
    theirs = [pair[:2] for pair in rows(pml_miners.DistanceWeightedMiner()(x, labels))]
    ours = [pair[:2] for pair in rows(DistanceWeightedMiner()(x, labels))]
    assert len(set(theirs)) < len(theirs)
    assert set(theirs) < every_pair
    assert len(ours) == len(every_pair)
    assert set(ours) == every_pair


def test_a_clone_of_the_labels_makes_pmls_anchors_their_own_positives_and_self_index_prevents_it_here() -> None:
    x, labels = faces(8)
    torch.manual_seed(0)
    clone = x.clone(), labels.clone()
    assert any(a == p for a, p, _ in rows(pml_miners.DistanceWeightedMiner()(x, labels, *clone)))
    alone = {int(a) for a in range(40) if (labels == labels[a]).sum() == 1}
    assert {a for a, p, _ in rows(pml_miners.BatchHardMiner()(x, labels, *clone)) if a == p} == alone
    for miner in MINERS:
        assert all(a != p for a, p, _ in rows(miner(x, labels, *clone, self_index=torch.arange(40))))


def test_at_full_collapse_pml_has_no_semi_hard_triplet_and_a_fallback_has_one_a_pair() -> None:
    x, labels = torch.ones(8, 4), torch.arange(8) // 4
    assert len(pml_miners.TripletMarginMiner(type_of_triplets="semihard")(x, labels)[0]) == 0
    assert len(SemiHardMiner(fallback="hardest")(x, labels).anchor) == 24


PML_LOSSES = [pml_losses.TripletMarginLoss(), pml_losses.MarginLoss(), pml_losses.ContrastiveLoss()]


@EVERY_MINER
@pytest.mark.parametrize("loss", PML_LOSSES)
def test_pmls_losses_take_what_our_miners_give(miner: nn.Module, loss: nn.Module) -> None:
    x, labels = faces(8)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, labels, miner(x, labels)), x)
    assert gradient.abs().sum() > 0


@EVERY_MINER
@pytest.mark.parametrize("loss", PML_LOSSES)
def test_pmls_losses_take_an_empty_result(miner: nn.Module, loss: nn.Module) -> None:
    x, labels = torch.eye(6, requires_grad=True), torch.arange(6)
    value = loss(x, labels, miner(x, labels))
    assert value.item() == 0.0
    value.backward()


@EVERY_MINER
def test_our_miners_work_inside_pmls_wrappers(miner: nn.Module) -> None:
    x, labels = faces(8)
    x = x.float().requires_grad_()
    several = pml_losses.MultipleLosses(PML_LOSSES, miners=[miner, BatchHardMiner(), RandomMiner()])
    assert torch.isfinite(several(x, labels))
    memory = pml_losses.CrossBatchMemory(pml_losses.ContrastiveLoss(), 8, memory_size=100, miner=miner)
    for _ in range(3):
        assert torch.isfinite(memory(x, labels))
