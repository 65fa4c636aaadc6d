"""Tiles: a few hundred anchors against block after block of references, as squared Euclidean distances.

The one way from a checked batch to its distances, whether the references are the batch, a memory or other ranks'
embeddings: made block by block, never all at once. References that are no negatives of an anchor (its identity, itself,
padding) stand at +inf in its row, so that what looks at a block needs no mask.

A block is made by a matrix product that adds the rows' lengths too, and read a few times while it is in the cache. On a
CPU the cost is then the product plus vectorised passes. Of 67 million distances (8,192 squared, D = 128; ms on 2
cores): product 115 to 190, a sum or a minimum 3, a comparison to floats 5, square roots 15, logarithm or exponential
40, a masked fill 100. So nothing is sorted, masked or compared to booleans here.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from metricface.choices import is_count
from metricface.distances import Distance, centre, unit_rows, without_autocast
from metricface.identities import Identities, own_references
from metricface.tuples import Batch

# A block's columns are padded to whole runs, which minima and sums are first made of.
RUN = 64

# Numbers in a block: 2 MiB in float32 for a CPU's caches, 256 MiB to fill a GPU.
CPU_BLOCK = 1 << 19
GPU_BLOCK = 1 << 26
# Where a block has to hold whole rows: 128 rows of 8,192 on a CPU.
CPU_WHOLE_ROWS = 1 << 20
# Rows and columns in a block, where there are so many: on a CPU a third faster than 64 whole rows of 8,192.
CPU_ROWS = 512
GPU_ROWS = 8192
# Fewer rows than this make the matrix product slow, however many columns there are.
FEWEST_ROWS = 64
# A squared distance made by a product is off by up to 6 (measured, D = 8 to 2048) times machine epsilon times the sum
# of both squared lengths.
ROUNDING = 8.0
# Numbers in a copy of rows that are subtracted from each other.
ROW_NUMBERS = 1 << 20


class References(NamedTuple):
    """A run of references and what goes with it: all that is needed of them once a tile knows its positives."""

    rows: Tensor  # (c, D)
    moved: Tensor  # (c, D + 2) rows around the centre, their squared lengths, 1
    labels: Tensor  # (c,)

    def part(self, start: int, number: int) -> "References":
        """Some of them."""
        return References(*(column[start : start + number] for column in self))


class Block(NamedTuple):
    """Squared distances of a tile's anchors to the references from `start` on."""

    start: int
    sq_negative: Tensor  # (b, C), C a multiple of RUN: +inf where not a negative. Free to overwrite.
    references: References | None = None  # C of them, without padding; None where each anchor has its own


