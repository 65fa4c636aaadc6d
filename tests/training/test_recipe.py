import copy

import pytest

from metricface.training.recipe import Component, Recipe, Stage, as_dict, budget_seconds, check, differences


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
    assert differences(Recipe(), changed) == []
    changed.data.crop = 0.7
    changed.stages[1].learning_rate = 1.0
    changed.stages[0].head = None
    found = differences(Recipe(), changed)
    assert [one.split(" ")[0] for one in found] == ["data.crop", "stages.softmax.head", "stages.triplet.learning_rate"]


def test_a_recipe_becomes_plain_values() -> None:
    plain = as_dict(Recipe())
    assert plain["stages"][1]["miner"] == {"name": "BatchHardMiner", "options": {}}
    assert plain["data"]["augmentation"]["flip"] is True
