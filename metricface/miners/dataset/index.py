"""Nearest neighbours among the embeddings of a whole data set, by cosine, with the recall measured."""

import warnings
from typing import Literal, TypedDict, get_args

import numpy as np

from metricface.choices import check_choice, is_count, is_number
from metricface.miners.dataset.calibration import Calibration, Found, Sample, least_effort
from metricface.miners.dataset.engines import Engine, Flat, GpuFlat, GpuLists, Graph, wants_gpu
from metricface.miners.dataset.inverted_lists import CompressedLists, InvertedLists
from metricface.miners.dataset.rows import Embeddings, Rows, UnitRows

IndexKind = Literal["auto", "flat", "ivf", "ivf-pq", "hnsw"]
INDEX_KINDS: tuple[IndexKind, ...] = get_args(IndexKind)

FLAT_UP_TO = 50_000
QUERY_NUMBERS = 1 << 23  # of a block of queries: 32 MiB


class IndexOptions(TypedDict, total=False):
    """What functions that build an EmbeddingIndex hand on to it."""

    kind: IndexKind
    target_recall: float
    seed: int
    gpu: bool | None
    max_bytes: int


class EmbeddingIndex:
    """An index over (N, D) embeddings for searches by cosine similarity.

    embeddings: array, memory map or CPU tensor of any floating type. Rows are scaled to length 1, block by block, as
        they are added; a memory map is never copied as a whole beside the index.
    kind: "flat" (exact), "ivf" (inverted lists), "ivf-pq" (inverted lists of compressed vectors; candidates are then
        compared exactly, from `embeddings`, which must stay unchanged) or "hnsw" (a graph). "auto": flat up to 50,000
        rows, where an exact search of everything takes less than building anything else; then ivf; ivf-pq where the
        vectors would take more than `max_bytes`.
    target_recall: in (0, 1]. An approximate index measures, on a seeded sample of up to 1,024 of its own rows, which
        share of their k true nearest others it finds, and takes the least effort whose share is above the target by
        twice its standard error. Measured for each k when it is first searched for; `effort` and `recall` say what was
        chosen and reached for `k`. Where no effort reaches the target a warning says what the greatest one reached.
        Miners that look for images of other identities measure the share of those that they find (`calibrated`).
    seed: of the sample and of the clustering. The same embeddings and seed give the same index.
    gpu: for flat and ivf. None takes a GPU if FAISS has one; True insists.

    Raises ValueError for wrong arguments and for rows with NaN, infinity or zeros only, ImportError without FAISS.
    """

    kind: Literal["flat", "ivf", "ivf-pq", "hnsw"]

    def __init__(
        self,
        embeddings: Embeddings | UnitRows,
        *,
        kind: IndexKind = "auto",
        target_recall: float = 0.95,
        k: int = 10,
        seed: int = 0,
        gpu: bool | None = None,
        max_bytes: int = 8 << 30,
    ) -> None:
        check_choice("kind", kind, INDEX_KINDS)
        if not is_number(target_recall) or not 0.0 < target_recall <= 1.0:
            raise ValueError(f"target_recall is a share, above 0 and at most 1; found {target_recall!r}.")
        for name, value in (("k", k), ("max_bytes", max_bytes)):
            if not is_count(value):
                raise ValueError(f"{name} must be a whole number, at least 1; found {value!r}.")
        if gpu and kind in ("ivf-pq", "hnsw"):
            raise ValueError(f"kind={kind!r} searches on the CPU only. Leave gpu=None, or use kind='ivf' or 'flat'.")
        on_gpu = wants_gpu(gpu)
        self.rows = UnitRows(embeddings)
        self.kind = _kind_for(self.rows, max_bytes) if kind == "auto" else kind
        self.target_recall = target_recall
        self.k = k
        self.seed = seed
        self._engine = _built(self.kind, self.rows, on_gpu, seed)
        self._sample: Sample | None = None
        self._calibrations: dict[int, Calibration] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def effort(self) -> int:
        """For `k`: lists looked through (ivf, ivf-pq), candidates kept (hnsw); 0 for an exact search."""
        return self.calibration(self.k).effort

    @property
    def recall(self) -> float:
        """Share of the `k` true nearest others that `effort` found in the sample; 1.0 for an exact search."""
        return self.calibration(self.k).recall

    def search(self, queries: Embeddings | UnitRows, k: int) -> Found:
        """The k nearest rows of each query (Q, D); a query that is a row of the index finds itself, too.

        Streamed in blocks of queries. Where the effort of a block leaves a query with fewer than min(k, N) rows, it is
        searched for again with more. Raises ValueError for another width, k < 1, and queries without a direction.
        """
        if not is_count(k):
            raise ValueError(f"k must be a whole number, at least 1; found {k!r}.")
        asked = UnitRows(queries, "queries")
        if asked.shape[1] != self.rows.shape[1]:
            raise ValueError(
                f"queries have {asked.shape[1]} columns, but the index holds rows of {self.rows.shape[1]}."
            )
        found = Found(np.full((len(asked), k), -1, dtype=np.int64), np.full((len(asked), k), -np.inf, dtype=np.float32))
        step = max(1, QUERY_NUMBERS // asked.shape[1])
        for start in range(0, len(asked), step):
            block = asked.at(slice(start, start + step))
            part = self.nearest(block, k)
            found.indices[start : start + len(block), : part.indices.shape[1]] = part.indices
            found.cos[start : start + len(block), : part.cos.shape[1]] = part.cos
        return found

    def nearest(self, queries: Rows, k: int, effort: int | None = None) -> Found:
        """As `search`, for one block of queries that are unit rows in float32 already.

        effort: of a calibration; None: of the one for k.
        """
        k_there = min(k, len(self))
        if effort is None:
            effort = self.calibration(k).effort
        found = self._ordered(queries, k_there, effort)
        more = [step for step in self._engine.efforts if step > effort]
        for step in [*more[3:-1:4], *more[-1:]]:
            short = np.flatnonzero(found.indices[:, -1] < 0)
            if len(short) == 0:
                break
            again = self._ordered(queries[short], k_there, step)
            found.indices[short], found.cos[short] = again
        if k_there == k:
            return found
        return Found(
            np.pad(found.indices, ((0, 0), (0, k - k_there)), constant_values=-1),
            np.pad(found.cos, ((0, 0), (0, k - k_there)), constant_values=-np.inf),
        )

    def calibration(self, k: int) -> Calibration:
        """The effort for k neighbours and the recall measured with it; measured when k is first asked for."""
        if k not in self._calibrations:
            if self._sample is None:
                self._sample = Sample(self.rows, self.seed)
            self._calibrations[k] = self.calibrated(self._sample, k)
        return self._calibrations[k]

    def calibrated(self, sample: Sample, k: int) -> Calibration:
        """The least effort that finds the target share of a sample's k nearest neighbours, and the share it found.

        Warns where no effort does; the greatest is taken then.
        """
        efforts = self._engine.efforts
        if efforts == (0,):
            return Calibration(0, 1.0)
        found, met = least_effort(
            efforts,
            lambda effort: sample.shares(lambda queries, asked: self._ordered(queries, asked, effort), k),
            self.target_recall,
        )
        if not met:
            warnings.warn(
                f"an index of kind {self.kind!r} reaches a recall of {found.recall:.4f} for {k} neighbours at its "
                f"greatest effort ({found.effort}); asked was {self.target_recall}. Use kind='flat' or a lower "
                "target_recall.",
                stacklevel=4,
            )
        return found

    def _ordered(self, queries: Rows, k: int, effort: int) -> Found:
        cos, indices = self._engine.search(queries, k, effort)
        cos = np.where(indices < 0, -np.inf, cos.clip(-1.0, 1.0)).astype(np.float32)
        by_index = np.argsort(indices, axis=1, kind="stable")
        cos, indices = np.take_along_axis(cos, by_index, axis=1), np.take_along_axis(indices, by_index, axis=1)
        order = np.argsort(-cos, axis=1, kind="stable")
        return Found(np.take_along_axis(indices, order, axis=1), np.take_along_axis(cos, order, axis=1))


def _kind_for(rows: UnitRows, max_bytes: int) -> Literal["flat", "ivf", "ivf-pq"]:
    """The kind for "auto"."""
    if len(rows) <= FLAT_UP_TO:
        return "flat"
    return "ivf" if 4 * len(rows) * rows.shape[1] <= max_bytes else "ivf-pq"


def _built(kind: IndexKind, rows: UnitRows, gpu: bool, seed: int) -> Engine:
    if kind == "flat":
        return GpuFlat(rows) if gpu else Flat(rows)
    if kind == "ivf":
        return GpuLists(rows, seed) if gpu else InvertedLists(rows, seed)
    return CompressedLists(rows, seed) if kind == "ivf-pq" else Graph(rows)
