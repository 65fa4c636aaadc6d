"""How many of a sampler's batches training has received, as opposed to those a loader fetched ahead.

The one place that looks into torch's DataLoader. A loader with workers pulls batches of indices long before training
gets their images, and a batch sampler is told nothing about it. The loader's iterator does count what it handed
out, in `_num_yielded`, so we find that iterator among the callers when the first batch is pulled and read its count.
Outside a DataLoader the caller is training itself: what was pulled is what was consumed.

Limits: who reads ahead behind the DataLoader (a thread that fills a queue, accelerate's DataLoaderShard with its one
batch of look-ahead) counts as training; with `in_order=False` the count is right, but which batches they were is not.
A sampler that an IterableDataset iterates is not counted: a worker has a copy of its own, and without workers the
loader's batches are others than the sampler's.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from torch.utils.data.dataloader import _BaseDataLoaderIter


class Consumed:
    """Counts the batches of one pass over a sampler. Make it when the first batch is pulled.

    earlier: of each earlier iteration over the sampler the last pass.
    pulled: batches handed to whoever iterates; the sampler adds to it.
    follows: the one of `earlier` that belongs to the same iteration of the same loader: some wrapper repeats the
        sampler for ever, and the loader may still hold batches of that pass.
    when_left: called once the loader's iterator is gone.
    """

    def __init__(self, earlier: "Sequence[Consumed]" = ()) -> None:
        self.pulled = 0
        self.follows: Consumed | None = None
        self.when_left: Callable[[], None] = lambda: None
        self._loader: dict[str, Any] | None = None
        self._final: int | None = None
        self._skipped = 0
        self._feed_id = 0
        loader = _loader_that_pulls()
        if loader is not None:
            self._attach(loader, earlier)

    def _attach(self, loader: "_BaseDataLoaderIter", earlier: "Sequence[Consumed]") -> None:
        names = vars(loader)
        if "_num_yielded" not in names or "_sampler_iter" not in names:
            raise RuntimeError(
                "This version of torch's DataLoader does not say how many batches it handed out (_num_yielded), so "
                "the sampler's state would be wrong. Use a torch version this package names, or report this."
            )
        feed = names["_sampler_iter"]
        self._skipped = names["_num_yielded"]
        for before in earlier:
            if before._loader is not names:
                continue
            if before._feed_id == id(feed):
                self.follows = before
                self._skipped = before._skipped + before.pulled  # its batches come out of the loader first
            else:
                before._freeze_at(before.pulled)  # only feeds without weak references get here, see _watch
        # We keep the iterator's namespace, not the iterator: it must be free to die (and stop its workers) when
        # training leaves the loop, and its last count must still be readable at that moment.
        self._loader = names
        self._feed_id = id(feed)
        self._watch(loader, feed)

    def _watch(self, loader: "_BaseDataLoaderIter", feed: object) -> None:
        """Note the last count when the loader's iterator dies, or is reset (persistent workers) and drops its feed.

        A reset sets `_num_yielded` to 0, but replaces the feed (the iterator over the sampler) just before.
        """
        self._loader_ref = weakref.ref(loader, self._freeze)
        # itertools objects cannot be watched: a pass pulled to its end then counts as consumed after a reset.
        with contextlib.suppress(TypeError):
            self._feed_ref = weakref.ref(feed, self._freeze)

    @property
    def live(self) -> bool:
        """Whether more of its batches may be received: whoever iterates is still there."""
        return self._final is None

    def close(self) -> None:
        """The sampler's iterator ended or was dropped. A loader may still hold batches, and is watched by itself."""
        if self._loader is None and self._final is None:
            self._final = self.pulled

    def count(self) -> int:
        """Batches of this pass that training has received, 0..pulled."""
        if self._loader is not None:
            given: int = self._loader["_num_yielded"] - self._skipped
            return min(max(given, 0), self.pulled)
        return self.pulled if self._final is None else self._final

    def _freeze(self, _: object) -> None:
        self._freeze_at(self.count())

    def _freeze_at(self, count: int) -> None:
        if self._loader is not None:
            self._final = count
            self._loader = None
            self.when_left()


def _loader_that_pulls() -> "_BaseDataLoaderIter | None":
    """The innermost DataLoader iterator among the callers; generators that wrap a sampler lie in between."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Only torch's own frames are opened: f_locals of a user's frame would keep its tensors alive.
        if frame.f_globals.get("__name__") == _BaseDataLoaderIter.__module__:
            caller = frame.f_locals.get("self")
            if isinstance(caller, _BaseDataLoaderIter):
                return caller
        frame = frame.f_back
    return None
