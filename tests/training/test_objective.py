import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from metricface.heads import CosFace, Softmax
from metricface.losses import ContrastiveLoss, MarginBasedLoss, RangeLoss, TripletLoss
from metricface.losses.mined import BatchHardTripletLoss
from metricface.miners import BatchHardMiner, EmbeddingMemory, PairMarginMiner
from metricface.training.objective import HeadObjective, MinedObjective, Part, SumObjective
from metricface.training.recipe import Schedule


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return embeddings, torch.arange(12) // 3


def mined(miner: BatchHardMiner | None) -> MinedObjective:
    return MinedObjective(TripletLoss(0.2), miner)


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
    objective = MinedObjective(ContrastiveLoss(), None)
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
    by_itself = MinedObjective(BatchHardTripletLoss(0.2), None)
    with_miner = mined(BatchHardMiner())
    assert by_itself(embeddings, labels).item() == pytest.approx(with_miner(embeddings, labels).item())
    found, expected = by_itself.statistics(embeddings, labels), with_miner.statistics(embeddings, labels)
    assert expected.keys() < found.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5)


def test_statistics_of_mined_pairs_are_of_pairs_and_never_of_all_triplets_that_they_could_form() -> None:
    embeddings, labels = batch()
    objective = MinedObjective(ContrastiveLoss(normalize=True), PairMarginMiner(0.1, 1.5))
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
    objective, seen = HeadObjective(head), (torch.eye(3), torch.tensor([0, 1, 0]))
    objective(*seen)
    assert objective.statistics(*seen)["head/accuracy"].item() == pytest.approx(2 / 3)


def test_a_head_is_not_asked_for_all_its_logits_to_say_what_it_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = HeadObjective(CosFace(4, 8))
    monkeypatch.setattr(objective.head, "logits", None)
    rows = torch.randn(6, 8), torch.arange(6) % 4
    objective(*rows)
    assert set(objective.statistics(*rows)) == {"head/accuracy", "head/target_angle_deg", "head/zero_embeddings"}


class Centred(nn.Module):
    """A loss that says what it saw and does not mine."""

    last: dict[str, torch.Tensor] | None = None

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor, found: object = None) -> torch.Tensor:
        self.last = {"center_distance": embeddings.detach().norm(dim=1).mean()}
        return 0.5 * embeddings.square().sum(dim=1).mean()


def test_what_a_loss_says_is_not_called_mining_and_hides_nothing_of_its_miner() -> None:
    embeddings, labels = batch()
    alone, with_miner = MinedObjective(Centred(), None), MinedObjective(Centred(), BatchHardMiner())
    alone(embeddings, labels)
    with_miner(embeddings, labels)
    assert set(alone.statistics(embeddings, labels)) == {"loss/center_distance"}
    assert {"loss/center_distance", "mining/triplets"} < set(with_miner.statistics(embeddings, labels))


def test_active_triplets_are_those_of_the_margin_that_a_loss_has_now() -> None:
    embeddings, labels = batch()
    shares = []
    for loss, number in ((TripletLoss(0.0), "margin"), (MarginBasedLoss(alpha=0.0), "alpha")):
        objective = MinedObjective(loss, None)
        objective(embeddings, labels)
        for value in (0.0, 4.0):
            setattr(loss, number, value)
            shares.append(objective.statistics(embeddings, labels)["random/active_share"].item())
    assert shares[0] < 1.0 == shares[1]
    assert shares[2] < 1.0 == shares[3]


def summed(weight: float = 0.25, **schedules: Schedule) -> SumObjective:
    head = CosFace(4, 8, margin_cos=0.3, scale=4.0, generator=torch.Generator().manual_seed(1)).double()
    parts: dict[str, Part] = {
        "head": HeadObjective(head),
        "triplet": MinedObjective(TripletLoss(0.2), BatchHardMiner()),
    }
    named = {key.replace("__", "."): schedule for key, schedule in schedules.items()}
    return SumObjective(parts, {"head": 1.0, "triplet": weight}, named)


def cosface_and_batch_hard(
    x: NDArray[np.float64], classes: NDArray[np.float64], labels: list[int], *, margin_cos: float, margin: float
) -> tuple[float, float]:
    """Both losses in loops: CosFace of scale 4, and FaceNet's triplet loss on the hardest in the batch."""
    unit = [row / np.linalg.norm(row) for row in x]
    vectors = [row / np.linalg.norm(row) for row in classes]
    cross_entropy = triplets = 0.0
    for a, label in enumerate(labels):
        logits = [4.0 * (unit[a] @ w - (margin_cos if j == label else 0.0)) for j, w in enumerate(vectors)]
        cross_entropy += np.log(sum(np.exp(z) for z in logits)) - logits[label]
        positive = max(((unit[a] - unit[p]) ** 2).sum() for p, other in enumerate(labels) if other == label and p != a)
        negative = min(((unit[a] - unit[n]) ** 2).sum() for n, other in enumerate(labels) if other != label)
        triplets += max(0.0, positive - negative + margin)
    return float(cross_entropy / len(labels)), float(triplets / len(labels))


