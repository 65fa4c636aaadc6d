"""Embeddings of a whole data set, read as unit rows block by block: never a copy of the whole."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.float32]
Embeddings = NDArray[np.floating[Any]] | Tensor  # arrays may be memory maps; tensors lie on the CPU

BLOCK_NUMBERS = 1 << 22  # of a block of rows: 16 MiB in float32, 32 MiB while lengths are taken in float64


class UnitRows:
    """(N, D) embeddings whose rows are scaled to length 1 as they are read, in float32.

    embeddings: array (memory maps too) or CPU tensor of any floating type, within the range of float32; it is kept,
        not copied.
    Raises ValueError for another shape, type or device, and for rows without a direction (NaN, infinity, zeros), with
    their number and the first of them: everything is read once to know.
    """

    def __init__(self, embeddings: "Embeddings | UnitRows", name: str = "embeddings") -> None:
        if isinstance(embeddings, UnitRows):
            self.source: Embeddings = embeddings.source
        else:
            self.source = _checked_form(embeddings, name)
        self.shape: tuple[int, int] = (int(self.source.shape[0]), int(self.source.shape[1]))
        if not isinstance(embeddings, UnitRows):
            self._check_values(name)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def block_rows(self) -> int:
        """How many rows a block has."""
        return max(1, BLOCK_NUMBERS // self.shape[1])

    def at(self, rows: slice | NDArray[np.integer[Any]]) -> Rows:
        """Unit rows at a slice or at indices (n,): a fresh float32 (n, D)."""
        start, stop = rows.indices(len(self))[:2] if isinstance(rows, slice) else (0, len(rows))
        unit: Rows = np.empty((max(0, stop - start), self.shape[1]), dtype=np.float32)
        for first in range(start, stop, self.block_rows):
            part = slice(first, min(first + self.block_rows, stop))
            wide = self._values(part if isinstance(rows, slice) else rows[part]).astype(np.float64)
            wide /= _lengths(wide)[:, None]  # in float64 no square of a float32 overflows or vanishes
            unit[first - start : part.stop - start] = wide
        return unit

    def blocks(self) -> Iterator[tuple[int, Rows]]:
        """All rows in order: the index of the first and the unit rows (n, D) of each block."""
        for start in range(0, len(self), self.block_rows):
            yield start, self.at(slice(start, start + self.block_rows))

    def _values(self, rows: slice | NDArray[np.integer[Any]]) -> Rows:
        if isinstance(self.source, Tensor):
            index = rows if isinstance(rows, slice) else torch.from_numpy(rows.astype(np.int64))
            return self.source[index].float().numpy()
        with np.errstate(over="ignore"):  # infinity is found, and named
            return np.asarray(self.source[rows], dtype=np.float32)

    def _check_values(self, name: str) -> None:
        count, first = 0, -1
        for start in range(0, len(self), self.block_rows):
            lengths = _lengths(self._values(slice(start, start + self.block_rows)).astype(np.float64))
            bad = np.flatnonzero(~((lengths > 0) & np.isfinite(lengths)))
            if len(bad) and count == 0:
                first = start + int(bad[0])
            count += len(bad)
        if count:
            raise ValueError(
                f"{count:,} of {len(self):,} rows of {name} hold NaN or infinity or are zero, and have no direction "
                f"(first: row {first}). Look for a corrupt image or a diverged network, or leave these rows out."
            )


def _checked_form(embeddings: Embeddings, name: str) -> Embeddings:
    if isinstance(embeddings, Tensor):
        if embeddings.device.type != "cpu":
            raise ValueError(f"{name} must lie on the CPU; these are on {embeddings.device}. Pass {name}.cpu().")
        if embeddings.layout != torch.strided:
            raise ValueError(f"{name} must be dense; found {embeddings.layout}. Pass {name}.to_dense().")
        floating, kind = embeddings.is_floating_point(), str(embeddings.dtype)
        embeddings = embeddings.detach()
    elif isinstance(embeddings, np.ndarray):
        floating, kind = embeddings.dtype.kind == "f", str(embeddings.dtype)
    else:
        raise ValueError(f"{name} must be a NumPy array, a memory map or a tensor; found {type(embeddings).__name__}.")
    if embeddings.ndim != 2 or 0 in embeddings.shape or not floating:
        raise ValueError(
            f"{name} must be floating point numbers of shape (N, D), N and D at least 1; found {kind} of shape "
            f"{tuple(embeddings.shape)}."
        )
    return embeddings


def _lengths(wide: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, D) -> (n,) Euclidean lengths."""
    lengths: NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    return lengths
