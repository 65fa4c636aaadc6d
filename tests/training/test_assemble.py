"""From names in a recipe to objects."""

import pytest
import torch

from metricface.miners import BatchHardMiner, CurriculumMiner, SemiHardMiner
from metricface.training.assemble import LOSSES, MINERS, objective
from metricface.training.objective import MinedObjective
from metricface.training.recipe import Component, Recipe, Stage

SAMPLER = Component("IdentityBalancedBatchSampler", {})


def mined(loss: Component, miner: Component | None) -> MinedObjective:
    made = objective(Stage(name="triplet", sampler=SAMPLER, loss=loss, miner=miner), Recipe(), 4)
    assert isinstance(made, MinedObjective)
    return made


CURRICULUM = {
    "first": {"name": "SemiHardMiner", "options": {"margin": 0.3}},
    "then": {"name": "BatchHardMiner"},
    "start": 0,
    "end": 10,
}


@pytest.mark.parametrize("miner", sorted(MINERS))
def test_every_miner_trains_by_its_name(miner: str) -> None:
    options = CURRICULUM if miner == "CurriculumMiner" else {}
    made = mined(Component("ContrastiveLoss"), Component(miner, options))
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(24) // 6
    made(x, labels).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert made.statistics(x, labels)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_trains_by_its_name_without_a_miner(loss: str) -> None:
    made = mined(Component(loss), None)
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    made(x, torch.arange(24) // 6).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert "d_ap_mean" in str(made.statistics(x, torch.arange(24) // 6))


def test_a_curriculum_names_two_miners_with_options_of_their_own_and_its_steps_are_saved() -> None:
    made = mined(Component("TripletLoss"), Component("CurriculumMiner", CURRICULUM))
    miner = made.miner
    assert isinstance(miner, CurriculumMiner)
    assert isinstance(miner.first, SemiHardMiner)
    assert isinstance(miner.then, BatchHardMiner)
    assert (miner.first.margin, miner.end) == (0.3, 10)
    made(torch.randn(12, 4), torch.arange(12) // 3)
    again = mined(Component("TripletLoss"), Component("CurriculumMiner", CURRICULUM))
    again.load_state_dict(made.state_dict())
    assert isinstance(again.miner, CurriculumMiner)
    assert again.miner.steps == 1


def test_a_miner_beside_a_loss_that_mines_for_itself_is_an_error() -> None:
    with pytest.raises(ValueError, match="BatchAllTripletLoss mines for itself; leave the miner SemiHardMiner out"):
        mined(Component("BatchAllTripletLoss"), Component("SemiHardMiner"))


def test_a_curriculums_miner_with_a_misspelt_key_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"given as name and options.*'nmae'"):
        mined(
            Component("TripletLoss"),
            Component("CurriculumMiner", CURRICULUM | {"then": {"nmae": "BatchHardMiner"}}),
        )


def test_a_curriculum_of_an_unknown_miner_is_an_error_that_lists_those_known() -> None:
    with pytest.raises(ValueError, match="names the miner 'HardestMiner'; known are BatchAllMiner"):
        mined(
            Component("TripletLoss"),
            Component("CurriculumMiner", CURRICULUM | {"then": {"name": "HardestMiner"}}),
        )
