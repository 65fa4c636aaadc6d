"""Face networks by name, and the exported embedder (`metricface.models.embedder`)."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, get_args

from torch import nn

from metricface.models.iresnet import IResNet, by_depth
from metricface.models.mobilefacenet import MobileFaceNet
from metricface.models.small import Small
from metricface.models.sphereface20 import SphereFace20

__all__ = [
    "Blueprint",
    "IResNet",
    "MobileFaceNet",
    "ModelName",
    "Small",
    "SphereFace20",
    "blueprint_of",
    "build",
]

ModelName = Literal["small", "sphereface20", "mobilefacenet", "iresnet18", "iresnet34", "iresnet50", "iresnet100"]

_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "small": Small,
    "sphereface20": SphereFace20,
    "mobilefacenet": MobileFaceNet,
    **by_depth(),
}


@dataclass(frozen=True)
class Blueprint:
    """What `build` was asked for; enough to build the same network again. `options` are plain JSON values."""

    name: str
    embedding_dim: int
    channels: int
    height: int
    width: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Build the network anew, with fresh weights."""
        named = asdict(self)
        return build(named.pop("name"), **named.pop("options"), **named)


def build(name: str, *, embedding_dim: int, channels: int, height: int, width: int, **options: Any) -> nn.Module:
    """Build a network: float images (B, channels, height, width) -> raw embeddings (B, embedding_dim).

    name: see ModelName. channels: 3 for colour, 1 for grey. height, width: of the images, in pixels.
    options: keyword arguments of the network's class.
    Initial weights follow torch.manual_seed. The network remembers what it was built from (`blueprint_of`), so that an
    `Embedder` can be saved and loaded. For speed on a CPU or GPU, follow with `.to(memory_format=torch.channels_last)`.
    Raises ValueError for an unknown name or option, sizes below 1, or images too small for the network.
    """
    if name not in _NETWORKS:
        raise ValueError(f"there is no network {name!r}; the networks are {', '.join(get_args(ModelName))}.")
    sizes = {"embedding_dim": embedding_dim, "channels": channels, "height": height, "width": width}
    for what, size in sizes.items():
        if size < 1:
            raise ValueError(f"{what} must be at least 1; got {size}.")
    known = _options(_NETWORKS[name])
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{name} has no option {', '.join(unknown)}; its options are {', '.join(known)}.")
    network = _NETWORKS[name](**sizes, **options)
    network.blueprint = Blueprint(name, **sizes, options=dict(options))  # type: ignore[assignment]
    return network


def blueprint_of(network: nn.Module) -> Blueprint | None:
    """What `build` made this network from, also behind torch.compile and DistributedDataParallel; None for others."""
    found = getattr(bare(network), "blueprint", None)
    return found if isinstance(found, Blueprint) else None


def bare(network: nn.Module) -> nn.Module:
    """The network itself, without the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        inner = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if not isinstance(inner, nn.Module):
            return network
        network = inner


def _options(network: Callable[..., nn.Module]) -> list[str]:
    """Keyword-only parameters, without those that the name has settled."""
    settled = network.keywords if isinstance(network, partial) else {}
    parameters = inspect.signature(network).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in settled]
