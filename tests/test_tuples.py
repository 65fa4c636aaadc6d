from typing import Any

import pytest
import torch
from pytorch_metric_learning.utils import loss_and_miner_utils as pml
from torch import Tensor

from metricface.distances import pairwise
from metricface.tuples import Batch, Pairs, Triplets, as_pairs, as_triplets, check_batch

LABELS = torch.tensor([3, 3, 7, 7, 9])
EMB = torch.eye(5)


def rows(*indices: Tensor) -> list[tuple[int, ...]]:
    return sorted(zip(*(index.tolist() for index in indices), strict=True))


def is_positive(batch: Batch) -> Tensor:
    """(B, R): of one identity, without the anchor itself."""
    return (batch.labels[:, None] == batch.ref_labels) & (
        torch.arange(len(batch.ref_labels)) != batch.self_index[:, None]
    )


def is_negative(batch: Batch) -> Tensor:
    """(B, R): of two identities."""
    return batch.labels[:, None] != batch.ref_labels


def all_pairs(batch: Batch) -> Pairs:
    """Every ordered pair: of one identity (without the anchor itself), and of two."""
    positive, negative = is_positive(batch).nonzero(), is_negative(batch).nonzero()
    return Pairs(positive[:, 0], positive[:, 1], negative[:, 0], negative[:, 1])


def test_a_batch_without_references_is_its_own_reference_and_every_anchor_knows_itself() -> None:
    batch = check_batch(EMB, LABELS)
    assert batch.ref_emb is batch.embeddings
    assert batch.self_index.tolist() == [0, 1, 2, 3, 4]


def test_separate_references_hold_no_anchor_unless_self_index_says_so() -> None:
    batch = check_batch(EMB, LABELS, EMB.clone(), LABELS.clone())
    assert batch.self_index.tolist() == [-1] * 5
    told = check_batch(EMB, LABELS, EMB.clone(), LABELS.clone(), torch.tensor([0, 1, -1, 3, 4]))
    assert told.self_index.tolist() == [0, 1, -1, 3, 4]


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([-5, -5, 2**24, 2**24 + 1]),
        torch.tensor([2**53, 2**53, 2**53 + 1, 2**62]),
        torch.tensor([200, 200, 255, 0], dtype=torch.uint8),
        torch.tensor([-1, -1, 127, -128], dtype=torch.int8),
        torch.tensor([7, 7, 8, 9], dtype=torch.int32),
    ],
)
def test_labels_of_any_integer_type_and_value_are_told_apart(labels: Tensor) -> None:
    for batch in (check_batch(torch.eye(4), labels), check_batch(torch.eye(4), labels, torch.eye(4), labels.long())):
        assert is_negative(batch).sum() == 10
    assert all_pairs(check_batch(torch.eye(4), labels)).positive.tolist() == [1, 0]


def test_half_precision_becomes_float32_and_normalize_gives_unit_rows() -> None:
    batch = check_batch(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16), torch.tensor([0, 1]))
    assert batch.embeddings.dtype == torch.float32
    unit = check_batch(batch.embeddings, batch.labels, normalize=True).embeddings
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_embeddings_and_references_of_two_types_meet_in_the_wider_one() -> None:
    for one, other, common in (
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float64),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
    ):
        batch = check_batch(EMB.to(one), LABELS, EMB.to(other), LABELS, normalize=True)
        assert batch.embeddings.dtype == batch.ref_emb.dtype == common


def test_the_longest_rows_allowed_have_finite_distances() -> None:
    batch = check_batch(EMB * 2e18, LABELS, EMB * -2e18, LABELS)
    assert torch.isfinite(pairwise(batch.embeddings, batch.ref_emb, "squared_euclidean")).all()


def test_pairs_meet_on_their_anchor_as_in_pml() -> None:
    pairs = all_pairs(check_batch(EMB, LABELS))
    assert rows(*pairs[:2]) == rows(*pml.get_all_pairs_indices(LABELS)[:2])
    assert rows(*pairs[2:]) == rows(*pml.get_all_pairs_indices(LABELS)[2:])
    assert rows(*as_triplets(pairs, LABELS)) == rows(*pml.convert_to_triplets(pairs, LABELS))


def test_triplets_split_into_pairs_as_in_pml() -> None:
    triplets = Triplets(torch.tensor([0, 0, 2]), torch.tensor([1, 1, 3]), torch.tensor([2, 4, 0]))
    for ours, theirs in zip(as_pairs(triplets, LABELS), pml.convert_to_pairs(triplets, LABELS), strict=True):
        assert torch.equal(ours, theirs)


