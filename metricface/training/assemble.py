"""The one place where names in a recipe become objects."""

import inspect
import signal
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader

from metricface import heads, losses, miners, models
from metricface.data.images import ImageBatch, ImageSet, keep
from metricface.losses import mined
from metricface.training.objective import HeadObjective, MinedObjective, Objective
from metricface.training.recipe import Component, Recipe, Stage
from samplers import IdentityBalancedBatchSampler, ImageBatchSampler

Sampler = IdentityBalancedBatchSampler | ImageBatchSampler


def _by_name(*parts: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {part.__name__: part for part in parts}


HEADS = _by_name(heads.Softmax, heads.CosFace)
LOSSES = _by_name(
    losses.ContrastiveLoss,
    losses.TripletLoss,
    losses.MarginBasedLoss,
    mined.BatchAllTripletLoss,
    mined.BatchHardTripletLoss,
    mined.SemiHardTripletLoss,
    mined.AllPairsContrastiveLoss,
    mined.AllPairsMarginBasedLoss,
)
MINERS = _by_name(
    miners.BatchAllMiner,
    miners.BatchHardMiner,
    miners.CurriculumMiner,
    miners.DistanceWeightedMiner,
    miners.EasyPositiveMiner,
    miners.MultiSimilarityMiner,
    miners.PairMarginMiner,
    miners.RandomHardMiner,
    miners.RandomMiner,
    miners.SemiHardMiner,
)
SAMPLERS = _by_name(ImageBatchSampler, IdentityBalancedBatchSampler)
OPTIMIZERS = _by_name(SGD, Adam, AdamW)
# fused: about half the time of the optimiser alone on a CPU (0.35 against 0.65 ms for 1.1 million weights).
DEFAULT_OPTIMIZER = Component("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True})


def build(kind: str, component: Component, known: Mapping[str, Callable[..., Any]], *fixed: Any, **named: Any) -> Any:
    """The object that `component` names, made with its options after the arguments the trainer fixes.

    Raises ValueError for an unknown name or option, listing the right ones, and for values that it rejects.
    """
    make = _find(kind, component, known, len(fixed), tuple(named))
    try:
        return make(*fixed, **named, **component.options)
    except TypeError as error:
        raise ValueError(f"The {kind} {component.name} cannot be made from {component.options}: {error}.") from error


def _find(
    kind: str,
    component: Component,
    known: Mapping[str, Callable[..., Any]],
    fixed: int = 0,
    named: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """What makes the component, its name and the names of its options checked."""
    if component.name not in known:
        raise ValueError(f"The recipe names the {kind} {component.name!r}; known are {', '.join(sorted(known))}.")
    make = known[component.name]
    accepted = [name for name in list(inspect.signature(make).parameters)[fixed:] if name not in named]
    unknown = [option for option in component.options if option not in accepted]
    if unknown:
        right = ", ".join(accepted) or "none"
        raise ValueError(f"The {kind} {component.name} has no option {', '.join(unknown)}; its options are: {right}.")
    return make


def check_names(recipe: Recipe) -> None:
    """Raise ValueError for parts and options that do not exist, before any image is read."""
    for stage in recipe.stages:
        _find("sampler", stage.sampler, SAMPLERS, 1, ("seed", "rank", "world_size"))
        for kind, component, known, fixed in (
            ("head", stage.head, HEADS, 2),
            ("loss", stage.loss, LOSSES, 0),
            ("miner", stage.miner, MINERS, 0),
            ("optimizer", stage.optimizer, OPTIMIZERS, 1),
        ):
            if component is not None:
                _find(kind, component, known, fixed, ("lr", "generator", "num_classes"))


def device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used here: {error}. Use auto, cpu or cuda.") from error
    return torch.device(name)


def precision(name: str, on: torch.device) -> torch.dtype:
    """The type in which the network computes; `auto` is bfloat16 only where the device has instructions for it.

    Without them bfloat16 is emulated and several times slower than float32.
    """
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if on.type == "cuda":
        native = torch.cuda.get_device_capability(on) >= (8, 0)
    else:
        ask = getattr(torch.cpu, "get_capabilities", dict)  # older versions of torch cannot be asked
        found: dict[str, bool] = ask() if on.type == "cpu" else {}
        native = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def autocast(dtype: torch.dtype, on: torch.device) -> torch.autocast:
    """Context in which the network computes in `dtype`; float32 is no autocast at all."""
    return torch.autocast(on.type, dtype=dtype, enabled=dtype != torch.float32)


def model(recipe: Recipe, on: torch.device) -> nn.Module:
    """The trunk, in channels_last layout, which CPUs and GPUs convolve fastest."""
    try:
        made = models.build(
            recipe.model.name,
            embedding_dim=recipe.model.embedding_dim,
            channels=3 if recipe.data.channels == "rgb" else 1,
            height=recipe.data.height,
            width=recipe.data.width,
            **recipe.model.options,
        )
    except TypeError as error:
        raise ValueError(
            f"The network {recipe.model.name} cannot be made from {recipe.model.options}: {error}."
        ) from error
    return made.to(device=on, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def sampler(stage: Stage, images: ImageSet, seed: int) -> Sampler:
    """Batches for a stage over the training people.

    People with one image offer no positive pair. Where the recipe does not say how many of them a balanced batch
    takes as negatives (`singletons_per_batch`), it takes as many as it has identities, if there are so many.
    """
    if stage.sampler.name == ImageBatchSampler.__name__:
        plain: Sampler = build("sampler", stage.sampler, SAMPLERS, len(images), seed=seed)
        return plain
    options = dict(stage.sampler.options)
    singles = int((images.counts() == 1).sum())
    options.setdefault("singletons_per_batch", min(singles, options.get("identities_per_batch", 0)))
    made: Sampler = build("sampler", Component(stage.sampler.name, options), SAMPLERS, images.labels, seed=seed)
    return made


def describe(batches: Sampler) -> str:
    """One line about the batches of a stage: how many, of what, and whom they leave out."""
    text = f"{len(batches):,} batches an epoch"
    if isinstance(batches, ImageBatchSampler):
        return f"{text}, each image once"
    text += f" of {batches.identities_per_batch} identities x {batches.images_per_identity} images"
    if batches.singletons_per_batch:
        text += f" + {batches.singletons_per_batch} people with one image, as negatives"
    if batches.left_out_identities:
        text += (
            f"; {batches.left_out_identities:,} identities ({batches.left_out_images:,} images) left out as too small"
        )
    return text


def objective(stage: Stage, recipe: Recipe, num_classes: int) -> Objective:
    """What a stage minimises; class-wise parts are sized to the training people."""
    if stage.head is not None:
        return HeadObjective(build("head", stage.head, HEADS, num_classes, recipe.model.embedding_dim))
    assert stage.loss is not None
    # beta per class is the paper's default, and only the trainer knows how many classes there are
    per_class = (losses.MarginBasedLoss.__name__, mined.AllPairsMarginBasedLoss.__name__)
    sized = {"num_classes": num_classes} if stage.loss.name in per_class else {}
    loss = build("loss", stage.loss, LOSSES, **sized)
    miner = None if stage.miner is None else _miner(stage.miner)
    if stage.miner is not None and type(loss).__module__ == mined.__name__:
        raise ValueError(f"The loss {stage.loss.name} mines for itself; leave the miner {stage.miner.name} out.")
    return MinedObjective(
        loss,
        miner,
        margin=_triplet_margin(loss),
        distance=getattr(loss, "distance", "euclidean"),
        normalize=getattr(loss, "normalize", True),
    )


def _miner(component: Component) -> nn.Module:
    """A miner; the options of a CurriculumMiner name two more, each with options of its own."""
    try:
        inner = {
            key: _miner(Component(**value))
            for key, value in component.options.items()
            if key in ("first", "then") and isinstance(value, dict)
        }
    except TypeError as error:
        raise ValueError(f"The miners of {component.name} are given as name and options; {error}.") from error
    made: nn.Module = build("miner", Component(component.name, component.options | inner), MINERS)
    return made


def _triplet_margin(loss: nn.Module) -> float | Literal["soft"] | None:
    """Below which d_an - d_ap a triplet has a loss."""
    if isinstance(loss, losses.TripletLoss):
        return loss.margin
    # One of a triplet's two pairs violates beta -+ alpha wherever d_ap + 2 alpha > d_an.
    return 2.0 * loss.alpha if isinstance(loss, losses.MarginBasedLoss) else None


def optimizer(stage: Stage, trunk: nn.Module, goal: nn.Module) -> Optimizer:
    """One optimiser over trunk and objective; biases, batch norms and slopes (1-D) are not decayed."""
    rate = stage.objective_learning_rate or stage.learning_rate
    groups = []
    for module, peak in ((trunk, stage.learning_rate), (goal, rate)):
        parameters = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim <= 1]
        groups += [{"params": matrices, "peak": peak}] if matrices else []
        groups += [{"params": vectors, "peak": peak, "weight_decay": 0.0}] if vectors else []
    made: Optimizer = build(
        "optimizer", stage.optimizer or DEFAULT_OPTIMIZER, OPTIMIZERS, groups, lr=stage.learning_rate
    )
    return made


def rehearse(recipe: Recipe, images: ImageSet) -> None:
    """Make every stage's parts once and drop them, so that a wrong name or size is found before the first stage."""
    for stage in recipe.stages:
        try:
            sampler(stage, images, recipe.seed)
            goal = objective(stage, recipe, len(images.identities))
            optimizer(stage, nn.Linear(1, 1), goal)
        except (ValueError, TypeError) as error:
            hint = f" (--stages.{stage.name}.sampler.options.identities_per_batch)"
            raise ValueError(
                f"Stage {stage.name!r}: {error}{hint if 'identities_per_batch' in str(error) else ''}"
            ) from error


def ignore_interrupts(_: int) -> None:
    """For workers: Ctrl-C reaches the whole group of processes, and it is the trainer that ends the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader(images: ImageSet, batches: Sampler, workers: int) -> DataLoader[ImageBatch]:
    """Whole batches of a set; read ahead by `workers` processes (0 for a set in memory, where a batch is one copy)."""
    # Its own generator: each pass over a loader draws a number, and a resumed run makes one pass more.
    own = torch.Generator()
    return DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=keep,
        num_workers=workers,
        worker_init_fn=ignore_interrupts,
        generator=own,
    )