def weights_of(objective: SumObjective) -> NDArray[np.float64]:
    head = objective.parts["head"]
    assert isinstance(head, HeadObjective)
    weight: NDArray[np.float64] = head.head.get_parameter("weight").detach().numpy()
    return weight


def test_a_sum_is_each_loss_times_its_weight_and_so_is_its_gradient() -> None:
    embeddings, labels = batch()
    x = embeddings.detach().double().requires_grad_()
    objective = summed(0.25)
    head, triplet = cosface_and_batch_hard(
        x.detach().numpy(), weights_of(objective), labels.tolist(), margin_cos=0.3, margin=0.2
    )
    value = objective(x, labels)
    assert value.item() == pytest.approx(head + 0.25 * triplet, abs=1e-9)
    assert {name: part.item() for name, part in objective.values.items()} == pytest.approx(
        {"head": head, "triplet": triplet}
    )
    (gradient,) = torch.autograd.grad(value, x)
    alone = [torch.autograd.grad(part(x, labels), x)[0] for part in objective.parts.values()]
    torch.testing.assert_close(gradient, alone[0] + 0.25 * alone[1])
    assert alone[1].abs().sum() > 0


def test_scheduled_weights_and_margins_are_those_of_the_moment() -> None:
    embeddings, labels = batch()
    x = embeddings.detach().double()
    objective = summed(
        head__margin_cos=Schedule("ramp", [[0.0, 0.0], [1.0, 0.4]]),
        triplet__margin=Schedule("step", [[0.0, 0.1], [0.5, 0.5]]),
        triplet__weight=Schedule("anneal", [[0.0, 2.0], [1.0, 0.0]]),
    )
    for progress, margin_cos, margin, weight in ((0.0, 0.0, 0.1, 2.0), (0.5, 0.2, 0.5, 1.0), (1.0, 0.4, 0.5, 0.0)):
        assert objective.follow(progress) == pytest.approx(
            {"head.margin_cos": margin_cos, "triplet.margin": margin, "triplet.weight": weight}, abs=1e-12
        )
        head, triplet = cosface_and_batch_hard(
            x.numpy(), weights_of(objective), labels.tolist(), margin_cos=margin_cos, margin=margin
        )
        assert objective(x, labels).item() == pytest.approx(head + weight * triplet, abs=1e-9)


def test_a_sum_shows_the_curves_of_every_part_and_each_loss_without_its_weight() -> None:
    embeddings, labels = batch()
    objective = summed(0.25)
    objective(embeddings.double(), labels)
    found = objective.statistics(embeddings.double(), labels)
    assert {"head/accuracy", "triplet/mining/active_share", "term/head", "term/triplet"} < set(found)
    assert not any(name.startswith("mining/") for name in found)
    assert found["term/triplet"].item() == objective.values["triplet"].item() > 0


def test_a_sum_of_one_part_is_that_part_to_the_bit_and_has_its_curves() -> None:
    embeddings, labels = batch()
    alone = mined(BatchHardMiner())
    objective = SumObjective({"loss": mined(BatchHardMiner())}, {"loss": 1.0}, {})
    assert torch.equal(objective(embeddings, labels), alone(embeddings, labels))
    found, expected = objective.statistics(embeddings, labels), alone.statistics(embeddings, labels)
    assert {name: value.item() for name, value in found.items()} == {n: value.item() for n, value in expected.items()}


def test_a_term_may_be_called_as_an_attribute_of_modules_and_its_parameters_are_saved() -> None:
    parts: dict[str, Part] = {
        "head": HeadObjective(Softmax(4, 8)),
        "type": MinedObjective(MarginBasedLoss(4), None),
    }
    objective = SumObjective(parts, {"head": 1.0, "type": 0.5}, {})
    saved = copy.deepcopy(objective.state_dict())
    assert len(list(objective.parameters())) == 3
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(1.0)
    objective.load_state_dict(saved)
    for name, value in objective.state_dict().items():
        assert torch.equal(value, saved[name])


def test_an_error_of_one_part_of_a_sum_names_the_part() -> None:
    embeddings, labels = batch()
    objective = SumObjective(
        {"loss": mined(None), "second": HeadObjective(Softmax(2, 8))}, {"loss": 1.0, "second": 1.0}, {}
    )
    with pytest.raises(ValueError, match=r"^second: labels must lie in \[0, 2\)"):
        objective(embeddings, labels)


