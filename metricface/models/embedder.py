"""The trained embedder as one thing: network, preprocessing and what is known about it; saved without pickle."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from metricface.atomic import replacing
from metricface.data.folders import decode_file
from metricface.data.images import Pixels, Preprocessing
from metricface.models import Blueprint, bare, blueprint_of
from metricface.modes import evaluating

CARD = "embedder.json"
FORMAT = "metricface embedder"
FORMAT_VERSION = 1
PIXELS = {"order": "HWC", "colour": "RGB", "input": "(x - 127.5) / 127.5"}  # what Preprocessing.to_input does

ImageLike = str | PathLike[str] | Pixels
Images = ImageLike | Sequence[ImageLike]


class Embedder:
    """A network with the preprocessing it was trained on: images go in, unit-length embeddings come out.

    model: float (B, C, H, W) -> raw embeddings (B, D); used in eval mode, its own mode is left as it is.
    preprocessing: what is done to each image; its shape must be the network's.
    description: whatever else should travel with it, as plain JSON values: thresholds, recipe and its digest, identity
        of the training data, figures.
    Raises ValueError where preprocessing and network disagree.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, description: Mapping[str, Any] | None = None):
        blueprint = blueprint_of(model)
        shape = blueprint and (blueprint.channels, blueprint.height, blueprint.width)
        if shape and shape != preprocessing.shape:
            raise ValueError(
                f"the network takes images of (channels, height, width) {shape}, the preprocessing gives "
                f"{preprocessing.shape}. Make them agree."
            )
        self.model = model
        self.preprocessing = preprocessing
        self.description = dict(description or {})

    def embed(self, images: Images, *, flip: bool = False, batch_size: int = 128) -> NDArray[np.float32]:
        """Embed images: unit rows float32 (N, D), one per image in order; a single image gives (1, D).

        images: a path, or a uint8 array (h, w), (h, w, 1) or (h, w, 3) in RGB order; or a list of these, of any sizes;
            or one uint8 array (n, h, w, C). All are cropped and resized by the preprocessing, so give whole images.
        flip: embed each image and its mirror image, and use the sum of the two raw embeddings. Twice the time; often a
            little more accurate for faces, wrong for letters.
        batch_size: images in the network at once.
        Raises ValueError for other inputs, UnreadableImageError naming a file that cannot be decoded, and ValueError
        with number and index where an embedding is zero or not finite, and so has no direction.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        listed = _listed(images)
        parts = []
        with evaluating(self.model), torch.inference_mode(), ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(listed), batch_size):
                pixels = np.stack(list(pool.map(self._read, listed[start : start + batch_size])))
                parts.append(self._raw(pixels, flip))
            if not parts:  # nothing to embed still has a width
                parts.append(self._raw(np.zeros((1, *self._pixel_shape), dtype=np.uint8), flip)[:0])
        return _unit(torch.cat(parts))

    @property
    def _pixel_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.preprocessing.shape
        return height, width, channels

    def _read(self, image: ImageLike) -> Pixels:
        if not isinstance(image, np.ndarray):
            path = Path(image)
            image = decode_file(path, str(path), grey=self.preprocessing.channels == "grey")
        return self.preprocessing.apply(image)

    def _raw(self, pixels: Pixels, flip: bool) -> Tensor:
        """Embed uint8 (n, H, W, C) -> raw (n, D) on the CPU, float64."""
        parameter = next(self.model.parameters(), torch.empty(0))
        images = torch.from_numpy(pixels).to(parameter.device).permute(0, 3, 1, 2)  # channels_last strides, no copy
        inputs = self.preprocessing.to_input(images).to(parameter.dtype)
        embeddings: Tensor = self.model(inputs)
        if flip:
            embeddings = embeddings + self.model(inputs.flip(3))
        return embeddings.double().cpu()

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the embedder into `folder`, which is made where it is missing: a JSON card and a safetensors file.

        An embedder already there is replaced in one step: a crash half way leaves the old one whole. In the description
        tuples become lists, NumPy scalars plain numbers, and numbers that are not finite null.
        Raises ValueError for a network that `metricface.models.build` did not make, or a description that is not JSON.
        """
        blueprint = blueprint_of(self.model)
        if blueprint is None:
            raise ValueError(
                f"{type(self.model).__name__} cannot be saved as an embedder: nothing says how to build it again. "
                "Make the network with metricface.models.build."
            )
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        state = bare(self.model).state_dict()
        weights = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in state.items()})
        digest = hashlib.sha256(weights).hexdigest()
        # The name tells the content, so that the card, replaced last, always points to weights that are whole.
        file = f"weights-{digest[:12]}.safetensors"
        card = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "metricface": _version(),
            "network": asdict(blueprint),
            "preprocessing": asdict(self.preprocessing),
            "pixels": PIXELS,
            "weights": {"file": file, "sha256": digest},
            "description": self.description,
        }
        text = json.dumps(_plain(card, "card"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        for name, content in ((file, weights), (CARD, text.encode())):
            with replacing(target / name) as opened:
                opened.write(content)
        for old in target.glob("weights-*.safetensors"):
            if old.name != file:
                old.unlink()


def load(folder: str | PathLike[str], *, device: str | torch.device = "cpu") -> Embedder:
    """Load an embedder that `Embedder.save` or a training run wrote, in eval mode, ready to embed images.

    Runs no code from the folder: a JSON card and a safetensors file, nothing pickled.
    Raises FileNotFoundError where the folder or a file is missing; ValueError, saying which part, for a card that is
    not an embedder's or is of another version, and for weights that are damaged or do not fit the network.
    """
    source = Path(folder)
    if not (source / CARD).exists() and (source / "model" / CARD).exists():
        raise FileNotFoundError(f"{source} is the folder of a run; its embedder is in {source / 'model'}.")
    card = _read_card(source / CARD)
    try:
        network = Blueprint(**card["network"]).build()
        preprocessing = Preprocessing(**card["preprocessing"])
        file, digest = str(card["weights"]["file"]), str(card["weights"]["sha256"])
        description = dict(card["description"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{source / CARD} does not describe an embedder of this version: {reason}") from error
    if card.get("pixels") != PIXELS:
        raise ValueError(f"{source / CARD} wants pixels as {card.get('pixels')}; this version gives {PIXELS}.")
    if Path(file).name != file:
        raise ValueError(f"{source / CARD} names weights outside its folder: {file!r}.")
    state = _read_weights(source / file, digest)
    _check_fit(state, network.state_dict(), source / file)
    network.load_state_dict(state)
    network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Embedder(network.eval(), preprocessing, description)


def _listed(images: Images) -> Sequence[ImageLike]:
    if isinstance(images, str | PathLike):
        return [images]
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if not isinstance(images, Sequence) or not all(isinstance(image, str | PathLike | np.ndarray) for image in images):
        raise ValueError(
            "images must be a path, a uint8 array, a list of these, or one uint8 array (n, h, w, C); got "
            f"{type(images).__name__}. Turn a tensor into an array of uint8 pixels first."
        )
    return images


def _unit(embeddings: Tensor) -> NDArray[np.float32]:
    """Raw float64 (N, D) -> unit rows float32; raises ValueError for rows without a direction."""
    norms = embeddings.norm(dim=1, keepdim=True)
    broken = torch.nonzero(~(norms.squeeze(1) > 0) | ~norms.squeeze(1).isfinite()).flatten().tolist()
    if broken:
        first = broken[0]
        what = "zero" if norms[first, 0] == 0 else "not finite"
        raise ValueError(
            f"{len(broken)} of {len(embeddings)} embeddings are zero or not finite; the first is image {first} "
            f"({what}). The network has diverged, or its weights are damaged."
        )
    unit: NDArray[np.float32] = (embeddings / norms).float().numpy()
    return unit


def _version() -> str:
    try:
        return metadata.version("metricface")
    except metadata.PackageNotFoundError:  # used from a checkout that is not installed
        return "unknown"


def _plain(value: object, where: str) -> object:
    """Turn `value` into plain JSON values; raises ValueError naming what cannot be turned."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, f"{where}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{where}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold. Give text, numbers, lists or mappings."
    )


def _read_card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no embedder in {path.parent}: {path.name} is missing. Give the folder it was saved to."
        )
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ValueError(f"{path} is not the card of a {FORMAT}.")
    if card.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {card.get('format_version')!r} (metricface {card.get('metricface')}); this "
            f"version reads {FORMAT_VERSION}. Load it with the metricface that wrote it, or a newer one."
        )
    return card


def _read_weights(path: Path, digest: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"the embedder's weights are missing: no file {path}.")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(f"{path} is not the file that was saved (SHA-256 {found[:12]}..., wanted {digest[:12]}...).")
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless names, shapes and types are those of the network."""
    wrong = [f"{name} is missing" for name in wanted if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in wanted]
    for name in state.keys() & wanted.keys():
        ours, theirs = state[name], wanted[name]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            wrong.append(f"{name} is {ours.dtype} {tuple(ours.shape)}, wanted {theirs.dtype} {tuple(theirs.shape)}")
    if wrong:
        shown = "; ".join(sorted(wrong)[:3]) + ("; ..." if len(wrong) > 3 else "")
        raise ValueError(f"{path} does not fit its network ({len(wrong)} of {len(wanted)} tensors): {shown}.")
