import time

import pytest
import torch
from torch import nn

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


def test_measuring_leaves_the_network_untouched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 8, 8))
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert bare_images_per_second(model, 4, (3, 8, 8), torch.device("cpu"), torch.float32) > 0
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
