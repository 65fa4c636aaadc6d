import pytest
import torch
from torch import nn

from metricface.models import build
from metricface.models.blocks import Project
from metricface.models.layers import freeze_statistics, layers, statistics_kept

NAMES = {"small": 5, "sphereface20": 5, "mobilefacenet": 21, "iresnet18": 11}


@pytest.mark.parametrize("name", NAMES)
def test_the_layers_one_after_the_other_are_the_network(name: str) -> None:
    made = build(name, embedding_dim=6, channels=1, height=20, width=24).eval()
    x = images = torch.randn(2, 1, 20, 24)
    found = layers(made)
    for layer in found:
        x = layer(x)
    torch.testing.assert_close(x, made(images))
    assert isinstance(found[-1], Project)
    assert len(found) == NAMES[name]
    assert sum(p.numel() for layer in found for p in layer.parameters()) == sum(p.numel() for p in made.parameters())


def test_frozen_statistics_stay_and_the_rest_is_in_training() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    freeze_statistics(model)
    model(torch.randn(2, 1, 8, 8))
    assert int(model.state_dict()["1.num_batches_tracked"]) == 0
    assert [module.training for module in model] == [True, False, True]


def test_kept_statistics_are_as_before_also_after_an_error() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    model(torch.randn(2, 1, 8, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with statistics_kept(model):
        model(torch.randn(2, 1, 8, 8))
        assert not torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])
    with pytest.raises(RuntimeError), statistics_kept(model):
        model(torch.randn(2, 9, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
