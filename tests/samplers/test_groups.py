from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers.groups import group_by_identity


def as_dict(labels: Any) -> dict[Any, list[int]]:
    """What the table says, as plain Python."""
    table = group_by_identity(labels)
    assert table.num_images == len(labels)
    assert table.offsets[0] == 0
    assert np.diff(table.offsets).tolist() == table.counts.tolist()
    return {name: table.images_of(row).tolist() for row, name in enumerate(table.identities.tolist())}


def by_loop(labels: list[Any]) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return {label: groups[label] for label in sorted(groups)}


integers = st.lists(st.one_of(st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(integers)
def test_integer_labels_group_as_a_loop_groups_them(labels: list[int]) -> None:
    expected = by_loop(labels)
    assert as_dict(labels) == expected
    assert as_dict(np.array(labels)) == expected
    assert as_dict(torch.tensor(labels)) == expected
    assert list(as_dict(labels)) == list(expected)  # sorted


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=3).filter(lambda text: "\0" not in text), min_size=1, max_size=30))
def test_string_labels_group_as_a_loop_groups_them(labels: list[str]) -> None:
    assert as_dict(labels) == by_loop(labels)
    assert as_dict(np.array(labels, dtype=object)) == by_loop(labels)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_every_integer_width_is_accepted_and_gives_the_same_digest(dtype: type[np.integer[Any]]) -> None:
    labels = [3, 1, 3, 100, 1, 0]
    assert as_dict(np.array(labels, dtype=dtype)) == by_loop(labels)
    assert group_by_identity(np.array(labels, dtype=dtype)).digest == group_by_identity(labels).digest


def test_neighbouring_labels_above_two_to_the_53_stay_apart() -> None:
    labels = [2**53, 2**53 + 1, 2**53, 2**62, 2**62 + 1]
    assert as_dict(labels) == by_loop(labels)
    beyond = [2**63 + 1, -1, 2**63, 2**63 + 1, 2**70]  # NumPy alone would make floats of these
    assert as_dict(beyond) == by_loop(beyond)


def test_a_memory_mapped_file_of_labels_is_accepted(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.array([5, 5, -2, 5]))
    assert as_dict(np.load(tmp_path / "labels.npy", mmap_mode="r")) == {-2: [2], 5: [0, 1, 3]}


def test_the_table_cannot_be_changed_and_leaves_the_labels_writable() -> None:
    labels = np.array([1, 0, 1])
    table = group_by_identity(labels)
    with pytest.raises(ValueError, match="read-only"):
        table.images[0] = 1
    labels[0] = 7
    assert table.identities.tolist() == [0, 1]


def test_the_digest_tells_other_labels_and_another_order_apart() -> None:
    digests = [group_by_identity(labels).digest for labels in ([0, 0, 1], [0, 1, 0], [0, 0, 2], [0, 0, 1, 1])]
    assert len(set(digests)) == 4
    assert group_by_identity(["a", "b"]).digest == group_by_identity(np.array(["a", "b"], dtype=object)).digest
    assert group_by_identity(["a", "b"]).digest != group_by_identity(["a", "c"]).digest


def test_the_digest_does_not_change_between_processes_and_versions() -> None:
    assert group_by_identity([4, 4, -1, 2**40]).digest == "91ced0aabf69a476a4469a5c493dd6d4"
    assert group_by_identity(["ann", "bob", "ann"]).digest == "fac36fa23a97578d28b8215082d6c198"


@pytest.mark.parametrize(
    "labels",
    [
        [0.0, 1.0],
        np.array([1.0, 2.0]),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        [True, False],
        [1, "a"],
        [None, "a"],
        np.array([1, 2.5], dtype=object),
    ],
)
def test_labels_that_are_neither_whole_numbers_nor_strings_are_refused(labels: Any) -> None:
    with pytest.raises(ValueError, match="whole numbers or strings, found"):
        group_by_identity(labels)


@pytest.mark.parametrize("labels", [[], np.array([]), torch.tensor([])])
def test_empty_labels_are_refused(labels: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        group_by_identity(labels)


@pytest.mark.parametrize("labels", [np.zeros((2, 3), dtype=int), torch.zeros(2, 1, dtype=torch.long), [[1], [2]], 3])
def test_labels_with_another_number_of_dimensions_are_refused(labels: Any) -> None:
    with pytest.raises(ValueError, match="one dimension"):
        group_by_identity(labels)
