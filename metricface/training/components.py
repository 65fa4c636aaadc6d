"""From the name and options of a part in a recipe to the object."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from metricface.training.recipe import Component


def by_name(*parts: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Parts by the names that recipes call them."""
    return {part.__name__: part for part in parts}


def build(kind: str, component: Component, known: Mapping[str, Callable[..., Any]], *fixed: Any, **named: Any) -> Any:
    """The object that `component` names, made with its options after the arguments the trainer fixes.

    Raises ValueError for an unknown name or option, listing the right ones, and for values that it rejects.
    """
    make = find(kind, component, known, len(fixed), tuple(named))
    try:
        return make(*fixed, **named, **component.options)
    except TypeError as error:
        raise ValueError(f"The {kind} {component.name} cannot be made from {component.options}: {error}.") from error


def find(
    kind: str,
    component: Component,
    known: Mapping[str, Callable[..., Any]],
    fixed: int = 0,
    named: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """What makes the component, its name and the names of its options checked."""
    if component.name not in known:
        raise ValueError(f"The recipe names the {kind} {component.name!r}; known are {', '.join(sorted(known))}.")
    make = known[component.name]
    accepted = [name for name in list(inspect.signature(make).parameters)[fixed:] if name not in named]
    unknown = [option for option in component.options if option not in accepted]
    if unknown:
        right = ", ".join(accepted) or "none"
        raise ValueError(f"The {kind} {component.name} has no option {', '.join(unknown)}; its options are: {right}.")
    return make
