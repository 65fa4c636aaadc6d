"""The dataclasses a recipe is made of: what YAML files and dotted command-line overrides are read onto.

A recipe holds names and numbers only; `metricface.training.assemble` is the one place where names become objects.
The defaults are the demo: procedural faces, CosFace pretraining, then triplets mined in the batch beside it.
"""

import re
from argparse import ArgumentError
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from jsonargparse import ArgumentParser

from metricface.data.augment import Augmentation
from metricface.training.schedules import Decay


@dataclass
class Component:
    """A part named in a recipe: a miner, loss, head, sampler or optimizer.

    Args:
        name: The name under which `metricface.training.assemble` knows it, e.g. `BatchHardMiner`.
        options: Keyword arguments of its constructor; an unknown one is an error that lists the right ones.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Data:
    """Where images come from, how they are cut, and which people are held out.

    Args:
        train: A folder with one sub-folder of images per identity, or `synthetic`, the built-in procedural faces.
        test: A folder of other people to score (never to choose on); none: people are held out of `train`.
        pairs: An LFW-style list of pairs among the test images, scored beside the test people's own pairs.
        missing_pairs: `error`, or `skip` to count and leave out listed pairs whose images are not there.
        filter: A CSV of images of `train` to drop or relabel (`metricface-data noise` proposes one). It acts on people
            that are trained and chosen on, never on test people, so that figures with and without it compare.
        height: Of the images the network sees, in pixels.
        width: Likewise.
        channels: Likewise; grey has one.
        crop: The share of the image's centre that is kept (LFW: 0.7).
        test_share: The share of the identities that is held out of `train`.
        test_split: `random` by the seed, or `last`: the end of the sorted names.
        validation_share: The share of the training identities that weights and settings are chosen on.
        group: A regular expression with one group, e.g. `^(.+)__`: identities are split by what it matches.
        synthetic_identities: People of the built-in set.
        synthetic_images: Images of each of them.
        memory_mib: Decoded images up to this size stay in memory; larger sets are read while training.
        workers: Processes that read them.
        augmentation: Random changes of training images.
    """

    train: str = "synthetic"
    test: str | None = None
    pairs: str | None = None
    missing_pairs: Literal["error", "skip"] = "error"
    filter: str | None = None
    height: int = 56
    width: int = 56
    channels: Literal["rgb", "grey"] = "rgb"
    crop: float = 1.0
    test_share: float = 0.2
    test_split: Literal["random", "last"] = "random"
    validation_share: float = 0.1
    group: str | None = None
    synthetic_identities: int = 1500
    synthetic_images: int = 12
    memory_mib: int = 4096
    workers: int = 2
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass
class Model:
    """The trunk.

    Args:
        name: `small`, `sphereface20`, `mobilefacenet`, `iresnet18`, `iresnet34`, `iresnet50` or `iresnet100`.
        embedding_dim: Numbers in an embedding.
        options: Keyword arguments of the network's class.
        start: The folder of an exported embedder of the same network, whose weights the trunk starts from; none: they
            are drawn. The report says so where it was trained on another division of people than this run's.
    """

    name: str = "small"
    embedding_dim: int = 128
    start: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Term:
    """One more term of the sum that a stage minimises: a head, or a loss with or without a miner.

    Args:
        name: By which schedules, curves and command-line settings call it; a Python identifier.
        head: Classification; give either this or a loss.
        partial_fc: As of a stage.
        loss: A pair or triplet loss, or one that keeps a centre for each class.
        miner: What picks the loss's triplets; none: every pair or triplet of the batch.
        memory: As of a stage.
        weight: The factor of the term in the sum; the stage's own head or loss has 1.
    """

    name: str
    head: Component | None = None
    partial_fc: float | None = None
    loss: Component | None = None
    miner: Component | None = None
    memory: int | None = None
    weight: float = 1.0


@dataclass
class Schedule:
    """How a number changes while a stage passes.

    Args:
        shape: Between two points: `ramp` is a line, `anneal` half a cosine, `step` holds the value of the first.
        points: Pairs of a share of the stage, in [0, 1] and rising, and the value there; before the first point and
            after the last the value stays.
    """

    shape: Literal["ramp", "anneal", "step"]
    points: list[list[float]]


@dataclass
class LookAlikes:
    """Who looks like whom, for a stage whose sampler is a LookAlikeBatchSampler (which says how many in a batch do).

    Args:
        source: `centroids`: nearest are the mean embeddings of the training people; `images`: their closest pairs of
            images; `head`: the class vectors of the stage's own head or, where it has none, of the last kept stage that
            had one, which costs no pass over the images (where there are none: `centroids`). A stage begins with those
            of its own head only where that has learned something (`keep_head`, `class_means`).
        neighbours: People in a row of the table, from which those in a batch are drawn.
        max_cos: People closer than this cosine are taken for one person under two names, and kept apart.
        every_steps: Steps between two renewals of the table, computed in the background; none: it stays the first.
        every_epochs: Likewise, in epochs of the stage.
        delay: Steps from a renewal's weights to the step where its table is in force; training waits if it is late.
    """

    source: Literal["centroids", "images", "head"] = "centroids"
    neighbours: int = 20
    max_cos: float | None = None
    every_steps: int | None = None
    every_epochs: float | None = None
    delay: int = 32


@dataclass
class Watch:
    """How held-out people are asked what a stage does to the network, before it has ended.

    Args:
        at: Shares of the stage at which validation people are scored, rising; this is not counted as training time. Not
            in a first stage from random weights, which cannot make them worse.
        on_regression: What follows where the recipe's figure (`select_by`) lies below what it was at the stage's start:
            `warn`; `go_back` to the start, and try again at a lower learning rate for what is left of the stage; or
            `stop` the stage. The best weights seen are kept in any case.
        tolerance: By how much the figure may lie below.
        factor: Of the learning rate, for each going back.
    """

    at: list[float] = field(default_factory=lambda: [0.1])
    on_regression: Literal["warn", "go_back", "stop"] = "warn"
    tolerance: float = 0.0
    factor: float = 0.3


@dataclass
class Stage:
    """One stretch of training: batches from one sampler, one objective, one learning-rate schedule.

    Args:
        name: By which reports, curves and command-line settings call it.
        sampler: What a batch is made of.
        look_alikes: Who looks like whom, for a LookAlikeBatchSampler; none: its defaults.
        head: Classification, dropped when the stage ends; give either this or a loss.
        partial_fc: Spread the head's classes over the ranks, and look at this share of them in each step, the batch's
            own among them (1: at all; exactly the head). None: every rank has the whole head.
        loss: A pair or triplet loss.
        miner: What picks the loss's triplets; none: every pair or triplet of the batch.
        memory: Embeddings of so many images of earlier batches, as the network was then and without gradient, stand
            beside the batch as positives and negatives of its anchors (cross-batch memory). For networks that change
            slowly: after pretraining, at a low learning rate. None: the batch alone.
        plus: Further terms of the sum that is minimised, beside the head or loss above, whose weight is 1.
        schedules: Numbers that change over the stage, called PART.NUMBER: `head.margin_cos`, `loss.margin`,
            `TERM.margin` of a further term's head or loss; `weight` is a term's factor in the sum.
        class_means: Whether heads and centres start from the mean embedding of each training person, under the network
            as it is then.
        keep_head: Whether heads go on with the class vectors, and whatever else it has learned, of the head of that
            name in the stage before; else they are new. Where that stage was not kept: as `class_means`.
        share: Of the recipe's budget, in proportion to the other stages' shares.
        epochs: Length where the recipe has no budget; or give steps.
        steps: Likewise.
        fade: The share of the stage over which the objective of the stage before fades out in a line, while this one
            comes in; none: the old one is dropped at once.
        learning_rate: The peak, reached after the warm-up.
        warmup: The share of the stage over which the learning rate rises.
        schedule: How it falls after that.
        optimizer: None: SGD with Nesterov momentum 0.9 and weight decay 5e-4.
        objective_learning_rate: For the head's or loss's own parameters; none: the same as the trunk's.
        layer_decay: Factor of the learning rate from each layer of the network to the one before it; 1: all alike.
        learns: What of the network does: `all`, the `embedding_layer` alone, or `nothing`, so that only the head's or
            loss's own parameters learn. What does not learn keeps its batch-norm statistics, too.
        batch_norm: `train`, or `frozen` to keep the statistics of the stage before (weights still learn).
        clip_norm: Largest norm of the gradient of all parameters together; none: not clipped.
        chunk: Images in the network at once, at most; none: the whole batch. The objective sees all of it either way.
            Exact with frozen batch norm; otherwise batch norms take the statistics of a chunk for those of the batch.
        average: Decay of a running average of the weights (0.9999), scored at the end beside the weights themselves;
            the better of the two stays. None: no average.
        watch: When validation people are scored before the end, and what follows where they are worse.
    """

    name: str
    sampler: Component
    head: Component | None = None
    partial_fc: float | None = None
    loss: Component | None = None
    miner: Component | None = None
    memory: int | None = None
    look_alikes: LookAlikes | None = None
    plus: list[Term] = field(default_factory=list)
    schedules: dict[str, Schedule] = field(default_factory=dict)
    class_means: bool = False
    keep_head: bool = False
    share: float = 1.0
    epochs: float | None = None
    steps: int | None = None
    fade: float | None = None
    learning_rate: float = 0.1
    warmup: float = 0.05
    schedule: Decay = field(default_factory=Decay)
    optimizer: Component | None = None
    objective_learning_rate: float | None = None
    layer_decay: float = 1.0
    learns: Literal["all", "embedding_layer", "nothing"] = "all"
    batch_norm: Literal["train", "frozen"] = "train"
    clip_norm: float | None = None
    chunk: int | None = None
    average: float | None = None
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        """An empty `plus:` or `schedules:` in YAML is null, and means none."""
        self.plus = self.plus or []
        self.schedules = self.schedules or {}

    def terms(self) -> list[Term]:
        """The whole sum: the stage's own head or loss, under the name `head` or `loss`, and the further terms."""
        name = "loss" if self.head is None else "head"
        main = Term(name, self.head, self.partial_fc, self.loss, self.miner, self.memory)
        return [main, *self.plus]

    def kept_heads(self, before: "Stage") -> dict[str, int]:
        """For each term with a head: which of the terms of the stage before has the head that it goes on with.

        A head of the same name, spread over ranks or not, as here; of several that of the same term, else the first.
        Raises ValueError where there is none.
        """
        found = {}
        for term in self.terms():
            if term.head is None:
                continue
            alike = [
                (other.name != term.name, place)
                for place, other in enumerate(before.terms())
                if other.head is not None
                and other.head.name == term.head.name
                and (other.partial_fc is None) == (term.partial_fc is None)
            ]
            if not alike:
                raise ValueError(
                    f"{term.head.name} of its term {term.name!r} is to go on with the head of the stage before "
                    f"(keep_head), but {before.name!r} has no such head. Give both stages the same head, or set "
                    "keep_head to false."
                )
            found[term.name] = min(alike)[1]
        return found


