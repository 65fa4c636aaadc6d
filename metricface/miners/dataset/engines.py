"""How neighbours are looked up: the interface, exact search, a graph, and FAISS's own indexes on a GPU.

An engine holds N unit rows and answers inner products, which are cosines.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from metricface.miners.dataset.rows import Rows, UnitRows

Indices = NDArray[np.int64]

ROWS_PER_LIST = 50  # of a sample, to learn centroids from
ITERATIONS = 10  # of that learning: further ones change recall by less than a sample of queries shows
GPU_MOST = 2048  # FAISS on a GPU gives no more neighbours, and looks through no more lists


class Raw(NamedTuple):
    """What an engine found: (Q, k) each, in any order among equals; -1 and anything where there was nothing more."""

    cos: Rows
    indices: Indices


class Engine(Protocol):
    """N unit rows that can be searched."""

    @property
    def efforts(self) -> Sequence[int]:
        """The settings that trade time for recall, least first; (0,) for an exact search."""
        ...

    def search(self, queries: Rows, k: int, effort: int) -> Raw:
        """The k rows of largest inner product with each of queries (Q, D) that are found with this effort."""
        ...


def faiss_module() -> Any:
    """FAISS, imported when first needed. Raises ImportError that says what to install."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "mining over a whole data set needs FAISS, which is not installed: pip install metricface[cpu] "
            "(or metricface[gpu] on a machine with an NVIDIA GPU)."
        ) from error
    return faiss


def wants_gpu(gpu: bool | None) -> bool:
    """Whether to search on a GPU: as asked, or, for None, where FAISS has one."""
    if gpu is False:
        return False
    present = faiss_module().get_num_gpus() > 0
    if gpu and not present:
        raise ValueError("gpu=True, but this FAISS finds no GPU. Install metricface[gpu], or leave gpu=None.")
    return bool(present)


class Flat:
    """Exact search: each query against all rows. Holds N x D float32."""

    efforts = (0,)

    def __init__(self, rows: UnitRows) -> None:
        # An array of our own: an IndexFlat grows by doubling and holds up to three times as much while it does.
        self._rows: Rows = np.empty(rows.shape, dtype=np.float32)
        for start, block in rows.blocks():
            self._rows[start : start + len(block)] = block

    def search(self, queries: Rows, k: int, effort: int) -> Raw:
        """Exact; effort has no meaning."""
        return in_threads(partial(inner_products, rows=self._rows, k=k), queries, len(queries))


class Graph:
    """A navigable small world: each row is linked to near ones. Holds N x (D + 64) float32; needs no training.

    An effort is the number of candidates a query keeps while it walks. Built on one thread, since the order in which
    threads add rows would change the graph.
    Source: Malkov and Yashunin 2018, Efficient and Robust Approximate Nearest Neighbor Search Using HNSW Graphs.
    """

    def __init__(self, rows: UnitRows) -> None:
        faiss = faiss_module()
        self._index = faiss.IndexHNSWFlat(rows.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        with one_thread():
            for _, block in rows.blocks():
                self._index.add(block)
        self.efforts = [effort for effort in ladder(len(rows)) if effort >= 16] or [len(rows)]

    def search(self, queries: Rows, k: int, effort: int) -> Raw:
        """What a walk with `effort` candidates (at least k) meets."""
        # Not as an argument: faiss.contrib.torch_utils, which pytorch-metric-learning loads, puts a search in place
        # of FAISS's that does not know it.
        self._index.hnsw.efSearch = max(effort, k)
        return Raw(*self._index.search(queries, k))


class GpuFlat:
    """Exact search on a GPU. Holds N x D float32 there."""

    efforts = (0,)

    def __init__(self, rows: UnitRows) -> None:
        self._index = on_gpu(faiss_module().IndexFlatIP(rows.shape[1]))
        for _, block in rows.blocks():
            self._index.add(block)

    def search(self, queries: Rows, k: int, effort: int) -> Raw:
        """Exact; effort has no meaning."""
        check_gpu_most(k)
        return Raw(*self._index.search(queries, k))


class GpuLists:
    """FAISS's inverted lists on a GPU, which holds N x D float32. An effort is a number of lists."""

    def __init__(self, rows: UnitRows, seed: int) -> None:
        faiss = faiss_module()
        dim, lists = rows.shape[1], number_of_lists(len(rows))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.cp.niter = seed, ITERATIONS
        index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, len(rows)
        self._index = on_gpu(index)
        self._index.train(training_rows(rows, lists, seed))
        for _, block in rows.blocks():
            self._index.add(block)
        self.efforts = ladder(min(lists, GPU_MOST))

    def search(self, queries: Rows, k: int, effort: int) -> Raw:
        """The best among the rows of the `effort` nearest lists."""
        check_gpu_most(k)
        self._index.nprobe = effort  # not as an argument, see Graph
        return Raw(*self._index.search(queries, k))


def check_gpu_most(k: int) -> None:
    """Raise ValueError where FAISS on a GPU cannot give so many neighbours."""
    if k > GPU_MOST:
        raise ValueError(f"FAISS on a GPU gives at most {GPU_MOST} neighbours; these are {k}. Pass gpu=False.")


def on_gpu(index: Any) -> Any:
    """The same index on the first GPU."""
    return faiss_module().index_cpu_to_all_gpus(index, ngpu=1)


def training_rows(rows: UnitRows, lists: int, seed: int) -> Rows:
    """A seeded sample of rows to learn the centroids of lists, and the codes of vectors, from."""
    wanted = min(len(rows), max(ROWS_PER_LIST * lists, 1 << 14))
    sample = np.random.default_rng(seed).choice(len(rows), wanted, replace=False, shuffle=False)
    return rows.at(np.sort(sample))  # sorted, to read a memory map in order


def number_of_lists(rows: int) -> int:
    """How many inverted lists N rows are put into: about 4 sqrt(N), a power of two."""
    return int(max(1, min(rows // 30, 2 ** round(np.log2(4.0 * np.sqrt(rows))))))


def ladder(most: int) -> list[int]:
    """1, 2, 3, ... 8, 10, 12, 14, 16, 20, 24, ...: four steps a doubling, up to and with `most`."""
    steps = sorted({quarters << power >> 2 for power in range(64) for quarters in (4, 5, 6, 7)})
    return [step for step in steps if step < most] + [most]


def inner_products(queries: Rows, rows: Rows, k: int) -> Raw:
    """The k rows of largest inner product with each query, by comparing with all."""
    faiss = faiss_module()
    return Raw(*faiss.knn(queries, rows, k, metric=faiss.METRIC_INNER_PRODUCT))


def in_threads(search: Callable[[Rows], Raw], queries: Rows, most: int) -> Raw:
    """Search for parts of the queries, of at most `most`, side by side; each part on one thread.

    FAISS alone would split each product among threads that wait for each other, spinning. Where training, say, has the
    cores, that made small products 10 times and large ones twice as slow as one thread.
    """
    faiss = faiss_module()
    threads = faiss.omp_get_max_threads()
    step = max(1, min(most, -(-len(queries) // threads)))
    parts = [queries[start : start + step] for start in range(0, len(queries), step)]
    # The number of threads is a setting of the thread that sets it.
    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(search, parts))
    return Raw(np.concatenate([part.cos for part in found]), np.concatenate([part.indices for part in found]))


@contextmanager
def one_thread() -> Iterator[None]:
    """What FAISS does inside stays on the thread that calls."""
    faiss = faiss_module()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
