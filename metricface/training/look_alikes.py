"""Tables of look-alikes while training goes on: the first one, and those that are renewed in the background.

A renewed table is of the weights as they were at a step that is a multiple of the recipe's `every`, and is in force
from `delay` steps later on, however long it took: training waits for it where it is late. So a run does not depend on
how fast its machine was.
"""

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metricface.data.images import ImageSet, UnreadableImageError
from metricface.distributed import world_size
from metricface.miners.dataset.identities import (
    IdentityNeighbours,
    centroids,
    neighbours_from_centroids,
    neighbours_from_images,
)
from metricface.training import ranks
from metricface.training.held_out import embed
from metricface.training.interrupt import StoppedError, never
from metricface.training.recipe import LookAlikes
from samplers import LookAlikeBatchSampler

Table = NDArray[np.int64]


class NoTableError(RuntimeError):
    """A table of look-alikes could not be computed; its cause is what went wrong."""

    @property
    def diverged(self) -> bool:
        """Whether the network is to blame (its embeddings are not finite), and not files, memory or the device."""
        return isinstance(self.__cause__, ValueError) and not isinstance(self.__cause__, UnreadableImageError)


@contextmanager
def _making() -> Iterator[None]:
    """Whatever goes wrong inside is why there is no table, but for a request to stop."""
    try:
        yield
    except StoppedError:
        raise
    except Exception as error:
        raise NoTableError(str(error) or type(error).__name__) from error


class ClassWeights(NamedTuple):
    """(C * vectors, D) rows of a head, `vectors` for each class."""

    rows: Tensor
    vectors: int


# What a table is computed from: the network, (N, D) unit embeddings of the images, or class vectors.
Source = nn.Module | NDArray[np.float32] | ClassWeights


def _shared(table: "Future[Table]") -> "Future[Table]":
    """Waits for the first rank's table and puts it, or its fault, into every rank's future; all ranks must call it."""
    if world_size() == 1:
        return table
    fault = table.exception() if ranks.speaks() else None
    told = (str(fault), fault.diverged) if isinstance(fault, NoTableError) else None
    rows, told = ranks.from_first((table.result() if ranks.speaks() and fault is None else None, told))
    if ranks.speaks():
        return table
    if rows is not None:
        table.set_result(rows)
    elif told is not None:
        fault = NoTableError(told[0])
        fault.__cause__ = ValueError(told[0]) if told[1] else None
        table.set_exception(fault)
    return table


class LookAlikeTables:
    """Makes the tables of one stage's sampler and puts them in force.

    every: steps between two renewals, None for none. images: the training people. ahead: how many batches are planned
    or fetched before training gets them. Of several ranks the first computes, and all get its tables: their samplers
    would otherwise follow different plans.
    """

    def __init__(
        self,
        options: LookAlikes,
        sampler: LookAlikeBatchSampler,
        images: ImageSet,
        device: torch.device,
        ahead: int,
    ) -> None:
        self.options, self.sampler, self.images, self.device = options, sampler, images, device
        self._ahead, self._due = ahead, 0
        self.every = options.every_steps
        if options.every_epochs is not None:
            self.every = round(options.every_epochs * len(sampler))
        if self.every is not None and self.every <= options.delay:
            raise ValueError(
                f"look_alikes: a table is renewed every {self.every} steps, but only in force {options.delay} steps "
                "later. Raise every_steps or every_epochs, or lower delay."
            )
        self._background = ThreadPoolExecutor(1, thread_name_prefix="look-alikes")
        self._coming: Future[Table] | None = None
        self._found: dict[str, float] = {}
        self.failures: list[str] = []

    def first(self, model: nn.Module, weights: ClassWeights | None, stopped: Callable[[], bool] = never) -> None:
        """Compute the table that the stage begins with, before its first batch is planned; ranks share the embedding.

        Raises NoTableError, and StoppedError where `stopped()` says so on the way.
        """
        since = time.perf_counter()
        source: Source = self._source(model, weights)
        if isinstance(source, nn.Module):
            with _making():
                source = embed(source, self.images, self.device, shared=True, stopped=stopped)
        coming: Future[Table] = Future()
        if ranks.speaks():
            try:
                coming.set_result(self._table(source, since))
            except NoTableError as error:
                coming.set_exception(error)
        self.sampler.refresh(_shared(coming).result(), at=0)

    def after(
        self, step: int, model: nn.Module, weights: Callable[[], ClassWeights | None], last: int | None = None
    ) -> None:
        """Where a renewal is due after `step` steps, take a copy of the weights and begin.

        last: steps of the stage, where that is known: a table that would only be in force after it is not computed.
        """
        if world_size() > 1 and step >= self._due:
            self.wait()  # together, before any rank plans the batches that need it
        at = step + self.options.delay
        if self.every is None or step % self.every or (last is not None and at >= last):
            return
        self.wait()
        source = self._source(copy.deepcopy(model), weights())
        self._coming = self._background.submit(self._table, source, time.perf_counter()) if ranks.speaks() else Future()
        self.sampler.refresh(self._coming, at=at)
        self._due = at - self._ahead

    def wait(self) -> None:
        """Until the table under way, if any, is there, on all ranks: a checkpoint holds it. All of them must wait.

        Should it have failed, `failures` says so; whoever needs the table gets the error.
        """
        if self._coming is not None:
            error = _shared(self._coming).exception()
            if error is not None:
                self.failures.append(str(error))
            self._coming = None

    def scalars(self, step: int) -> dict[str, float]:
        """Steps since the weights that the table in force is of, look-alikes that were missing, and about its making.

        missing_share: of the look-alikes planned so far, how many were strangers because a row had too few. twins:
        pairs of identities left out as too close; without: identities that look like nobody; seconds: it took. These
        three are of the table computed last.
        """
        since = self.sampler.table_from()
        found = {"age": float(step - max(since - self.options.delay, 0)), **self._found}
        if self.sampler.planned_look_alikes:
            found["missing_share"] = self.sampler.missing_look_alikes / self.sampler.planned_look_alikes
        return {f"look_alikes/{name}": value for name, value in found.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the thread go; a table that it has not begun will not come."""
        if self._coming is not None and not ranks.speaks():
            self._coming.set_exception(NoTableError("training ended before the table was there"))
        self._background.shutdown(wait=False, cancel_futures=True)

    def _source(self, model: nn.Module, weights: ClassWeights | None) -> nn.Module | ClassWeights:
        """What the table is computed from: class weights where the recipe says so and there are any, or the network."""
        if self.options.source != "head" or weights is None:
            return model
        return ClassWeights(weights.rows.detach().to("cpu", torch.float32, copy=True), weights.vectors)

    def _table(self, source: Source, since: float) -> Table:
        with _making():
            found = self._neighbours(source)
        self._found = {
            "seconds": time.perf_counter() - since,
            "twins": float(len(found.twins.first)),
            "without": float(len(found.without)),
        }
        return found.rows

    def _neighbours(self, source: Source) -> IdentityNeighbours:
        k, max_cos = self.options.neighbours, self.options.max_cos
        if isinstance(source, ClassWeights):
            return neighbours_from_centroids(source.rows, k, max_cos=max_cos, vectors_per_class=source.vectors)
        embeddings = embed(source, self.images, self.device) if isinstance(source, nn.Module) else source
        if self.options.source == "images":
            return neighbours_from_images(embeddings, self.images.labels, k, max_cos=max_cos)
        return neighbours_from_centroids(centroids(embeddings, self.images.labels), k, max_cos=max_cos)
