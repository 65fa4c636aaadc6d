"""Which images of an identity a visit takes: they rotate, so that visits after one another take other images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from samplers.groups import IdentityTable, group_by_identity
from samplers.shuffles import key_of, keys_for, shuffled, turn

Integers = NDArray[np.integer[Any]]


class Rotation:
    """All images of an identity in turn, `per_visit` of them a visit, K for short.

    Turns of one identity fall into cycles of ceil(n / K), each with a shuffled order of its own; the turns of a whole
    cycle take each of the n images at least once. The K images of a turn are distinct where n >= K; with fewer, all of
    them come before any a second time.
    """

    def __init__(self, table: IdentityTable, per_visit: int, seed: int) -> None:
        self._table, self._per_visit = table, per_visit
        self._key = key_of("rotation", seed)

    def images(self, identity: NDArray[np.int64], turns: NDArray[np.int64], ahead: NDArray[np.int64]) -> Integers:
        """Image indices (V, K) of V visits.

        identity: (V,) rows of the table. turns: (V,) which turn of its identity each visit has. ahead: (V,) visits made
        before in that same turn; images differ from theirs as far as there are others.
        """
        count = self._table.counts[identity]
        cycle, taken = turn(turns, count, self._per_visit, ahead=ahead * self._per_visit)
        keys = keys_for(keys_for(self._key, identity), cycle)
        chosen = shuffled(taken, count[:, None], keys[:, None])  # (V, K)
        images: Integers = self._table.images[self._table.offsets[identity][:, None] + chosen]
        return images


class CrossGroupRotation:
    """As `Rotation`, but the K images of a visit come from as many groups (cameras, sessions, ages) as possible.

    Of an identity with images in m groups a visit takes min(K, m) groups, and from them images as evenly as the groups'
    sizes allow; they are distinct where the identity has K. Groups take turns, ceil(m / K) turns for all of them, and
    within a group of s images these do: each comes at least once in ceil(m / K) * s turns in a row that begin at a
    multiple of that number. A visit ahead of its turn takes a later one. A visit costs O(K * K).

    groups: (N,) the group of each image, whole numbers or strings.
    Raises ValueError for another number of groups than images, and as `group_by_identity` does.
    """

    def __init__(
        self,
        table: IdentityTable,
        groups: "Sequence[int] | Sequence[str] | NDArray[Any] | torch.Tensor",
        per_visit: int,
        seed: int,
    ) -> None:
        self.cells = Cells(table, groups)
        self._per_visit = per_visit
        self._keys = key_of("group rotation", seed), key_of("rotation in group", seed)

    def images(self, identity: NDArray[np.int64], turns: NDArray[np.int64], ahead: NDArray[np.int64]) -> Integers:
        """Image indices (V, K); see `Rotation.images`."""
        cells, k = self.cells, self._per_visit
        first = cells.of_identity[identity]
        m = cells.of_identity[identity + 1] - first  # (V,) groups
        draw = np.minimum(k, m)
        cycle, step = np.divmod(turns + ahead, -(-m // draw))
        slot = np.arange(k)
        keys = keys_for(keys_for(self._keys[0], identity), cycle)[:, None]
        cell = first[:, None] + shuffled((slot + (step * draw)[:, None]) % m[:, None], m[:, None], keys)  # (V, K)
        s = (cells.offsets[cell + 1] - cells.offsets[cell])[:, None, :]  # (V, 1, K)
        cycles = np.broadcast_to(cycle[:, None, None], s.shape)
        # The rank-th image of each of these cells: (V, ranks, cells), so that each cell comes once before any twice.
        rank = slot[:, None]
        keys = keys_for(keys_for(self._keys[1], cell[:, None, :]), cycles // s)
        places = shuffled((rank + cycles) % s, np.broadcast_to(s, (len(s), k, k)), keys)
        offered = (cells.offsets[cell][:, None, :] + places).reshape(len(s), k * k)
        there = ((rank < s) & (slot < draw[:, None, None])).reshape(len(s), k * k)
        order = np.argsort(~there, axis=1, kind="stable")
        taken = np.take_along_axis(order, slot % there.sum(axis=1)[:, None], axis=1)
        chosen: Integers = cells.images[np.take_along_axis(offered, taken, axis=1)]
        return chosen


class Cells:
    """Images grouped by identity and, within it, by group: a cell holds the images of one identity in one group.

    images: (N,) image indices, cell after cell. offsets: (M + 1,) where each of M cells begins in `images`.
    of_identity: (C + 1,) where the cells of each identity begin. single_group: (C,) whether all images of an identity,
    two at least, are in one group: its positives cannot cross.
    """

    def __init__(self, table: IdentityTable, groups: Any) -> None:
        found = group_by_identity(groups, name="groups")
        if found.num_images != table.num_images:
            raise ValueError(
                f"groups must say for each of {table.num_images:,} images which group it is of; found "
                f"{found.num_images:,}."
            )
        code = np.empty(table.num_images, dtype=np.int64)
        code[found.images] = np.repeat(np.arange(found.num_identities), found.counts)
        owner = np.repeat(np.arange(table.num_identities), table.counts)
        order = np.lexsort((code[table.images], owner))  # stable: images ascend within a cell
        self.digest = found.digest
        self.images: Integers = table.images[order]
        code = code[self.images]
        new = (code[1:] != code[:-1]) | (owner[1:] != owner[:-1])
        starts = np.concatenate(([0], np.flatnonzero(new) + 1))
        self.offsets = np.append(starts, table.num_images)
        self.of_identity = np.searchsorted(starts, table.offsets)
        self.single_group = (np.diff(self.of_identity) == 1) & (table.counts > 1)
