"""What a stage's batches are made of: its sampler, its tables of look-alikes, its loader."""

import signal
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from metricface.data.images import ImageBatch, ImageSet, keep
from metricface.data.splits import captured
from metricface.miners.dataset.engines import faiss_module
from metricface.training.components import build, by_name
from metricface.training.look_alikes import LookAlikeTables
from metricface.training.recipe import Component, LookAlikes, Stage
from samplers import IdentityBalancedBatchSampler, ImageBatchSampler, LookAlikeBatchSampler, PairBatchSampler
from samplers.look_alikes import PLANNED_AHEAD

Sampler = IdentityBalancedBatchSampler | ImageBatchSampler | LookAlikeBatchSampler | PairBatchSampler

SAMPLERS = by_name(ImageBatchSampler, IdentityBalancedBatchSampler, LookAlikeBatchSampler, PairBatchSampler)
# What the trainer gives a sampler, beside images or labels.
GIVEN = ("seed", "rank", "world_size", "neighbours")


def sampler(stage: Stage, images: ImageSet, seed: int, *, rank: int = 0, world_size: int = 1) -> Sampler:
    """Batches for a stage over the training people.

    People with one image offer no positive pair. Where the recipe does not say how many of them a batch of identities
    takes as negatives (`singletons_per_batch`), it takes as many as it has identities, if there are so many. rank,
    world_size: this process's part of each batch. The option
    `groups` of a recipe is a regular expression with one group, searched in each image's key: what it captures is the
    camera, session, ... of the image. A LookAlikeBatchSampler knows nobody's look-alikes yet.
    """
    name, options = stage.sampler.name, dict(stage.sampler.options)
    if name == ImageBatchSampler.__name__:
        part = {"rank": rank, "world_size": world_size}
        plain: Sampler = build("sampler", stage.sampler, SAMPLERS, len(images), seed=seed, **part)
        return plain
    if options.get("groups") is not None:
        options["groups"] = captured(images.keys, str(options["groups"]))
    known: dict[str, Any] = {"seed": seed, "rank": rank, "world_size": world_size}
    if name != PairBatchSampler.__name__:
        singles = int((images.counts() == 1).sum())
        options.setdefault("singletons_per_batch", min(singles, options.get("identities_per_batch", 0)))
    if name == LookAlikeBatchSampler.__name__:
        known["neighbours"] = np.full((len(images.identities), 1), -1)
    made: Sampler = build("sampler", Component(name, options), SAMPLERS, images.labels, **known)
    return made


def look_alikes(
    stage: Stage, batches: Sampler, images: ImageSet, workers: int, on: torch.device
) -> LookAlikeTables | None:
    """What makes the tables of the stage's sampler, if it needs any. Raises ValueError where that cannot work."""
    if not isinstance(batches, LookAlikeBatchSampler):
        return None
    asked = stage.look_alikes or LookAlikes()
    ahead = PLANNED_AHEAD + 2 * workers  # of training: what the sampler has planned and torch's loader fetched
    if asked.delay <= ahead:
        raise ValueError(
            f"look_alikes.delay={asked.delay} must be above {ahead}: so many batches are planned or fetched before "
            "training gets them."
        )
    try:
        faiss_module()
    except ImportError as error:
        raise ValueError(f"LookAlikeBatchSampler: {error}") from error
    return LookAlikeTables(asked, batches, images, on, ahead)


def describe(batches: Sampler) -> str:
    """One line about the batches of a stage: how many, of what, and whom they leave out."""
    text = f"{len(batches):,} batches an epoch"
    if isinstance(batches, ImageBatchSampler):
        return f"{text}, each image once"
    if isinstance(batches, PairBatchSampler):
        text += f" of {batches.positive_pairs} positive and {batches.negative_pairs} negative pairs"
        single = batches.single_image_identities
        return f"{text}; {single:,} people with one image in negative pairs only" if single else text
    text += f" of {batches.identities_per_batch} identities x {batches.images_per_identity} images"
    if isinstance(batches, LookAlikeBatchSampler):
        text += f" ({batches.look_alikes_per_batch} of them look-alikes)"
    elif batches.identity_weights != "uniform":
        most, asked = batches.realised_shares.max(), batches.asked_shares.max()
        text += f" (the one with most images has {most:.2%} of the visits; by {batches.identity_weights} {asked:.2%})"
    if batches.singletons_per_batch:
        text += f" + {batches.singletons_per_batch} people with one image, as negatives"
    if batches.left_out_identities:
        text += (
            f"; {batches.left_out_identities:,} identities ({batches.left_out_images:,} images) left out as too small"
        )
    return text


def ignore_interrupts(_: int) -> None:
    """For workers: Ctrl-C, or a scheduler's SIGTERM, reaches all processes, and it is the trainer that ends the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader(images: ImageSet, batches: Sampler, workers: int, on: torch.device) -> DataLoader[ImageBatch]:
    """Whole batches of a set; read ahead by `workers` processes (0 for a set in memory, where a batch is one copy).

    on: where they go; on the way to a GPU they lie in pinned memory, so that the copy runs beside the step.

    Workers live as long as the loader: starting them anew each epoch would fork beside a thread that looks for
    look-alikes, and a child can inherit a lock that is never released.
    """
    # Its own generator: each pass over a loader draws a number, and a resumed run makes one pass more.
    own = torch.Generator()
    return DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=keep,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=ignore_interrupts,
        generator=own,
        pin_memory=on.type == "cuda",
    )
