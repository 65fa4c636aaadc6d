import time

import pytest

from metricface.training.schedules import Clock, Curve, Decay, Shape, learning_rate, scheduled
from tests.vectors import case


def decay(shape: Shape, **options: float) -> Decay:
    """One of that shape; steps at 0.4 and 0.7."""
    return Decay(shape=shape, at=[0.4, 0.7] if shape == "step" else [], **options)


def rate(progress: float, found: Decay, warmup: float = 0.0) -> float:
    return learning_rate(progress, peak=1.0, warmup=warmup, decay=found)


@pytest.mark.parametrize("shape", ["cosine", "polynomial", "exponential", "step", "constant"])
def test_learning_rate_reaches_its_peak_at_the_end_of_the_warmup(shape: Shape) -> None:
    assert learning_rate(0.1, peak=0.4, warmup=0.1, decay=decay(shape)) == pytest.approx(0.4)


def test_learning_rate_starts_near_zero_so_that_a_fresh_objective_cannot_shock_the_trunk() -> None:
    assert rate(0.0, Decay(), warmup=0.1) == pytest.approx(0.01)
    assert rate(0.05, Decay(), warmup=0.1) == pytest.approx(0.505)


def test_cosine_is_halfway_down_in_the_middle_and_at_one_percent_at_the_end() -> None:
    assert rate(0.5, Decay()) == pytest.approx(0.505)
    assert rate(1.0, Decay()) == pytest.approx(0.01)
    assert rate(7.0, Decay()) == pytest.approx(0.01)  # beyond the end
    assert rate(1.0, Decay(to=0.2)) == pytest.approx(0.2)


def test_a_polynomial_of_power_one_falls_in_a_line_and_a_higher_one_below_it() -> None:
    assert [rate(p, decay("polynomial")) for p in (0.25, 0.5, 0.75)] == pytest.approx([0.7525, 0.505, 0.2575])
    assert rate(0.5, decay("polynomial", power=2.0, to=0.0)) == pytest.approx(0.25)


def test_the_peak_is_kept_until_the_start_of_the_fall_or_the_end_of_the_warmup() -> None:
    assert rate(0.39, decay("polynomial", start=0.4, to=0.0)) == 1.0
    assert rate(0.7, decay("polynomial", start=0.4, to=0.0)) == pytest.approx(0.5)
    assert rate(0.75, decay("polynomial", start=0.1, to=0.0), warmup=0.5) == pytest.approx(0.5)


def test_an_exponential_fall_is_that_of_triplet_reid() -> None:
    found = Decay(shape="exponential", start=15_000 / 25_000, to=0.001)
    for step, expected in case("D2.triplet_reid_lr")["expected"].items():
        value = learning_rate(int(step) / 25_000, peak=3e-4, warmup=0.0, decay=found)
        assert value == pytest.approx(expected, rel=1e-5)


def test_steps_are_those_of_sphereface() -> None:
    worked = case("D4.sphereface_lr")
    found = Decay(shape="step", at=[16 / 28, 24 / 28])
    rates = [learning_rate(it / 28_000, peak=0.1, warmup=0.0, decay=found) for it in worked["inputs"]["it"]]
    assert rates == pytest.approx(worked["expected"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": 1.0}, "start is a share"),
        ({"to": 1.5}, "to one of the peak"),
        ({"shape": "exponential", "to": 0.0}, "never comes to 0"),
        ({"power": 0.0}, "power must be above 0"),
        ({"factor": 2.0}, "factor above 0 and at most 1"),
        ({"shape": "step", "at": [0.7, 0.4]}, "rising between 0 and 1"),
        ({"shape": "step", "at": [0.0]}, "rising between 0 and 1"),
        ({"shape": "step"}, "needs shares of the stage in at"),
        ({"at": [0.5]}, "others none"),
    ],
)
def test_a_fall_that_cannot_be_is_an_error(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Decay(**options)  # type: ignore[arg-type]


POINTS = [[0.2, 1.0], [0.6, 3.0], [0.8, 2.0]]


@pytest.mark.parametrize(
    ("shape", "progress", "value"),
    [
        ("ramp", 0.3, 1.5),  # a quarter of the way from 1 to 3
        ("ramp", 0.7, 2.5),
        ("anneal", 0.3, 1.0 + 2.0 * (0.5 - 0.5 * 0.7071067811865476)),  # cos(pi / 4)
        ("anneal", 0.4, 2.0),
        ("anneal", 0.7, 2.5),
        ("step", 0.3, 1.0),
        ("step", 0.5999, 1.0),
        ("step", 0.6, 3.0),
        ("step", 0.8, 2.0),
    ],
)
def test_a_curve_goes_from_point_to_point_in_its_shape(shape: Curve, progress: float, value: float) -> None:
    assert scheduled(progress, shape=shape, points=POINTS) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("shape", ["ramp", "anneal", "step"])
def test_a_curve_stays_before_its_first_point_and_after_its_last_and_meets_them_all(shape: Curve) -> None:
    for progress, value in [(0.0, 1.0), *POINTS, (1.0, 2.0), (1.3, 2.0)]:
        assert scheduled(progress, shape=shape, points=POINTS) == pytest.approx(value, abs=1e-12)
    assert scheduled(0.4, shape=shape, points=[[0.5, 7.0]]) == scheduled(0.6, shape=shape, points=[[0.5, 7.0]]) == 7.0


def test_clock_counts_no_time_between_pause_and_start() -> None:
    clock = Clock(total_seconds=10.0)
    clock.start()
    time.sleep(0.02)
    clock.pause()
    passed = clock.elapsed
    time.sleep(0.05)
    assert clock.elapsed == passed
    assert 0.02 <= passed < 0.045
    assert clock.progress == pytest.approx(passed / 10.0)


def test_clock_of_steps_ignores_time_and_goes_on_from_its_state() -> None:
    clock = Clock(total_steps=8)
    clock.load_state_dict({"steps": 6, "images": 600, "seconds": 3.0})
    assert (clock.progress, clock.images_per_second) == (0.75, 200.0)
    assert clock.state_dict() == {"steps": 6, "images": 600, "seconds": 3.0}
