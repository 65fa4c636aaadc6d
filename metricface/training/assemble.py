"""Where the names in a recipe become objects, but for those of samplers (batches.py), and are rehearsed."""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from metricface import heads, losses, miners, models
from metricface.choices import is_number
from metricface.data.images import ImageSet
from metricface.distributed import rank, world_size
from metricface.heads.partial_fc import PartialFC
from metricface.losses import mined
from metricface.models.embedder import Embedder, load
from metricface.models.layers import freeze_statistics, layers, recompute_activations
from metricface.modes import evaluating
from metricface.training.batches import GIVEN, SAMPLERS, Sampler, look_alikes, sampler
from metricface.training.components import build, by_name, find
from metricface.training.objective import (
    GivenPairs,
    HeadObjective,
    MinedObjective,
    Part,
    SumObjective,
    mines_for_itself,
)
from metricface.training.ranks import local_rank
from metricface.training.recipe import Component, Recipe, Stage, Term
from samplers import PairBatchSampler


def _classes(module: Any) -> list[Callable[..., Any]]:
    """What a package exports, without its plain functions."""
    return [getattr(module, name) for name in module.__all__ if inspect.isclass(getattr(module, name))]


HEADS = by_name(*_classes(heads))
LOSSES = by_name(
    *_classes(losses),
    mined.BatchAllTripletLoss,
    mined.BatchHardTripletLoss,
    mined.SemiHardTripletLoss,
    mined.AllPairsContrastiveLoss,
    mined.AllPairsMarginBasedLoss,
)
MINERS = by_name(
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
# Losses of pairs: without a miner they take the pairs of a PairBatchSampler as they are, others all of the batch.
OF_PAIRS = (losses.ContrastiveLoss, losses.DeepID2Loss)
OPTIMIZERS = by_name(SGD, Adam, AdamW)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What the trainer knows and a recipe does not say.
SIZES = ("num_classes", "embedding_dim")
# Of the parts made only to try numbers on: a matrix for every class of a large set would take gigabytes.
TRIAL_CLASSES = 10
# fused: about half the time of the optimiser alone on a CPU (0.35 against 0.65 ms for 1.1 million weights).
DEFAULT_OPTIMIZER = Component("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True})


def _sized(kind: str, component: Component, num_classes: int, embedding_dim: int) -> nn.Module:
    """A head or loss, given the number of classes and dimensions where its constructor takes them.

    So a loss that may keep one number for all classes, or one for each, keeps one for each.
    """
    known = HEADS if kind == "head" else LOSSES
    make = find(kind, component, known, named=SIZES)
    sizes = dict(zip(SIZES, (num_classes, embedding_dim), strict=True))
    taken = {name: size for name, size in sizes.items() if name in inspect.signature(make).parameters}
    made: nn.Module = build(kind, component, known, **taken)
    return made


def check_names(recipe: Recipe) -> None:
    """Raise ValueError for parts, options and scheduled numbers that do not exist, before any image is read."""
    for stage in recipe.stages:
        find("sampler", stage.sampler, SAMPLERS, 1, GIVEN)
        for term in stage.terms():
            for kind, component, known in (
                ("head", term.head, HEADS),
                ("loss", term.loss, LOSSES),
                ("miner", term.miner, MINERS),
            ):
                if component is not None:
                    find(kind, component, known, named=("generator", *SIZES))
        if stage.optimizer is not None:
            find("optimizer", stage.optimizer, OPTIMIZERS, 1, ("lr",))
        _check_scheduled(stage, recipe.model.embedding_dim)


def _check_scheduled(stage: Stage, embedding_dim: int) -> None:
    """Raise ValueError for a schedule of what is no number, or through values that the constructor refuses."""
    if not stage.schedules:
        return
    terms = {term.name: term for term in stage.terms()}
    known = [f"{name}.{number}" for name, term in terms.items() for number in _numbers(term, embedding_dim)]
    for key, schedule in stage.schedules.items():
        where = f"Stage {stage.name!r}: schedules.{key}"
        if key not in known:
            raise ValueError(f"{where} names no number that a schedule can change; it can change {', '.join(known)}.")
        name, _, number = key.partition(".")
        for _, value in schedule.points:
            try:
                _trial(terms[name], embedding_dim, {} if number == "weight" else {number: float(value)})
            except ValueError as error:
                raise ValueError(f"{where} goes to {value:g}, which is refused: {error}") from error


def _numbers(term: Term, embedding_dim: int) -> list[str]:
    """What a schedule can change: the weight, and options of the head or loss that are plain, not whole, numbers."""
    made = _trial(term, embedding_dim, {})
    found = ["weight"]
    for name in inspect.signature(type(made)).parameters:
        value: Any = getattr(made, name, None)
        if name not in SIZES and is_number(value):
            with contextlib.suppress(ValueError):  # a count, which does not go from one value to the next
                _trial(term, embedding_dim, {name: float(value)})
                found.append(name)
    return found


def _trial(term: Term, embedding_dim: int, options: dict[str, float]) -> nn.Module:
    """A small head or loss of a term with some options replaced."""
    kind, component = ("head", term.head) if term.head is not None else ("loss", term.loss)
    assert component is not None
    return _sized(kind, Component(component.name, component.options | options), TRIAL_CLASSES, embedding_dim)


def device(name: str) -> torch.device:
    """`auto` is this process's CUDA device where there is one, else the CPU. Raises ValueError for one not there."""
    if name == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
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
        return PRECISIONS[name]
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


def start(recipe: Recipe) -> Embedder | None:
    """The embedder whose weights the trunk starts from, if the recipe names one.

    Raises FileNotFoundError where it is not there, ValueError where it is damaged.
    """
    return None if recipe.model.start is None else load(recipe.model.start)


def model(recipe: Recipe, on: torch.device, begun: Embedder | None = None) -> nn.Module:
    """The trunk, in channels_last layout, which CPUs and GPUs convolve fastest.

    begun: whose weights it takes; without it they are drawn. Raises ValueError where that is another network.
    """
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
    if begun is not None:
        ours, theirs = models.blueprint_of(made), models.blueprint_of(begun.model)
        if ours != theirs:
            raise ValueError(
                f"model.start={recipe.model.start!r} is another network: {theirs}; the recipe asks for {ours}. Set "
                "model and data (height, width, channels) as they were, or leave model.start out."
            )
        made.load_state_dict(begun.model.state_dict())
    if recipe.recompute:
        recompute_activations(made)
    return made.to(device=on, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def compiled(trunk: nn.Module, shape: tuple[int, int, int], on: torch.device) -> nn.Module:
    """The trunk through torch.compile; it shares the weights. Raises ValueError where that does not work here."""
    try:
        made: nn.Module = torch.compile(trunk)  # type: ignore[assignment]
        with evaluating(trunk), torch.no_grad():
            made(torch.zeros(2, *shape, device=on).contiguous(memory_format=torch.channels_last))
    except Exception as error:
        raise ValueError(f"compile: torch.compile does not work here ({error}). Leave compile out.") from error
    return made


def objective(
    stage: Stage, recipe: Recipe, num_classes: int, batches: Sampler | None = None, before: Stage | None = None
) -> SumObjective:
    """What a stage minimises; class-wise parts are sized to the training people.

    batches: where they are pairs, losses of pairs take these. before: the stage whose objective fades out.
    """
    old = None
    if before is not None:
        old = objective(before, recipe, num_classes)
        old.follow(1.0)  # numbers on schedules stay as they end
    terms = stage.terms()
    pairs = _given_pairs(recipe, batches)
    parts = {term.name: _part(term, recipe, num_classes, pairs) for term in terms}
    weights = {term.name: term.weight for term in terms}
    return SumObjective(parts, weights, stage.schedules, before=old, fade=stage.fade or 0.0)


def _given_pairs(recipe: Recipe, batches: Sampler | None) -> GivenPairs | None:
    """Where the pairs of a PairBatchSampler are in the batches that an objective sees, of all ranks or of this one."""
    if not isinstance(batches, PairBatchSampler):
        return None
    return GivenPairs(batches.joined_indices_tuple if recipe.mining == "joined" else batches.indices_tuple)


def faded(recipe: Recipe, index: int) -> Stage | None:
    """The stage whose objective fades out in the stage `index`, if it has one."""
    return recipe.stages[index - 1] if recipe.stages[index].fade is not None else None


def _part(term: Term, recipe: Recipe, num_classes: int, pairs: nn.Module | None) -> Part:
    embedding_dim = recipe.model.embedding_dim
    if term.head is not None:
        head = _sized("head", term.head, num_classes, embedding_dim)
        assert isinstance(head, heads.base.Head)
        if term.partial_fc is None:
            return HeadObjective(head)
        partial = PartialFC(head, sampling_rate=term.partial_fc, seed=recipe.seed)
        return HeadObjective(partial, joined=recipe.mining == "joined")
    assert term.loss is not None
    loss = _sized("loss", term.loss, num_classes, embedding_dim)
    memory = _memory(term, loss, embedding_dim, pairs)
    if term.miner is None:
        given = pairs if isinstance(loss, OF_PAIRS) and not mines_for_itself(loss) else None
        return MinedObjective(loss, given, memory)
    if mines_for_itself(loss):
        raise ValueError(f"The loss {term.loss.name} mines for itself; leave the miner {term.miner.name} out.")
    return MinedObjective(loss, _miner(term.miner), memory)


def _memory(term: Term, loss: nn.Module, embedding_dim: int, pairs: nn.Module | None) -> miners.EmbeddingMemory | None:
    """Of earlier batches. Raises ValueError for a loss that looks at one batch alone, and for given pairs."""
    if term.memory is None:
        return None
    if "self_index" not in inspect.signature(loss.forward).parameters:
        raise ValueError(f"The loss {type(loss).__name__} looks at one batch alone; leave memory out.")
    if pairs is not None and term.miner is None:
        raise ValueError(
            "The pairs of a PairBatchSampler are all that the loss takes; give a miner, or leave memory out."
        )
    return miners.EmbeddingMemory(term.memory, embedding_dim)


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


def set_learning(stage: Stage, trunk: nn.Module) -> None:
    """Put the trunk in the mode it has in this stage: what learns, and which batch norms follow their batches."""
    frozen = {"all": [], "embedding_layer": layers(trunk)[:-1], "nothing": [trunk]}[stage.learns]
    trunk.requires_grad_(True).train()
    for part in frozen:
        part.requires_grad_(False).eval()
    if stage.batch_norm == "frozen":
        freeze_statistics(trunk)


def optimizer(stage: Stage, trunk: nn.Module, goal: nn.Module) -> Optimizer:
    """One optimiser over what learns of trunk and objective; biases, batch norms and slopes (1-D) are not decayed.

    Each group's `peak` is the learning rate it comes to. Raises ValueError where nothing learns.
    """
    parts = [(goal, stage.objective_learning_rate or stage.learning_rate)]
    if stage.layer_decay == 1.0:
        parts.insert(0, (trunk, stage.learning_rate))
    else:
        parts[:0] = [(layer, stage.learning_rate * stage.layer_decay**i) for i, layer in enumerate(layers(trunk)[::-1])]
    groups = []
    for module, peak in parts:
        parameters = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim <= 1]
        groups += [{"params": matrices, "peak": peak}] if matrices else []
        groups += [{"params": vectors, "peak": peak, "weight_decay": 0.0}] if vectors else []
    if not groups:
        raise ValueError("nothing learns: the network is frozen (learns), and the loss has no parameters of its own.")
    asked = stage.optimizer or DEFAULT_OPTIMIZER
    try:
        made: Optimizer = build("optimizer", asked, OPTIMIZERS, groups, lr=stage.learning_rate)
    except (RuntimeError, IndexError, AssertionError) as error:  # what torch raises for options that do not go together
        raise ValueError(f"The optimizer {asked.name} refuses its options {asked.options}: {error}.") from error
    return made


def rehearse(recipe: Recipe, images: ImageSet) -> None:
    """Make every stage's parts and call its objective once, then drop them.

    So a wrong name, a wrong size and parts that do not go together are found before the first stage, and are not taken
    for the divergence of a later one.
    """
    before: SumObjective | None = None
    for index, stage in enumerate(recipe.stages):
        try:
            batches = sampler(stage, images, recipe.seed, rank=rank(), world_size=world_size())
            look_alikes(stage, batches, images, recipe.data.workers, torch.device("cpu"))
            goal = objective(stage, recipe, len(images.identities), batches, faded(recipe, index))
            if stage.keep_head and before is not None:
                goal.go_on_with(before.state_dict(), stage.kept_heads(recipe.stages[index - 1]))
            before = goal
            for progress in (0.0, 1.0) if stage.fade else (0.0,):
                goal.follow(progress)
                goal(*_rehearsed(_given_pairs(recipe, batches), recipe.model.embedding_dim))
            trial = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
            set_learning(stage, trial)
            optimizer(stage, trial, goal)
        except (ValueError, TypeError) as error:
            hint = f" (--stages.{stage.name}.sampler.options.identities_per_batch)"
            raise ValueError(
                f"Stage {stage.name!r}: {error}{hint if 'identities_per_batch' in str(error) else ''}"
            ) from error


def _rehearsed(pairs: GivenPairs | None, embedding_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random embeddings and labels that look like one of these batches as far as a loss can tell."""
    labels = torch.tensor([0, 0, 1, 1])
    if pairs is not None:
        labels = torch.zeros(2 * sum(map(len, pairs.pairs[::2])), dtype=torch.int64)
        labels[pairs.pairs[3]] = 1
    return torch.randn(len(labels), embedding_dim, generator=torch.Generator().manual_seed(0)), labels
