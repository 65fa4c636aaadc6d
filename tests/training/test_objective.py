import pytest
import torch

from metricface.heads import Softmax
from metricface.losses import ContrastiveLoss, TripletLoss
from metricface.losses.mined import BatchHardTripletLoss
from metricface.miners import BatchHardMiner, PairMarginMiner
from metricface.training.objective import HeadObjective, MinedObjective


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return embeddings, torch.arange(12) // 3


def mined(miner: BatchHardMiner | None) -> MinedObjective:
    return MinedObjective(TripletLoss(0.2), miner, margin=0.2, distance="squared_euclidean", normalize=True)


def test_a_mined_objective_is_miner_and_loss_called_by_hand() -> None:
    embeddings, labels = batch()
    by_hand = TripletLoss(0.2)(embeddings, labels, BatchHardMiner()(embeddings, labels))
    assert mined(BatchHardMiner())(embeddings, labels).item() == by_hand.item()


def test_without_a_miner_every_triplet_counts_and_statistics_are_of_random_ones() -> None:
    embeddings, labels = batch()
    objective = mined(None)
    assert objective(embeddings, labels).item() == TripletLoss(0.2)(embeddings, labels).item()
    state = torch.get_rng_state()
    found = objective.statistics(embeddings, labels)
    assert found["random/triplets"] == 24
    assert torch.equal(state, torch.get_rng_state())  # looking does not change what training draws


def test_a_loss_without_a_triplet_margin_claims_no_active_share() -> None:
    embeddings, labels = batch()
    objective = MinedObjective(ContrastiveLoss(), None, margin=None, distance="euclidean", normalize=False)
    objective(embeddings, labels)
    found = objective.statistics(embeddings, labels)
    assert "random/d_ap_mean" in found
    assert not any("share" in name and "anchor" not in name for name in found)


def test_statistics_are_of_the_triplets_that_were_mined() -> None:
    embeddings, labels = batch()
    objective = mined(BatchHardMiner())
    objective(embeddings, labels)
    found = objective.statistics(embeddings, labels)
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    anchor, positive, _ = BatchHardMiner()(embeddings, labels)
    expected = (unit[anchor] - unit[positive]).square().sum(dim=1).mean()
    assert found["mining/triplets"] == 12
    assert found["mining/d_ap_mean"].item() == pytest.approx(expected.item())


def test_statistics_of_a_loss_that_mines_for_itself_are_what_it_saw() -> None:
    embeddings, labels = batch()
    by_itself = MinedObjective(
        BatchHardTripletLoss(0.2), None, margin=0.2, distance="squared_euclidean", normalize=True
    )
    with_miner = mined(BatchHardMiner())
    assert by_itself(embeddings, labels).item() == pytest.approx(with_miner(embeddings, labels).item())
    found, expected = by_itself.statistics(embeddings, labels), with_miner.statistics(embeddings, labels)
    assert expected.keys() < found.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5)


def test_statistics_of_mined_pairs_are_of_pairs_and_never_of_all_triplets_that_they_could_form() -> None:
    embeddings, labels = batch()
    objective = MinedObjective(
        ContrastiveLoss(), PairMarginMiner(0.1, 1.5), margin=None, distance="euclidean", normalize=True
    )
    objective(embeddings, labels)
    found = objective.statistics(embeddings, labels)
    pairs = PairMarginMiner(0.1, 1.5)(embeddings, labels)
    assert int(found["mining/positive_pairs"]) == len(pairs.positive) > 0
    assert int(found["mining/negative_pairs"]) == len(pairs.negative) > 0
    assert 0.1 < found["mining/d_ap_mean"] < 2
    assert found["mining/d_an_mean"] < 1.5


def test_a_batch_without_positives_gives_loss_zero_and_no_gradient() -> None:
    embeddings = torch.randn(6, 4, requires_grad=True)
    value = mined(BatchHardMiner())(embeddings, torch.arange(6))
    value.backward()
    assert value.item() == 0.0
    assert embeddings.grad is not None
    assert not embeddings.grad.any()


def test_a_head_reports_its_accuracy_without_its_margin() -> None:
    head = Softmax(3, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3))
    accuracy = HeadObjective(head).statistics(torch.eye(3), torch.tensor([0, 1, 0]))["head/accuracy"]
    assert accuracy.item() == pytest.approx(2 / 3)