def test_a_term_named_like_a_figure_of_the_main_loss_hides_nothing() -> None:
    parts: dict[str, Part] = {"loss": MinedObjective(RangeLoss(), None), "intra": MinedObjective(TripletLoss(), None)}
    objective = SumObjective(parts, {"loss": 1.0, "intra": 1.0}, {})
    objective(*batch())
    found = objective.statistics(*batch())
    assert isinstance(parts["loss"], MinedObjective)
    assert isinstance(parts["loss"].loss, RangeLoss)
    assert parts["loss"].loss.last is not None
    assert torch.equal(found["loss/intra"], parts["loss"].loss.last["intra"])
    assert torch.equal(found["term/intra"], objective.values["intra"])


def sums(fade: float = 0.5) -> tuple[SumObjective, SumObjective]:
    """A head's sum as it was trained, and a triplet loss that takes its place."""
    torch.manual_seed(0)
    head = HeadObjective(CosFace(4, 8))
    old = SumObjective({"head": head}, {"head": 2.0}, {})
    fresh = SumObjective({"head": HeadObjective(CosFace(4, 8))}, {"head": 2.0}, {})
    new = SumObjective(
        {"loss": MinedObjective(TripletLoss(), BatchHardMiner())}, {"loss": 3.0}, {}, before=fresh, fade=fade
    )
    return old, new


@pytest.mark.parametrize(("progress", "come_in"), [(0.0, 0.0), (0.125, 0.25), (0.25, 0.5), (0.5, 1.0), (0.9, 1.0)])
def test_an_objective_fades_out_in_a_line_while_the_next_comes_in(progress: float, come_in: float) -> None:
    old, new = sums()
    new.take_over(old.state_dict())
    embeddings, labels = torch.randn(12, 8), torch.arange(12) // 3
    assert new.follow(progress) == {"fade": come_in}
    found = float(new(embeddings, labels))
    before = float(old(embeddings, labels))
    mined = 3.0 * float(MinedObjective(TripletLoss(), BatchHardMiner())(embeddings, labels))
    assert found == pytest.approx((1.0 - come_in) * before + come_in * mined, rel=1e-5)
    assert ("loss" in new.values, "before/head" in new.values) == (True, come_in < 1.0)
    assert any("accuracy" in name for name in new.statistics(embeddings, labels)) is (come_in < 1.0)


def test_what_fades_out_goes_on_learning_and_its_state_is_saved() -> None:
    old, new = sums()
    new.take_over(old.state_dict())
    other = sums()[1]
    other.load_state_dict(new.state_dict())
    new.follow(0.1)
    new(torch.randn(12, 8), torch.arange(12) // 3).backward()
    grads = [p.grad for p in new.parameters()]
    assert len(grads) == 1
    assert grads[0] is not None
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), other.state_dict().values(), strict=True))


def test_without_a_stage_to_take_over_from_nothing_fades() -> None:
    _, new = sums()
    new.take_over(None)
    assert new.follow(0.0) == {}
    new(torch.randn(12, 8), torch.arange(12) // 3)
    assert set(new.values) == {"loss"}


def test_a_memory_offers_the_batches_before_as_it_does_by_hand_and_takes_the_batch_in_afterwards() -> None:
    objective = MinedObjective(TripletLoss(0.2), BatchHardMiner(), EmbeddingMemory(18, 8))
    earlier, labels = batch()
    objective(earlier, labels)
    embeddings = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    both, of_both = torch.cat([embeddings, earlier.detach()]), torch.cat([labels, labels])
    itself = torch.arange(12)
    mined = BatchHardMiner()(embeddings, labels, both.detach(), of_both, self_index=itself)
    expected = TripletLoss(0.2)(embeddings, labels, mined, both, of_both, self_index=itself)
    loss = objective(embeddings, labels)
    assert loss.item() == expected.item()
    assert loss.item() != TripletLoss(0.2)(embeddings, labels, BatchHardMiner()(embeddings, labels)).item()
    assert torch.equal(*(torch.autograd.grad(value, embeddings)[0] for value in (loss, expected)))
    found = objective.statistics(embeddings, labels)
    units = [nn.functional.normalize(rows, dim=1) for rows in (embeddings, both)]
    hardest = torch.cdist(units[0], units[1]) ** 2
    assert found["mining/d_an_mean"].item() == pytest.approx(hardest[itself, mined.negative].mean().item(), rel=1e-4)
    assert objective.memory is not None
    assert len(objective.memory) == 18  # the oldest six of 24 have gone


@pytest.mark.parametrize("miner", [None, PairMarginMiner()])
def test_pairs_are_taken_from_a_memory_with_and_without_a_miner(miner: PairMarginMiner | None) -> None:
    objective = MinedObjective(ContrastiveLoss(), miner, EmbeddingMemory(64, 8))
    first, labels = batch()
    alone = objective(first, labels).item()
    again = objective(first.detach().requires_grad_(), labels)
    assert again.item() != alone
    assert objective.statistics(first, labels)
