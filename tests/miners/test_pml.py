"""PML's miners on our kernels: its tuples index set by index set, its arguments, its statistics; and what differs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_metric_learning import distances, losses
from pytorch_metric_learning import miners as theirs
from torch import Tensor

from metricface.miners import pml as ours

DISTANCES: dict[str, Callable[[], Any]] = {
    "euclidean": distances.LpDistance,
    "raw": lambda: distances.LpDistance(normalize_embeddings=False),
    "squared": lambda: distances.LpDistance(power=2),
    "cosine": distances.CosineSimilarity,
    "dot": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    "unit dot": distances.DotProductSimilarity,
}
DISTANCE = pytest.mark.parametrize("make_distance", DISTANCES.values(), ids=DISTANCES)
REFERENCES = pytest.mark.parametrize("references", [False, True], ids=["batch", "references"])


def faces(seed: int = 0, dim: int = 12) -> tuple[Tensor, Tensor]:
    """40 images of 12 people in mixed order, two of them with one image."""
    labels = torch.tensor([*range(12), *[k for k in range(10) for _ in range(2 + k % 3)][:28]])
    generator = torch.Generator().manual_seed(seed)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.randn(12, dim, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(len(labels), dim, generator=generator, dtype=torch.float64), labels


def batch(references: bool) -> tuple[Tensor, ...]:
    x, labels = faces()
    # Identities that one side lacks, and anchors without a positive.
    return (x[:15], labels[:15], x[15:], labels[15:]) if references else (x, labels)


def sets(indices: Any) -> list[set[tuple[int, ...]]]:
    """A triplet tuple as one set, a pair tuple as two; no index twice."""
    assert all(column.dtype == torch.int64 for column in indices)
    halves = [indices] if len(indices) == 3 else [indices[:2], indices[2:]]
    lists = [list(zip(*(column.tolist() for column in half), strict=True)) for half in halves]
    assert all(len(set(found)) == len(found) for found in lists)
    return [set(found) for found in lists]


def between(values: Tensor, share: float) -> float:
    """A number with about that share of the values below it, and none of them near."""
    ordered = values.sort().values
    place = int(share * len(ordered))
    wide = int((ordered[place:].diff() > 1e-6).nonzero()[0, 0]) + place
    return float(ordered[wide : wide + 2].mean())


def check_same(name: str, references: bool, **arguments: Any) -> None:
    miners = [getattr(module, name)(**arguments, collect_stats=True) for module in (ours, theirs)]
    found = [miner(*batch(references)) for miner in miners]
    assert len(found[0]) == len(found[1])
    assert sets(found[0]) == sets(found[1])
    assert sum(map(len, sets(found[0]))) > 0
    for statistic in miners[1]._record_these_stats:
        values = [getattr(miner, statistic) for miner in miners]
        assert values[0] == pytest.approx(values[1], rel=1e-9, abs=1e-12), statistic


@REFERENCES
@DISTANCE
def test_batch_hard(make_distance: Callable[[], Any], references: bool) -> None:
    check_same("BatchHardMiner", references, distance=make_distance())


@REFERENCES
@DISTANCE
@pytest.mark.parametrize("kind", ["all", "hard", "semihard", "easy"])
def test_triplet_margin(make_distance: Callable[[], Any], references: bool, kind: str) -> None:
    distance = make_distance()
    margin = 0.15 if distance.normalize_embeddings else 3.0
    check_same("TripletMarginMiner", references, margin=margin, type_of_triplets=kind, distance=distance)


STRATEGIES = ["easy", "hard", "semihard", "all"]


@REFERENCES
@DISTANCE
@pytest.mark.parametrize("pos_strategy", STRATEGIES)
@pytest.mark.parametrize("neg_strategy", STRATEGIES)
def test_batch_easy_hard(
    make_distance: Callable[[], Any], references: bool, pos_strategy: str, neg_strategy: str
) -> None:
    if "semihard" in (pos_strategy, neg_strategy) and {pos_strategy, neg_strategy} <= {"semihard", "all"}:
        for module in (ours, theirs):
            with pytest.raises(ValueError, match="semihard"):
                module.BatchEasyHardMiner(pos_strategy, neg_strategy)
        return
    check_same(
        "BatchEasyHardMiner",
        references,
        pos_strategy=pos_strategy,
        neg_strategy=neg_strategy,
        distance=make_distance(),
    )


@REFERENCES
@DISTANCE
@pytest.mark.parametrize("strategies", [("easy", "semihard"), ("hard", "hard"), ("semihard", "easy"), ("all", "hard")])
def test_batch_easy_hard_within_ranges(
    make_distance: Callable[[], Any], references: bool, strategies: tuple[str, str]
) -> None:
    x, labels = faces()
    matrix = make_distance()(x, x)
    ranges = [
        tuple(between(matrix[(labels[:, None] == labels) == same], share) for share in (0.2, 0.6))
        for same in (True, False)
    ]
    check_same(
        "BatchEasyHardMiner",
        references,
        pos_strategy=strategies[0],
        neg_strategy=strategies[1],
        allowed_pos_range=ranges[0],
        allowed_neg_range=ranges[1],
        distance=make_distance(),
    )


@REFERENCES
@DISTANCE
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_multi_similarity(make_distance: Callable[[], Any], references: bool, epsilon: float) -> None:
    check_same("MultiSimilarityMiner", references, epsilon=epsilon, distance=make_distance())


@REFERENCES
@DISTANCE
def test_pair_margin(make_distance: Callable[[], Any], references: bool) -> None:
    x, labels = faces()
    matrix = make_distance()(x, x)
    same = labels[:, None] == labels
    check_same(
        "PairMarginMiner",
        references,
        pos_margin=between(matrix[same], 0.5),
        neg_margin=between(matrix[~same], 0.5),
        distance=make_distance(),
    )


@REFERENCES
def test_distance_weighting_draws_from_pmls_negatives(references: bool) -> None:
    drawn: list[set[tuple[int, int]]] = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        miner, found = module.DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.2), set()
        for _ in range(300):
            a, _, n = miner(*(part[:, :3] if part.ndim == 2 else part for part in batch(references)))
            found |= set(zip(a.tolist(), n.tolist(), strict=True))
        drawn.append(found)
    assert len(drawn[0]) > 60
    assert len(drawn[0] ^ drawn[1]) <= 0.02 * len(drawn[0])  # chances of less than 1 in 1,000


def test_distance_weighting_takes_each_pair_once_where_pml_repeats_some() -> None:
    x, labels = faces()
    pairs = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        a, p, _ = module.DistanceWeightedMiner()(x, labels)
        pairs.append(list(zip(a.tolist(), p.tolist(), strict=True)))
    assert len(set(pairs[0])) == len(pairs[0])
    assert len(set(pairs[1])) < len(pairs[1])


def test_one_near_duplicate_costs_no_other_anchor_its_triplets() -> None:
    x = torch.nn.functional.normalize(torch.randn(128, 512, generator=torch.Generator().manual_seed(0)) + 0.5)
    labels = torch.arange(128) // 4
    x[4] = x[0] + 1e-4
    torch.manual_seed(0)
    assert len(set(theirs.DistanceWeightedMiner()(x, labels)[0].tolist())) < 10
    assert len(set(ours.DistanceWeightedMiner()(x, labels)[0].tolist())) == 128


def test_a_type_of_triplets_that_does_not_exist_is_an_error_where_pml_means_all() -> None:
    x, labels = faces()
    everything = sets(theirs.TripletMarginMiner(type_of_triplets="all")(x, labels))
    assert sets(theirs.TripletMarginMiner(type_of_triplets="semi-hard")(x, labels)) == everything
    with pytest.raises(ValueError, match="'all', 'hard', 'semihard', 'easy'"):
        ours.TripletMarginMiner(type_of_triplets="semi-hard")


MINERS: list[Callable[[], Any]] = [
    ours.BatchHardMiner,
    ours.BatchEasyHardMiner,
    ours.TripletMarginMiner,
    ours.DistanceWeightedMiner,
    ours.MultiSimilarityMiner,
    ours.PairMarginMiner,
]
EVERY_MINER = pytest.mark.parametrize("make", MINERS, ids=lambda make: make.__name__)


@EVERY_MINER
def test_self_index_keeps_an_anchor_of_cloned_references_from_being_its_own_positive(make: Callable[[], Any]) -> None:
    x, labels = faces()
    named = {"self_index": torch.arange(40)}
    torch.manual_seed(0)
    expected = sets(make()(x, labels))
    torch.manual_seed(0)
    assert sets(make()(x, labels, x.clone(), labels.clone(), **named)) == expected


def test_without_self_index_cloned_references_hold_the_anchor_itself_as_in_pml() -> None:
    x, labels = faces()
    for module in (ours, theirs):
        a, p, _ = module.BatchHardMiner()(x, labels, x.clone(), labels.clone())
        assert (a == p).any()  # of people with one image


@EVERY_MINER
def test_it_is_one_of_pmls_miners_and_feeds_its_losses_and_wrappers(make: Callable[[], Any]) -> None:
    miner = make()
    assert isinstance(miner, theirs.BaseMiner)
    x, labels = faces()
    x = x.float().requires_grad_()
    loss = losses.MultipleLosses([losses.ContrastiveLoss(), losses.TripletMarginLoss()], miners=[miner, make()])
    loss(x, labels).backward()
    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), 12, memory_size=100, miner=make())
    for _ in range(3):
        assert torch.isfinite(memory(x, labels))


@EVERY_MINER
def test_half_precision_is_mined_in_float32(make: Callable[[], Any]) -> None:
    x, labels = faces()
    half = x.bfloat16()
    torch.manual_seed(0)
    expected = sets(make()(half.float(), labels))
    torch.manual_seed(0)
    assert sets(make()(half, labels)) == expected


@EVERY_MINER
@pytest.mark.parametrize("images", ["one identity", "all distinct", "none"])
def test_nothing_to_mine_is_an_empty_tuple_as_in_pml(make: Callable[[], Any], images: str) -> None:
    x, _ = faces()
    labels = torch.arange(40) * (images == "all distinct")
    if images == "none":
        x, labels = x[:0], labels[:0]
    found = make()(x, labels)
    kinds = sets(found)
    if len(found) == 3:
        assert kinds == [set()]
    elif images != "none":
        name = type(make()).__name__
        assert kinds == sets(getattr(theirs, name)()(x, labels))


@pytest.mark.parametrize(
    "distance",
    [
        distances.LpDistance(p=1),
        distances.LpDistance(power=3),
        distances.SNRDistance(),
        distances.CosineSimilarity(power=2),
    ],
    ids=["L1", "cubed", "SNR", "squared cosine"],
)
def test_a_distance_without_a_kernel_is_an_error_that_says_which_have_one(distance: Any) -> None:
    with pytest.raises(ValueError, match=r"takes LpDistance .p=2, power 1 or 2.*pytorch_metric_learning's own miner"):
        ours.TripletMarginMiner(distance=distance)


def test_labels_above_two_to_the_24_stay_apart() -> None:
    x, labels = faces()
    assert sets(ours.BatchHardMiner()(x, labels + 2**24)) == sets(ours.BatchHardMiner()(x, labels))
