"""What the ranks of a PartialFC hold, joined, and cut anew for another number of ranks."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metricface.heads.shards import PER_CLASS, shard_of


def reshard(states: Sequence[Mapping[str, Tensor]], world_size: int) -> list[dict[str, Tensor]]:
    """The states of a PartialFC on some ranks, cut anew for another number of ranks.

    states: `state_dict()` of every rank, in any order. world_size: how many ranks there will be; with 1 the entries
    under "head." are those of the head alone. Returns a state for each new rank, in rank order, that share no memory.
    Below a sampling rate of 1 the draws follow the shards, so they are others from then on. What an optimizer has:
    `reshard_optimizer`.
    Raises ValueError where the states are not those of all classes, once each, or classes are fewer than ranks.
    """
    states = sorted(states, key=lambda state: int(state["held"][0]))
    num_classes = _check_complete([state["held"].tolist() for state in states])
    found: list[dict[str, Tensor]] = [{} for _ in range(world_size)]
    for name, value in states[0].items():
        if name in [f"head.{parameter}" for parameter in PER_CLASS]:
            pieces = reshard_rows([state[name] for state in states], num_classes, world_size)
        elif name == "held":
            pieces = [torch.tensor([mine.start, mine.stop, num_classes]) for mine in _shards(num_classes, world_size)]
        else:
            pieces = [value.clone() for _ in range(world_size)]
        for state, piece in zip(found, pieces, strict=True):
            state[name] = piece
    return found


def reshard_optimizer(
    states: Sequence[Mapping[str, Any]], sharded: Collection[int], num_classes: int, world_size: int
) -> list[dict[str, Any]]:
    """The states of a torch optimizer on some ranks (momentum and the like), cut anew as `reshard` does the classes.

    states: `optimizer.state_dict()` of every rank, in rank order. sharded: the numbers, in the "params" of these, of
    the parameters that are spread over ranks: a PartialFC's head.weight and, if there is one, head.bias. What belongs
    to others, and counts of steps, are rank 0's. Returns a state for each new rank.
    Raises ValueError as `reshard_rows` does.
    """
    found = [{**states[0], "state": dict(states[0]["state"])} for _ in range(world_size)]
    for number in sharded:
        for name, value in states[0]["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.ndim:
                pieces = reshard_rows([state["state"][number][name] for state in states], num_classes, world_size)
                for state, piece in zip(found, pieces, strict=True):
                    state["state"][number] = {**state["state"][number], name: piece}
    return found


def reshard_rows(parts: Sequence[Tensor], num_classes: int, world_size: int) -> list[Tensor]:
    """What belongs to classes row by row (weights, momentum), cut anew for another number of ranks.

    parts: of every rank, in rank order, (classes of the rank x K, ...). Returns one for each new rank, in memory of its
    own. Raises ValueError where the rows are no multiple of the classes, or classes are fewer than ranks.
    """
    whole = torch.cat(list(parts))
    if len(whole) % num_classes:
        raise ValueError(f"{len(whole)} rows are no multiple of {num_classes} classes; pass the parts of every rank.")
    each = len(whole) // num_classes
    return [whole[mine.start * each : mine.stop * each].clone() for mine in _shards(num_classes, world_size)]


def _shards(num_classes: int, world_size: int) -> list[range]:
    check_ranks(num_classes, world_size)
    return [shard_of(num_classes, r, world_size) for r in range(world_size)]


def check_ranks(num_classes: int, world_size: int) -> None:
    """Raise ValueError unless each rank gets a class."""
    if not 1 <= world_size <= num_classes:
        raise ValueError(f"Each of {world_size} ranks needs at least one class of its own; there are {num_classes}.")


def _check_complete(held: list[list[int]]) -> int:
    """The number of classes; ValueError unless the shards, [first, last + 1, classes] each, make up all of them."""
    starts, stops, totals = ([one[i] for one in held] for i in range(3))
    if not held or starts != [0, *stops[:-1]] or set(totals) != {stops[-1]}:
        these = ", ".join(f"{start} to {stop - 1} of {total}" for start, stop, total in held) or "nothing"
        raise ValueError(f"reshard needs the state of every rank, once each; found those of classes {these}.")
    return totals[0]