def default_stages() -> list[Stage]:
    """A head (CosFace) at a held learning rate; as the rate falls, that head and mined triplets together.

    The triplets join in while the network still learns: once the rate has come down to 0 the training people are known
    by heart, and a further stage has little to add (figures in examples/guides/staged_training.md).
    """
    return [
        Stage(
            name="softmax",
            sampler=Component("ImageBatchSampler", {"batch_size": 128}),
            head=_cosface(),
            share=0.6,
            schedule=Decay("constant"),
            optimizer=_sgd(),
        ),
        Stage(
            name="triplet",
            sampler=Component(
                "IdentityBalancedBatchSampler",
                {"identities_per_batch": 32, "images_per_identity": 3, "identity_weights": "count"},
            ),
            miner=Component("DistanceWeightedMiner"),
            loss=Component("TripletLoss", {"margin": 0.3}),
            plus=[Term("classes", head=_cosface())],
            keep_head=True,
            share=0.4,
            warmup=0.02,
            optimizer=_sgd(),
            watch=Watch(tolerance=0.15),  # at the full rate figures dip by up to .13, and rise as it falls
        ),
    ]


def _cosface() -> Component:
    return Component("CosFace", {"margin_cos": 0.35, "scale": 30.0})


def _sgd() -> Component:
    """With four times the usual decay: for the 13,000 images of the demo 1e-3 is as good, for a few thousand 5e-3."""
    return Component("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 2e-3, "fused": True})


@dataclass
class Recipe:
    """Everything a run depends on.

    Args:
        name: The run's folder is runs/NAME unless --output says otherwise.
        seed: Of weights, order, augmentation, draws and splits.
        budget: Wall-clock training time shared among the stages (`170s`, `4m`, or seconds), evaluation not counted;
            null: each stage has its own epochs or steps.
        data: Images and people.
        model: The trunk.
        stages: One after another; the trunk's weights go from each to the next.
        select_by: The validation figure that decides which weights a stage leaves behind.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        precision: Of the network's forward pass; `auto` is bfloat16 where the device computes in it natively (Ampere
            and later GPUs; CPUs with avx512_bf16 or AMX), else float32. With float16 the loss is scaled, and steps
            whose gradient overflows are left out and counted. Losses, mining, evaluation stay in float32.
        mining: Of several ranks (torchrun): `joined`: the objective sees the rows of all of them, as one process with
            the joined batch would; `per_rank`: each its own, so that an anchor meets fewer negatives. Batch norms in
            training take the statistics of each rank's own images either way, and average what they gather.
        recompute: Compute activations once more in the backward pass and save the memory for them: for large batches
            and networks, a third slower.
        compile: Train the network through torch.compile: some minutes at the start, then faster steps.
        threads: CPU threads of torch; none: torch's own choice.
        log_every: Steps between two points of a curve.
        checkpoint_every: Seconds of training between two checkpoints.
        checkpoints_kept: How many of the newest stay on the disk.
    """

    name: str = "demo"
    seed: int = 0
    budget: str | float | None = "170s"
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    stages: list[Stage] = field(default_factory=default_stages)
    select_by: Literal["map_at_r", "recall_at_1", "auc", "tar_at_far_1e-2"] = "map_at_r"
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    mining: Literal["joined", "per_rank"] = "joined"
    recompute: bool = False
    compile: bool = False
    threads: int | None = None
    log_every: int = 20
    checkpoint_every: float = 60.0
    checkpoints_kept: int = 2


def budget_seconds(budget: str | float) -> float:
    """Seconds in `240s`, `4m`, `1.5h` or a bare number. Raises ValueError for anything else, and for 0."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smh]?)\s*", str(budget))
    seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if seconds <= 0:
        raise ValueError(f"budget={budget!r} is no positive length of time; write it as 240s, 4m or 1.5h.")
    return seconds


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dicts, lists and numbers, for YAML, JSON and comparison."""
    return asdict(recipe)


def from_dict(plain: dict[str, Any]) -> Recipe:
    """The recipe of plain values, with defaults where they say nothing. Raises ValueError where they do not fit."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, None)
    parser.set_defaults({"stages": []})  # jsonargparse would fill stages up with the default ones in their places
    try:
        made = parser.instantiate(parser.parse_object(plain))
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    return Recipe(**{field.name: made[field.name] for field in fields(Recipe)})