class Tile(NamedTuple):
    """Some anchors, their own identity, and their positives in it; the anchors with most positives come first.

    `same` lists the references of an anchor's identity, itself included, `positive` those that are not itself, both
    ascending. N and M are the most that an anchor of the tile has; others are filled up with other references, where
    `is_same` and `is_positive` are False.
    """

    anchors: Tensor  # (b,) int64 rows of the embeddings
    same: Tensor  # (b, N) int64 rows of the references
    is_same: Tensor  # (b, N) bool
    positive: Tensor  # (b, M) int64 rows of the references
    is_positive: Tensor  # (b, M) bool
    depths: list[int]  # M numbers: how many anchors, from the first on, have a positive in that column
    pair: Tensor  # (b, M) int64, the positive pair's number in row order; any valid number where there is none
    sq_positive: Tensor  # (b, M) squared distances to `positive`, of rows subtracted from each other
    rounding: Tensor  # (b, 1) how far the product may be off: what differs by less than this is a tie
    plan: "Plan"

    def blocks(self) -> Iterator[Block]:
        """The squared distances to all references, block after block; each block's memory is used for the next."""
        plan = self.plan
        queries = _with_lengths(plan.queries.index_select(0, self.anchors) - plan.centre, -2.0)  # (b, D + 2)
        for start in range(0, len(plan.references.rows), plan.columns):
            references = plan.references.part(start, plan.columns)
            number = len(references.rows)
            padded = -(-number // RUN) * RUN
            values = plan.buffer[: len(self.anchors) * padded].view(len(self.anchors), padded)
            with without_autocast(queries):
                torch.mm(queries, references.moved.T, out=values[:, :number])
            values.clamp_min_(0.0)
            values[:, number:] = torch.inf
            exclude_same(values, self, start, references.labels)
            yield Block(start, values, references)

    def sq_distances(self, columns: Tensor) -> Tensor:
        """(b, m) squared distances to the references `columns` (b, m), of rows subtracted from each other."""
        rows = self.plan.queries.index_select(0, self.anchors)
        return subtracted(rows, self.plan.references.rows, columns)


class Plan(NamedTuple):
    """What all tiles of a batch share."""

    queries: Tensor  # (B, D), unit rows for cosine distance
    labels: Tensor  # (B,)
    references: References  # R of them
    centre: Tensor  # (D,)
    longest: Tensor  # 0-dim: the largest squared length of a moved reference
    rows: int  # anchors in a tile
    columns: int  # references in a block
    buffer: Tensor  # (numbers in a block,)


def block_shape(
    references: int, device: torch.device, tile_rows: int | None = None, *, whole_rows: bool = False
) -> tuple[int, int]:
    """Anchors and references in a block: as many as fit the cache, or as many as keep a GPU busy.

    whole_rows: all references in one block, for what has to see a row at once.
    """
    numbers, rows = (CPU_BLOCK, CPU_ROWS) if device.type == "cpu" else (GPU_BLOCK, GPU_ROWS)
    if whole_rows:
        numbers = CPU_WHOLE_ROWS if device.type == "cpu" else GPU_BLOCK
        return tile_rows or max(FEWEST_ROWS, numbers // max(1, references)), max(1, references)
    padded = max(1, -(-references // RUN)) * RUN
    rows = tile_rows or max(rows, numbers // padded)
    return rows, min(padded, max(1, numbers // rows // RUN) * RUN)


def check_tile_rows(tile_rows: int | None) -> None:
    """Raise ValueError unless it is None or a count."""
    if tile_rows is not None and not is_count(tile_rows):
        raise ValueError(
            f"tile_rows must be a whole number, at least 1, or None to choose by size and device; found {tile_rows!r}."
        )


def tiles(
    batch: Batch,
    identities: Identities,
    distance: Distance,
    anchors: Tensor | None = None,
    *,
    tile_rows: int | None = None,
    whole_rows: bool = False,
) -> Iterator[Tile]:
    """The anchors, `tile_rows` at a time: from those with most positives to those with fewest, else in order.

    anchors: (A,) int64, which rows of the embeddings; by default those that have a positive and a negative. That most
    positives come first makes an identity that is much larger than the others work for its own anchors only.
    """
    if anchors is None:
        anchors = ((identities.positives > 0) & (identities.negatives > 0)).nonzero()[:, 0]
    anchors = anchors[identities.positives[anchors].argsort(descending=True, stable=True)]
    positives, sizes = torch.stack([identities.positives[anchors], identities.size[anchors]]).tolist()
    if not sizes or not len(batch.ref_emb):
        return
    plan = _plan(batch, distance, len(sizes), tile_rows, whole_rows)
    for start in range(0, len(sizes), plan.rows):
        some = slice(start, start + plan.rows)
        yield _tile(anchors[some], max(sizes[some]), _depths(positives[some]), batch, identities, plan)


def _plan(batch: Batch, distance: Distance, anchors: int, tile_rows: int | None, whole_rows: bool) -> Plan:
    queries, references = batch.embeddings, batch.ref_emb
    if distance == "cosine":
        queries, references = for_cosine(queries, references)
    origin = centre(references)
    rows, columns = block_shape(len(references), queries.device, tile_rows, whole_rows=whole_rows)
    widest = -(-min(columns, len(references)) // RUN) * RUN
    moved = _with_lengths(references - origin, 1.0, lengths_first=True)
    return Plan(
        queries,
        batch.labels.long(),
        References(references, moved, batch.ref_labels.long()),
        origin,
        moved[:, -2].amax(),
        rows,
        columns,
        references.new_empty(min(rows, anchors) * widest),
    )


def for_cosine(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, D), (R, D) -> (Q, D + 2), (R, D + 2): rows whose squared distances are twice the cosine distances.

    Unit rows, but a zero row has cosine 0 with every row, so its squared distance has to be 2, also to a zero row: it
    gets a 1 in a place of its own side.
    """
    unit = [unit_rows(x), unit_rows(y)]
    is_zero = [(rows == 0).all(dim=1, keepdim=True).to(rows.dtype) for rows in unit]
    nothing = [torch.zeros_like(column) for column in is_zero]
    return torch.cat([unit[0], is_zero[0], nothing[0]], dim=1), torch.cat([unit[1], nothing[1], is_zero[1]], dim=1)


def _with_lengths(rows: Tensor, factor: float, *, lengths_first: bool = False) -> Tensor:
    """(N, D) -> (N, D + 2): factor x rows, then 1 and their squared lengths, or the reverse.

    The product of rows with factor -2 and of rows with factor 1 and lengths first is their squared distances.
    """
    number, dim = rows.shape
    made = rows.new_ones(number, dim + 2)
    torch.mul(rows, factor, out=made[:, :dim])
    torch.sum(rows.square(), dim=1, out=made[:, dim if lengths_first else dim + 1])
    return made


def _depths(numbers: Sequence[int]) -> list[int]:
    """For each number below the first one, how many numbers exceed it. numbers: descending."""
    depths, rows = [], len(numbers)
    for number in range(numbers[0]):
        while numbers[rows - 1] <= number:
            rows -= 1
        depths.append(rows)
    return depths


def _tile(anchors: Tensor, largest: int, depths: list[int], batch: Batch, identities: Identities, plan: Plan) -> Tile:
    """largest: references of the largest identity in the tile."""
    own = own_references(batch, identities, anchors, largest, len(depths))
    number = identities.first_pair[anchors, None] + torch.arange(len(depths), device=anchors.device)  # (b, 1) + (M,)
    pair = torch.where(own.is_positive, number, 0)
    rows = plan.queries.index_select(0, anchors)
    sq_positive = subtracted(rows, plan.references.rows, own.positive, depths)
    rounding = rounding_of((rows - plan.centre).square_().sum(dim=1, keepdim=True) + plan.longest)
    return Tile(anchors, *own, depths, pair, sq_positive, rounding, plan)


def rounding_of(sq_lengths: Tensor) -> Tensor:
    """How far a squared distance made by a product may be off; sq_lengths: of both rows together, any shape."""
    return ROUNDING * torch.finfo(sq_lengths.dtype).eps * sq_lengths


def subtracted(x: Tensor, y: Tensor, columns: Tensor, depths: Sequence[int] | None = None) -> Tensor:
    """Squared distances of x's rows (b, D) to the rows `columns` (b, m) of y (R, D): exactly 0 for equal rows.

    depths: for each column, how many rows, from the first on, matter; the others are 0.
    """
    rows, number = columns.shape
    sq_dist = x.new_zeros(rows, number)
    at_once = max(1, ROW_NUMBERS // max(1, x.numel()))
    for first in range(0, number, at_once):
        deep = rows if depths is None else depths[first]
        some = columns[:deep, first : first + at_once]
        others = y.index_select(0, some.reshape(-1)).view(*some.shape, -1)  # (deep, at_once, D)
        sq_dist[:deep, first : first + at_once] = (others - x[:deep, None]).square_().sum(dim=2)
    return sq_dist


def candidates(tile: Tile, columns: Tensor) -> Block:
    """Squared distances of a tile's anchors to references of their own each: what a search found, for instance.

    columns: (b, k) int64 reference rows, -1 for none. Returns a block like any other, its columns being places in
    `columns` and its start 0: +inf at the anchor's own identity, where there is none, and in the padding.
    """
    own = tile.plan.references.labels[columns.clamp_min(0)] == tile.plan.labels[tile.anchors, None]
    sq_dist = tile.sq_distances(columns.clamp_min(0)).masked_fill_(own | (columns < 0), torch.inf)
    padding = -columns.shape[1] % RUN if columns.shape[1] else RUN
    return Block(0, pad(sq_dist, (0, padding), value=torch.inf))


def exclude_same(values: Tensor, tile: Tile, start: int, ref_labels: Tensor, value: float = torch.inf) -> None:
    """Write `value`, +inf or 0, over each anchor's own identity in a block (b, C) of numbers >= 0 from `start` on.

    ref_labels: (c,) those of the block.
    """
    width, most = values.shape[1], tile.same.shape[1]
    if 4 * most > width:  # so many that finding their places costs more than comparing all labels
        own = tile.plan.labels[tile.anchors, None] == ref_labels  # (b, 1) == (C,)
        values[:, : len(ref_labels)].masked_fill_(own, value)
    elif most:
        place = tile.same - start  # (b, M)
        inside = tile.is_same & (place >= 0) & (place < width)
        # Where the place lies in another block, what is there has to win: two writes may meet in one place.
        weakest = -value if value else torch.inf
        written = torch.where(inside, value, weakest).to(values.dtype)
        values.scatter_reduce_(1, place.clamp(0, width - 1), written, "amax" if value else "amin")
