"""What the ranks of a PartialFC hold, joined, and cut anew for another number of ranks.

Two ways. From files that every rank has written by itself: `reshard` and `reshard_optimizer`, in any process. In one
file, for a checkpoint: all ranks call `whole_state` and `whole_optimizer`, and the first one writes what it gets; any
number of ranks then reads that, each PartialFC taking its own classes from it.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metricface.distributed import gather_to_first
from metricface.heads.shards import PER_CLASS, shard_of

HELD = "held"  # the buffer of a PartialFC: first class, last + 1, all


def reshard(states: Sequence[Mapping[str, Tensor]], world_size: int) -> list[dict[str, Tensor]]:
    """The states of a PartialFC on some ranks, cut anew for another number of ranks.

    states: `state_dict()` of every rank, in any order. world_size: how many ranks there will be; with 1 the entries
    under "head." are those of the head alone. Returns a state for each new rank, in rank order, that share no memory.
    Below a sampling rate of 1 the draws follow the shards, so they are others from then on. What an optimizer has:
    `reshard_optimizer`.
    Raises ValueError where the states are not those of all classes, once each, or classes are fewer than ranks.
    """
    states = sorted(states, key=lambda state: int(state[HELD][0]))
    num_classes = _check_complete([state[HELD].tolist() for state in states])
    found: list[dict[str, Tensor]] = [{} for _ in range(world_size)]
    for name, value in states[0].items():
        if name in [f"head.{parameter}" for parameter in PER_CLASS]:
            pieces = reshard_rows([state[name] for state in states], num_classes, world_size)
        elif name == HELD:
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
    found = [copy.deepcopy({**states[0], "state": dict(states[0]["state"])}) for _ in range(world_size)]
    for number in sharded:
        for name, value in states[0]["state"].get(number, {}).items():
            if _has_rows(value):
                pieces = reshard_rows([state["state"][number][name] for state in states], num_classes, world_size)
                for state, piece in zip(found, pieces, strict=True):
                    state["state"][number] = {**state["state"][number], name: piece}
    return found


def whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a module, with the classes of all ranks wherever it has a PartialFC; on rank 0, which is to keep it.

    state: `state_dict()` of the module on this rank. Every rank must call it; the others get a state without those
    classes. They are sent and put together in main memory (through gloo), since no device need have room for all. Where
    all classes are there already nothing is sent.
    """
    found = dict(state)
    for name, mine, total, keys in _parts_in(state):
        if len(mine) < total:
            found |= {key: gather_to_first(state[key].cpu()) for key in keys}
            found[name] = torch.tensor([0, total, total])
    return found


def whole_optimizer(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """What an optimizer has (momentum and the like) for the classes of all ranks; on rank 0, as `whole_state`.

    module: of whose parameters it has some.
    """
    state = optimizer.state_dict()
    entries = dict(state["state"])
    for number, (mine, total) in _sharded(optimizer, module).items():
        if number in entries and len(mine) < total:
            entries[number] = {
                name: gather_to_first(value.cpu()) if _has_rows(value) else value
                for name, value in entries[number].items()
            }
    return {**state, "state": entries}


def own_optimizer(state: Mapping[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Of what `whole_optimizer` gave, on any number of ranks, this rank's classes, for `optimizer.load_state_dict`."""
    entries = dict(state["state"])
    for number, (mine, total) in _sharded(optimizer, module).items():
        if number in entries:
            entries[number] = {
                name: rows_of(value, total, mine) if _has_rows(value) else value
                for name, value in entries[number].items()
            }
    return {**state, "state": entries}


def sharded_names(module: nn.Module) -> list[str]:
    """Of the entries of `module.state_dict()`, those that are of this rank's classes wherever it has a PartialFC."""
    return [entry for name, _, _, keys in _parts_in(module.state_dict()) for entry in (name, *keys)]


def sharded_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that hold this rank's classes, and have their whole gradient on this rank."""
    names = set(sharded_names(module))
    return [parameter for name, parameter in module.named_parameters() if name in names]


def rows_of(whole: Tensor, num_classes: int, mine: range) -> Tensor:
    """The rows of some classes, (classes of the rank x K, ...), in memory of their own. whole: (classes x K, ...)."""
    each = len(whole) // num_classes
    return whole[mine.start * each : mine.stop * each].clone()


def _parts_in(state: Mapping[str, Any]) -> Iterator[tuple[str, range, int, list[str]]]:
    """Of each PartialFC in a module's state: its entry `held`, what that says, and which entries have a row a class."""
    for name in state:
        prefix, _, last = name.rpartition(HELD)
        if not last and (not prefix or prefix.endswith(".")):
            start, stop, total = state[name].tolist()
            keys = (f"{prefix}head.{parameter}" for parameter in PER_CLASS)
            yield name, range(start, stop), total, [key for key in keys if key in state]


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _sharded(optimizer: Optimizer, module: nn.Module) -> dict[int, tuple[range, int]]:
    """By its number in the optimizer: which classes a parameter holds, and how many there are."""
    numbers = {p: n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    parameters = dict(module.named_parameters())
    return {
        numbers[parameters[key]]: (mine, total)
        for _, mine, total, keys in _parts_in(module.state_dict())
        for key in keys
        if parameters[key] in numbers
    }


def reshard_rows(parts: Sequence[Tensor], num_classes: int, world_size: int) -> list[Tensor]:
    """What belongs to classes row by row (weights, momentum), cut anew for another number of ranks.

    parts: of every rank, in rank order, (classes of the rank x K, ...). Returns one for each new rank, in memory of its
    own. Raises ValueError where the rows are no multiple of the classes, or classes are fewer than ranks.
    """
    whole = torch.cat(list(parts))
    if len(whole) % num_classes:
        raise ValueError(f"{len(whole)} rows are no multiple of {num_classes} classes; pass the parts of every rank.")
    return [rows_of(whole, num_classes, mine) for mine in _shards(num_classes, world_size)]


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
