"""SphereFace-20: the standard network of the margin-softmax papers, with batch norm."""

from torch import Tensor, nn

from metricface.models.blocks import Project, Residual, check_size, checked_activation, convolve, halved, initialise

WIDTHS = (64, 128, 256, 512)
UNITS = (1, 2, 4, 1)  # residual units of each stage: with the four strided convolutions, 20 convolutions


class SphereFace20(nn.Module):
    """Four stages, each a convolution of stride 2 and 1, 2, 4 and 1 residual units; then one fully connected layer.

    channels, height, width: of the input, any size from 17 x 17; the last layer's size follows (512 x 7 x 6 inputs at
        the papers' 112 x 96). embedding_dim: 512 in the papers.
    activation: "prelu" as published (one slope a channel), or "leaky_relu", "relu", "silu".
    batch_norm: after every convolution, where the original Caffe network of 2017 has a bias instead.
    embedding_norm: batch norm after the last layer too, as the setting with batch norm has it. Follows `batch_norm`
        where not given. Without it the last layer has a bias, as the original.
    dropout: before the last layer; neither of the two settings needs one.

    At 112 x 96 in colour with 512 dimensions it has 22,675,840 parameters, 11,010,048 of them in the last layer, and
    22,670,656 without batch norm.
    Takes (B, channels, height, width), gives raw embeddings (B, embedding_dim). Raises ValueError for smaller inputs
    and unknown activations. The setting with batch norm, as its author corrected it in 2018 (LFW .995 +- .003,
    cross-validated): SGD with momentum .9, weight decay 5e-4 on every layer, the last included; batch 256; learning
    rate .1, then .01, .001 and .0001 from steps 16k, 24k and 28k.

    Source: Liu et al. 2017, SphereFace, table 2 (20 layers); batch norm and its place: github.com/Joker316701882/
    Additive-Margin-Softmax, models/resface.py.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        embedding_dim: int,
        *,
        activation: str = "prelu",
        batch_norm: bool = True,
        embedding_norm: bool | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kind = checked_activation(activation)
        check_size("sphereface20", height, width, stride=2 ** len(WIDTHS))
        stages: list[nn.Module] = []
        inputs = channels
        for outputs, units in zip(WIDTHS, UNITS, strict=True):
            stages.append(
                nn.Sequential(
                    convolve(inputs, outputs, kind, stride=2, batch_norm=batch_norm),
                    *(Residual(outputs, kind, batch_norm=batch_norm) for _ in range(units)),
                )
            )
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        cells = halved(height, len(WIDTHS)) * halved(width, len(WIDTHS))
        self.project = Project(
            WIDTHS[-1] * cells,
            embedding_dim,
            dropout=dropout,
            batch_norm=batch_norm if embedding_norm is None else embedding_norm,
        )
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, channels, height, width) -> raw (B, embedding_dim)."""
        embeddings: Tensor = self.project(self.stages(images))
        return embeddings
