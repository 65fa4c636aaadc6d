import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metricface.data.folders import FolderImages
from metricface.data.images import Preprocessing
from metricface.data.splits import split_identities

ALPHABET = r"^(.+)__"
CHARACTERS = [f"{name}__character{i:02d}" for name in ("Greek", "Latin", "Old__Norse", "Tifinagh") for i in range(1, 6)]


def test_last_takes_the_last_share_of_the_sorted_names_whatever_order_they_come_in() -> None:
    names = ["e", "a", "d", "b", "c"]
    kept, held_out = split_identities(names, 0.4, order="last")
    assert held_out.tolist() == [0, 2]  # e and d
    assert kept.tolist() == [1, 3, 4]


def test_random_depends_on_the_seed_and_not_on_the_order_of_names() -> None:
    names = [f"person{i:03d}" for i in range(100)]
    chosen = {names[i] for i in split_identities(names, 0.3, seed=5).held_out}
    backwards = names[::-1]
    assert {backwards[i] for i in split_identities(backwards, 0.3, seed=5).held_out} == chosen
    assert {names[i] for i in split_identities(names, 0.3, seed=6).held_out} != chosen
    assert chosen != set(names[-30:])


def test_a_group_is_never_split() -> None:
    for seed in range(5):
        kept, held_out = split_identities(CHARACTERS, 0.5, seed=seed, group=ALPHABET)
        groups = [{re.match(ALPHABET, CHARACTERS[i]).group(1) for i in side} for side in (kept, held_out)]  # type: ignore[union-attr]
        assert not groups[0] & groups[1]
        assert (len(kept), len(held_out)) == (10, 10)


def test_last_by_group_takes_the_last_groups() -> None:
    held_out = split_identities(CHARACTERS, 0.25, group=ALPHABET, order="last").held_out
    assert {CHARACTERS[i].split("__")[0] for i in held_out} == {"Tifinagh"}


@settings(max_examples=60, derandomize=True, deadline=None)
@given(number=st.integers(2, 40), share=st.floats(0.001, 0.999), seed=st.integers(0, 9), last=st.booleans())
def test_sides_are_disjoint_complete_and_never_empty(number: int, share: float, seed: int, last: bool) -> None:
    names = [str(i) for i in range(number)]
    kept, held_out = split_identities(names, share, seed=seed, order="last" if last else "random")
    assert sorted([*kept, *held_out]) == list(range(number))
    assert len(kept) > 0
    assert len(held_out) == min(max(round(share * number), 1), number - 1)


def test_what_cannot_be_split_says_why() -> None:
    with pytest.raises(ValueError, match="random, last"):
        split_identities(["a", "b"], 0.5, order="first")  # type: ignore[arg-type]
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_identities(["a", "b"], share)
    with pytest.raises(ValueError, match=r"at least 2 identities.*there is 1 among"):
        split_identities(["a"], 0.5)
    with pytest.raises(ValueError, match="at least 2 groups"):
        split_identities(["A__1", "A__2"], 0.5, group=ALPHABET)
    with pytest.raises(ValueError, match="distinct"):
        split_identities(["a", "a", "b"], 0.5)


def test_a_pattern_that_does_not_fit_says_which_name_it_misses() -> None:
    with pytest.raises(ValueError, match="captures nothing in 1 of 3 names, for instance 'lonely'"):
        split_identities(["A__1", "lonely", "B__1"], 0.5, group=ALPHABET)
    with pytest.raises(ValueError, match="exactly one capturing group"):
        split_identities(["a", "b"], 0.5, group="^.+__")
    with pytest.raises(ValueError, match="not a regular expression"):
        split_identities(["a", "b"], 0.5, group="(")


@pytest.mark.slow
def test_omniglot_divides_by_alphabet(omniglot: Path) -> None:
    images = FolderImages(omniglot, Preprocessing(28, 28, "grey"))
    kept, held_out = split_identities(images.identities, 0.2, seed=0, group=ALPHABET)
    test, train = images.select(held_out), images.select(kept)
    assert len(test) + len(train) == len(images) == 19280
    alphabets = [{name.split("__")[0] for name in side.identities} for side in (train, test)]
    assert [len(side) for side in alphabets] == [24, 6]
    assert not alphabets[0] & alphabets[1]
    assert np.all(test.counts() == 20)
