"""Rows in lists around learnt centroids, searched list by list for many queries at once.

FAISS learns the centroids and codes and keeps the best of each query, but its own inverted lists go query by query:
each reads the lists it looks through from memory, at the speed of memory. All queries of a data set look through the
same lists, so here each list meets all its queries in one matrix product: 4.5 times as fast on one core (100,000 x 128,
512 lists, 128 of them looked through; the idea is that of FAISS's contrib.big_batch_search). The vectors lie sorted by
list in one array that is allocated once.
"""

import numpy as np

from metricface.miners.dataset.engines import (
    ITERATIONS,
    ROWS_PER_LIST,
    Indices,
    Raw,
    faiss_module,
    in_threads,
    ladder,
    number_of_lists,
    one_thread,
    training_rows,
)
from metricface.miners.dataset.rows import BLOCK_NUMBERS, Rows, UnitRows

VISITS_PER_BLOCK = 1 << 21  # of a list by a query: about 50 MiB for each thread
PQ_CODES = 256  # of each part of a vector: 8 bits
CANDIDATES = 8  # compared exactly for each neighbour wanted: with fewer the best are missed, more cost more than lists


class InvertedLists:
    """Inverted lists of unit rows. Holds N x D float32. An effort is a number of lists a query looks through."""

    def __init__(self, rows: UnitRows, seed: int) -> None:
        faiss = faiss_module()
        lists = number_of_lists(len(rows))
        sample = training_rows(rows, lists, seed)
        learning = faiss.Kmeans(
            rows.shape[1],
            lists,
            niter=ITERATIONS,
            seed=seed,
            spherical=True,
            min_points_per_centroid=1,  # without a warning on stdout where rows are few
            max_points_per_centroid=len(sample),
        )
        learning.train(sample)
        self._centroids: Rows = learning.centroids
        self._quantizer = faiss.IndexFlatIP(rows.shape[1])
        self._quantizer.add(self._centroids)
        self.efforts = ladder(lists)
        list_of = np.empty(len(rows), dtype=np.int64)
        for start, block in rows.blocks():
            list_of[start : start + len(block)] = self._quantizer.search(block, 1)[1][:, 0]
        self._ids: Indices = np.argsort(list_of, kind="stable")  # rows by list, ascending within one
        self._offsets = np.concatenate(([0], np.cumsum(np.bincount(list_of, minlength=lists))))
        self._fill(rows, list_of, sample, seed)

    def search(self, queries: Rows, k: int, effort: int) -> Raw:
        """The best among the rows of the `effort` nearest lists."""
        return in_threads(lambda part: self._by_list(part, k, effort), queries, max(1, VISITS_PER_BLOCK // effort))

    def _by_list(self, queries: Rows, k: int, effort: int) -> Raw:
        faiss = faiss_module()
        lists = len(self._centroids)
        visited = self._quantizer.search(queries, effort)[1].ravel()  # (Q * effort,)
        # NumPy sorts 16 bits by counting, three times as fast as 64.
        order = np.argsort(visited.astype(np.uint16) if lists <= 1 << 16 else visited, kind="stable")
        bounds = np.concatenate(([0], np.cumsum(np.bincount(visited, minlength=lists))))
        by_list = order // effort  # queries, grouped by the list they visit
        best = faiss.ResultHeap(len(queries), k, keep_max=True)
        for number in range(lists):
            ids = self._ids[self._offsets[number] : self._offsets[number + 1]]
            if len(ids) == 0 or bounds[number] == bounds[number + 1]:
                continue
            # FAISS's plain matrix product, which keeps to this thread; NumPy's does as its library is set.
            product = faiss.LinearTransform(queries.shape[1], len(ids))
            faiss.copy_array_to_vector(self._vectors_of(number).ravel(), product.A)
            product.is_trained = True
            rows = max(1, BLOCK_NUMBERS // len(ids))
            for start in range(bounds[number], bounds[number + 1], rows):
                asking = by_list[start : min(start + rows, bounds[number + 1])]
                best.add_result_subset(asking, product.apply(queries[asking]), ids)
        best.finalize()
        return Raw(best.D, best.I)

    def _fill(self, rows: UnitRows, list_of: Indices, sample: Rows, seed: int) -> None:
        self._vectors: Rows = np.empty(rows.shape, dtype=np.float32)
        place = _inverse(self._ids)
        for start, block in rows.blocks():
            self._vectors[place[start : start + len(block)]] = block

    def _vectors_of(self, number: int) -> Rows:
        return self._vectors[self._offsets[number] : self._offsets[number + 1]]


class CompressedLists(InvertedLists):
    """Inverted lists of vectors compressed to about D / 4 bytes; the best candidates are compared again, exactly.

    What is compressed is a row's difference from its list's centroid. The exact cosines are read from the embeddings
    (a memory map, say), which stay where they are. Candidates for each neighbour grow with the effort, from 8 on.
    Source: Jegou et al. 2011, Product Quantization for Nearest Neighbor Search.
    """

    def __init__(self, rows: UnitRows, seed: int) -> None:
        if len(rows) < PQ_CODES:
            raise ValueError(
                f"kind='ivf-pq' learns {PQ_CODES} codes and needs at least as many embeddings; these are "
                f"{len(rows):,}. Use kind='flat'."
            )
        self._rows = rows
        super().__init__(rows, seed)

    def search(self, queries: Rows, k: int, effort: int) -> Raw:
        """The best by exact cosine among the candidates that compressed vectors give."""
        candidates = min(len(self._rows), k * max(CANDIDATES, effort // CANDIDATES))
        return in_threads(
            lambda part: self._compared_again(part, self._by_list(part, candidates, effort).indices, k),
            queries,
            max(1, VISITS_PER_BLOCK // max(effort, candidates)),
        )

    def _compared_again(self, queries: Rows, found: Indices, k: int) -> Raw:
        cos = self._exact(queries, found)
        best = np.argsort(-cos, axis=1, kind="stable")[:, :k]
        return Raw(np.take_along_axis(cos, best, axis=1), np.take_along_axis(found, best, axis=1))

    def _exact(self, queries: Rows, found: Indices) -> Rows:
        """Cosine of each query with its candidates: (Q, c), -inf where there is none."""
        cos = np.empty(found.shape, dtype=np.float32)
        step = max(1, BLOCK_NUMBERS // (found.shape[1] * queries.shape[1]))
        for start in range(0, len(found), step):
            near = found[start : start + step]
            rows = self._rows.at(near.ravel().clip(min=0)).reshape(*near.shape, -1)  # (b, c, D)
            cos[start : start + step] = np.matmul(rows, queries[start : start + step, :, None])[:, :, 0]
        return np.where(found < 0, np.float32(-np.inf), cos)

    def _fill(self, rows: UnitRows, list_of: Indices, sample: Rows, seed: int) -> None:
        faiss = faiss_module()
        self._padding = -rows.shape[1] % 4  # zeros, which change no cosine
        parts = (rows.shape[1] + self._padding) // 4
        self._coder = faiss.ProductQuantizer(4 * parts, parts, 8)
        self._coder.cp.seed, self._coder.cp.min_points_per_centroid = seed, 1
        self._coder.cp.niter = ITERATIONS
        sample = sample[:: max(1, len(sample) // (ROWS_PER_LIST * PQ_CODES))]
        with one_thread():  # thousands of tiny products
            self._coder.train(self._residuals(sample, self._quantizer.search(sample, 1)[1][:, 0]))
        self._codes = np.empty((len(rows), parts), dtype=np.uint8)
        place = _inverse(self._ids)
        for start, block in rows.blocks():
            to = start + len(block)
            self._codes[place[start:to]] = self._coder.compute_codes(self._residuals(block, list_of[start:to]))

    def _residuals(self, rows: Rows, list_of: Indices) -> Rows:
        return np.pad(rows - self._centroids[list_of], ((0, 0), (0, self._padding)))

    def _vectors_of(self, number: int) -> Rows:
        codes = self._codes[self._offsets[number] : self._offsets[number + 1]]
        decoded: Rows = self._coder.decode(codes)[:, : self._centroids.shape[1]] + self._centroids[number]
        return decoded


def _inverse(permutation: Indices) -> Indices:
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation))
    return inverse
