import time

import pytest
import torch
from torch import nn

from metricface.training.interrupt import StoppedError
from metricface.training.throughput import Waiting, bare_images_per_second


def test_the_share_of_waiting_is_of_the_time_since_it_was_asked_for_last() -> None:
    waiting = Waiting(elapsed=10.0)
    for _ in range(2):
        with waiting:
            time.sleep(0.02)
    # By the stage's clock 0.1 s have passed since; sleeping takes no less than asked, and more on a busy machine.
    assert 0.4 <= waiting.share(10.1) < 4.0
    assert waiting.share(10.2) == 0.0
    assert waiting.share(10.2) == pytest.approx(0.0)  # no time has passed


CLOCK: list[float] = []  # passes so far: the network that is measured is a copy


class Slow(nn.Module):
    """A network whose every pass takes so long, by the clock that it moves on itself."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.seconds = seconds
        CLOCK.clear()
        monkeypatch.setattr(time, "perf_counter", lambda: seconds * len(CLOCK))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        CLOCK.append(self.seconds)
        return images.mean(dim=(2, 3)) * self.weight


@pytest.mark.parametrize(("seconds", "passes"), [(0.01, 8), (3.0, 4), (60.0, 2)])
def test_slow_networks_are_measured_in_fewer_passes(
    seconds: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bare_images_per_second(Slow(seconds, monkeypatch), 4, (3, 8, 8), torch.device("cpu"), torch.float32)
    assert found == pytest.approx(4 / seconds)
    assert len(CLOCK) == passes


def test_measuring_a_slow_network_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, cpu, plain = (3, 8, 8), torch.device("cpu"), torch.float32
    with pytest.raises(StoppedError):
        bare_images_per_second(Slow(2.0, monkeypatch), 4, shape, cpu, plain, stopped=lambda: True)
    assert len(CLOCK) == 1
    bare_images_per_second(Slow(0.01, monkeypatch), 4, shape, cpu, plain, stopped=lambda: True)


def test_measuring_leaves_the_network_untouched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 8, 8))
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert bare_images_per_second(model, 4, (3, 8, 8), torch.device("cpu"), torch.float32) > 0
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
