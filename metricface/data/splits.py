"""Divide identities into those kept and those held out; no identity is ever on both sides."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from metricface.data.images import IntArray

Order = Literal["random", "last"]


class IdentitySplit(NamedTuple):
    """Labels (indices into `identities`) on each side, int64, ascending; disjoint, together all of them."""

    kept: IntArray
    held_out: IntArray


def split_identities(
    identities: Sequence[str], share: float, *, seed: int = 0, group: str | None = None, order: Order = "random"
) -> IdentitySplit:
    r"""Hold out a share of the identities, or of the groups above them.

    identities: name of each label, distinct, as `ImageSet.identities`; use the result with `ImageSet.select`.
    share: in (0, 1), of the identities or, with `group`, of the groups. round(share * n) are held out, but at least
        one, and at least one is kept.
    group: a regular expression with one capturing group, searched in each name; names that capture the same text stay
        on one side. r"^(.+)__" splits Omniglot's ALPHABET__characterNN by alphabet.
    order: "random" takes what is held out at random by `seed`, whatever order the names come in; "last" takes the last
        of the sorted names or groups.

    Raises ValueError for a share outside (0, 1), fewer than two identities or groups, a pattern without exactly one
    group, and names that it does not match.
    """
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {', '.join(get_args(Order))}; got {order!r}.")
    if not 0.0 < share < 1.0:
        raise ValueError(f"share of identities to hold out must lie between 0 and 1, both excluded; got {share}.")
    if len(set(identities)) != len(identities):
        raise ValueError("identities must be distinct names; some occur more than once.")
    units = list(identities) if group is None else captured(identities, group)
    names = sorted(set(units))
    if len(names) < 2:
        what = "identities" if group is None else f"groups by {group!r}"
        raise ValueError(
            f"a split needs at least 2 {what}, one for each side; there {'is' if len(names) == 1 else 'are'} "
            f"{len(names)} among {len(identities):,} identities. Add identities, or evaluate on another folder."
        )
    number = min(max(round(share * len(names)), 1), len(names) - 1)
    if order == "last":
        chosen = set(names[-number:])
    else:
        chosen = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:number]}
    out = np.array([unit in chosen for unit in units])
    return IdentitySplit(np.flatnonzero(~out).astype(np.int64), np.flatnonzero(out).astype(np.int64))


def captured(names: Sequence[str], group: str) -> list[str]:
    """What the pattern's one group captures in each name, found by `re.search`.

    Raises ValueError where the pattern is none, has not exactly one group, or captures nothing in some name.
    """
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise ValueError(f"group {group!r} is not a regular expression: {error}.") from error
    if pattern.groups != 1:
        raise ValueError(f"group {group!r} must have exactly one capturing group in brackets; it has {pattern.groups}.")
    matches = [pattern.search(name) for name in names]
    texts = [match.group(1) if match else None for match in matches]
    unmatched = [name for name, text in zip(names, texts, strict=True) if text is None]
    if unmatched:
        raise ValueError(
            f"group {group!r} captures nothing in {len(unmatched):,} of {len(names):,} names, for "
            f"instance {unmatched[0]!r}. Adjust the pattern, or rename these folders."
        )
    return [text for text in texts if text is not None]
