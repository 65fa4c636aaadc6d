import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from metricface.miners.dataset import index as index_module
from metricface.miners.dataset.calibration import least_effort
from metricface.miners.dataset.engines import ladder
from metricface.miners.dataset.index import EmbeddingIndex, IndexKind
from metricface.miners.dataset.inverted_lists import InvertedLists
from metricface.miners.dataset.rows import UnitRows
from tests.miners.dataset.faces import cosines, faces

APPROXIMATE: list[IndexKind] = ["ivf", "ivf-pq", "hnsw"]


def check_found(index: EmbeddingIndex, queries: Any, rows: Any, k: int, least: float = 1.0) -> None:
    """Cosines are those of the rows named, nearest first, and the share of the true ones is at least `least`."""
    found = index.search(queries, k)
    assert found.indices.shape == found.cos.shape == (len(queries), k)
    assert (found.indices.dtype.name, found.cos.dtype.name) == ("int64", "float32")
    exact = cosines(np.asarray(queries), np.asarray(rows))
    assert all(len(set(row)) == k for row in found.indices.tolist())
    np.testing.assert_allclose(found.cos, np.take_along_axis(exact, found.indices, axis=1), atol=2e-6)
    assert (np.diff(found.cos, axis=1) <= 0).all()
    kth = -np.sort(-exact, axis=1)[:, k - 1 : k]
    assert (found.cos >= kth - 2e-6).mean() >= least


def test_a_flat_index_finds_the_nearest_rows_of_queries_from_elsewhere() -> None:
    rows, _ = faces(40, 5, 24)
    queries, _ = faces(10, 3, 24, seed=1)
    index = EmbeddingIndex(rows)
    check_found(index, queries, rows, 7)
    assert (index.kind, index.effort, index.recall) == ("flat", 0, 1.0)
    found = index.search(queries, 7)
    assert found.indices.tolist() == np.argsort(-cosines(queries, rows), axis=1)[:, :7].tolist()


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_an_approximate_index_reaches_its_target_on_other_queries_and_repeats_itself(kind: IndexKind) -> None:
    rows, _ = faces(300, 10, 32)
    index = EmbeddingIndex(rows, kind=kind, target_recall=0.9, seed=3)
    assert index.recall >= 0.9
    assert index.effort >= 1
    check_found(index, rows[::5], rows, 10, least=0.88)
    again = EmbeddingIndex(rows, kind=kind, target_recall=0.9, seed=3)
    assert (again.effort, again.recall) == (index.effort, index.recall)
    for one, other in zip(index.search(rows, 10), again.search(rows, 10), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_a_target_of_one_is_met_by_searching_everything(kind: IndexKind) -> None:
    rows, _ = faces(60, 8, 12, within=1.5)
    index = EmbeddingIndex(rows, kind=kind, target_recall=1.0)
    assert index.recall == 1.0
    check_found(index, rows[:50], rows, 10)


def test_the_measured_recall_is_that_of_a_loop_over_the_sample() -> None:
    rows, _ = faces(100, 6, 16, within=1.0)
    index = EmbeddingIndex(rows, kind="ivf", target_recall=0.5, k=5)
    assert index.effort < index._engine.efforts[-1]
    exact = cosines(rows, rows)
    np.fill_diagonal(exact, -2.0)
    found = index.search(rows, 6)  # 600 rows: the sample is all of them
    raw = index._engine.search(index.rows.at(slice(0, 600)), 6, index.effort)
    shares = []
    for row in range(600):
        true = set(np.argsort(-exact[row])[:5].tolist())
        mine = set(raw.indices[row][np.argsort(-raw.cos[row], kind="stable")].tolist()) - {row}
        shares.append(len(true & mine) / 5)
    assert index.recall == pytest.approx(np.mean(shares), abs=1e-3)
    assert np.mean(shares) < 0.999
    assert found.indices.shape == (600, 6)


def test_effort_rises_with_the_target_and_with_the_neighbours_asked_for() -> None:
    rows, _ = faces(500, 6, 24, within=1.0)
    easy, hard = (EmbeddingIndex(rows, kind="ivf", target_recall=target) for target in (0.3, 0.98))
    assert 0.3 <= easy.recall < hard.recall
    assert hard.recall >= 0.98
    assert easy.effort < hard.effort
    assert easy.calibration(100).effort >= easy.calibration(10).effort
    assert easy.calibration(100).recall >= 0.3


def test_a_target_that_no_effort_meets_is_a_warning_with_the_recall_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = faces(100, 6, 16)
    monkeypatch.setattr("metricface.miners.dataset.inverted_lists.ladder", lambda most: [1])
    with pytest.warns(UserWarning, match=r"'ivf' reaches a recall of 0\.\d+ for 10 .* asked was 0\.99"):
        recall = EmbeddingIndex(rows, kind="ivf", target_recall=0.99).recall
    assert 0.0 < recall < 0.99


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_fewer_rows_than_neighbours_leave_minus_one_and_minus_infinity(kind: IndexKind) -> None:
    rows, _ = faces(3, 2, 8)
    found = EmbeddingIndex(rows, kind=kind).search(rows[:4], 9)
    assert (found.indices[:, 6:] == -1).all()
    assert np.isneginf(found.cos[:, 6:]).all()
    assert (np.sort(found.indices[:, :6], axis=1) == np.arange(6)).all()
    one = EmbeddingIndex(rows[:1], kind=kind).search(rows[:1], 2)
    assert one.indices.tolist() == [[0, -1]]


def test_a_query_whose_lists_hold_too_few_rows_is_searched_for_again() -> None:
    rows, _ = faces(400, 5, 16)
    index = EmbeddingIndex(rows, kind="ivf", target_recall=0.01, k=1)
    index._calibrations[500] = index.calibration(1)
    assert index.effort == 1
    assert (index._engine.search(index.rows.at(slice(0, 9)), 500, 1).indices < 0).any()
    assert (index.search(rows[:9], 500).indices >= 0).all()


def test_equal_cosines_come_lower_index_first() -> None:
    rows = np.repeat(faces(5, 1, 8)[0], 6, axis=0)
    found = EmbeddingIndex(rows, kind="flat").search(rows[::6], 6)
    assert found.indices.tolist() == [list(range(6 * i, 6 * i + 6)) for i in range(5)]


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_duplicates_do_not_spoil_the_measured_recall(kind: IndexKind) -> None:
    rows = np.repeat(faces(40, 1, 8)[0], 30, axis=0)  # more duplicates than neighbours asked for
    assert EmbeddingIndex(rows, kind=kind).recall >= 0.95


def test_memory_maps_tensors_and_half_precision_are_read_as_their_values(tmp_path: Path) -> None:
    rows, _ = faces(30, 4, 16)
    half = (rows / 10).astype(np.float16)
    np.save(tmp_path / "rows.npy", half)
    expected = EmbeddingIndex(half.astype(np.float32)).search(half[:9], 5)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for given in (half, mapped, torch.from_numpy(half), torch.from_numpy(half).double(), half[:, :][::1]):
        found = EmbeddingIndex(given).search(given[:9], 5)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.cos, expected.cos)
    bfloat = torch.from_numpy(rows).bfloat16().requires_grad_()
    check_found(EmbeddingIndex(bfloat), bfloat.detach().float().numpy(), bfloat.detach().float().numpy(), 4)


