"""A ring of earlier embeddings: what is in it, in what order it forgets, and across a checkpoint."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metricface.losses import TripletLoss
from metricface.miners import BatchHardMiner, EmbeddingMemory
from tests.vectors import case


def numbered(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    number = torch.arange(first, first + count)
    return number[:, None].float().repeat(1, 2), number - 3  # labels below, at and above 0


def stored(memory: EmbeddingMemory) -> list[int]:
    rows, labels = memory.references()
    assert torch.equal(rows[:, 0].long() - 3, labels)
    return sorted(rows[:, 0].long().tolist())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.lists(st.integers(0, 15), max_size=8))
def test_the_last_rows_are_kept_whatever_the_sizes_of_batches(size: int, batches: list[int]) -> None:
    memory, added = EmbeddingMemory(size, 2), 0
    for count in batches:
        memory.add(*numbered(added, count))
        added += count
        assert stored(memory) == list(range(max(0, added - size), added))
        assert len(memory) == min(size, added)


def test_the_queue_is_a_ring_where_the_authors_code_overwrites_its_end() -> None:
    inputs, theirs = case("C7.xbm_queue")["inputs"], case("C7.xbm_queue")["expected"]
    memory = EmbeddingMemory(inputs["K"], 1)
    for label in (1, 2, 3, 1):
        memory.add(torch.full((2, 1), float(label)), torch.full((2,), label))
    assert sorted(memory.references()[1].tolist()) == [1, 1, 2, 3, 3]  # one 2 is older than the new 1s, and stays
    assert theirs[-1][1] == [1, 1, 2, 3, 3]
    memory.add(torch.full((2, 1), 4.0), torch.full((2,), 4))
    assert sorted(memory.references()[1].tolist()) == [1, 1, 3, 4, 4]


def test_a_full_memory_whose_last_label_is_zero_is_full() -> None:
    inputs, theirs = case("C7.xbm_label0_bug")["inputs"], case("C7.xbm_label0_bug")["expected"]
    assert (theirs["stored"], theirs["returned"]) == (4, 0)
    memory = EmbeddingMemory(inputs["K"], 1)
    for labels in inputs["batches"]:
        memory.add(torch.tensor(labels)[:, None].float(), torch.tensor(labels))
    assert len(memory.references()[1]) == 4


def test_the_queue_goes_on_after_a_checkpoint_as_if_there_had_been_none(tmp_path: Path) -> None:
    one, other = EmbeddingMemory(7, 2), EmbeddingMemory(7, 2)
    one.add(*numbered(0, 10))
    torch.save(one.state_dict(), tmp_path / "memory.pt")
    other.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    for memory in (one, other):
        memory.add(*numbered(10, 3))
    assert torch.equal(one.rows, other.rows)
    assert stored(other) == list(range(6, 13))


def test_a_batch_and_the_memory_are_mined_together_and_only_the_batch_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    memory = EmbeddingMemory(50, 4)
    memory.add(torch.randn(30, 4, generator=generator, dtype=torch.float64), torch.arange(30) // 3)
    x = torch.randn(8, 4, generator=generator).requires_grad_()
    labels = torch.arange(8) // 2
    ref_emb, ref_labels, self_index = memory.with_batch(x, labels)
    mined = BatchHardMiner()(x, labels, ref_emb, ref_labels, self_index=self_index)
    assert (mined.anchor != mined.positive).all()
    assert (mined.positive >= 8).any()
    TripletLoss("soft")(x, labels, mined, ref_emb, ref_labels).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert not memory.rows.requires_grad


def test_gradients_and_graphs_are_not_kept() -> None:
    memory = EmbeddingMemory(3, 2)
    memory.add(torch.ones(2, 2).requires_grad_() * 2, torch.zeros(2, dtype=torch.int32))
    assert not memory.references()[0].requires_grad


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (torch.ones(2, 3), torch.zeros(2).long(), r"floating \(batch, 2\)"),
        (torch.ones(2, 2), torch.zeros(3).long(), r"\(2,\) integers"),
        (torch.ones(2, 2), torch.zeros(2), "integers"),
        (torch.tensor([[1.0, torch.nan]]), torch.zeros(1).long(), "NaN"),
    ],
)
def test_what_cannot_be_stored_is_an_error_and_changes_nothing(
    embeddings: torch.Tensor, labels: torch.Tensor, message: str
) -> None:
    memory = EmbeddingMemory(5, 2)
    memory.add(*numbered(0, 3))
    with pytest.raises(ValueError, match=message):
        memory.add(embeddings, labels)
    assert stored(memory) == [0, 1, 2]


@pytest.mark.parametrize(("size", "dim"), [(0, 2), (2, 0), (1.5, 2), (True, 2)])
def test_sizes_that_mean_nothing_are_errors(size: int, dim: int) -> None:
    with pytest.raises(ValueError, match="whole number, at least 1"):
        EmbeddingMemory(size, dim)
