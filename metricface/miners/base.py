"""What miners share: a checked batch in, index tuples out, and counts of what was left out and why."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from metricface.choices import is_count
from metricface.identities import Identities, find_identities
from metricface.miners.tiles import Tile, check_tile_rows
from metricface.tuples import Batch, Pairs, Triplets, check_batch

Tuples = TypeVar("Tuples", Triplets, Pairs)


class MiningCounts(NamedTuple):
    """What a miner found in its last batch, and what it left out and why: 0-dim int64 tensors on the batch's device.

    "Pairs" are the positive pairs for which a negative was looked for: all ordered ones, or one an anchor (batch-hard,
    easy positive). triplets = pairs - pairs_without_candidate, plus those that a fallback found, minus those beyond
    `max_triplets`, where a miner forms one triplet a pair; a miner that forms several has more.
    """

    anchors: Tensor  # rows of the batch
    anchors_without_positive: Tensor
    anchors_without_negative: Tensor
    pairs: Tensor
    pairs_without_candidate: Tensor  # no negative at all, or none that the miner's rule allows
    triplets: Tensor
    left_out: Tensor  # triplets that the rule allows, beyond max_triplets


class PairCounts(NamedTuple):
    """What a pair miner found in its last batch: 0-dim int64 tensors on the batch's device."""

    anchors: Tensor  # rows of the batch
    anchors_without_positive: Tensor
    anchors_without_negative: Tensor
    positive_pairs: Tensor  # all ordered ones
    negative_pairs: Tensor
    positives: Tensor  # pairs that were chosen
    negatives: Tensor
    left_out: Tensor  # negative pairs that the rule allows, beyond max_pairs


class Chosen(NamedTuple):
    """What a miner chose: triplets, pairs it looked at, pairs that its rule left without a negative (0-dim)."""

    triplets: Triplets
    pairs: Tensor
    pairs_without_candidate: Tensor
    left_out: int = 0


class Miner(nn.Module, ABC, Generic[Tuples]):
    """What all miners do with a batch before and after they choose. No gradient is kept."""

    def __init__(self, *, normalize: bool, tile_rows: int | None = None) -> None:
        super().__init__()
        check_tile_rows(tile_rows)
        self.normalize = normalize
        self.tile_rows = tile_rows

    @torch.no_grad()
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        self_index: Tensor | None = None,
    ) -> Tuples:
        """Choose triplets, or pairs.

        embeddings: (B, D) floating; labels: (B,) integers of any type and value. Positives and negatives come from
        the batch itself or, where given, from ref_emb (R, D) with ref_labels (R,). self_index: (B,) which reference
        row is the anchor itself (-1: none), so that it is not its own positive; without references it is known. This
        also holds where ref_emb is the batch once more: miner(E, l, E, l) takes an anchor as its own positive.
        (pytorch-metric-learning leaves it out if ref_labels is the very object labels, and takes it in a clone.)
        Returns index tensors, int64, anchors ascending, maybe empty: Triplets, (T,) each, or Pairs, (P,) and (N,).
        `self.last` then has the counts. Raises ValueError for wrong shapes, types and ranges, and for NaN or infinity
        in embeddings.
        """
        batch = check_batch(embeddings, labels, ref_emb, ref_labels, self_index, normalize=self.normalize)
        return self.mine_batch(batch, find_identities(batch))

    @abstractmethod
    def mine_batch(self, batch: Batch, identities: Identities) -> Tuples:
        """Choose from a checked batch, and set `last`."""


class TripletMiner(Miner[Triplets]):
    """A miner of triplets."""

    last: MiningCounts | None = None

    def mine_batch(self, batch: Batch, identities: Identities) -> Triplets:
        """Choose triplets from a checked batch, and count."""
        chosen = self._choose(batch, identities)
        self.last = MiningCounts(
            anchors=identities.size.new_full((), len(batch.labels)),
            anchors_without_positive=(identities.positives == 0).sum(),
            anchors_without_negative=(identities.negatives == 0).sum(),
            pairs=chosen.pairs,
            pairs_without_candidate=chosen.pairs_without_candidate,
            triplets=identities.size.new_full((), len(chosen.triplets.anchor)),
            left_out=identities.size.new_full((), chosen.left_out),
        )
        return chosen.triplets

    @abstractmethod
    def _choose(self, batch: Batch, identities: Identities) -> Chosen:
        """Choose triplets from a checked batch."""


