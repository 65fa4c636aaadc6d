"""Which of several passes over one sampler is training's.

Nearly always there is one at a time. But a script may look at a batch in the middle of an epoch, say
`next(iter(loader))` for a grid of pictures, may keep the iterator of such a look for later, or may read the whole
loader inside its loop. All that the sampler learns is how many batches each of them received, so the rule goes by that:

- Training's pass is the one that last received `_IN_A_ROW` batches while the one before received none, or that last
  ended its epoch. One batch looked at so changes nothing, and after a longer look epoch and state are training's
  again once it received two batches more.
- A pass that begins where training's is over (its iterator is gone, at the end or before) is training's at once.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from samplers.consumed import Consumed

_IN_A_ROW = 2
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Pass:
    """One iteration over an epoch of `length` batches, or over what is left of it from batch `first` on."""

    epoch: int
    first: int
    length: int
    consumed: Consumed

    @property
    def position(self) -> int:
        """Batches of the epoch that were received."""
        return self.first + self.consumed.count()

    @property
    def ended(self) -> bool:
        """Whether the whole epoch was received."""
        return self.position == self.length

    @property
    def pulled_to_its_end(self) -> bool:
        """Whether the whole epoch was handed to the loader."""
        return self.first + self.consumed.pulled == self.length


class Run:
    """One iteration of a loader or loop: a pass, or several where a wrapper repeats the sampler inside it."""

    def __init__(self) -> None:
        # More than one only where the loader prefetches over the end of an epoch.
        self._passes: list[Pass] = []
        self._received_before = 0
        self.seen = 0  # what it had received when training's run was last looked at

    def add(self, begun: Pass) -> None:
        """`begun` continues this run: behind a pass pulled to its end, else instead of it."""
        kept = [one for one in self._passes if not one.ended] if self._passes and self.last.pulled_to_its_end else []
        self._received_before += sum(one.consumed.count() for one in self._passes if one not in kept)
        self._passes = [*kept, begun]

    @property
    def last(self) -> Pass:
        """The pass that pulls; the loader may still hand out batches of the one before."""
        return self._passes[-1]

    @property
    def current(self) -> Pass:
        """The pass whose batches come out now."""
        return next((one for one in self._passes if not one.ended), self.last)

    @property
    def live(self) -> bool:
        """Whether its iterator is still there."""
        return self.last.consumed.live

    @property
    def under_way(self) -> bool:
        """Whether it is in the middle of an epoch and may go on."""
        return self.live and not self.current.ended

    @property
    def received(self) -> int:
        """Batches of all its passes."""
        return self._received_before + sum(one.consumed.count() for one in self._passes)


class Passes:
    """The passes over a sampler; empty where none has begun since `epoch` and `position` were set from outside."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._training: Run | None = None
        self._next: Run | None = None  # begun at the last batch of training's epoch: the next epoch, or a look

    def begin(self, run: Run | None, begun: Pass) -> None:
        """Add a pass. `run`: the one it continues, None for a new one."""
        begun.consumed.when_left = self.look
        if run is not None:
            run.add(begun)
            return
        training = self._looked_up()
        run = Run()
        run.add(begun)
        self._runs = [*(one for one in self._runs if one.under_way or (one is training and one.live)), run]
        if training is None or not training.live:
            self._training = run
        elif training.current.ended:
            self._next = run

    def look(self) -> None:
        """Note who received batches since the last look: at each pull, and when an iterator is gone.

        Only so often is the order known in which several passes received theirs. Where two of them did since the last
        look (both prefetched to their ends), one that ended its epoch counts as the later, else training's.
        """
        training, needed = self._training, 1 if self._training is None else _IN_A_ROW
        moved = [run for run in self._runs if run.received > run.seen]
        takers = [run for run in moved if run is training or run.current.ended or run.received - run.seen >= needed]
        if not takers:
            return
        taker = max(takers, key=lambda run: (run.current.ended, run is training))
        if training and training.current.ended and self._runs.index(taker) < self._runs.index(training):
            _log.warning(
                "An epoch ended in one pass over a batch sampler, and now an earlier pass goes on with batch %d of "
                "epoch %d: epoch and state follow it. To read batches beside training, use a sampler of its own.",
                taker.current.position,
                taker.current.epoch,
            )
        self._appoint(taker)

    @property
    def training(self) -> Pass | None:
        """The pass that epoch and state speak of, None where none has begun."""
        run = self._looked_up()
        return None if run is None else run.current

    def following(self, consumed: Consumed) -> Run | None:
        """The run whose loader pulls for `consumed` too."""
        return next((run for run in self._runs if run.last.consumed is consumed.follows), None)

    def counts(self) -> Sequence[Consumed]:
        """What the next `Consumed` may follow."""
        return [run.last.consumed for run in self._runs]

    def expect_another(self) -> None:
        """The next pass is training's, unless one that is still under way goes on before."""
        self.look()
        self._appoint(None)

    def _looked_up(self) -> Run | None:
        self.look()
        if self._training and not self._training.live and self._next and self._next.under_way:
            self._appoint(self._next)
        return self._training

    def _appoint(self, training: Run | None) -> None:
        if training is not self._training:
            self._training, self._next = training, None
        for run in self._runs:
            run.seen = run.received
