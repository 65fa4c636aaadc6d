"""P identities x K images: the batches that mining needs."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from samplers.epochs import EpochBatchSampler, whole_number
from samplers.groups import group_by_identity
from samplers.shuffles import key_of, keys_for, shuffled, turn

SmallIdentities = Literal["repeat", "skip"]

_log = logging.getLogger(__name__)


class IdentityBalancedBatchSampler(EpochBatchSampler):
    """Batches of P distinct identities with K images each, image indices of one identity side by side.

    An epoch is ceil(usable identities / P) batches. Each usable identity has its visit in it; the last batch is filled
    up from others, with images that their own visit did not take as far as they have such. The n images of an identity
    rotate: counted from epoch 0, epochs fall into cycles of ceil(n / K); its visits of one whole cycle take each image
    at least once, and each cycle has an order of its own. ceil(n / K) epochs that lie across two cycles may miss
    some. The K images of a visit are distinct where n >= K.

    The order depends on (seed, epoch) alone. All ranks share one plan and get P / world_size identities of each batch;
    `world_size` may change on resume. Epochs, state and len(): see EpochBatchSampler.

    labels: (N,) whole numbers or strings, list, array or tensor. identities_per_batch: P, over all ranks together.
    images_per_identity: K.
    small_identities: what to do with identities of fewer than K images. "repeat" takes all their images before any
        a second time: note that an identity with one image then fills K places with it, a positive pair at distance 0;
        a warning says how many do. With many of those use singletons_per_batch. "skip" leaves them out;
        `left_out_identities` and `left_out_images` say how many, and a warning is logged. Only rank 0 logs.
    singletons_per_batch: N. Above 0 identities with a single image have no visits; N of them, distinct, end every
        batch as negatives, and all of them get their turn over the epochs, K does not matter to them.
    usable_identities: attribute, the identities that have visits.

    Raises ValueError for labels that are empty, not 1-D or neither whole numbers nor strings, P or K < 1, N < 0, a
    rank out of range, P or N not divisible by world_size, fewer usable identities than P, fewer singletons than N, or
    an unknown small_identities; TypeError where a number is not whole.
    """

    def __init__(
        self,
        labels: Sequence[int] | Sequence[str] | NDArray[Any] | torch.Tensor,
        identities_per_batch: int,
        images_per_identity: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        small_identities: SmallIdentities = "repeat",
        singletons_per_batch: int = 0,
    ) -> None:
        self.identities_per_batch = whole_number("identities_per_batch", identities_per_batch, least=1)
        self.images_per_identity = whole_number("images_per_identity", images_per_identity, least=1)
        self.singletons_per_batch = whole_number("singletons_per_batch", singletons_per_batch, least=0)
        if small_identities not in get_args(SmallIdentities):
            raise ValueError(f'small_identities must be "repeat" or "skip", found {small_identities!r}.')
        self.small_identities: SmallIdentities = small_identities
        self.seed = whole_number("seed", seed)
        self.table = group_by_identity(labels)
        self._choose_identities()
        plan: dict[str, int | str] = {
            "seed": self.seed,
            "identities_per_batch": self.identities_per_batch,
            "images_per_identity": self.images_per_identity,
            "small_identities": self.small_identities,
            "singletons_per_batch": self.singletons_per_batch,
            "num_images": self.table.num_images,
        }
        num_batches = -(-self.usable_identities // self.identities_per_batch)
        super().__init__(num_batches, plan, rank=rank, world_size=world_size)
        self._check_shares()
        if self.rank == 0:
            self._warn_of_small_identities()

    def _warn_of_small_identities(self) -> None:
        if self.left_out_identities:
            _log.warning(
                "IdentityBalancedBatchSampler leaves out %d of %d identities (%d of %d images): fewer than %d images "
                'each and small_identities="skip".',
                self.left_out_identities,
                self.table.num_identities,
                self.left_out_images,
                self.table.num_images,
                self.images_per_identity,
            )
        repeated = int((self.table.counts[self._usable] == 1).sum())
        if repeated and self.images_per_identity > 1:
            _log.warning(
                "IdentityBalancedBatchSampler fills %d places with one image for %d of %d identities, which have no "
                'other (small_identities="repeat"): positive pairs at distance 0. Set singletons_per_batch to use '
                'them as negatives only, or pass small_identities="skip".',
                self.images_per_identity,
                repeated,
                self.table.num_identities,
            )

    def _choose_identities(self) -> None:
        """Rows of the table that have visits, that are singletons, and how many are neither."""
        counts = self.table.counts
        single = counts == 1 if self.singletons_per_batch else np.zeros(len(counts), dtype=bool)
        small = counts < self.images_per_identity if self.small_identities == "skip" else np.zeros_like(single)
        self._usable = np.flatnonzero(~single & ~small)
        self._singles = np.flatnonzero(single)
        self.usable_identities = len(self._usable)
        left_out = small & ~single
        self.left_out_identities = int(left_out.sum())
        self.left_out_images = int(counts[left_out].sum())
        if self.usable_identities < self.identities_per_batch:
            raise ValueError(self._too_few())
        if len(self._singles) < self.singletons_per_batch:
            raise ValueError(
                f"singletons_per_batch={self.singletons_per_batch} needs as many identities with one image; these "
                f"labels have {len(self._singles):,} of {self.table.num_identities:,}. Lower singletons_per_batch."
            )

    def _too_few(self) -> str:
        skip = self.small_identities == "skip"
        total = self.table.num_identities
        wanted = f"{self.identities_per_batch:,} identities"
        if skip:
            wanted += f" with at least {self.images_per_identity} images"
        found = f"{self.usable_identities:,} of {total:,}"
        if total == 1:
            found = f"one identity only ({self.table.num_images:,} images)"
        if len(self._singles):
            found += f" ({len(self._singles):,} with one image are set aside by singletons_per_batch)"
        advice = "Lower identities_per_batch"
        if skip:
            advice += ' or images_per_identity, or pass small_identities="repeat"'
        return (
            f"IdentityBalancedBatchSampler needs {wanted} "
            f'(small_identities="{self.small_identities}"); these labels have {found}. {advice}.'
        )

    def _check_shares(self) -> None:
        shared = {
            "identities_per_batch": self.identities_per_batch,
            "singletons_per_batch": self.singletons_per_batch,
        }
        for name, number in shared.items():
            if number % self.world_size:
                below = number - number % self.world_size
                nearest = f"{below} or {below + self.world_size}" if below else f"{self.world_size}"
                raise ValueError(
                    f"{name}={number} counts all ranks together and must be divisible by "
                    f"world_size={self.world_size}: pass {nearest}."
                )

    def _described_plan(self) -> dict[str, int | str]:
        return {**self._plan, "labels": self.table.digest}

    def _batches(self, epoch: int, first: int) -> Iterator[list[int]]:
        size = self.identities_per_batch * self.images_per_identity + self.singletons_per_batch
        for span in self._spans(first, size):
            batches = np.arange(span.start, span.stop)
            rows = np.concatenate((self._visits(epoch, batches), self._negatives(epoch, batches)), axis=1)
            yield from (row.tolist() for row in rows)

    def _visits(self, epoch: int, batches: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
        """(batches, P / world_size * K) image indices of this rank's identities."""
        places = _shares(batches, self.identities_per_batch, self.rank, self.world_size).ravel()
        # The last batch runs over the end of the order and takes its first identities again: others than its own,
        # since there are at least P. Their images are those of the next turn of their rotation.
        filler = places >= self.usable_identities
        places[filler] -= self.usable_identities
        identity = self._usable[shuffled(places, self.usable_identities, key_of("identities", self.seed, epoch))]
        count = self.table.counts[identity]
        cycle, taken = turn(epoch, count, self.images_per_identity, ahead=filler * self.images_per_identity)
        key = keys_for(keys_for(key_of("rotation", self.seed), identity), cycle)
        chosen = shuffled(taken, count[:, None], key[:, None])  # (visits, K)
        images: NDArray[np.integer[Any]] = self.table.images[self.table.offsets[identity][:, None] + chosen]
        return images.reshape(len(batches), -1)

    def _negatives(self, epoch: int, batches: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
        """(batches, N / world_size) image indices of singletons: one rotation of all of them, a turn each batch."""
        if not self.singletons_per_batch:
            return np.empty((len(batches), 0), dtype=self.table.images.dtype)
        share = self.singletons_per_batch // self.world_size
        total = len(self._singles)
        cycle, taken = turn(epoch * len(self) + batches, np.full(len(batches), total), self.singletons_per_batch)
        taken = taken[:, self.rank * share : (self.rank + 1) * share]
        chosen = self._singles[shuffled(taken, total, keys_for(key_of("singletons", self.seed), cycle)[:, None])]
        images: NDArray[np.integer[Any]] = self.table.images[self.table.offsets[chosen]]
        return images


def _shares(batches: NDArray[np.int64], per_batch: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """(batches, per_batch / world_size) places of this rank in an order of which each batch takes per_batch."""
    share = per_batch // world_size
    places: NDArray[np.int64] = batches[:, None] * per_batch + rank * share + np.arange(share)
    return places