def test_tuples_of_the_right_kind_pass_through_and_empty_ones_stay_empty() -> None:
    nothing = torch.empty(0, dtype=torch.long)
    assert len(as_triplets((nothing, nothing, nothing, nothing), LABELS).anchor) == 0
    assert len(as_pairs((nothing, nothing, nothing), LABELS).negative) == 0
    one = torch.tensor([0])
    assert as_triplets((one, one, one), LABELS) == Triplets(one, one, one)
    assert as_pairs((one, one, one, one), LABELS) == Pairs(one, one, one, one)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([[0], [0]], "3 .triplets. or 4 .pairs."),
        ([[5], [0], [0]], r"indices_tuple\[0\] must lie in \[0, 5\)"),
        ([[0], [9], [0]], r"indices_tuple\[1\] must lie in \[0, 9\); found 9 to 9"),
        ([[0], [0], [0], [-1]], r"indices_tuple\[3\]"),
        ([[0], [0], [7], [0]], r"indices_tuple\[2\] must lie in \[0, 5\)"),
    ],
)
def test_indices_that_point_outside_the_batch_are_an_error(indices: list[list[int]], message: str) -> None:
    tensors = [torch.tensor(index) for index in indices]
    for convert in (as_triplets, as_pairs):
        with pytest.raises(ValueError, match=message):
            convert(tensors, LABELS, torch.zeros(9, dtype=torch.long))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ((LABELS[:3] * 0, LABELS[:1] * 0, LABELS[:3] * 0), r"as many .* found lengths \[3, 1, 3\]"),
        ((LABELS[:3] * 0, LABELS[:1] * 0, LABELS[:3] * 0, LABELS[:3] * 0), r"found lengths \[3, 1, 3, 3\]"),
        ((LABELS[:1] * 0, LABELS[:1] * 0, LABELS[:3] * 0, LABELS[:1] * 0), r"found lengths \[1, 1, 3, 1\]"),
        (
            (LABELS * 0.0, LABELS * 0, LABELS * 0),
            r"indices_tuple\[0\] must be \(T,\) int64 or int32; found torch.float32",
        ),
        ((LABELS * 0, LABELS > 0, LABELS * 0), r"indices_tuple\[1\].*torch.bool"),
        ((LABELS * 0, LABELS * 0, LABELS[None] * 0), r"indices_tuple\[2\].*\(1, 5\)"),
        ((LABELS * 0, LABELS * 0, [0, 0, 0, 0, 0]), r"indices_tuple\[2\].*found list"),
    ],
)
def test_indices_of_unequal_lengths_or_of_no_integer_type_are_an_error(indices: Any, message: str) -> None:
    for convert in (as_triplets, as_pairs):
        with pytest.raises(ValueError, match=message):
            convert(indices, LABELS)


def test_pairs_may_hold_more_negatives_than_positives_and_indices_may_be_int32() -> None:
    found = as_triplets(tuple(torch.tensor(index).int() for index in ([0], [1], [0, 0], [2, 3])), LABELS)
    assert rows(*found) == [(0, 1, 2), (0, 1, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.eye(5)[0]}, "embeddings must be floating .rows, dimensions."),
        ({"embeddings": torch.eye(5).long()}, "torch.int64"),
        (
            {"embeddings": torch.eye(5).masked_fill(torch.eye(5).bool(), torch.nan)},
            "5 of 5 rows of embeddings hold NaN",
        ),
        ({"embeddings": torch.eye(5).index_fill(0, torch.tensor(3), torch.inf)}, "first: row 3"),
        ({"embeddings": torch.eye(5) * 1e19}, "5 of 5 rows of embeddings .* longer than 2.3e.18"),
        ({"embeddings": [[1.0]]}, "embeddings must be a tensor; found list"),
        ({"labels": LABELS.tolist()}, "labels must be a tensor; found list. torch.as_tensor"),
        ({"labels": LABELS.numpy()}, "labels must be a tensor; found ndarray"),
        ({"ref_emb": EMB, "ref_labels": LABELS.numpy()}, "ref_labels must be a tensor; found ndarray"),
        ({"self_index": [0, 1, 2, 3, 4]}, "self_index must be a tensor; found list"),
        ({"self_index": LABELS > 3}, "self_index must be .5,. integers"),
        ({"labels": LABELS[:4]}, r"labels must be \(5,\)"),
        ({"labels": LABELS.float()}, "2.24"),
        ({"labels": LABELS > 3}, "torch.bool"),
        ({"ref_emb": EMB}, "both or neither"),
        ({"ref_labels": LABELS}, "both or neither"),
        ({"ref_emb": torch.eye(6), "ref_labels": torch.zeros(6).long()}, "ref_emb has 6 dimensions, embeddings have 5"),
        ({"ref_emb": EMB, "ref_labels": LABELS[:2]}, r"ref_labels must be \(5,\)"),
        ({"self_index": torch.arange(4)}, r"self_index must be \(5,\)"),
        ({"self_index": torch.arange(5) + 1}, r"\[-1, 5\)"),
        ({"self_index": torch.arange(5) - 2}, r"\[-1, 5\)"),
        ({"self_index": torch.tensor([1, 2, 3, 3, 4])}, "another identity for 1 of 5 anchors .first: row 1"),
    ],
)
def test_what_does_not_fit_together_is_an_error_that_says_what_was_found(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batch(**{"embeddings": EMB, "labels": LABELS, **change})


def test_empty_batches_and_empty_references_are_allowed() -> None:
    assert check_batch(EMB[:0], LABELS[:0]).self_index.shape == (0,)
    batch = check_batch(EMB, LABELS, EMB[:0], LABELS[:0])
    assert batch.ref_labels.shape == (0,)
    assert batch.self_index.tolist() == [-1] * 5
