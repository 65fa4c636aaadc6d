"""Batches in which identities meet those they are confused with."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from samplers.epochs import share, whole_number
from samplers.identity_batches import IdentityBatchSampler, Labels, Plan, SmallIdentities
from samplers.shuffles import key_of, keys_for, shuffled
from samplers.visits import EvenVisits, Planned

# Batches planned ahead of the one asked for: enough to spread NumPy's cost per call, few enough that a table computed
# while training goes on is soon in force.
PLANNED_AHEAD = 16
# (usable identities, k): numbers of usable identities, -1 for none.
Neighbours = NDArray[np.int32]


class LookAlikeBatchSampler(IdentityBatchSampler):
    """Batches of P distinct identities with K images each, a share of them look-alikes of others in the batch.

    Of a batch's P identities L = round(look_alike_share * P) are look-alikes and R = P - L have their visit of the
    epoch: each usable identity has one, in shuffled order, so everybody is seen, and len() is
    ceil(usable identities / R). ceil(L / (neighbourhood - 1)) of these R are centres: each is followed by up to
    neighbourhood - 1 look-alikes drawn from its row of the table. The rest are strangers, and stand between the
    neighbourhoods. A batch of look-alikes alone is not offered: with
    hard negatives only, training tends to collapse.

    Where a row has too few (usable, not in the batch already), strangers take the places that are left:
    `missing_look_alikes` counts them, of `planned_look_alikes`, in all batches planned so far.

    Images of a visit rotate as `IdentityBalancedBatchSampler` says; images of look-alikes are drawn at random, distinct
    where there are K. Everything depends on (seed, epoch, table) alone. All ranks share one plan. Epochs, state and
    len(): see EpochBatchSampler; `state_dict()` holds the tables that are needed from there on, as int32 tensors.

    neighbours: (C, k) whole numbers; row c lists identities that look like identity c, -1 where there are no more. Rows
        are numbered as the sorted distinct labels are (`sampler.table.identities`); metricface.miners.dataset makes
        such tables. The k of a row are drawn from evenly: a longer row is a softer choice.
    look_alike_share: L / P before rounding, in [0, 1); R must be at least 1, and enough for the centres.
    neighbourhood: a centre and its look-alikes, at least 2 identities.
    All others, and errors: as IdentityBalancedBatchSampler. Raises ValueError also for a table of another shape, or
    that names identities that are not there.

    Source: the idea is Smirnov et al. 2017, Doppelganger Mining for Face Representation Learning, and Ge 2018, Deep
    Metric Learning with Hierarchical Triplet Loss, section 4.2 (random classes and the nearest to each).
    """

    def __init__(
        self,
        labels: Labels,
        identities_per_batch: int,
        images_per_identity: int,
        neighbours: ArrayLike,
        *,
        look_alike_share: float = 0.5,
        neighbourhood: int = 4,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        small_identities: SmallIdentities = "repeat",
        min_images: int = 1,
        singletons_per_batch: int = 0,
        groups: Labels | None = None,
    ) -> None:
        identities_per_batch = whole_number("identities_per_batch", identities_per_batch, least=1)
        self.neighbourhood = whole_number("neighbourhood", neighbourhood, least=2)
        self.look_alikes_per_batch = share("look_alike_share", look_alike_share, identities_per_batch, whole=False)
        self._layout = _Layout(identities_per_batch, self.look_alikes_per_batch, self.neighbourhood)
        super().__init__(
            labels,
            identities_per_batch,
            images_per_identity,
            {"look_alikes_per_batch": self.look_alikes_per_batch, "neighbourhood": self.neighbourhood},
            seed=seed,
            rank=rank,
            world_size=world_size,
            small_identities=small_identities,
            min_images=min_images,
            singletons_per_batch=singletons_per_batch,
            groups=groups,
        )
        self._number_of = np.full(self.table.num_identities, -1, dtype=np.int32)  # row of the table -> usable number
        self._number_of[self._usable] = np.arange(self.usable_identities)
        self._tables: list[tuple[int, Neighbours | Future[ArrayLike]]] = [(0, self._checked(neighbours))]
        self._planned = 0  # batches, since the first of epoch 0
        self.planned_look_alikes = 0
        self.missing_look_alikes = 0

    def refresh(self, neighbours: ArrayLike | Future[Any], *, at: int) -> None:
        """Draw look-alikes from another table from batch `at` on.

        at: counted from the first batch of epoch 0: epoch * len(sampler) + position. It must lie beyond what is
            planned already: PLANNED_AHEAD batches, and whatever a loader has fetched ahead of training.
        neighbours: a table as the constructor takes it, or a Future of one that is still being computed. Whoever pulls
            a batch that needs it waits, so that a run does not depend on how fast it was. A Future that failed raises
            there, at each try; until then it is no part of a state, and another table for the same batch replaces it.
        A table for the same batch as the last one replaces it. Raises ValueError for a batch that is planned already or
        before the last table's; and as the constructor.
        """
        at = whole_number("at", at, least=0)
        if at < self._planned:
            raise ValueError(
                f"A table of neighbours cannot be put in force at batch {at}: batches up to {self._planned - 1} are "
                f"planned. Ask for batch {self._planned} or later."
            )
        if at < self._tables[-1][0]:
            raise ValueError(f"There is a table from batch {self._tables[-1][0]} on; this one, from {at}, comes late.")
        table = neighbours if isinstance(neighbours, Future) else self._checked(neighbours)
        self._tables = [*(kept for kept in self._needed() if kept[0] != at), (at, table)]

    def table_from(self) -> int:
        """Since which batch, counted from the first of epoch 0, the table has been in force that training drew from.

        That is the table of the last batch it received, or of the first, if none yet.
        """
        return self._at(max(self.epoch * len(self) + self.position - 1, 0))

    def state_dict(self) -> dict[str, Any]:
        """As EpochBatchSampler, and "neighbours": [{"at", "table"}]; waits for tables that are being computed."""
        tables = [{"at": at, "table": torch.from_numpy(self._rows(at))} for at in self._computed()]
        return {**super().state_dict(), "neighbours": tables}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As EpochBatchSampler; the tables in `state` replace the constructor's."""
        if isinstance(state, Mapping) and "neighbours" not in state:
            raise ValueError("This state has no tables of neighbours: it is not one of LookAlikeBatchSampler.")
        try:
            tables = [(whole_number("at", kept["at"], least=0), kept["table"]) for kept in state["neighbours"]]
        except (TypeError, KeyError, IndexError):
            tables = []
        if not tables or [at for at, _ in tables] != sorted({at for at, _ in tables}):
            raise ValueError(
                'This is not a state as state_dict() returns it: "neighbours" should list tables as {"at", "table"}, '
                "at rising."
            )
        checked: list[tuple[int, Neighbours | Future[ArrayLike]]] = [(at, self._checked(table)) for at, table in tables]
        super().load_state_dict(state)
        self._tables = checked
        self._planned = self.epoch * len(self) + self.position

    def __getstate__(self) -> dict[str, Any]:
        resolved = [(at, self._table(at)) for at in self._computed()]  # a Future cannot be copied
        return {**super().__getstate__(), "_tables": resolved}

    def _length(self) -> int:
        self._visits = EvenVisits(self.usable_identities, self._layout.mains, self.seed)
        return self._visits.num_batches

    def _spans(self, epoch: int, first: int, images_per_batch: int) -> Iterator[range]:
        start = first
        while start < len(self):
            # No further than the next table, which may still be computed when the batches before it are wanted.
            coming = [at - epoch * len(self) for at, _ in self._tables]
            stop = min([start + PLANNED_AHEAD, len(self), *(at for at in coming if at > start)])
            yield range(start, stop)
            start = stop

    def _epoch_plan(self, epoch: int) -> Plan:
        planned, mains = self._visits.epoch(epoch), np.arange(self._layout.mains)
        slots = self._part(self.identities_per_batch)

        def plan(batches: NDArray[np.int64]) -> Planned:
            visits = planned.at(batches, mains)
            numbers = epoch * len(self) + batches  # since the first batch of epoch 0
            # Everybody's whole batch: which look-alikes there are depends on who else is in it.
            who = self._completed(visits.who, numbers)
            self._planned = max(self._planned, int(numbers[-1]) + 1)
            keys = keys_for(key_of("look-alike images", self.seed), numbers)[:, None]
            slot = np.arange(self.identities_per_batch)
            turns = (keys_for(keys, slot) >> np.uint64(33)).astype(np.int64)  # (batches, P), random
            ahead = np.zeros_like(turns)
            turns[:, self._layout.main_slots] = visits.turns
            ahead[:, self._layout.main_slots] = visits.ahead
            return Planned(who[:, slots], turns[:, slots], ahead[:, slots])

        return plan

    def _completed(self, mains: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """(batches, P) identities: those whose visit it is in their slots, look-alikes and strangers in the others.

        One table is in force for all these batches: a span ends where the next one begins.
        """
        who = np.full((len(mains), self.identities_per_batch), -1, dtype=np.int64)
        who[:, self._layout.main_slots] = mains
        table = self._table(self._at(int(numbers[0])))
        self._add_look_alikes(who, table, keys_for(key_of("look-alikes", self.seed), numbers))
        self.planned_look_alikes += len(who) * self.look_alikes_per_batch
        step = 0
        while len(rows := np.flatnonzero((who < 0).any(axis=1))):
            keys = keys_for(key_of("strangers", self.seed), numbers[rows])
            drawn = shuffled(step, self.usable_identities, keys)
            new = ~(who[rows] == drawn[:, None]).any(axis=1)
            rows, drawn = rows[new], drawn[new]
            who[rows, (who[rows] < 0).argmax(axis=1)] = drawn
            self.missing_look_alikes += len(rows)
            step += 1
        return who

    def _add_look_alikes(self, who: NDArray[np.int64], table: Neighbours, keys: NDArray[np.uint64]) -> None:
        """Round after round each neighbourhood is offered one of its centre's row, in random order.

        It takes what is not in the batch yet; where two are offered the same in one round, the first has it.
        """
        centres, sizes = self._layout.centres, self._layout.sizes
        k = table.shape[1]
        order = keys_for(keys_for(keys[:, None], centres)[:, :, None], np.arange(k)).argsort(axis=2, kind="stable")
        offered = np.take_along_axis(table[who[:, centres]], order, axis=2)  # (batches, neighbourhoods, k)
        filled = np.zeros((len(who), len(centres)), dtype=np.int64)
        earlier = np.tri(len(centres), k=-1, dtype=bool)
        for column in range(k):
            now = offered[:, :, column]
            free = (now >= 0) & (filled < sizes) & ~(now[:, :, None] == who[:, None, :]).any(axis=2)
            taken_before = (now[:, :, None] == now[:, None, :]) & earlier & free[:, None, :]
            batch, hood = np.nonzero(free & ~taken_before.any(axis=2))
            filled[batch, hood] += 1
            who[batch, centres[hood] + filled[batch, hood]] = now[batch, hood]
            if (filled == sizes).all():
                break

    def _at(self, number: int) -> int:
        """From which batch on the table is in force that batch `number` is drawn from."""
        return max((at for at, _ in self._tables if at <= number), default=self._tables[0][0])

    def _needed(self) -> list[tuple[int, Neighbours | Future[ArrayLike]]]:
        """The tables from the start of the epoch that training is in, which may start again."""
        since = self._at(self.epoch * len(self))
        return [(at, table) for at, table in self._tables if at >= since]

    def _computed(self) -> list[int]:
        """From which batches on there are tables that are needed and could be computed; waits for those under way."""
        return [at for at, table in self._needed() if not isinstance(table, Future) or _came(table)]

    def _table(self, at: int) -> Neighbours:
        """The table in force from `at` on, waited for."""
        place = next(place for place, (begin, _) in enumerate(self._tables) if begin == at)
        table = self._tables[place][1]
        if isinstance(table, Future):
            table = self._checked(table.result())
            self._tables[place] = (at, table)
        return table

    def _rows(self, at: int) -> NDArray[np.int32]:
        """That table as the constructor takes it."""
        table = self._table(at)
        rows = np.full((self.table.num_identities, table.shape[1]), -1, dtype=np.int32)
        rows[self._usable] = np.where(table >= 0, self._usable[table], -1)
        return rows

    def _checked(self, neighbours: ArrayLike) -> Neighbours:
        """Rows of usable identities only, which name usable identities by their numbers."""
        identities = self.table.num_identities
        if isinstance(neighbours, torch.Tensor):
            neighbours = neighbours.detach().cpu().numpy()
        try:
            rows = np.asarray(neighbours)
        except ValueError:  # rows of different lengths, or a table with its cosines
            rows = np.empty(0)
        if hasattr(neighbours, "rows"):
            raise ValueError("neighbours must be the table alone: pass the `rows` of what found it.")
        if rows.dtype.kind not in "iu" or rows.ndim != 2 or rows.shape[0] != identities or rows.shape[1] < 1:
            raise ValueError(
                f"neighbours must be whole numbers of shape ({identities}, k): a row for each of the labels' "
                f"identities; found {rows.dtype} of shape {rows.shape}."
            )
        if rows.min() < -1 or rows.max() >= identities:
            raise ValueError(
                f"neighbours must name identities 0 to {identities - 1}, or -1 for none; found {rows.min()} to "
                f"{rows.max()}."
            )
        rows = rows[self._usable]
        numbers: Neighbours = np.where(rows >= 0, self._number_of[rows], np.int32(-1))
        return numbers


def _came(table: "Future[ArrayLike]") -> bool:
    """Whether it was computed, waited for."""
    wait([table])
    return not table.cancelled() and table.exception() is None


class _Layout:
    """Where in a batch of P identities the neighbourhoods are, and where strangers.

    mains: identities whose visit it is. main_slots: (mains,) where they stand.
    centres, sizes: (neighbourhoods,) the slot of each centre, and how many look-alikes stand behind it.
    """

    def __init__(self, per_batch: int, look_alikes: int, neighbourhood: int) -> None:
        self.mains = per_batch - look_alikes
        centres = -(-look_alikes // (neighbourhood - 1))
        if centres > self.mains or self.mains < 1:
            least = -(-look_alikes // self.mains) + 1 if self.mains else per_batch
            raise ValueError(
                f"{look_alikes} look-alikes in a batch of {per_batch} identities leave {self.mains} for centres and "
                f"strangers; neighbourhoods of {neighbourhood} need {centres}. "
                + (f"Make neighbourhood at least {least}, or lower" if self.mains else "Lower")
                + " look_alike_share."
            )
        cuts = np.arange(centres + 1)
        self.sizes = np.diff(cuts * look_alikes // max(centres, 1))
        strangers = np.diff(cuts * (self.mains - centres) // max(centres, 1))
        self.centres = np.cumsum(1 + self.sizes + strangers) - (1 + self.sizes + strangers)
        behind = self.centres[:, None] + np.arange(per_batch)
        look_alike = behind[(behind > self.centres[:, None]) & (behind <= (self.centres + self.sizes)[:, None])]
        self.main_slots = np.setdiff1d(np.arange(per_batch), look_alike)
