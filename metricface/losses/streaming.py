"""Sums over every pair or triplet of a batch, with their gradient, in memory that does not grow with their number.

Tile after tile of anchors meets block after block of references (metricface.miners.tiles). A loss looks at a block's
distances while they are in the cache and says what each of them adds to its sum and to its derivative; the derivative
goes into the embeddings' gradient by two matrix products, and the block is forgotten. So nothing is kept for the
backward pass and nothing is computed twice. A step needs the block's own rows and labels, the batch's centre, and what
its tile remembers between blocks, which is as wide as the tile's positives: once ranks have exchanged centre and
positives, blocks may come from them one by one.

The products are those of rows around the batch's centre; pairs so close together that they would round the distance
are subtracted instead, in value and in gradient.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metricface.distances import without_autocast
from metricface.miners.tiles import ROW_NUMBERS, Block, References, Tile, exclude_same
from metricface.tuples import Batch

# A squared distance below this many times the rounding of the rows' squared lengths is taken from their difference.
CLOSE = 256


class Distances(NamedTuple):
    """A tile's distances to a block of references, in the loss's own units, and room to work in."""

    block: Block
    dist: Tensor  # (b, C), +inf where not a negative
    by_dist: Tensor  # (b, C), for the loss to fill: the derivative of its sum with respect to `dist`
    work: Tensor  # (b, C), free to use

    def sum_of_negatives(self, tile: Tile) -> Tensor:
        """(b,) sums of the distances to negatives. Overwrites `work`."""
        labels = _references(self.block).labels
        finite = self.work.copy_(self.dist)
        exclude_same(finite, tile, self.block.start, labels, 0.0)
        return finite[:, : len(labels)].sum(dim=1)


class Close(NamedTuple):
    """Places in a block, (n,) each, whose distance was taken from the rows' difference."""

    row: Tensor
    column: Tensor


