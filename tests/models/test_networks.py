"""The face networks: shapes, sizes, parameter counts, gradients, repeatability."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metricface.models import Blueprint, IResNet, blueprint_of, build
from metricface.models.blocks import Residual, halved
from metricface.models.layers import layers

NAMES = ("small", "sphereface20", "mobilefacenet", "iresnet18")
SIZES = [(1, 105, 105), (3, 112, 96), (3, 56, 56), (1, 92, 112), (3, 17, 17), (1, 33, 40)]


def network(
    name: str = "small", *, dim: int = 8, size: tuple[int, int, int] = (3, 32, 32), **options: object
) -> nn.Module:
    channels, height, width = size
    return build(name, embedding_dim=dim, channels=channels, height=height, width=width, **options)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_images_of_odd_sizes_in_grey_and_colour_become_embeddings(name: str, size: tuple[int, int, int]) -> None:
    embeddings = network(name, dim=128, size=size)(torch.randn(2, *size))
    assert embeddings.shape == (2, 128)
    assert bool(torch.isfinite(embeddings).all())


@pytest.mark.parametrize("size", range(1, 40))
def test_halving_a_side_is_what_a_strided_convolution_does(size: int) -> None:
    map_ = torch.zeros(1, 1, size, size)
    for times in range(4):
        assert map_.shape[-1] == halved(size, times)
        map_ = nn.functional.conv2d(map_, torch.zeros(1, 1, 3, 3), stride=2, padding=1)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_sphereface20_has_the_parameters_of_its_table(batch_norm: bool) -> None:
    def convolution(inputs: int, outputs: int) -> int:  # weights; then norm (scale, shift) or bias; then slopes
        return 9 * inputs * outputs + (2 if batch_norm else 1) * outputs + outputs

    trunk = sum(
        convolution(inputs, outputs) + 2 * units * convolution(outputs, outputs)
        for inputs, outputs, units in [(3, 64, 1), (64, 128, 2), (128, 256, 4), (256, 512, 1)]
    )
    last = 512 * 7 * 6 * 512 + (2 * 512 if batch_norm else 512)
    made = network("sphereface20", dim=512, size=(3, 112, 96), batch_norm=batch_norm)
    assert count(made) == trunk + last == (22_675_840 if batch_norm else 22_670_656)
    assert sum(isinstance(module, nn.Conv2d) for module in made.modules()) == 20


def test_sphereface20_keeps_the_shapes_of_its_stages() -> None:
    shapes = []
    made = network("sphereface20", dim=16, size=(3, 112, 96))
    for stage in made.stages:  # type: ignore[union-attr]
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    made(torch.randn(2, 3, 112, 96))
    assert shapes == [(64, 56, 48), (128, 28, 24), (256, 14, 12), (512, 7, 6)]


def merged(made: nn.Module) -> int:
    """Parameters with each batch norm after a convolution or linear layer as a bias of that."""
    modules = dict(made.named_modules())
    assert all(module.bias is None for module in modules.values() if isinstance(module, nn.Conv2d | nn.Linear))
    norms = {name: module for name, module in modules.items() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)}
    return count(made) - sum(norm.num_features for name, norm in norms.items() if _follows(name, made))


def _follows(name: str, made: nn.Module) -> bool:
    """Whether the batch norm of that name stands behind a convolution or linear layer in its sequence."""
    parent, _, own = name.rpartition(".")
    before = list(dict(made.get_submodule(parent).named_children()).items())
    place = [label for label, _ in before].index(own)
    return place > 0 and isinstance(before[place - 1][1], nn.Conv2d | nn.Linear)


def test_mobilefacenet_has_the_parameters_of_its_table() -> None:
    def unit(inputs: int, expansion: int, outputs: int) -> int:  # weights, norms of two numbers, slopes
        wide = expansion * inputs
        return inputs * wide + 3 * wide + 9 * wide + 3 * wide + wide * outputs + 2 * outputs

    table = [(64, 2, 64)] * 5 + [(64, 4, 128)] + [(128, 2, 128)] * 6 + [(128, 4, 128)] + [(128, 2, 128)] * 2
    ends = (27 * 64 + 3 * 64) + (9 * 64 + 3 * 64) + (128 * 512 + 3 * 512) + (49 * 512 + 2 * 512) + (512 * 128 + 2 * 128)
    made = network("mobilefacenet", dim=128, size=(3, 112, 112))
    assert count(made) == sum(unit(*row) for row in table) + ends == 1_003_136
    assert merged(made) == 993_344  # the paper: 0.99 M


def test_mobilefacenet_keeps_the_shapes_of_its_table() -> None:
    made = network("mobilefacenet", dim=128, size=(3, 112, 112))
    shapes: list[tuple[int, ...]] = []
    for layer in layers(made)[:-2]:
        layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    made(torch.randn(2, 3, 112, 112))
    rows = [
        ((64, 56, 56), 2),
        ((64, 28, 28), 5),
        ((128, 14, 14), 7),
        ((128, 7, 7), 3),
        ((512, 7, 7), 1),
        ((512, 1, 1), 1),
    ]
    assert shapes == [shape for shape, times in rows for _ in range(times)]


@pytest.mark.parametrize(
    ("depth", "parameters", "published"),
    # 34 and 100: docs.openvino.ai, face-recognition-resnet34-arcface and -resnet100-arcface-onnx (MParams); their last
    # norm has a fixed scale, so nothing of it is left when merged.
    [(18, 24_025_600, None), (34, 34_139_328, 34.129), (50, 43_590_848, None), (100, 65_156_160, 65.132)],
)
def test_iresnets_have_the_parameters_and_shapes_of_their_papers(
    depth: int, parameters: int, published: float | None
) -> None:
    with torch.device("meta"):
        made = network(f"iresnet{depth}", dim=512, size=(3, 112, 112))
    assert count(made) == parameters - 512  # the last linear layer's bias, which the batch norm replaces
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in made.modules()) == depth - 1
    if published is not None:
        assert merged(made) / 1e6 == pytest.approx(published, abs=0.001)


def test_an_iresnet_keeps_the_shapes_of_its_stages() -> None:
    made = network("iresnet34", dim=16, size=(3, 112, 112))
    shapes: list[tuple[int, ...]] = []
    for layer in layers(made)[:-1]:
        layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    made.eval()(torch.randn(1, 3, 112, 112))
    rows = [((64, 112, 112), 1), ((64, 56, 56), 3), ((128, 28, 28), 4), ((256, 14, 14), 6), ((512, 7, 7), 4)]
    assert shapes == [shape for shape, times in rows for _ in range(times)]


def test_the_depth_of_an_iresnet_is_in_its_name_and_nowhere_else() -> None:
    with pytest.raises(ValueError, match=r"iresnet18 has no option depth; its options are activation, dropout"):
        network("iresnet18", depth=50)
    with pytest.raises(ValueError, match="a depth of 18, 34, 50, 100; got 20"):
        IResNet(3, 32, 32, 8, depth=20)


def test_a_residual_unit_that_changes_nothing_hands_its_input_on() -> None:
    unit = Residual(4, "relu")
    for parameter in unit.second.parameters():
        nn.init.zeros_(parameter)
    images = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(unit(images), images)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ["leaky_relu", "prelu", "relu", "silu"])
def test_a_gradient_reaches_every_parameter(name: str, activation: str) -> None:
    torch.manual_seed(0)
    made = network(name, activation=activation)
    weights = torch.randn(6, 8)  # a plain sum would have no gradient through batch norm
    (made(torch.randn(6, 3, 32, 32)) * weights).sum().backward()
    for label, parameter in made.named_parameters():
        assert parameter.grad is not None, label
        assert bool(torch.isfinite(parameter.grad).all()), label
        assert float(parameter.grad.abs().max()) > 0, label


@pytest.mark.parametrize("activation", ["leaky_relu", "prelu"])
def test_the_gradient_is_that_of_finite_differences(activation: str) -> None:
    torch.manual_seed(1)
    made = network(size=(1, 17, 17), dim=3, stem=2, widths=[3], units=[1], activation=activation).double()
    images = torch.randn(3, 1, 17, 17, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(made, (images,), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(name: str) -> None:
    def made(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([parameter.detach().flatten() for parameter in network(name).parameters()])

    assert torch.equal(made(3), made(3))
    assert not torch.equal(made(3), made(4))


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_memory_does_not_change_embeddings(name: str) -> None:
    torch.manual_seed(0)
    made = network(name, size=(3, 40, 33)).eval()
    images = torch.randn(4, 3, 40, 33)
    other = copy.deepcopy(made).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(
        other(images.contiguous(memory_format=torch.channels_last)), made(images), rtol=1e-4, atol=1e-5
    )


def test_fresh_embeddings_have_unit_variance_without_a_last_batch_norm_too() -> None:
    torch.manual_seed(0)
    made = network("sphereface20", dim=64, size=(3, 56, 56), embedding_norm=False)
    spread = float(made(torch.randn(16, 3, 56, 56)).detach().std())
    assert 0.2 < spread < 5, spread


def test_an_unknown_name_lists_the_networks() -> None:
    with pytest.raises(ValueError, match="there is no network 'resnet'; the networks are small, sphereface20"):
        network("resnet")


def test_an_unknown_option_lists_the_options() -> None:
    with pytest.raises(ValueError, match="small has no option depth; its options are stem, widths, units"):
        network(depth=3)


@pytest.mark.parametrize(("size", "says"), [((3, 16, 40), "17 x 17 pixels; got 16 x 40"), ((3, 0, 8), "height")])
@pytest.mark.parametrize("name", NAMES)
def test_images_too_small_are_refused_with_the_least_size(name: str, size: tuple[int, int, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        network(name, size=size)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"activation": "gelu"}, "leaky_relu, prelu, relu, silu; got 'gelu'"),
        ({"dropout": 1.0}, "dropout is a share"),
        ({"widths": [8, 8], "units": [1]}, "as many units as widths"),
        ({"widths": [], "units": []}, "at least one"),
        ({"units": [1, -1, 1]}, "got stem 16"),
        ({"widths": [0, 8, 8]}, "positive widths"),
    ],
)
def test_wrong_options_say_what_is_wrong(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        network(**options)


def test_a_network_remembers_its_blueprint_and_can_be_built_again_from_it() -> None:
    made = network(widths=[8, 12, 16], dropout=0.1)
    blueprint = blueprint_of(made)
    assert blueprint == Blueprint("small", 8, 3, 32, 32, {"widths": [8, 12, 16], "dropout": 0.1})
    again = blueprint.build()
    assert again.state_dict().keys() == made.state_dict().keys()
    assert blueprint_of(copy.deepcopy(made)) == blueprint
    assert blueprint_of(torch.nn.parallel.DataParallel(made)) == blueprint
    assert blueprint_of(torch.compile(made)) == blueprint  # type: ignore[arg-type]
    assert blueprint_of(nn.Linear(1, 1)) is None
