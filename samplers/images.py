"""Each image once an epoch: batches for the softmax stage."""

from collections.abc import Iterator

import numpy as np

from samplers.epochs import EpochBatchSampler, whole_number
from samplers.shuffles import key_of, shuffled


class ImageBatchSampler(EpochBatchSampler):
    """Shuffled batches that hold each image exactly once an epoch.

    An epoch of N images is cut into ceil(N / batch_size) batches whose sizes differ by at most one: batch_size is a
    ceiling, and there is no tiny last batch to upset batch norm. All ranks share one plan; each gets a part
    of every batch, and parts differ by at most one. Epochs, state and len(): see EpochBatchSampler.

    num_images: N; indices are 0..N-1. batch_size: images of a batch over all ranks together.
    Raises ValueError for N, batch_size or world_size < 1, a rank out of range, and where a batch has fewer images than
    there are ranks; TypeError where a number is not whole.
    """

    def __init__(self, num_images: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.num_images = whole_number("num_images", num_images, least=1)
        self.batch_size = whole_number("batch_size", batch_size, least=1)
        self.seed = whole_number("seed", seed)
        num_batches = -(-self.num_images // self.batch_size)
        plan = {"seed": self.seed, "num_images": self.num_images, "batch_size": self.batch_size}
        super().__init__(num_batches, plan, rank=rank, world_size=world_size)
        if self.num_images // num_batches < self.world_size:
            raise ValueError(
                f"{self.num_images} images in {num_batches} batches of at most {self.batch_size} leave fewer than "
                f"one image for each of {self.world_size} ranks. Raise batch_size or use fewer ranks."
            )

    def _batches(self, epoch: int, first: int) -> Iterator[list[int]]:
        key = key_of("images", self.seed, epoch)
        for span in self._spans(epoch, first, self.batch_size):
            cuts = [self._share(batch) for batch in span]
            places = np.concatenate([np.arange(begin, end) for begin, end in cuts])
            indices = shuffled(places, self.num_images, key).tolist()
            done = 0
            for begin, end in cuts:
                yield indices[done : done + end - begin]
                done += end - begin

    def _share(self, batch: int) -> tuple[int, int]:
        """Where this rank's part of a batch begins and ends in the epoch's order."""
        begin = batch * self.num_images // len(self)
        size = (batch + 1) * self.num_images // len(self) - begin
        return begin + size * self.rank // self.world_size, begin + size * (self.rank + 1) // self.world_size
