"""Sums over the products of each row with many others, block after block, with their exact gradient.

Every margin-softmax loss is softplus(N - t): N the log-sum-exp of a row's logits for the classes that are not its own,
t the logit of its own class. Margins touch t alone, so N is the one thing whose cost grows with the number of classes.
Here a block of classes meets a tile of rows, is read while it lies in the cache (a running maximum and a running sum),
and is forgotten; the backward pass makes it once more. So no (B, C) tensor is ever held. With `hold` the products are
kept, B x C numbers, and the backward pass has one matrix product less to do. Classes of length 1 are never copied:
products are divided by the classes' lengths.

Losses over negatives of a batch (N-pair, angular) are the same sum over references in place of classes.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from metricface.distances import without_autocast

# Numbers in a block of products: 2 MiB in float32 for a CPU's caches, 32 MiB on a GPU.
CPU_BLOCK = 1 << 19
GPU_BLOCK = 1 << 23
CPU_ROWS = 512
GPU_ROWS = 2048
# exp(-60) is below the rounding of 1 + exp(-60) x 10^6; exp of less, and arithmetic on it, is 10 times slower on a CPU.
LEAST_EXPONENT = -60.0

Reduction = Literal["logsumexp", "sum"]
# (b, c x group) products and (b, 1) products with the own references, then further tensors -> (b, c).
Transform = Callable[..., Tensor]


class Others(NamedTuple):
    """Of each row, (B,) each; all but `best` have a gradient."""

    reduced: Tensor  # log-sum-exp or sum over the others; -inf or 0 where there is none
    own: Tensor  # product with its own reference
    own_length: Tensor  # length of that reference
    best: Tensor  # largest product with another, before the transform; -inf where there is none


class _Plan(NamedTuple):
    left_out: Tensor  # (B, N) int64 columns (of groups), -1 for none
    rows: Tensor | None  # (B,) int64 own references
    unit: bool
    group: int
    transform: Transform | None
    reduction: Reduction
    hold: bool
    number: int  # references
    tile: int  # rows at a time
    columns: int  # references at a time


def reduce_others(
    queries: Tensor,
    references: Tensor,
    left_out: Tensor,
    rows: Tensor | None,
    *,
    unit_references: bool = False,
    bias: Tensor | None = None,
    group: int = 1,
    own: Tensor | None = None,
    transform: Transform | None = None,
    extra: tuple[Tensor, ...] = (),
    reduction: Reduction = "logsumexp",
    hold: bool = False,
) -> Others:
    """Reduce each row's products with all references but some, and give the product with its own one.

    queries: (B, D); references: (R, D), both of the same full precision. left_out: (B, N) int64 columns that are not
    summed, -1 for none. rows: (B,) int64, each row's own reference, -1 for none (own and own_length are then 0; R must
    not be); or None and `own`, (B,) products with own references that lie elsewhere. unit_references: divide by the
    references' lengths (a reference of length 0 has product 0). bias: (R,) added to the products, not together with
    unit_references.
    group: references of a column, one after the other (sub-centres); only a `transform` can reduce them to one.
    transform: what is summed, as a differentiable function of (b, c x group) products, (b, 1) own products and `extra`;
    it returns (b, c). The backward pass calls it again, so it must not look at anything that changes in between. N must
    then be 1. reduction: over the columns. hold: keep the products for the backward pass.
    Gradients flow to queries, references, bias, own and extra, once (create_graph=True is a RuntimeError).
    """
    assert bias is None or not unit_references
    assert (rows is None) == (own is not None)
    assert transform is None or left_out.shape[1] == 1
    return _call(
        queries, references, left_out, rows, unit_references, bias, own, group, transform, extra, reduction, hold
    )


def others_logsumexp(queries: Tensor, references: Tensor, left_out: Tensor) -> Tensor:
    """Log-sum-exp of q.r over each row's references but some, streamed.

    queries: (Q, D), references: (R, D), in full precision; left_out: (Q, N) int64 columns, -1 for none. Returns (Q,),
    -inf where nothing is left; gradients flow to both, once.
    """
    return _call(queries, references, left_out, None, False, None, None, 1, None, (), "logsumexp", False).reduced


@torch.no_grad()
def nearest_others(
    queries: Tensor, references: Tensor, left_out: Tensor, k: int, *, unit_references: bool = False
) -> Tensor:
    """The k references with the largest products with each row, but some, streamed.

    queries, references, left_out, unit_references: as in reduce_others. Returns (B, min(k, R)) int64 references,
    largest product first; -1 where fewer are left.
    """
    plan = _plan(queries, references, left_out, None, unit_references, 1, None, "sum", False)
    best = queries.new_full((len(queries), min(k, len(references))), -torch.inf)
    column = torch.full_like(best, -1, dtype=torch.long)
    with without_autocast(queries):
        inverse = inverse_lengths(references) if unit_references else None
        everything = _Products(plan, queries, references, None, inverse)
        for block in everything.blocks():
            for part in everything.parts(block):
                _write(part.products, part.place, -torch.inf)
                top = part.products.topk(min(best.shape[1], part.products.shape[1]), dim=1)
                values = torch.cat([best[part.rows], top.values], dim=1)
                columns = torch.cat([column[part.rows], top.indices + block.start], dim=1)
                best[part.rows], place = values.topk(best.shape[1], dim=1)
                column[part.rows] = columns.gather(1, place)
    return torch.where(best != -torch.inf, column, -1)


def _plan(
    queries: Tensor,
    references: Tensor,
    left_out: Tensor,
    rows: Tensor | None,
    unit: bool,
    group: int,
    transform: Transform | None,
    reduction: Reduction,
    hold: bool,
) -> _Plan:
    on_cpu = queries.device.type == "cpu"
    tile = min(max(1, len(queries)), CPU_ROWS if on_cpu else GPU_ROWS)
    columns = max(1, (CPU_BLOCK if on_cpu else GPU_BLOCK) // tile // group) * group
    return _Plan(left_out, rows, unit, group, transform, reduction, hold, len(references), tile, columns)


def _call(
    queries: Tensor,
    references: Tensor,
    left_out: Tensor,
    rows: Tensor | None,
    unit: bool,
    bias: Tensor | None,
    own: Tensor | None,
    group: int,
    transform: Transform | None,
    extra: tuple[Tensor, ...],
    reduction: Reduction,
    hold: bool,
) -> Others:
    tensors = (queries, references, bias, *extra)
    hold = hold and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    plan = _plan(queries, references, left_out, rows, unit, group, transform, reduction, hold)
    with without_autocast(queries):
        return Others(*_ReduceOthers.apply(plan, queries, references, bias, own, *extra))  # type: ignore[no-untyped-call]


class _Part(NamedTuple):
    """A tile of rows and a block of references."""

    rows: slice
    columns: slice
    place: Tensor  # (b, N) where the left-out columns lie in the block, or outside of it
    references: Tensor  # (c x group, D)
    products: Tensor  # (b, c x group), to be kept if they are held
    work: Tensor  # the same shape, free to overwrite
    spare: Tensor  # the same shape, free to overwrite once the products are not needed


class _Products:
    """All parts of a pass, the references outside, so that each of them is read from memory once."""

    def __init__(
        self, plan: _Plan, queries: Tensor, references: Tensor, bias: Tensor | None, inverse: Tensor | None
    ) -> None:
        self.plan, self.queries, self.references, self.bias, self.inverse = plan, queries, references, bias, inverse
        size = plan.tile * min(plan.columns, max(1, plan.number))
        self._buffers = [queries.new_empty(size) for _ in range(2)]

    def blocks(self) -> Iterator[slice]:
        """Runs of references."""
        for start in range(0, self.plan.number, self.plan.columns):
            yield slice(start, min(start + self.plan.columns, self.plan.number))

    def parts(self, block: slice, held: list[Tensor] | None = None) -> Iterator[_Part]:
        """The tiles of rows against a block; held: their products, if they have been made before."""
        some = self.references[block]
        for start in range(0, len(self.queries), self.plan.tile):
            rows = slice(start, min(start + self.plan.tile, len(self.queries)))
            shape = (rows.stop - rows.start, len(some))
            work, spare = (buffer[: shape[0] * shape[1]].view(shape) for buffer in self._buffers)
            if held is None:
                out = torch.empty_like(spare) if self.plan.hold else spare
                products = self._multiply(self.queries[rows], some, block, out)
            else:
                products = held.pop(0)
            place = self.plan.left_out[rows] - block.start // self.plan.group
            yield _Part(rows, block, place, some, products, work, spare)

    def _multiply(self, x: Tensor, y: Tensor, block: slice, out: Tensor) -> Tensor:
        if self.bias is not None:
            return torch.addmm(self.bias[block], x, y.T, out=out)
        torch.mm(x, y.T, out=out)
        return out if self.inverse is None else out.mul_(self.inverse[block])


class _ReduceOthers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        queries: Tensor,
        references: Tensor,
        bias: Tensor | None,
        given: Tensor | None,
        *extra: Tensor,
    ) -> tuple[Tensor, ...]:
        inverse = queries.new_zeros(plan.number) if plan.unit else None
        own, own_length = _own(plan, queries, references, bias, given)
        everything = _Products(plan, queries, references, bias, inverse)
        running = _LogSumExp(queries) if plan.reduction == "logsumexp" else _Sum(queries)
        best = queries.new_full((len(queries),), -torch.inf)
        held: list[Tensor] = []
        for block in everything.blocks():
            if inverse is not None:
                inverse[block] = inverse_lengths(references[block])
            for part in everything.parts(block):
                if plan.transform is None:
                    values = part.products
                    _write(values, part.place, -torch.inf)
                    top = values.amax(dim=1)
                    running.see(part.rows, values, top, part.work)
                else:
                    values = plan.transform(part.products, own[part.rows, None], *extra)
                    _write(values, part.place, -torch.inf if plan.reduction == "logsumexp" else 0.0)
                    running.see(part.rows, values, values.amax(dim=1), torch.empty_like(values))
                    top = _best_of(part, plan)
                if plan.hold:
                    if plan.transform is None:
                        _write(part.products, part.place, 0.0)  # -inf would meet a 0 in the backward pass
                    held.append(part.products)
                best[part.rows] = torch.maximum(best[part.rows], top)
        reduced = running.result()
        ctx.plan, ctx.extra = plan, len(extra)
        # Saved, not kept as attributes: so that they are freed as soon as the backward pass is over.
        ctx.save_for_backward(queries, references, bias, inverse, reduced, own, *extra, *held)
        ctx.mark_non_differentiable(best)
        return reduced, own, own_length, best

    @staticmethod
    def backward(ctx: Any, by_reduced: Tensor, by_own: Tensor, by_length: Tensor, _: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # what is computed here has no graph: a second derivative would be 0
            raise RuntimeError(
                "Sums over other classes or references can be differentiated only once; found create_graph=True."
            )
        plan: _Plan = ctx.plan
        queries, references, bias, inverse, reduced, own, *rest = ctx.saved_tensors
        extra, held = rest[: ctx.extra], rest[ctx.extra :] if plan.hold else None
        _, wants_queries, wants_references, wants_bias, wants_own, *wants_extra = ctx.needs_input_grad
        by_queries = torch.zeros_like(queries) if wants_queries else None
        by_references = None
        if wants_references:  # the first tile of rows writes it; where there is none, zeros
            by_references = torch.empty_like(references) if len(queries) else torch.zeros_like(references)
        by_bias = torch.zeros_like(bias) if wants_bias else None
        by_own = by_own.clone()
        by_extra = [torch.zeros_like(tensor) for tensor in extra]
        with without_autocast(queries):
            everything = _Products(plan, queries, references, bias, inverse)
            for block in everything.blocks():
                into = None if by_references is None else by_references[block]
                for part in everything.parts(block, held):
                    by_products = _by_products(plan, part, by_reduced, reduced, own, extra, by_own, by_extra)
                    if by_bias is not None:
                        by_bias[block] += by_products.sum(dim=0)
                    x, y = queries[part.rows], part.references
                    shrink = None
                    if inverse is not None:
                        # What turns no reference but only lengthens it has no effect: sum of G x cos, of each column.
                        shrink = torch.mul(by_products, part.products, out=part.spare).sum(dim=0)
                        shrink.mul_(inverse[block].square())
                        by_products.mul_(inverse[block])
                    if by_queries is not None:
                        by_queries[part.rows].addmm_(by_products, y)
                    if into is not None:
                        if part.rows.start == 0:
                            torch.mm(by_products.T, x, out=into)
                        else:
                            into.addmm_(by_products.T, x)
                        if shrink is not None:
                            into.addcmul_(y, shrink[:, None], value=-1.0)
            if plan.rows is not None:
                _add_own(plan, (queries, references, own), by_own, by_length, by_queries, by_references, by_bias)
        found = [grad if want else None for grad, want in zip(by_extra, wants_extra, strict=True)]
        return None, by_queries, by_references, by_bias, by_own if wants_own else None, *found


def inverse_lengths(rows: Tensor) -> Tensor:
    """1 / length of each row (N, D), 0 for rows of zeros: (N,). Without a copy of the rows, without gradient."""
    lengths = torch.linalg.vector_norm(rows.detach(), dim=1)
    some = lengths > torch.finfo(rows.dtype).tiny ** 0.5
    return torch.where(some, torch.where(some, lengths, 1.0).reciprocal(), 0.0)


class _LogSumExp:
    """A running maximum and a running sum of exponentials below it, (B,) each."""

    def __init__(self, queries: Tensor) -> None:
        self.top = queries.new_full((len(queries),), -torch.inf)
        self.total = queries.new_zeros(len(queries))

    def see(self, rows: slice, values: Tensor, top: Tensor, work: Tensor) -> None:
        """values: (b, c), top: (b,) their maxima. Overwrites work."""
        before = self.top[rows]
        after = torch.maximum(before, top)
        origin = torch.where(after != -torch.inf, after, 0.0)
        some = torch.sub(values, origin[:, None], out=work).clamp_(min=LEAST_EXPONENT).exp_().sum(dim=1)
        self.total[rows] = self.total[rows] * (before - origin).exp() + some
        self.top[rows] = after

    def result(self) -> Tensor:
        """What has been seen, (B,)."""
        # Not ">": a NaN among the products is no empty set.
        return torch.where(self.top != -torch.inf, self.top + self.total.log(), -torch.inf)


class _Sum:
    """A running sum, (B,)."""

    def __init__(self, queries: Tensor) -> None:
        self.total = queries.new_zeros(len(queries))

    def see(self, rows: slice, values: Tensor, top: Tensor, work: Tensor) -> None:
        """values: (b, c)."""
        self.total[rows] += values.sum(dim=1)

    def result(self) -> Tensor:
        """What has been seen, (B,)."""
        return self.total


def _own(
    plan: _Plan, queries: Tensor, references: Tensor, bias: Tensor | None, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    if plan.rows is None:
        nothing = queries.new_zeros(len(queries))
        return (nothing if given is None else given.detach().clone()), nothing.clone()
    at, some = plan.rows.clamp_min(0), plan.rows >= 0
    y = references.index_select(0, at)
    length = torch.linalg.vector_norm(y, dim=1)
    product = (queries * y).sum(dim=1)
    if plan.unit:
        product = product * inverse_lengths(y)
    if bias is not None:
        product = product + bias[at]
    return torch.where(some, product, 0.0), torch.where(some, length, 0.0)


def _write(values: Tensor, place: Tensor, value: float) -> None:
    """Write `value` at the columns `place` (b, N) of values (b, c); places outside are passed over."""
    if not place.numel() or not values.shape[1]:
        return
    inside = (place >= 0) & (place < values.shape[1])
    first = torch.where(inside, place, values.shape[1]).amin(dim=1, keepdim=True)  # (b, 1)
    some = first < values.shape[1]
    # Places outside repeat a write inside, or write what is there: two writes that meet agree.
    at = torch.where(inside, place, torch.where(some, first, 0))
    values.scatter_(1, at, torch.where(some, value, values.gather(1, at)))


def _best_of(part: _Part, plan: _Plan) -> Tensor:
    """Largest product with another reference, (b,), leaving the products as they were."""
    products = part.work.copy_(part.products)
    for member in range(plan.group):
        _write(products, torch.where(part.place < 0, -1, part.place * plan.group + member), -torch.inf)
    return products.amax(dim=1)


def _by_products(
    plan: _Plan,
    part: _Part,
    by_reduced: Tensor,
    reduced: Tensor,
    own: Tensor,
    extra: list[Tensor],
    by_own: Tensor,
    by_extra: list[Tensor],
) -> Tensor:
    """(b, c x group) derivative with respect to a part's products; what goes to own products and extra is added."""
    by_row = by_reduced[part.rows, None]  # (b, 1)
    if plan.transform is None:
        values = part.products
    else:
        with torch.enable_grad():
            inputs = [part.products.detach().requires_grad_(), own[part.rows, None].detach().requires_grad_()]
            inputs += [tensor.detach().requires_grad_() for tensor in extra]
            values = plan.transform(*inputs)
    with torch.no_grad():
        if plan.reduction == "sum":
            by_values = by_row.expand_as(values).clone()
        else:
            row = reduced[part.rows, None]
            origin = torch.where(row != -torch.inf, row, 0.0)
            out = part.work if plan.transform is None else None
            by_values = torch.sub(values.detach(), origin, out=out).clamp_(min=LEAST_EXPONENT).exp_().mul_(by_row)
        _write(by_values, part.place, 0.0)
    if plan.transform is None:
        return by_values
    found = torch.autograd.grad(values, inputs, by_values, allow_unused=True)
    for total, more in zip((by_own[part.rows], *by_extra), found[1:], strict=True):
        if more is not None:
            total += more.view(total.shape)
    by_products = found[0]
    assert by_products is not None
    return by_products


def _add_own(
    plan: _Plan,
    saved: tuple[Tensor, Tensor, Tensor],
    by_own: Tensor,
    by_length: Tensor,
    by_queries: Tensor | None,
    by_references: Tensor | None,
    by_bias: Tensor | None,
) -> None:
    """The gradient of the products with the own references, and of these references' lengths."""
    queries, references, own = saved
    assert plan.rows is not None
    at, some = plan.rows.clamp_min(0), plan.rows >= 0
    by_own, by_length = torch.where(some, by_own, 0.0), torch.where(some, by_length, 0.0)
    y = references.index_select(0, at)
    inverse = inverse_lengths(y)[:, None]
    direction = y * inverse
    if by_queries is not None:
        by_queries.addcmul_(by_own[:, None], direction if plan.unit else y)
    if by_references is not None:
        part = by_length[:, None] * direction
        part += by_own[:, None] * ((queries - own[:, None] * direction) * inverse if plan.unit else queries)
        by_references.index_add_(0, at, part)
    if by_bias is not None:
        by_bias.index_add_(0, at, by_own)