def test_rows_of_any_length_have_a_direction_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = faces(30, 4, 16)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    expected = EmbeddingIndex(rows).search(rows, 5)
    rows[::3] *= np.float32(1e30)
    rows[1::3] *= np.float32(1e-30)
    monkeypatch.setattr("metricface.miners.dataset.rows.BLOCK_NUMBERS", 7 * 16)
    monkeypatch.setattr(index_module, "QUERY_NUMBERS", 11 * 16)
    found = EmbeddingIndex(rows).search(rows, 5)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.cos, expected.cos, atol=1e-6)


def test_rows_without_a_direction_are_an_error_with_their_number_and_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metricface.miners.dataset.rows.BLOCK_NUMBERS", 7 * 8)
    rows, _ = faces(10, 4, 8)
    rows[[9, 22]] = 0.0
    rows[31, 2], rows[38, 5] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"4 of 40 rows of embeddings .* \(first: row 9\)"):
        EmbeddingIndex(rows)
    index = EmbeddingIndex(rows[:9])
    with pytest.raises(ValueError, match=r"1 of 2 rows of queries .* \(first: row 1\)"):
        index.search(rows[8:10], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "annoy"}, "'flat', 'ivf', 'ivf-pq', 'hnsw'"),
        ({"target_recall": 0.0}, "target_recall is a share"),
        ({"target_recall": 1.1}, "target_recall is a share"),
        ({"k": 0}, "k must be"),
        ({"max_bytes": 0.5}, "max_bytes must be"),
        ({"gpu": True}, "no GPU"),
        ({"gpu": True, "kind": "hnsw"}, "on the CPU only"),
        ({"kind": "ivf-pq"}, "at least as many embeddings; these are 40"),
    ],
)
def test_wrong_arguments_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingIndex(faces(10, 4, 8)[0], **arguments)


@pytest.mark.parametrize("rows", [np.ones((4,)), np.ones((0, 3)), np.ones((3, 2), dtype=np.int64), [[1.0, 2.0]]])
def test_what_is_not_a_table_of_floats_is_an_error(rows: Any) -> None:
    with pytest.raises(ValueError, match="embeddings must be"):
        EmbeddingIndex(rows)


def test_queries_of_another_width_are_an_error() -> None:
    rows, _ = faces(10, 4, 8)
    with pytest.raises(ValueError, match="queries have 5 columns, but the index holds rows of 8"):
        EmbeddingIndex(rows).search(rows[:, :5], 1)


def test_auto_is_flat_then_lists_then_compressed_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = faces(200, 5, 20)
    assert EmbeddingIndex(rows).kind == "flat"
    monkeypatch.setattr(index_module, "FLAT_UP_TO", 999)
    assert EmbeddingIndex(rows, max_bytes=1000 * 20 * 4).kind == "ivf"
    assert EmbeddingIndex(rows, max_bytes=1000 * 20 * 4 - 1).kind == "ivf-pq"


