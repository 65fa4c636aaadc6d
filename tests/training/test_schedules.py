import time

import pytest

from metricface.training.schedules import Clock, Curve, learning_rate, scheduled


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_learning_rate_reaches_its_peak_at_the_end_of_the_warmup(shape: str) -> None:
    assert learning_rate(0.1, peak=0.4, warmup=0.1, shape=shape) == pytest.approx(0.4)  # type: ignore[arg-type]


def test_learning_rate_starts_near_zero_so_that_a_fresh_objective_cannot_shock_the_trunk() -> None:
    assert learning_rate(0.0, peak=1.0, warmup=0.1, shape="cosine") == pytest.approx(0.01)
    assert learning_rate(0.05, peak=1.0, warmup=0.1, shape="cosine") == pytest.approx(0.505)


def test_cosine_is_halfway_down_in_the_middle_and_at_one_percent_at_the_end() -> None:
    assert learning_rate(0.5, peak=1.0, warmup=0.0, shape="cosine") == pytest.approx(0.505)
    assert learning_rate(1.0, peak=1.0, warmup=0.0, shape="cosine") == pytest.approx(0.01)
    assert learning_rate(7.0, peak=1.0, warmup=0.0, shape="cosine") == pytest.approx(0.01)  # beyond the end


def test_linear_falls_in_a_line() -> None:
    rates = [learning_rate(p, peak=1.0, warmup=0.0, shape="linear") for p in (0.25, 0.5, 0.75)]
    assert rates == pytest.approx([0.7525, 0.505, 0.2575])


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
