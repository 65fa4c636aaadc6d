"""MobileFaceNet: a face network of a million parameters, for phones and for training without a large GPU."""

from torch import Tensor, nn

from metricface.models.blocks import Activation, Project, check_size, checked_activation, convolve, halved, initialise

STEM = 64
# Expansion t, channels c, units n and stride s of the first, as in the paper's table 1.
BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
LAST = 512
HALVED = 4  # times: by the stem and by three of the bottlenecks


class Bottleneck(nn.Module):
    """MobileNetV2's unit: widen t times by 1 x 1, a 3 x 3 depthwise convolution, and back by a linear 1 x 1.

    The input is added where it has the shape of the result. (B, inputs, H, W) -> (B, outputs, ceil(H / stride), ...).
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, activation: Activation) -> None:
        super().__init__()
        wide = expansion * inputs
        self.added = stride == 1 and inputs == outputs
        self.unit = nn.Sequential(
            convolve(inputs, wide, activation, kernel=1),
            convolve(wide, wide, activation, stride=stride, groups=wide),
            convolve(wide, outputs, None, kernel=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit's result, on top of x where the shapes agree."""
        changed: Tensor = self.unit(x)
        return x + changed if self.added else changed


class MobileFaceNet(nn.Module):
    """Fifteen bottlenecks between two convolutions; a depthwise convolution as large as the map takes pooling's place.

    channels, height, width: of the input, any size from 17 x 17; the global depthwise convolution follows (7 x 7 at the
        paper's 112 x 112, 7 x 6 at its 112 x 96). embedding_dim: 128 in the paper.
    activation: "prelu" as published, or "leaky_relu", "relu", "silu".

    At 112 x 112 in colour with 128 dimensions it has 1,003,136 parameters, 993,344 (the paper's 0.99 M) where each
    batch norm is merged into the convolution before it.
    Takes (B, channels, height, width), gives raw embeddings (B, embedding_dim), the last step a batch norm. Raises
    ValueError for smaller inputs and unknown activations. The paper trains it by SGD with momentum .9, batch 512,
    weight decay 4e-4 on the last two layers and 4e-5 before, learning rate .1 divided by 10 at steps 36k, 52k and 58k
    of 60k.

    Source: Chen et al. 2018, MobileFaceNets, arXiv:1804.07573, table 1.
    """

    def __init__(
        self, channels: int, height: int, width: int, embedding_dim: int, *, activation: str = "prelu"
    ) -> None:
        super().__init__()
        kind = checked_activation(activation)
        check_size("mobilefacenet", height, width, stride=2**HALVED)
        layers: list[nn.Module] = [convolve(channels, STEM, kind, stride=2), convolve(STEM, STEM, kind, groups=STEM)]
        inputs = STEM
        for expansion, outputs, units, stride in BOTTLENECKS:
            for number in range(units):
                layers.append(Bottleneck(inputs, outputs, expansion, stride if number == 0 else 1, kind))
                inputs = outputs
        layers.append(convolve(inputs, LAST, kind, kernel=1))
        self.layers = nn.Sequential(*layers)
        cells = (halved(height, HALVED), halved(width, HALVED))
        self.over_all = nn.Sequential(
            nn.Conv2d(LAST, LAST, cells, groups=LAST, bias=False), nn.BatchNorm2d(LAST)
        )  # GDConv: each place of the map has a weight of its own
        self.project = Project(LAST, embedding_dim)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, channels, height, width) -> raw (B, embedding_dim)."""
        embeddings: Tensor = self.project(self.over_all(self.layers(images)))
        return embeddings
