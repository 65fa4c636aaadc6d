"""Ctrl-C and SIGTERM as a request to stop at the next safe place."""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self


class StoppedError(Exception):
    """A pass over images was left half way, since a stop was asked for; nothing of it is kept."""


def never() -> bool:
    """For runs that nobody stops."""
    return False


class StopRequest:
    """Inside `with StopRequest() as stopped`, `stopped()` says whether a stop was asked for.

    Once somebody has asked, the first SIGINT or SIGTERM only sets the flag, so that a step or a checkpoint is finished
    (an evaluation is left, and made anew on resume). A second one of its kind, or one before there is anything to save,
    raises KeyboardInterrupt at once (of another kind: torchrun passes Ctrl-C on as a SIGTERM to processes that have had
    it already).
    Only the main thread may enter; processes forked inside ignore the signals and leave them to it.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self._asked: int | None = None
        self._answered = False
        self._process = os.getpid()
        self._say = say
        self._before: dict[signal.Signals, object] = {}

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        self._answered = True
        return self._asked is not None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if not self._answered or self._asked == number:
            raise KeyboardInterrupt
        if self._asked is not None:
            return
        self._asked = number
        self._say("\nStopping at the next safe place, with a checkpoint (press Ctrl-C again to stop at once).")
