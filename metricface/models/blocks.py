"""The pieces face networks are made of here: convolution, batch norm, activation; residual units; the last layer."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["leaky_relu", "prelu", "relu", "silu"]

SLOPE = 0.25  # of negative inputs: where PReLU starts to learn from, and where LeakyReLU stays

_ACTIVATIONS: dict[Activation, Callable[[int], nn.Module]] = {
    # In place: batch norm's backward needs its input, not its output, so the output may be overwritten.
    "leaky_relu": lambda width: nn.LeakyReLU(SLOPE, inplace=True),
    "prelu": lambda width: nn.PReLU(width, init=SLOPE),
    "relu": lambda width: nn.ReLU(inplace=True),
    "silu": lambda width: nn.SiLU(),
}


def checked_activation(name: str) -> Activation:
    """`name` itself; raises ValueError listing the known activations where it is none of them."""
    for known in _ACTIVATIONS:
        if name == known:
            return known
    raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}; got {name!r}.")


def convolve(
    inputs: int,
    outputs: int,
    activation: Activation | None,
    *,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    batch_norm: bool = True,
) -> nn.Module:
    """Convolution, batch norm, activation: (B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride)).

    activation: None for none, a linear layer. kernel: its side, odd. groups: as many as inputs make it depthwise.
    Without batch norm the convolution has a bias instead.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=not batch_norm)
    ]
    if batch_norm:
        layers.append(nn.BatchNorm2d(outputs))
    if activation is not None:
        layers.append(_ACTIVATIONS[activation](outputs))
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """SphereFace's unit: the input plus two convolutions of it; the activation comes before the sum, none after."""

    def __init__(self, width: int, activation: Activation, *, batch_norm: bool = True) -> None:
        super().__init__()
        self.first = convolve(width, width, activation, batch_norm=batch_norm)
        self.second = convolve(width, width, activation, batch_norm=batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus its change, (B, width, H, W)."""
        changed: Tensor = self.second(self.first(x))
        return x + changed


class Project(nn.Module):
    """The last layer: every cell of the feature map, through one linear map, to the embedding.

    in_features: channels x height x width of the map. dropout: share of them set to 0 in training.
    batch_norm: normalise each component of the embedding over the batch; the linear map then has no bias, since batch
        norm's own would replace it.
    Takes (B, C, H, W), gives (B, embedding_dim), raw.
    """

    def __init__(self, in_features: int, embedding_dim: int, *, dropout: float = 0.0, batch_norm: bool = True) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is a share, at least 0 and below 1; got {dropout}.")
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_features, embedding_dim, bias=not batch_norm)
        self.norm = nn.BatchNorm1d(embedding_dim) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Embed feature maps (B, C, H, W) -> (B, embedding_dim)."""
        embeddings: Tensor = self.norm(self.linear(self.dropout(torch.flatten(x, 1))))
        return embeddings


def halved(size: int, times: int) -> int:
    """What is left of a side of `size` pixels after `times` convolutions of stride 2: each rounds up."""
    for _ in range(times):
        size = (size + 1) // 2
    return size


def check_size(name: str, height: int, width: int, stride: int) -> None:
    """Raise ValueError unless each side of the input has at least two cells of the last feature map."""
    least = stride + 1
    if min(height, width) < least:
        raise ValueError(
            f"{name} halves its input {stride.bit_length() - 1} times and needs at least {least} x {least} pixels; got "
            f"{height} x {width}. Give larger images."
        )


def initialise(network: nn.Module) -> None:
    """He et al. 2015 for convolutions, corrected for the slope; embeddings of unit variance to begin with.

    Draws from torch's global generator: torch.manual_seed before building makes the weights repeat.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=SLOPE, mode="fan_out", nonlinearity="leaky_relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
