import math
from typing import Any

import pytest

from metricface.training.alarms import PATIENCE, Alarms
from metricface.training.assemble import objective
from metricface.training.objective import SumObjective
from metricface.training.recipe import Component, Model, Recipe, Stage, Term

RECIPE = Recipe(model=Model(embedding_dim=8))
WELL = {
    "loss": 0.08,
    "mining/active_share": 0.4,
    "mining/triplets": 90.0,
    "mining/d_ap_mean": 0.8,
    "mining/d_an_mean": 1.1,
    "embedding/spread": 0.8,
}


def goal(loss: Component | None = None, **rest: Any) -> SumObjective:
    loss = loss or Component("TripletLoss", {"margin": 0.2})
    return objective(Stage(name="fine", sampler=Component("x"), loss=loss, **rest), RECIPE, 4)


def warnings(objective: SumObjective, *steps: dict[str, float]) -> list[str]:
    alarms = Alarms("fine", objective)
    return [text for step in steps for text in alarms.see(WELL | step)]


def test_all_is_well() -> None:
    assert warnings(goal(), *([{}] * 20)) == []


def test_what_has_been_seen_and_said_is_known_after_a_resume() -> None:
    falling = [{"embedding/spread": spread} for spread in (0.9, 0.8, 0.2, 0.2, 0.2, 0.2)]
    for stop in range(len(falling)):
        told = []
        alarms = Alarms("fine", goal())
        for number, step in enumerate(falling):
            if number == stop:
                state, alarms = alarms.state_dict(), Alarms("fine", goal())
                alarms.load_state_dict(state)
            told += alarms.see(WELL | step)
        assert len(told) == 1


def test_what_passes_after_a_step_or_two_is_no_alarm() -> None:
    bad = {"mining/active_share": 0.0}
    assert warnings(goal(), *[bad] * (PATIENCE - 1), {}, *[bad] * (PATIENCE - 1)) == []


def test_no_active_triplets_are_starvation_and_said_once() -> None:
    found = warnings(goal(), *[{"mining/active_share": 0.004}] * 9)
    assert len(found) == 1
    assert "Stage 'fine', loss: mining finds nothing to learn from (active share 0.4% of 90 triplets)" in found[0]
    assert "harder miner" in found[0]


def test_no_triplets_at_all_are_starvation_too() -> None:
    nothing = {"mining/active_share": math.nan, "mining/triplets": 0.0}
    found = warnings(goal(), *[nothing] * 3)
    assert len(found) == 1
    assert "nothing to learn from (no triplets)" in found[0]


@pytest.mark.parametrize(
    ("loss", "level"),
    [
        (Component("TripletLoss", {"margin": 0.3}), 0.3),
        (Component("TripletLoss", {"margin": "soft"}), math.log(2)),
        (Component("BatchHardTripletLoss", {"margin": "soft"}), math.log(2)),
    ],
)
def test_a_loss_at_the_value_of_equal_distances_is_stuck(loss: Component, level: float) -> None:
    stuck = {"loss": level * 1.01, "mining/d_ap_mean": 0.5, "mining/d_an_mean": 0.503, "mining/active_share": 1.0}
    found = warnings(goal(loss), *[stuck] * 4)
    assert len(found) == 1
    assert f"the loss stands at {level * 1.01:.3f}" in found[0]
    assert "stages.fine.learning_rate" in found[0]
    assert warnings(goal(loss), *[stuck | {"mining/d_an_mean": 0.9}] * 4) == []  # by chance


def test_a_sum_over_triplets_has_no_value_to_be_stuck_at() -> None:
    stuck = {"loss": 0.2, "mining/d_ap_mean": 0.5, "mining/d_an_mean": 0.5}
    assert warnings(goal(Component("TripletLoss", {"margin": 0.2, "reduction": "sum"})), *[stuck] * 4) == []


def test_a_spread_that_falls_is_a_collapse() -> None:
    falling = [{"embedding/spread": spread} for spread in (0.8, 0.5, 0.19, 0.18, 0.17, 0.1)]
    found = warnings(goal(), *falling)
    assert len(found) == 1
    assert "collapsing to one point (spread 0.170, at its first step 0.800)" in found[0]


def test_a_further_term_is_looked_at_by_its_own_figures() -> None:
    terms = [Term("far", loss=Component("TripletLoss", {"margin": 0.5}))]
    both = goal(plus=terms)
    starved = {"far/mining/active_share": 0.0, "far/mining/triplets": 4.0, "term/far": 0.1, "term/loss": 0.1}
    found = warnings(both, *[starved] * 3)
    assert len(found) == 1
    assert "Stage 'fine', far: mining finds nothing" in found[0]
