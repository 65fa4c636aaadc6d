"""What batches of P identities x K images share: who is usable, whose turn which images have, singletons, ranks."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from samplers.epochs import EpochBatchSampler, whole_number
from samplers.groups import group_by_identity
from samplers.rotation import CrossGroupRotation, Rotation
from samplers.shuffles import in_turn, key_of
from samplers.visits import Planned

Labels = Sequence[int] | Sequence[str] | NDArray[Any] | torch.Tensor
SmallIdentities = Literal["repeat", "skip"]
# Plans batches (B,) of an epoch: who visits, in all P slots or in those of this rank.
Plan = Callable[[NDArray[np.int64]], Planned]

_log = logging.getLogger(__name__)


class IdentityBatchSampler(EpochBatchSampler):
    """A batch sampler of P distinct identities with K images each. Subclasses say who meets whom.

    What the options mean is said by `IdentityBalancedBatchSampler`; subclasses pass them on as they are. A subclass
    writes `_length` and `_epoch_plan`, and hands `plan` what its order depends on beside these options.
    """

    def __init__(
        self,
        labels: Labels,
        identities_per_batch: int,
        images_per_identity: int,
        plan: Mapping[str, int | str],
        *,
        seed: int,
        rank: int,
        world_size: int,
        small_identities: SmallIdentities,
        min_images: int,
        singletons_per_batch: int,
        groups: Labels | None,
    ) -> None:
        self.identities_per_batch = whole_number("identities_per_batch", identities_per_batch, least=1)
        self.images_per_identity = whole_number("images_per_identity", images_per_identity, least=1)
        self.singletons_per_batch = whole_number("singletons_per_batch", singletons_per_batch, least=0)
        self.min_images = whole_number("min_images", min_images, least=1)
        if small_identities not in get_args(SmallIdentities):
            raise ValueError(f'small_identities must be "repeat" or "skip", found {small_identities!r}.')
        self.small_identities: SmallIdentities = small_identities
        self.seed = whole_number("seed", seed)
        self.table = group_by_identity(labels)
        self._choose_identities()
        self._rotation: Rotation | CrossGroupRotation = (
            Rotation(self.table, self.images_per_identity, self.seed)
            if groups is None
            else CrossGroupRotation(self.table, groups, self.images_per_identity, self.seed)
        )
        described: dict[str, int | str] = {
            "seed": self.seed,
            "identities_per_batch": self.identities_per_batch,
            "images_per_identity": self.images_per_identity,
            "small_identities": self.small_identities,
            "min_images": self.min_images,
            "singletons_per_batch": self.singletons_per_batch,
            "num_images": self.table.num_images,
            **plan,
        }
        super().__init__(self._length(), described, rank=rank, world_size=world_size)
        check_share("identities_per_batch", self.identities_per_batch, self.world_size)
        if self.rank == 0:
            self._warn()

    @abstractmethod
    def _length(self) -> int:
        """Batches of an epoch; `_usable` is known by then."""

    @abstractmethod
    def _epoch_plan(self, epoch: int) -> Plan:
        """The visits of an epoch's batches in this rank's slots: numbers into `_usable`."""

    @property
    def usable_identities(self) -> int:
        """Identities that have visits."""
        return len(self._usable)

    def _choose_identities(self) -> None:
        """Rows of the table that have visits, that are singletons, and how many are neither."""
        counts = self.table.counts
        self._least = max(self.min_images, self.images_per_identity if self.small_identities == "skip" else 1)
        single = counts == 1 if self.singletons_per_batch else np.zeros(len(counts), dtype=bool)
        left_out = (counts < self._least) & ~single
        self._usable = np.flatnonzero(~single & ~left_out)
        self._singles = np.flatnonzero(single)
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
        total = self.table.num_identities
        wanted = f"{self.identities_per_batch:,} identities"
        if self._least > 1:
            wanted += f" with at least {self._least} images"
        found = f"{self.usable_identities:,} of {total:,}"
        if total == 1:
            found = f"one identity only ({self.table.num_images:,} images)"
        if len(self._singles):
            found += f" ({len(self._singles):,} with one image are set aside by singletons_per_batch)"
        advice = ["Lower identities_per_batch"]
        if self._least > 1:
            advice.append("min_images" if self._least == self.min_images else "images_per_identity")
        text = " or ".join(advice)
        if self.small_identities == "skip":
            text += ', or pass small_identities="repeat"'
        return (
            f"{type(self).__name__} needs {wanted} "
            f'(small_identities="{self.small_identities}"); these labels have {found}. {text}.'
        )

    def places(self) -> NDArray[np.int64] | None:
        """Identities first, then singletons, where ranks have both: see EpochBatchSampler."""
        if not self.singletons_per_batch:
            return None
        first = self._part(self.identities_per_batch)[:, None] * self.images_per_identity
        identities = (first + np.arange(self.images_per_identity)).ravel()
        singles = self.identities_per_batch * self.images_per_identity + self._part(self.singletons_per_batch)
        return np.concatenate((identities, singles))

    def _warn(self) -> None:
        name, total = type(self).__name__, self.table.num_identities
        if self.left_out_identities:
            _log.warning(
                "%s leaves out %d of %d identities (%d of %d images): fewer than %d images each.",
                name,
                self.left_out_identities,
                total,
                self.left_out_images,
                self.table.num_images,
                self._least,
            )
        repeated = int((self.table.counts[self._usable] == 1).sum())
        if repeated and self.images_per_identity > 1:
            _log.warning(
                "%s fills %d places with one image for %d of %d identities, which have no "
                'other (small_identities="repeat"): positive pairs at distance 0. Set singletons_per_batch to use '
                'them as negatives only, or pass small_identities="skip".',
                name,
                self.images_per_identity,
                repeated,
                total,
            )
        if isinstance(self._rotation, CrossGroupRotation):
            single = int(self._rotation.cells.single_group[self._usable].sum())
            if single:
                _log.warning(
                    "%s cannot take positives across groups for %d of %d usable identities: all their images are in "
                    "one group.",
                    name,
                    single,
                    self.usable_identities,
                )

    def _described_plan(self) -> dict[str, int | str]:
        grouped = {"groups": self._rotation.cells.digest} if isinstance(self._rotation, CrossGroupRotation) else {}
        return {**self._plan, "labels": self.table.digest, **grouped}

    def _batches(self, epoch: int, first: int) -> Iterator[list[int]]:
        size = self.identities_per_batch * self.images_per_identity + self.singletons_per_batch
        plan = self._epoch_plan(epoch)
        for span in self._spans(epoch, first, size):
            batches = np.arange(span.start, span.stop)
            who, turns, ahead = plan(batches)  # each (batches, identities of this rank)
            images = self._rotation.images(self._usable[who.ravel()], turns.ravel(), ahead.ravel())
            rows = np.concatenate((images.reshape(len(batches), -1), self._negatives(epoch, batches)), axis=1)
            yield from (row.tolist() for row in rows)

    def _negatives(self, epoch: int, batches: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
        """(batches, singletons of this rank) image indices: one rotation of all of them, a turn each batch."""
        if not self.singletons_per_batch:
            return np.empty((len(batches), 0), dtype=self.table.images.dtype)
        number, part = self.singletons_per_batch, self._part(self.singletons_per_batch)
        key = key_of("singletons", self.seed)
        chosen = in_turn(epoch * len(self) + batches, len(self._singles), number, part, key)
        images: NDArray[np.integer[Any]] = self.table.images[self.table.offsets[self._singles[chosen]]]
        return images


def check_share(name: str, number: int, world_size: int) -> None:
    """Raise ValueError where a number that counts all ranks together cannot be divided among them."""
    if number % world_size:
        below = number - number % world_size
        nearest = f"{below} or {below + world_size}" if below else f"{world_size}"
        raise ValueError(
            f"{name}={number} counts all ranks together and must be divisible by world_size={world_size}: "
            f"pass {nearest}."
        )
