import copy

import pytest
import torch
from torch import nn

from metricface.training.averaging import WeightAverage
from tests.vectors import case


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def test_the_average_is_that_of_tensorflow() -> None:
    worked = case("D3.ema")
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, worked["inputs"]["init"])
    average = WeightAverage(model, 0.9999)
    found = []
    for value in worked["inputs"]["values"]:
        nn.init.constant_(model.weight, value)
        average.update(model)
        with average.in_place_of(model):
            found.append(model.weight.item())
        assert model.weight.item() == value
    assert found == pytest.approx(worked["expected"], abs=1e-6)


def test_the_decay_is_the_least_of_the_one_asked_for_and_that_of_a_few_steps() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.5)
    average.updates = 1000
    nn.init.ones_(model.weight)
    average.update(model)
    average.copy_to(model)
    assert model.weight.item() == 0.5


def test_batch_norm_statistics_have_an_average_and_counters_stay() -> None:
    model = network()
    average = WeightAverage(model, 0.9)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 1, 8, 8))
    average.update(model)
    now = copy.deepcopy(model.state_dict())
    with average.in_place_of(model):
        inside = copy.deepcopy(model.state_dict())
    decay = 2 / 11
    mean = decay * before["1.running_mean"] + (1 - decay) * now["1.running_mean"]
    torch.testing.assert_close(inside["1.running_mean"], mean)
    assert int(inside["1.num_batches_tracked"]) == 1
    assert all(torch.equal(value, now[name]) for name, value in model.state_dict().items())


def test_an_error_inside_leaves_the_weights_as_they_were() -> None:
    model = network()
    average = WeightAverage(model, 0.9)
    nn.init.ones_(next(model.parameters()))
    with pytest.raises(RuntimeError), average.in_place_of(model):
        raise RuntimeError
    assert next(model.parameters()).eq(1).all()


def test_it_goes_on_from_its_state() -> None:
    model = network()
    one, other = WeightAverage(model, 0.99), WeightAverage(network(), 0.99)
    for _ in range(3):
        nn.init.normal_(next(model.parameters()))
        one.update(model)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    nn.init.normal_(next(model.parameters()))
    one.update(model)
    other.update(model)
    assert other.updates == 4
    for name, value in one.state_dict()["values"].items():
        assert torch.equal(value, other.state_dict()["values"][name])


@pytest.mark.parametrize("decay", [0.0, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_an_error(decay: float) -> None:
    with pytest.raises(ValueError, match="lies between 0 and 1"):
        WeightAverage(nn.Linear(1, 1), decay)