class Sample:
    """A uniform sample, without replacement, of rows that arrive bit by bit; without a limit, all of them.

    Every row gets a random key as it arrives; the rows with the smallest keys stay. Memory is that of twice the limit,
    of a million rows and of the last arrivals. `seen` counts all rows.
    """

    def __init__(self, limit: int | None, generator: torch.Generator | None) -> None:
        self.limit = limit
        self.generator = generator
        self.seen = 0
        self._keys: list[Tensor] = []
        self._columns: list[tuple[Tensor, ...]] = []

    def add(self, *columns: Tensor) -> None:
        """Rows as columns, (n,) each."""
        self.seen += len(columns[0])
        self._columns.append(columns)
        if self.limit is not None:
            self._keys.append(uniform(len(columns[0]), columns[0].device, self.generator))
            if sum(len(keys) for keys in self._keys) > 2 * self.limit + (1 << 20):
                self._prune(self.limit)

    def rows(self, empty: Tensor, number: int) -> list[Tensor]:
        """The `number` columns of what stayed, sorted by the first, else in order of arrival. empty: (0,) int64."""
        if self.limit is not None and self.seen > self.limit:
            self._prune(self.limit)
        return joined([[empty] * number, *self._columns])

    @property
    def left_out(self) -> int:
        """How many rows did not stay."""
        return 0 if self.limit is None else max(0, self.seen - self.limit)

    def _prune(self, limit: int) -> None:
        keys = torch.cat(self._keys)
        if len(keys) <= limit:
            return
        kept = keys.topk(limit, largest=False).indices.sort().values
        width = len(self._columns[0])
        self._columns = [tuple(torch.cat([part[i] for part in self._columns])[kept] for i in range(width))]
        self._keys = [keys[kept]]


def check_limit(name: str, limit: int | None) -> None:
    """Raise ValueError unless `limit` is None or a count."""
    if limit is not None and not is_count(limit):
        raise ValueError(f"{name} must be a whole number, at least 1, or None for no limit; found {limit!r}.")


def check_unit(batch: Batch) -> None:
    """Raise ValueError unless all rows are of length 1, within 1%."""
    for rows, name in ((batch.embeddings, "embeddings"), (batch.ref_emb, "ref_emb")):
        lengths = rows.square().sum(dim=1).sqrt()
        wrong = ((lengths - 1.0).abs() > 0.01).nonzero()[:, 0]  # bfloat16 rounds a length by up to 0.4%
        if len(wrong):
            raise ValueError(
                f"{len(wrong)} of {len(rows)} rows of {name} are not of length 1 (first: row {int(wrong[0])}, length "
                f"{float(lengths[wrong[0]]):.3g}). Pass unit rows, or leave normalize=True."
            )


def uniform(number: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """(number,) float64 in [0, 1)."""
    drawn_on = device if generator is None else generator.device
    return torch.rand(number, dtype=torch.float64, device=drawn_on, generator=generator).to(device)


def for_each_pair(batch: Batch, identities: Identities, generator: torch.Generator | None) -> Tensor:
    """A number in [0, 1) for each positive pair in row order, so that tiles do not change the draws: (P,) float64."""
    return uniform(identities.pairs, batch.labels.device, generator)


def picked(tile: Tile, negative: Tensor, wanted: Tensor) -> Triplets:
    """Triplets of the pairs of a tile that are wanted. negative, wanted: (b, M)."""
    row, place = wanted.nonzero(as_tuple=True)
    return Triplets(tile.anchors[row], tile.positive[row, place], negative[row, place])


def joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The columns of all parts (at least one), sorted by the first column, else in order."""
    columns = [torch.cat(part) for part in zip(*parts, strict=True)]
    order = columns[0].argsort(stable=True)  # positives of an anchor stay ascending
    return [column[order] for column in columns]


def triplets_of(parts: Sequence[Triplets], batch: Batch) -> Triplets:
    """The triplets of all tiles, anchors ascending."""
    empty = batch.labels.new_empty(0, dtype=torch.long)
    return Triplets(*joined([[empty] * 3, *parts]))
