"""From names in a recipe to objects."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metricface.heads import CosFace
from metricface.losses import MarginBasedLoss
from metricface.miners import BatchHardMiner, CurriculumMiner, SemiHardMiner
from metricface.models import build
from metricface.models.blocks import Project
from metricface.models.layers import layers
from metricface.training.assemble import HEADS, LOSSES, MINERS, check_names, objective, optimizer, set_learning
from metricface.training.objective import HeadObjective, MinedObjective, Part
from metricface.training.recipe import Component, Model, Recipe, Schedule, Stage, Term
from samplers import PairBatchSampler

SAMPLER = Component("IdentityBalancedBatchSampler", {})
RECIPE = Recipe(model=Model(embedding_dim=8))


def mined(loss: Component, miner: Component | None) -> MinedObjective:
    made = objective(Stage(name="triplet", sampler=SAMPLER, loss=loss, miner=miner), RECIPE, 4).parts["loss"]
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
    assert made.statistics(x, torch.arange(24) // 6)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_every_head_trains_by_its_name(head: str) -> None:
    made = objective(Stage(name="softmax", sampler=SAMPLER, head=Component(head)), RECIPE, 4)
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    made(x, torch.arange(24) // 6).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert "head/accuracy" in made.statistics(x, torch.arange(24) // 6)


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


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_memory_goes_with_every_loss_that_takes_references_and_is_refused_by_the_others(loss: str) -> None:
    stage = Stage(name="s", sampler=SAMPLER, loss=Component(loss), memory=32)
    if loss in ("CenterLoss", "ContrastiveCenterLoss", "RangeLoss"):
        with pytest.raises(ValueError, match=f"{loss} looks at one batch alone; leave memory out"):
            objective(stage, RECIPE, 4)
        return
    made = objective(stage, RECIPE, 4)
    labels = torch.arange(24) // 6
    for seed in range(2):
        x = torch.randn(24, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        made(x, labels).backward()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0
        assert made.statistics(x, labels)


def test_given_pairs_have_no_use_for_a_memory() -> None:
    stage = Stage(name="s", sampler=SAMPLER, loss=Component("ContrastiveLoss"), memory=32)
    batches = PairBatchSampler(np.arange(12) // 3, pairs_per_batch=4)
    with pytest.raises(ValueError, match="give a miner, or leave memory out"):
        objective(stage, RECIPE, 4, batches)


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


class Centred(nn.Module):
    """A loss that has to know how many classes and dimensions there are, and takes no tuple."""

    def __init__(self, num_classes: int, embedding_dim: int, *, alpha: float = 0.5, count: int = 2) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1]; got {alpha}.")
        if not isinstance(count, int):
            raise ValueError(f"count must be whole; got {count}.")
        self.register_buffer("centers", torch.zeros(num_classes, embedding_dim))
        self.alpha, self.count = alpha, count

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Sequence[Tensor] | None = None) -> Tensor:
        if indices_tuple is not None:
            raise ValueError("Centred takes no miner's tuple.")
        return 0.5 * embeddings.square().sum(dim=1).mean()


@pytest.fixture
def _centred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "Centred", Centred)


def composed(**schedules: list[list[float]]) -> Stage:
    """CosFace, plus a tenth of a triplet loss, plus centres; keyword PART__NUMBER: points of a ramp."""
    return Stage(
        name="sum",
        sampler=SAMPLER,
        head=Component("CosFace", {"scale": 16.0}),
        plus=[
            Term("triplet", loss=Component("TripletLoss"), miner=Component("BatchHardMiner"), weight=0.1),
            Term("centre", loss=Component("Centred")),
        ],
        schedules={key.replace("__", "."): Schedule("ramp", points) for key, points in schedules.items()},
    )


def core(part: Part) -> nn.Module:
    return part.head if isinstance(part, HeadObjective) else part.loss


@pytest.mark.usefixtures("_centred")
def test_the_terms_of_a_stage_become_a_sum_and_get_the_sizes_that_they_ask_for() -> None:
    made = objective(composed(triplet__margin=[[0.0, 0.5]]), RECIPE, 4)
    assert made.weights == {"head": 1.0, "triplet": 0.1, "centre": 1.0}
    head, triplet, centre = made.parts.values()
    assert isinstance(core(head), CosFace)
    assert core(head).get_parameter("weight").shape == core(centre).get_buffer("centers").shape == (4, 8)
    assert isinstance(triplet, MinedObjective)
    assert isinstance(triplet.miner, BatchHardMiner)
    assert made.follow(0.0) == {"triplet.margin": 0.5}
    assert core(triplet).margin == 0.5


def test_the_boundary_of_the_margin_based_loss_is_one_for_each_class() -> None:
    loss = mined(Component("MarginBasedLoss"), None).loss
    assert isinstance(loss, MarginBasedLoss)
    assert loss.beta.shape == (4,)


@pytest.mark.usefixtures("_centred")
def test_sizes_are_no_options_of_a_recipe() -> None:
    stage = composed()
    stage.plus[1].loss = Component("Centred", {"num_classes": 3})
    with pytest.raises(ValueError, match="Centred has no option num_classes; its options are: alpha, count"):
        check_names(Recipe(stages=[stage]))


@pytest.mark.usefixtures("_centred")
def test_a_misspelt_part_of_a_term_is_an_error_that_lists_the_right_ones() -> None:
    for kind, wrong in (("loss", Component("Centered")), ("miner", Component("HardMiner"))):
        stage = composed()
        setattr(stage.plus[0], kind, wrong)
        with pytest.raises(ValueError, match=f"names the {kind} '{wrong.name}'; known are "):
            check_names(Recipe(stages=[stage]))


@pytest.mark.usefixtures("_centred")
@pytest.mark.parametrize(
    "key",
    [
        "head.margin",  # CosFace has a margin_cos
        "head.num_classes",
        "centre.count",  # whole
        "centre.centers",  # a tensor
        "triplet.normalize",
        "center.alpha",
        "alpha",
        "triplet.margin.x",
    ],
)
def test_a_schedule_of_what_is_no_number_is_an_error_that_lists_what_can_change(key: str) -> None:
    stage = composed()
    stage.schedules = {key: Schedule("ramp", [[0.0, 0.5]])}
    with pytest.raises(
        ValueError, match=rf"Stage 'sum': schedules\.{key} names no number.*it can change (.*)\."
    ) as error:
        check_names(Recipe(stages=[stage]))
    listed = str(error.value).partition("it can change ")[2].rstrip(".").split(", ")
    assert {"head.weight", "head.margin_cos", "head.scale", "triplet.weight", "triplet.margin", "centre.alpha"} <= set(
        listed
    )
    assert not {"head.num_classes", "head.embedding_dim", "centre.count", "triplet.normalize"} & set(listed)


@pytest.mark.usefixtures("_centred")
def test_a_soft_margin_cannot_change() -> None:
    stage = composed(triplet__margin=[[0.0, 0.5]])
    stage.plus[0].loss = Component("TripletLoss", {"margin": "soft"})
    with pytest.raises(ValueError, match=r"schedules\.triplet\.margin names no number"):
        check_names(Recipe(stages=[stage]))


@pytest.mark.usefixtures("_centred")
def test_a_schedule_through_a_value_that_the_constructor_refuses_is_an_error_that_says_why() -> None:
    check_names(Recipe(stages=[composed(centre__alpha=[[0.0, 0.0], [1.0, 1.0]], centre__weight=[[0.0, 7.0]])]))
    with pytest.raises(ValueError, match=r"schedules\.centre\.alpha goes to 1\.5, which is refused: alpha must lie in"):
        check_names(Recipe(stages=[composed(centre__alpha=[[0.0, 0.5], [1.0, 1.5]])]))


HEAD_STAGE = Stage(name="softmax", sampler=SAMPLER, head=Component("CosFace"), learning_rate=0.4)


def trunk() -> nn.Module:
    return build("small", embedding_dim=8, channels=1, height=20, width=20, widths=[4, 6], units=[1, 0])


@pytest.mark.parametrize("learns", ["all", "embedding_layer", "nothing"])
def test_what_does_not_learn_has_no_gradient_and_keeps_its_statistics(learns: str) -> None:
    model = trunk()
    set_learning(replace(HEAD_STAGE, learns="nothing"), model)  # of the stage before
    set_learning(replace(HEAD_STAGE, learns=learns), model)  # type: ignore[arg-type]
    for module in model.modules():
        last = any(module is inner for part in model.modules() if isinstance(part, Project) for inner in part.modules())
        free = learns == "all" or (learns == "embedding_layer" and last)
        assert all(p.requires_grad is free for p in module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.training is free
    goal = objective(HEAD_STAGE, RECIPE, 4)
    learning = {id(p) for group in optimizer(HEAD_STAGE, model, goal).param_groups for p in group["params"]}
    expected = [p for p in [*model.parameters(), *goal.parameters()] if p.requires_grad]
    assert learning == {id(p) for p in expected}


def test_frozen_batch_norm_has_weights_that_learn() -> None:
    model = trunk()
    set_learning(replace(HEAD_STAGE, batch_norm="frozen"), model)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert all(p.requires_grad for p in model.parameters())


def test_nothing_that_learns_is_an_error() -> None:
    stage = Stage(name="triplet", sampler=SAMPLER, loss=Component("TripletLoss"), learns="nothing")
    model = trunk()
    set_learning(stage, model)
    with pytest.raises(ValueError, match="nothing learns"):
        optimizer(stage, model, objective(stage, RECIPE, 4))


def test_the_learning_rate_falls_from_the_last_layer_to_the_first() -> None:
    model = trunk()
    goal = objective(HEAD_STAGE, RECIPE, 4)
    made = optimizer(replace(HEAD_STAGE, layer_decay=0.5, objective_learning_rate=3.0), model, goal)
    peaks = {id(p): group["peak"] for group in made.param_groups for p in group["params"]}
    for place, layer in enumerate(reversed(layers(model))):
        assert {peaks[id(p)] for p in layer.parameters()} == {0.4 * 0.5**place}
    assert {peaks[id(p)] for p in goal.parameters()} == {3.0}
    decays = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert all((decays[id(p)] == 0.0) == (p.ndim <= 1) for p in model.parameters())
    assert len(peaks) == len([*model.parameters(), *goal.parameters()])
