import torch
from torch import nn

from metricface.training.throughput import bare_images_per_second


def test_measuring_leaves_the_network_untouched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 8, 8))
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert bare_images_per_second(model, 4, (3, 8, 8), torch.device("cpu"), torch.float32) > 0
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
