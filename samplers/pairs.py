"""Batches of positive and negative pairs."""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from samplers.epochs import EpochBatchSampler, share, whole_number
from samplers.groups import group_by_identity
from samplers.identity_batches import Labels, check_share
from samplers.rotation import Cells, Integers
from samplers.shuffles import in_turn, key_of, keys_for, shuffled
from samplers.visits import EvenVisits

_log = logging.getLogger(__name__)


class PairBatchSampler(EpochBatchSampler):
    """Batches of M image pairs, side by side: positive pairs first, then negative ones.

    A batch has round(positive_share * M) positive pairs (two images of one identity) and negative ones for the rest
    (images of two identities); images 2i and 2i + 1 of a batch are its pair i. `indices_tuple` says so in the form
    that losses take: the same four tensors for every batch.

    In an epoch each image of an identity with two or more is once the first of a positive pair, in shuffled order; the
    last batch is filled up with the first ones again. Its partners rotate: of an identity with n images, over n - 1
    epochs that begin at a multiple of n - 1 each image meets each of the others. Negative pairs begin with each of all
    N images in turn, going on from epoch to epoch, and their partners are drawn evenly from the images of all
    other identities. Without positive pairs an epoch is as long as the turn of all images in negative ones.

    The order depends on (seed, epoch) alone. All ranks share one plan, each gets its part of both kinds of pairs;
    `world_size` may change on resume. Epochs, state and len(): see EpochBatchSampler.

    labels: (N,) whole numbers or strings, list, array or tensor. pairs_per_batch: M, over all ranks together.
    positive_share: in [0, 1]. DeepID2's verification signal sees both; its paper does not say how many of each.
    groups: (N,) a camera, session, age band, ... of each image: the partner in a positive pair is then of another one
        where its identity has images in several; n - 1 above is then the number of images in other groups. A
        warning says how many identities have not.
    single_image_identities: attribute, how many identities are in negative pairs only, having one image.

    Raises ValueError for labels that are no labels (see IdentityBalancedBatchSampler) or of one identity only (where
    there are negative pairs), M < 1, a share outside [0, 1] or one that rounds to none or all of M though it is not 0
    or 1, more positive pairs in a batch than images that can begin
    one, numbers of pairs not divisible by world_size, a rank out of range, or another number of groups than labels.

    Source: Sun et al. 2014, Deep Learning Face Representation by Joint Identification-Verification, section 2.
    """

    def __init__(
        self,
        labels: Labels,
        pairs_per_batch: int,
        *,
        positive_share: float = 0.5,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        groups: Labels | None = None,
    ) -> None:
        self.pairs_per_batch = whole_number("pairs_per_batch", pairs_per_batch, least=1)
        self.positive_pairs = share("positive_share", positive_share, self.pairs_per_batch, whole=True)
        self.negative_pairs = self.pairs_per_batch - self.positive_pairs
        self.seed = whole_number("seed", seed)
        self.table = group_by_identity(labels)
        self._cells = None if groups is None else Cells(self.table, groups)
        self._images: Integers = self.table.images if self._cells is None else self._cells.images
        self._several = np.flatnonzero(self.table.counts > 1)  # rows of identities that have positive pairs
        self._ends = np.cumsum(self.table.counts[self._several])
        self.single_image_identities = self.table.num_identities - len(self._several)
        firsts = int(self._ends[-1]) if len(self._several) else 0
        self._check_enough(firsts)
        plan = {
            "seed": self.seed,
            "positive_pairs": self.positive_pairs,
            "negative_pairs": self.negative_pairs,
            "num_images": self.table.num_images,
        }
        # What an epoch goes through: the first images of positive pairs, or of negative ones where these are alone.
        self._visits = (
            EvenVisits(firsts, self.positive_pairs, self.seed, of="positive pairs")
            if self.positive_pairs
            else EvenVisits(self.table.num_images, self.negative_pairs, self.seed)
        )
        super().__init__(self._visits.num_batches, plan, rank=rank, world_size=world_size)
        for name in ("positive_pairs", "negative_pairs"):
            check_share(name, getattr(self, name), self.world_size)
        if self.rank == 0:
            self._warn()

    @property
    def indices_tuple(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(a1, p, a2, n): where in this rank's batches its positive pairs are, and its negative ones; int64."""
        return _pairs(self.positive_pairs // self.world_size, self.negative_pairs // self.world_size)

    @property
    def joined_indices_tuple(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same of a batch of one process: see `places`."""
        return _pairs(self.positive_pairs, self.negative_pairs)

    def places(self) -> NDArray[np.int64] | None:
        """Positive pairs first, then negative ones, where ranks have both: see EpochBatchSampler."""
        pairs = np.concatenate((self._part(self.positive_pairs), self.positive_pairs + self._part(self.negative_pairs)))
        return (2 * pairs[:, None] + np.arange(2)).ravel()

    def _check_enough(self, firsts: int) -> None:
        if self.positive_pairs > firsts:
            raise ValueError(
                f"PairBatchSampler needs {self.positive_pairs} images that have another of their identity, for as many "
                f"positive pairs; these labels have {firsts:,} of {self.table.num_images:,}. Lower pairs_per_batch or "
                "positive_share."
            )
        if self.negative_pairs and self.table.num_identities == 1:
            raise ValueError(
                f"PairBatchSampler needs two identities for negative pairs; these labels have one identity only "
                f"({self.table.num_images:,} images). Pass positive_share=1.0 for positive pairs alone."
            )

    def _warn(self) -> None:
        if self._cells is None:
            return
        single = int(self._cells.single_group.sum())
        if single:
            _log.warning(
                "PairBatchSampler cannot take positive pairs across groups for %d of %d identities that have any: all "
                "their images are in one group.",
                single,
                len(self._several),
            )

    def _described_plan(self) -> dict[str, int | str]:
        grouped = {} if self._cells is None else {"groups": self._cells.digest}
        return {**self._plan, "labels": self.table.digest, **grouped}

    def _batches(self, epoch: int, first: int) -> Iterator[list[int]]:
        for span in self._spans(epoch, first, 2 * self.pairs_per_batch):
            batches = np.arange(span.start, span.stop)
            pairs = np.concatenate((self._positives(epoch, batches), self._negatives(epoch, batches)), axis=1)
            yield from (row.tolist() for row in pairs.reshape(len(batches), -1))

    def _positives(self, epoch: int, batches: NDArray[np.int64]) -> Integers:
        """(batches, pairs of this rank, 2) image indices."""
        if not self.positive_pairs:
            return np.empty((len(batches), 0, 2), dtype=self._images.dtype)
        drawn, turns, ahead = self._visits.epoch(epoch).at(batches, self._part(self.positive_pairs))
        found = np.searchsorted(self._ends, drawn, side="right")
        identity = self._several[found]
        count = self.table.counts[identity]
        number = drawn - (self._ends[found] - count)  # which of its identity's images it is
        begin, end = self._own(identity, number)
        others = count - (end - begin)
        cycle, step = np.divmod(turns + ahead, others)
        keys = keys_for(keys_for(key_of("partners", self.seed), self.table.offsets[identity] + number), cycle)
        partner = shuffled(step, others, keys)
        partner += (partner >= begin) * (end - begin)
        offset = self.table.offsets[identity]
        pairs: Integers = self._images[np.stack((offset + number, offset + partner), axis=2)]
        return pairs

    def _own(
        self, identity: NDArray[np.int64], number: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of an identity's images a partner may not be: itself, or all in its group if there are others."""
        if self._cells is None:
            return number, number + 1
        offset = self.table.offsets[identity]
        cell = np.searchsorted(self._cells.offsets, offset + number, side="right") - 1
        begin, end = self._cells.offsets[cell] - offset, self._cells.offsets[cell + 1] - offset
        whole = end - begin == self.table.counts[identity]
        return np.where(whole, number, begin), np.where(whole, number + 1, end)

    def _negatives(self, epoch: int, batches: NDArray[np.int64]) -> Integers:
        """(batches, pairs of this rank, 2) image indices."""
        if not self.negative_pairs:
            return np.empty((len(batches), 0, 2), dtype=self._images.dtype)
        total, numbers, part = self.table.num_images, epoch * len(self) + batches, self._part(self.negative_pairs)
        first = in_turn(numbers, total, self.negative_pairs, part, key_of("negative pairs", self.seed))
        identity = np.searchsorted(self.table.offsets, first, side="right") - 1
        count = self.table.counts[identity]
        keys = keys_for(key_of("negative partners", self.seed), numbers)[:, None]
        partner = shuffled(0, total - count, keys_for(keys, part))
        partner += (partner >= self.table.offsets[identity]) * count
        pairs: Integers = self._images[np.stack((first, partner), axis=2)]
        return pairs


def _pairs(positive: int, negative: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    pairs = torch.arange(2 * (positive + negative)).view(-1, 2)
    return pairs[:positive, 0], pairs[:positive, 1], pairs[positive:, 0], pairs[positive:, 1]
