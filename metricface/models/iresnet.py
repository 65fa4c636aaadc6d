"""IResNet: the residual networks that ArcFace and its successors are compared with."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from metricface.models.blocks import (
    Activation,
    Project,
    check_size,
    checked_activation,
    convolve,
    halved,
    initialise,
)

WIDTHS = (64, 128, 256, 512)
UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}


class PreNormUnit(nn.Module):
    """Batch norm, convolution, batch norm, activation, convolution, batch norm, on top of the input; nothing after.

    The stride is the second convolution's. Where the shape changes, the input goes through a 1 x 1 convolution with
    batch norm. (B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.first = convolve(inputs, outputs, activation)
        self.second = convolve(outputs, outputs, None, stride=stride)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else convolve(inputs, outputs, None, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, fitted in shape, plus its change."""
        changed: Tensor = self.second(self.first(self.norm(x)))
        shortcut: Tensor = self.shortcut(x)
        return shortcut + changed


class IResNet(nn.Module):
    """A stem at full resolution, four stages that each halve the map, batch norm, dropout, one fully connected layer.

    depth: 18, 34, 50 or 100. channels, height, width: of the input, any size from 17 x 17; the last layer's size
        follows (512 x 7 x 7 inputs at the papers' 112 x 112). embedding_dim: 512 in the papers.
    activation: "prelu" as published, or "leaky_relu", "relu", "silu". dropout: before the last layer; .4 in ArcFace's
        first version, 0 since.

    At 112 x 112 in colour with 512 dimensions there are, in millions, 24.03, 34.14, 43.59 and 65.16 parameters; 24.02,
    34.13, 43.58 and 65.13 with each batch norm merged into the layer before it, as published models count. The last
    linear layer has no bias, for the batch norm after it has one; that has a scale, too, which insightface fixes at 1.
    Takes (B, channels, height, width), gives raw embeddings (B, embedding_dim). Raises ValueError for another depth,
    smaller inputs and unknown activations.

    Source: Deng et al. 2019, ArcFace, section 3.1 (after Han et al. 2017, Deep Pyramidal Residual Networks); layers as
    in github.com/deepinsight/insightface, recognition/arcface_torch/backbones/iresnet.py.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        embedding_dim: int,
        *,
        depth: int,
        activation: str = "prelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth not in UNITS:
            raise ValueError(f"an IResNet has a depth of {', '.join(map(str, UNITS))}; got {depth}.")
        kind = checked_activation(activation)
        check_size(f"iresnet{depth}", height, width, stride=2 ** len(WIDTHS))
        layers = [convolve(channels, WIDTHS[0], kind)]
        inputs = WIDTHS[0]
        for outputs, units in zip(WIDTHS, UNITS[depth], strict=True):
            for number in range(units):
                layers.append(PreNormUnit(inputs, outputs, 2 if number == 0 else 1, kind))
                inputs = outputs
        layers.append(nn.BatchNorm2d(inputs))
        self.layers = nn.Sequential(*layers)
        cells = halved(height, len(WIDTHS)) * halved(width, len(WIDTHS))
        self.project = Project(inputs * cells, embedding_dim, dropout=dropout)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, channels, height, width) -> raw (B, embedding_dim)."""
        embeddings: Tensor = self.project(self.layers(images))
        return embeddings


def by_depth() -> dict[str, Callable[..., IResNet]]:
    """The networks by name: iresnet18, iresnet34, ..."""
    return {f"iresnet{depth}": partial(IResNet, depth=depth) for depth in UNITS}