def test_compressed_lists_take_any_width() -> None:
    rows, _ = faces(60, 10, 19)
    check_found(EmbeddingIndex(rows, kind="ivf-pq"), rows[:60], rows, 5, least=0.93)


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_what_a_gpu_would_hold_is_searched_in_the_same_way(kind: IndexKind, monkeypatch: pytest.MonkeyPatch) -> None:
    # There is no GPU here: FAISS's own index stays on the CPU, and everything around it is put to the test.
    monkeypatch.setattr("metricface.miners.dataset.engines.on_gpu", lambda index: index)
    monkeypatch.setattr(index_module, "wants_gpu", lambda gpu: gpu is not False)
    rows, _ = faces(300, 10, 32)
    index = EmbeddingIndex(rows, kind=kind, target_recall=0.9, gpu=True)
    assert type(index._engine).__name__.startswith("Gpu")
    assert index.recall >= 0.9
    check_found(index, rows[::5], rows, 10, least=0.88 if kind == "ivf" else 1.0)
    with pytest.raises(ValueError, match="at most 2048 neighbours; these are 20"):
        index.search(rows[:1], 2049)


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf-pq"])
def test_threads_and_the_blocks_they_take_change_nothing(kind: IndexKind, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    rows, _ = faces(120, 8, 16)
    found = []
    before = faiss.omp_get_max_threads()
    for threads, visits in ((1, 1 << 21), (3, 1 << 21), (3, 500)):
        monkeypatch.setattr(faiss, "omp_get_max_threads", lambda threads=threads: threads)
        monkeypatch.setattr("metricface.miners.dataset.inverted_lists.VISITS_PER_BLOCK", visits)
        monkeypatch.setattr("metricface.miners.dataset.inverted_lists.BLOCK_NUMBERS", visits)
        found.append(EmbeddingIndex(rows, kind=kind).search(rows, 9))
    faiss.omp_set_num_threads(before)  # FAISS puts back what it is told there was, and torch shares the setting
    for other in found[1:]:
        np.testing.assert_array_equal(other.indices, found[0].indices)
        np.testing.assert_allclose(other.cos, found[0].cos, atol=1e-6)


def test_searching_leaves_the_number_of_threads_as_it_was() -> None:
    import faiss

    before = faiss.omp_get_max_threads()
    rows, _ = faces(40, 8, 16)
    for kind in (*APPROXIMATE, "flat"):
        EmbeddingIndex(rows, kind=kind).search(rows, 3)
    assert faiss.omp_get_max_threads() == before


def test_inverted_lists_find_what_faiss_finds_in_the_same_lists() -> None:
    import faiss

    rows, _ = faces(200, 6, 24)
    engine = InvertedLists(UnitRows(rows), 0)
    unit = UnitRows(rows).at(slice(0, len(rows)))
    theirs = faiss.IndexIVFFlat(engine._quantizer, 24, len(engine._centroids), faiss.METRIC_INNER_PRODUCT)
    theirs.is_trained = True
    theirs.add(unit)
    for effort in (1, 5, len(engine._centroids)):
        theirs.nprobe = effort
        cos, indices = theirs.search(unit, 7)
        mine = engine.search(unit, 7, effort)
        np.testing.assert_array_equal(np.sort(mine.indices, axis=1), np.sort(indices, axis=1))
        there = indices >= 0
        np.testing.assert_allclose(
            np.sort(mine.cos, axis=1)[there[:, ::-1]], np.sort(cos, axis=1)[there[:, ::-1]], atol=1e-6
        )
    assert engine._vectors.nbytes == rows.nbytes


def _enough_from(wanted: int, effort: int) -> NDArray[np.float64]:
    return np.full(9, float(effort >= wanted))


@pytest.mark.parametrize("most", [1, 2, 5, 90])
def test_the_least_effort_that_is_enough_is_chosen(most: int) -> None:
    efforts = ladder(most)
    for wanted in efforts:
        enough = partial(_enough_from, wanted)
        assert least_effort(efforts, enough, 0.9) == ((wanted, 1.0), True)
    assert least_effort(efforts, lambda effort: np.full(9, 0.5), 0.9) == ((efforts[-1], 0.5), False)


def test_two_standard_errors_are_kept_from_the_target() -> None:
    shares = np.array([1.0, 0.8] * 50)  # mean 0.9, standard error 0.01
    assert [least_effort([1], lambda _: shares, target)[1] for target in (0.879, 0.881)] == [True, False]


def test_faiss_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, metricface.miners.dataset; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_faiss_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install metricface\[cpu\]"):
        EmbeddingIndex(faces(3, 2, 4)[0])


def test_beside_pytorch_metric_learning_which_replaces_faisss_search_every_kind_still_searches() -> None:
    import faiss.contrib.torch_utils  # noqa: F401  # what PML loads; it stays for all tests after this one

    rows, _ = faces(40, 8, 16)
    for kind in (*APPROXIMATE, "flat"):
        assert EmbeddingIndex(rows, kind=kind).search(rows[:3], 1).indices.ravel().tolist() == [0, 1, 2]
