"""A small face network: what two CPU cores can train in minutes."""

from collections.abc import Sequence

from torch import Tensor, nn

from metricface.models.blocks import Project, Residual, check_size, checked_activation, convolve, halved, initialise

# Narrow, because in minutes on a CPU more passes beat more width: TAR@FAR=1e-2 on validation people of LFW was .51 with
# these, .43 at 1.5 times the width, .37 at twice (56 x 56, one seed, steps in proportion to estimated speed for 90 s).
STEM = 16
WIDTHS = (32, 64, 128)
UNITS = (1, 1, 1)


class Small(nn.Module):
    """SphereFace's layout, made narrow: a stem and stages that each halve the image, then one fully connected layer.

    channels, height, width: of the input, any size from 17 x 17 with three stages; meant for 32 to 112 pixels.
    stem: channels after the first convolution, which has stride 2 already: full resolution costs most and gives least.
    widths, units: channels and residual units of each stage, each begun by a convolution of stride 2.
    activation: "leaky_relu" by default, which has PReLU's slope to begin with; PReLU itself slows a CPU's forward and
        backward pass by a quarter (float32) to nearly a half (bfloat16).
    dropout: before the last layer.

    Takes (B, channels, height, width), gives raw embeddings (B, embedding_dim), the last step a batch norm.
    Raises ValueError for images that are too small, an unknown activation, or stages that do not match.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        embedding_dim: int,
        *,
        stem: int = STEM,
        widths: Sequence[int] = WIDTHS,
        units: Sequence[int] = UNITS,
        activation: str = "leaky_relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kind = checked_activation(activation)
        if not widths or len(widths) != len(units) or min(stem, *widths) < 1 or min(units) < 0:
            raise ValueError(
                "small needs as many units as widths, at least one, and positive widths; got "
                f"stem {stem}, widths {list(widths)}, units {list(units)}."
            )
        check_size("small", height, width, stride=2 ** (1 + len(widths)))
        stages: list[nn.Module] = [convolve(channels, stem, kind, stride=2)]
        inputs = stem
        for outputs, repeats in zip(widths, units, strict=True):
            down = convolve(inputs, outputs, kind, stride=2)
            stages.append(nn.Sequential(down, *(Residual(outputs, kind) for _ in range(repeats))))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        cells = halved(height, 1 + len(widths)) * halved(width, 1 + len(widths))
        self.project = Project(inputs * cells, embedding_dim, dropout=dropout)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, channels, height, width) -> raw (B, embedding_dim)."""
        embeddings: Tensor = self.project(self.stages(images))
        return embeddings
