import time

import pytest

from metricface.training.schedules import Clock, learning_rate


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
