import copy

import pytest

from metricface.training.comparison import differences
from metricface.training.contradictions import check
from metricface.training.recipe import (
    Component,
    Recipe,
    Schedule,
    Stage,
    Term,
    as_dict,
    budget_seconds,
)


@pytest.mark.parametrize(
    ("text", "seconds"), [("240s", 240), ("4m", 240), ("1.5h", 5400), ("90", 90), (240, 240), (" .5m ", 30)]
)
def test_a_budget_is_read_in_its_unit(text: str | float, seconds: float) -> None:
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "fast", "-3s", "0s", "4 min", "1h30m"])
def test_a_budget_that_is_no_time_is_an_error_that_shows_the_right_form(text: str) -> None:
    with pytest.raises(ValueError, match=r"write it as 240s, 4m or 1\.5h"):
        budget_seconds(text)


def test_the_default_recipe_passes_its_own_check() -> None:
    check(Recipe())


def stage(**changes: object) -> Stage:
    settings = {"name": "only", "sampler": Component("ImageBatchSampler"), "head": Component("Softmax")}
    return Stage(**(settings | changes))  # type: ignore[arg-type]


def term(name: str = "triplet", **changes: object) -> Term:
    return Term(**({"name": name, "loss": Component("TripletLoss")} | changes))  # type: ignore[arg-type]


def scheduling(key: str, *points: list[float]) -> Recipe:
    return Recipe(stages=[stage(plus=[term()], schedules={key: Schedule("ramp", list(points))})])


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (Recipe(stages=[]), "no stages"),
        (Recipe(stages=[stage(), stage()]), "Stage names must differ"),
        (Recipe(stages=[stage(head=None)]), "found neither"),
        (Recipe(stages=[stage(loss=Component("TripletLoss"))]), "found both"),
        (Recipe(stages=[stage(miner=Component("BatchHardMiner"))]), "a miner but no loss"),
        (Recipe(stages=[stage()], budget=None), "needs a length"),
        (Recipe(stages=[stage(epochs=1, steps=5)], budget=None), "needs a length"),
        (Recipe(stages=[stage(learning_rate=0.0)]), "learning_rate=0.0 must be above 0"),
        (Recipe(stages=[stage(warmup=1.0)]), "warmup=1.0"),
        (Recipe(budget="soon"), "budget='soon'"),
        (Recipe(stages=[stage(epochs=2)]), "--budget null"),
        (Recipe(log_every=0), "log_every=0 must be above 0"),
        (Recipe(stages=[stage(plus=[term(), term()])]), r"different identifiers.*\['triplet', 'triplet'\]"),
        (Recipe(stages=[stage(plus=[term("head")])]), "not head or loss"),
        (Recipe(stages=[stage(plus=[term("a.b")])]), "different identifiers"),
        (
            Recipe(stages=[stage(plus=[term(loss=None)])]),
            "its term 'triplet' needs either a head or a loss; found neit",
        ),
        (Recipe(stages=[stage(plus=[term(head=Component("Softmax"))])]), "its term 'triplet' .*found both"),
        (
            Recipe(stages=[stage(plus=[term(loss=None, head=Component("Softmax"), miner=Component("RandomMiner"))])]),
            "its term 'triplet' has a miner but no loss",
        ),
        (Recipe(stages=[stage(plus=[term(weight=-0.1)])]), r"plus\.triplet\.weight=-0\.1 must be finite and 0 or more"),
        (Recipe(stages=[stage(plus=[term(weight=float("nan"))])]), "weight=nan"),
        (scheduling("triplet.margin"), r"schedules\.triplet\.margin needs points.*found \[\]"),
        (scheduling("triplet.margin", [0.0, 1.0, 2.0]), "needs points"),
        (scheduling("triplet.margin", [0.0, float("inf")]), "needs points"),
        (scheduling("triplet.margin", [0.5, 0.1], [0.5, 0.2]), r"must rise within \[0, 1\]; found \[0\.5, 0\.5\]"),
        (scheduling("triplet.margin", [0.5, 0.1], [0.2, 0.2]), "must rise"),
        (scheduling("triplet.margin", [0.5, 0.1], [1.5, 0.2]), r"within \[0, 1\]"),
        (
            scheduling("triplet.weight", [0.0, 1.0], [1.0, -1.0]),
            "weights of schedules.triplet.weight must be 0 or more",
        ),
        (
            Recipe(stages=[stage(head=None, loss=Component("TripletLoss"), class_means=True, plus=[term()])]),
            "class_means=True, but no head and no centres",
        ),
    ],
)
def test_a_recipe_that_contradicts_itself_is_an_error_before_anything_is_read(recipe: Recipe, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check(recipe)


@pytest.mark.parametrize("name", ["test_share", "validation_share"])
def test_a_share_of_held_out_people_must_be_a_share(name: str) -> None:
    recipe = Recipe()
    setattr(recipe.data, name, 1.0)
    with pytest.raises(ValueError, match=f"data.{name}=1.0"):
        check(recipe)


def test_differences_are_named_by_their_dotted_path() -> None:
    changed = copy.deepcopy(Recipe())
    assert differences(as_dict(Recipe()), as_dict(changed)) == []
    changed.data.crop = 0.7
    changed.stages[1].learning_rate = 1.0
    changed.stages[0].head = None
    found = differences(as_dict(Recipe()), as_dict(changed))
    assert [one.split(" ")[0] for one in found] == ["data.crop", "stages.softmax.head", "stages.triplet.learning_rate"]


def test_a_stage_is_the_sum_of_its_own_part_and_its_further_terms() -> None:
    made = stage(plus=[term(weight=0.1), term("centre")])
    assert [(one.name, one.weight) for one in made.terms()] == [("head", 1.0), ("triplet", 0.1), ("centre", 1.0)]
    assert made.terms()[0].head == made.head
    assert Recipe().stages[1].terms()[0].miner == Component("DistanceWeightedMiner")


def test_a_head_in_a_further_term_can_start_from_class_means() -> None:
    second = Term("second", head=Component("CosFace"))
    check(Recipe(stages=[stage(head=None, loss=Component("TripletLoss"), class_means=True, plus=[second])]))


def test_a_center_loss_can_start_from_class_means_without_a_head() -> None:
    center = Term("center", loss=Component("CenterLoss"))
    check(Recipe(stages=[stage(head=None, loss=Component("TripletLoss"), class_means=True, plus=[center])]))


def test_differences_in_terms_and_schedules_are_named_by_term_and_number() -> None:
    one = scheduling("triplet.margin", [0.0, 0.1])
    other = copy.deepcopy(one)
    other.stages[0].plus[0].weight = 0.5
    other.stages[0].schedules["triplet.margin"].shape = "step"
    assert differences(as_dict(one), as_dict(other)) == [
        "stages.only.plus.triplet.weight (1.0 against 0.5)",
        "stages.only.schedules.triplet.margin.shape ('ramp' against 'step')",
    ]
    other.stages[0].schedules = {}
    other.stages[0].plus = []
    assert [found.split(" ")[0] for found in differences(as_dict(one), as_dict(other))] == [
        "stages.only.plus",
        "stages.only.schedules.triplet.margin",
    ]


def test_a_recipe_becomes_plain_values() -> None:
    plain = as_dict(Recipe())
    assert plain["stages"][1]["miner"] == {"name": "DistanceWeightedMiner", "options": {}}
    assert plain["data"]["augmentation"]["flip"] is True