class Gradients:
    """The gradient of a sum with respect to embeddings and references, added up tile by tile.

    squared: whether the loss's distances are squared. wanted: whose gradient is asked for, (embeddings, references).
    """

    def __init__(self, batch: Batch, *, squared: bool, wanted: tuple[bool, bool]) -> None:
        self.squared = squared
        self.wanted = wanted
        self._shared = batch.embeddings is batch.ref_emb
        self.embeddings = torch.zeros_like(batch.embeddings) if wanted[0] else None
        self.references = torch.zeros_like(batch.ref_emb) if wanted[1] and not self._shared else None
        self._buffers: dict[str, Tensor] = {}

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """For embeddings and references; where they are one tensor, all of it for the embeddings."""
        return self.embeddings, self.references

    def distances(self, sq_dist: Tensor) -> Tensor:
        """Squared distances in the loss's own units."""
        return sq_dist if self.squared else sq_dist.sqrt()

    def blocks(self, tile: Tile) -> Iterator[Distances]:
        """A tile's distances to all references, block after block; after each its `by_dist` goes into the gradient."""
        x = tile.plan.queries.index_select(0, tile.anchors) - tile.plan.centre  # (b, D)
        sq_norms = x.square().sum(dim=1)  # (b,)
        for block in tile.blocks():
            close = _subtract_close(tile, block, sq_norms)
            dist = block.sq_negative if self.squared else block.sq_negative.sqrt_()
            distances = Distances(block, dist, self._room("by_dist", dist), self._room("work", dist))
            yield distances
            if any(self.wanted):
                self._add_block(tile, x, distances, close)

    def add_pairs(self, tile: Tile, columns: Tensor, dist: Tensor, by_dist: Tensor) -> None:
        """Pairs of a tile's anchors with the references `columns`, and d sum / d dist: (b, m) each."""
        if not any(self.wanted):
            return
        scale = self._scale(dist, by_dist)
        x, y = tile.plan.queries.index_select(0, tile.anchors), tile.plan.references.rows
        at_once = max(1, ROW_NUMBERS // max(1, x.numel()))
        for first in range(0, columns.shape[1], at_once):
            some = columns[:, first : first + at_once]
            others = y.index_select(0, some.reshape(-1)).view(*some.shape, -1)  # (b, m, D)
            part = (x[:, None] - others).mul_(scale[:, first : first + at_once, None])
            self._add_rows(tile.anchors, part.sum(dim=1), self.embeddings)
            self._subtract_from_references(some.reshape(-1), part.flatten(0, 1))

    def _scale(self, dist: Tensor, by_dist: Tensor) -> Tensor:
        """What x - y is to be multiplied with: d|x - y|^2 = 2 (x - y), d|x - y| = (x - y) / |x - y|, and 0 at 0."""
        return 2.0 * by_dist if self.squared else torch.where(dist > 0, by_dist / dist, 0.0)

    def _room(self, name: str, like: Tensor) -> Tensor:
        if name not in self._buffers or self._buffers[name].numel() < like.numel():
            self._buffers[name] = like.new_empty(like.numel())
        return self._buffers[name][: like.numel()].view(like.shape)

    def _add_block(self, tile: Tile, x: Tensor, distances: Distances, close: Close | None) -> None:
        block, dist, by_dist, _ = distances
        references = _references(block)
        if close is not None:
            row, column = close
            self._add_close(tile, block, close, dist[row, column], by_dist[row, column])
            by_dist[row, column] = 0.0
            by_dist.masked_fill_(dist == 0, 0.0)
            dist.masked_fill_(dist == 0, 1.0)
        scale = 2.0 if self.squared else 1.0
        if not self.squared:
            by_dist.div_(dist)
        y = references.moved[:, : x.shape[1]]  # (c, D)
        by_dist = by_dist[:, : len(y)]  # without padding
        with without_autocast(x):
            if self.embeddings is not None:
                part = torch.addmm(x * by_dist.sum(dim=1, keepdim=True), by_dist, y, alpha=-1.0)
                self._add_rows(tile.anchors, part * scale, self.embeddings)
            into = self.embeddings if self._shared else self.references
            if into is not None:
                some = into[block.start : block.start + len(y)]
                some.addcmul_(y, by_dist.sum(dim=0)[:, None], value=scale).addmm_(by_dist.T, x, alpha=-scale)

    def _add_close(self, tile: Tile, block: Block, close: Close, dist: Tensor, by_dist: Tensor) -> None:
        scale = self._scale(dist, by_dist)
        for some in _slices(len(close.row), tile.plan.queries.shape[1]):
            part = _difference(tile, block, close.row[some], close.column[some]).mul_(scale[some, None])
            self._add_rows(tile.anchors[close.row[some]], part, self.embeddings)
            self._subtract_from_references(close.column[some] + block.start, part)

    def _add_rows(self, rows: Tensor, part: Tensor, into: Tensor | None) -> None:
        if into is not None:
            into.index_add_(0, rows, part)

    def _subtract_from_references(self, columns: Tensor, part: Tensor) -> None:
        self._add_rows(columns, part.neg_(), self.embeddings if self._shared else self.references)


def _subtract_close(tile: Tile, block: Block, sq_norms: Tensor) -> Close | None:
    """Replace the squared distances that the product has rounded by more than about 1%; say where.

    None where no distance is near 0. Where both rows are the centre itself the product is exact: 0.
    """
    sq_dist, y_sq_norms = block.sq_negative, _references(block).moved[:, -2]  # (b, C), (c,)
    limit = CLOSE * torch.finfo(sq_dist.dtype).eps
    near = sq_dist.amin(dim=1) <= limit * (sq_norms + y_sq_norms.amax())
    if not bool(near.any()):
        return None
    rows = near.nonzero()[:, 0]
    some = sq_dist[rows, : len(y_sq_norms)]
    both = sq_norms[rows, None] + y_sq_norms  # (n, 1) + (c,)
    row, column = ((some <= limit * both) & (both > 0)).nonzero(as_tuple=True)
    row = rows[row]
    for part in _slices(len(row), tile.plan.queries.shape[1]):
        difference = _difference(tile, block, row[part], column[part])
        sq_dist[row[part], column[part]] = difference.square_().sum(dim=1)
    return Close(row, column)


def _difference(tile: Tile, block: Block, row: Tensor, column: Tensor) -> Tensor:
    """(n, D) rows of a tile's anchors minus rows of a block's references."""
    return tile.plan.queries.index_select(0, tile.anchors[row]) - _references(block).rows.index_select(0, column)


def _references(block: Block) -> References:
    assert block.references is not None  # a tile's own blocks have them
    return block.references


def _slices(number: int, dim: int) -> list[slice]:
    """Runs of rows whose copies stay small."""
    size = max(1, ROW_NUMBERS // max(1, dim))
    return [slice(start, start + size) for start in range(0, number, size)]


class Totals(NamedTuple):
    """What a pass over a batch comes to: the sum, its derivative with respect to `extra`, and anything else found."""

    total: Tensor  # 0-dim
    by_extra: Tensor | None
    found: Any


def streamed(
    batch: Batch, run: Callable[[Gradients], Totals], *, squared: bool, extra: Tensor | None = None
) -> tuple[Tensor, Any]:
    """The sum that `run` adds up, 0-dim and differentiable, and what else it found.

    run: makes one pass and gives its gradients to what it is called with. extra: another tensor that the sum depends
    on. Gradients flow to the batch's embeddings and references, and to `extra`; they have none themselves, and asking
    for a graph of them (create_graph=True) is a RuntimeError.
    """
    tensors = (batch.embeddings, batch.ref_emb, *(() if extra is None else (extra,)))
    # Asked here because inside a Function gradients are always off.
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors)
    box: list[Any] = []
    with without_autocast(batch.embeddings):
        total = _Streamed.apply(batch, run, squared, wanted, box, *tensors)  # type: ignore[no-untyped-call]
    return total, box[0]


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        batch: Batch,
        run: Callable[[Gradients], Totals],
        squared: bool,
        wanted: tuple[bool, ...],
        box: list[Any],
        *tensors: Tensor,
    ) -> Tensor:
        gradients = Gradients(batch, squared=squared, wanted=(wanted[0], wanted[1]))
        totals = run(gradients)
        box.append(totals.found)
        found = [*gradients.result(), totals.by_extra][: len(tensors)]
        ctx.wanted = [want and grad is not None for want, grad in zip(wanted, found, strict=True)]
        ctx.save_for_backward(*(grad for grad, want in zip(found, ctx.wanted, strict=True) if want))
        return totals.total.to(batch.embeddings.dtype)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the gradients that were kept are numbers: a second derivative would be 0
            raise RuntimeError(
                "A loss over every pair or triplet can be differentiated only once; found create_graph=True. Use a "
                "miner and a loss on its tuples, which can be differentiated twice."
            )
        saved = iter(ctx.saved_tensors)
        return None, None, None, None, None, *(next(saved) * grad_total if want else None for want in ctx.wanted)
