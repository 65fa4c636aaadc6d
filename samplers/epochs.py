"""What all samplers share: epochs, position, state, ranks."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from samplers.consumed import Consumed
from samplers.passes import Pass, Passes

# Part of every state: a change of the order of batches must refuse old states rather than continue another plan.
ORDER_VERSION = 1

_PLANNED_AT_ONCE = 16384  # indices; NumPy's cost per call vanishes, and it is still milliseconds


class EpochBatchSampler(Sampler[list[int]], ABC):
    """A batch sampler whose order depends on (seed, epoch) alone. Subclasses write `_batches`, and nothing else moves.

    Epochs: an epoch is finished when training has received all its batches; the next iteration then serves the next
    one. Once `set_epoch` was called the caller drives: a finished epoch is repeated until another is set. An epoch left
    early (break) starts again from where it started.

    State: `state_dict()` holds the epoch, the number of its batches that training received (also behind a DataLoader
    with workers, where many more are prefetched), and what the plan depends on; not rank or world size, so that
    another number of ranks can continue the same plan. After `load_state_dict` the next iteration serves what is left
    of that epoch; `set_epoch` of that same epoch keeps the position, of another one forgets it. A look at one batch
    in the middle of an epoch, as `next(iter(loader))`, changes none of this; samplers/passes.py has the whole rule.

    `len()` is always the number of batches of a whole epoch, also when a resumed epoch has fewer left: schedules
    count with it. A progress bar is `tqdm(loader, initial=sampler.position, total=len(sampler))`.

    num_batches: batches of an epoch. plan: what the order depends on beside the epoch; whole numbers and strings.
    Raises ValueError where world_size < 1 or rank is not in 0..world_size-1.
    """

    def __init__(self, num_batches: int, plan: Mapping[str, int | str], *, rank: int, world_size: int) -> None:
        self.world_size = whole_number("world_size", world_size, least=1)
        self.rank = whole_number("rank", rank, least=0)
        if self.rank >= self.world_size:
            raise ValueError(f"rank={rank} is out of range: world_size={world_size} has ranks 0..{world_size - 1}.")
        self._num_batches = num_batches
        self._plan = {"sampler": type(self).__name__, "order": ORDER_VERSION, **plan}
        self._start = (0, 0)  # (epoch, position) where the first pass starts
        self._passes = Passes()
        self._driven = False

    @abstractmethod
    def _batches(self, epoch: int, first: int) -> Iterator[list[int]]:
        """Yield batches `first`, `first + 1`, ... of an epoch, this rank's share; a function of these and the plan."""

    def places(self) -> NDArray[np.int64] | None:
        """Where this rank's images stand in a batch of one process, which has them all in another order.

        (images of this rank,) places, the same in every batch; None where the parts of all ranks, one after the other
        in rank order, are that batch.
        """
        return None

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever the position."""
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        # A generator: which epoch to serve is decided when the first batch is pulled, because torch's loader with
        # workers asks for two iterators and drops the first.
        served = self._begin()
        try:
            for batch in self._batches(served.epoch, served.first):
                self._passes.look()
                served.consumed.pulled += 1
                yield batch
        finally:
            served.consumed.close()

    @property
    def epoch(self) -> int:
        """The epoch training is in; after a finished one the next, unless `set_epoch` is in use."""
        return self._reached()[0]

    @property
    def position(self) -> int:
        """Batches of that epoch which training has received."""
        return self._reached()[1]

    def set_epoch(self, epoch: int) -> None:
        """Serve this epoch from now on, again and again, from its first batch.

        If it is the one just loaded, or one left before its end, the next iteration starts where that was loaded or
        had started. `position` says so at once. Raises ValueError for a negative epoch. A loader that has started
        prefetching does not notice.
        """
        epoch = whole_number("epoch", epoch, least=0)
        training = self._passes.training
        self._driven = True
        if training and training.epoch == epoch and not training.ended:
            # Not forgotten: if it was not left at all, it goes on to count.
            self._start = (epoch, training.first)
            self._passes.expect_another()
        elif training or epoch != self._start[0]:
            self._start, self._passes = (epoch, 0), Passes()

    def state_dict(self) -> dict[str, Any]:
        """{"epoch", "position", "plan"}: plain numbers and strings, fit for JSON. See the class about its meaning."""
        epoch, position = self._reached()
        return {"epoch": epoch, "position": position, "plan": self._described_plan()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of a sampler with the same plan, on any rank and world size.

        Raises ValueError, naming each difference, where the plan is another one, or what is loaded is no state;
        TypeError for an epoch or position that is no whole number.
        """
        wanted = f"a state of {type(self).__name__}, as state_dict() returns it"
        if not isinstance(state, Mapping):
            raise ValueError(f"load_state_dict needs {wanted}, found {state!r}.")
        missing = [name for name in ("epoch", "position", "plan") if name not in state]
        if missing:
            raise ValueError(f"This is not {wanted}: {', '.join(missing)} missing.")
        here, there = self._described_plan(), state["plan"]
        if not isinstance(there, Mapping):
            raise ValueError(f"This is not {wanted}: its plan should be names and values, found {there!r}.")
        differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        if differing:
            told = "; ".join(f"{name} was {there.get(name)!r} and is {here.get(name)!r} here" for name in differing)
            raise ValueError(
                f"The state belongs to another plan: {told}. Build the sampler as it was, or start afresh."
            )
        epoch = whole_number("epoch", state["epoch"], least=0)
        position = whole_number("position", state["position"], least=0)
        if position > len(self):
            raise ValueError(f"The state's position {position} lies beyond the {len(self)} batches of an epoch.")
        self._start, self._passes = (epoch, position), Passes()

    def __getstate__(self) -> dict[str, Any]:
        # A copy (pickle, deepcopy) continues where training stands; loaders and half-used iterators stay behind.
        return {**self.__dict__, "_start": self._progress(), "_passes": Passes()}

    def _described_plan(self) -> dict[str, int | str]:
        """The plan with whatever is costly to work out; asked for only where a state is made or loaded."""
        return dict(self._plan)

    def _spans(self, epoch: int, first: int, images_per_batch: int) -> Iterator[range]:
        """The batches of an epoch from `first` on, cut into spans that are worth planning at once."""
        at_once = max(1, _PLANNED_AT_ONCE * self.world_size // images_per_batch)
        for start in range(first, len(self), at_once):
            yield range(start, min(start + at_once, len(self)))

    def _part(self, number: int) -> NDArray[np.int64]:
        """Which of `number` things that all ranks have in a batch are this rank's: number / world_size, or one more."""
        return np.arange(number * self.rank // self.world_size, number * (self.rank + 1) // self.world_size)

    def _begin(self) -> Pass:
        consumed = Consumed(self._passes.counts())
        run = self._passes.following(consumed)
        goes_on = run is not None and run.last.pulled_to_its_end
        epoch, first = self._after(run.last.epoch) if run and goes_on else self._next_start()
        begun = Pass(epoch, first, len(self), consumed)
        self._passes.begin(run, begun)
        return begun

    def _progress(self) -> tuple[int, int]:
        """(epoch, batches of it that training received); a finished epoch stays (epoch, len)."""
        training = self._passes.training
        return (training.epoch, training.position) if training else self._start

    def _reached(self) -> tuple[int, int]:
        """As _progress, but a finished epoch is the start of the next one where nobody drives.

        Where somebody does, (epoch, len) is kept: loaded and set again, that epoch has nothing left to serve.
        """
        epoch, position = self._progress()
        return self._after(epoch) if position == len(self) and not self._driven else (epoch, position)

    def _next_start(self) -> tuple[int, int]:
        """(epoch, first batch) of a pass that begins now."""
        training = self._passes.training
        if training is None:
            return self._reached()
        return self._after(training.epoch) if training.ended else (training.epoch, training.first)

    def _after(self, epoch: int) -> tuple[int, int]:
        return (epoch if self._driven else epoch + 1), 0


def whole_number(name: str, value: int, *, least: int | None = None) -> int:
    """`value` as an int (NumPy's too). Raises TypeError if it is none, ValueError if it is below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, found {value!r}.") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, found {number}.")
    return number


def share(name: str, value: float, of: int, *, whole: bool) -> int:
    """How many of `of` things a share is, rounded.

    Raises TypeError for what is no number, ValueError outside [0, 1] (or 1 itself where not `whole`), and for a share
    that rounds to none though it is above 0, or to all though it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number, found {value!r}.")
    if not 0.0 <= value <= 1.0 or (value == 1.0 and not whole):
        raise ValueError(f"{name}={value} is a share of a batch; it must lie in [0, 1{']' if whole else ')'}.")
    number = round(float(value) * of)
    if (value > 0 and number == 0) or (whole and value < 1 and number == of):
        raise ValueError(f"{name}={value} of {of} rounds to {number}. Choose another share, or a larger batch.")
    return number
