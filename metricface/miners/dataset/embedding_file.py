"""The embeddings of a data set in a file, written batch by batch, that a second call goes on with."""

import errno
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from metricface.atomic import replacing
from metricface.choices import is_count
from metricface.modes import evaluating

SECONDS_BETWEEN_RECORDS = 10.0  # at most so much work is done twice after a kill
DTYPES = [np.dtype(name) for name in ("float16", "float32", "float64")]


@dataclass(frozen=True)
class Progress:
    """What stands beside an embedding file: how it was made and how many of its rows are there."""

    rows: int
    columns: int
    dtype: str
    tag: str
    done: int

    def write(self, path: Path) -> None:
        """Put this in place of what is at `path`, whole."""
        with replacing(path) as file:
            file.write((json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ValueError where this is no such record."""
        try:
            progress = cls(**json.loads(path.read_text(encoding="utf-8")))
            numbers = (progress.rows, progress.columns, progress.done)
            if not all(isinstance(number, int) for number in numbers) or not 0 <= progress.done <= progress.rows:
                raise ValueError(f"it holds {numbers}")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no record of an embedding file ({error}). Delete it and the file beside it, or give "
                "another path."
            ) from error
        return progress


@torch.no_grad()
def embed_to_file(
    model: nn.Module,
    dataset: Dataset[Any],
    path: str | os.PathLike[str],
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    prepare: Callable[[Any], Tensor] | None = None,
    device: str | torch.device = "cpu",
    dtype: DTypeLike = np.float32,
    tag: str = "",
) -> "np.memmap[Any, np.dtype[np.floating[Any]]]":
    """Embed every item of a data set, in order, into a .npy file.

    model: input -> (B, D) floating, on `device`; it runs in eval mode, and each of its modules gets its mode back.
    dataset: map-style, with a length. collate_fn: as for a DataLoader (metricface.data.images.keep for an ImageSet).
    prepare: batch from the loader -> input tensor of the model; by default the tensor itself or the first item of a
        tuple. path: of the file; beside it, at path + ".json", stands how many rows are done.
    dtype: of the file, float16, float32 or float64; embeddings are stored as the model gives them, not normalised.
    tag: what the embeddings depend on, say a digest of weights and data. A file with another tag is an error.

    Interrupted at any point, the same call goes on where the record says, at most 10 seconds of work before the end; a
    record never claims rows that are not on the disk. With all rows done, nothing is computed. One process at a time
    may write a file.
    Returns the file as a read-only memory map (N, D).
    Raises ValueError for wrong arguments, for a file that belongs to another tag, length, width or type, and for
    embeddings with NaN or infinity; OSError where the disk is full (it is asked for the whole file at the start). What
    was written stays.
    """
    path = Path(path)
    number, kind = _checked(dataset, batch_size, dtype, tag)
    wanted = Progress(number, 0, kind.name, tag, 0)
    progress = _found(path, wanted)
    if progress is None or progress.done < number:
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=range(0 if progress is None else progress.done, number),
            num_workers=num_workers,
            collate_fn=collate_fn,
            generator=torch.Generator().manual_seed(0),  # or the loader would draw from the global one
        )
        with evaluating(model):
            batches = (_as_array(model((prepare or _input)(batch).to(device)), kind) for batch in loader)
            _write(path, _record(path), progress or wanted, batches, batch_size)
    return np.lib.format.open_memmap(path, mode="r")


def _write(
    path: Path, record: Path, progress: Progress, batches: Iterator[NDArray[np.floating[Any]]], batch_size: int
) -> None:
    """Write batches of embeddings from row progress.done on; the record follows what has reached the disk."""
    first = next(batches)
    if progress.done == 0:
        progress = replace(progress, columns=first.shape[1])
        # The record comes first: a file without one is not ours, and one with a record of 0 rows may be written over.
        progress.write(record)
        _create(path, progress)
    file = os.open(path, os.O_RDWR)
    recorded = time.monotonic()
    try:
        for batch in itertools.chain([first], batches):
            _check_batch(batch, progress, batch_size)
            place = os.fstat(file).st_size - (progress.rows - progress.done) * batch[0].nbytes
            _write_at(file, batch.tobytes(), place)
            progress = replace(progress, done=progress.done + len(batch))
            if time.monotonic() - recorded >= SECONDS_BETWEEN_RECORDS:
                _keep(file, record, progress)
                recorded = time.monotonic()
    finally:  # whatever went wrong, what is there shall count
        try:
            _keep(file, record, progress)
        finally:
            os.close(file)


def _keep(file: int, record: Path, progress: Progress) -> None:
    os.fsync(file)
    progress.write(record)


def _write_at(file: int, data: bytes, place: int) -> None:
    """Not through the memory map: on a full disk that kills the process, where this raises OSError."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, place)
        rest, place = rest[written:], place + written


def _create(path: Path, progress: Progress) -> None:
    """A .npy file of the full size, of zeros, with its disk space taken."""
    header = {"descr": np.dtype(progress.dtype).str, "fortran_order": False, "shape": (progress.rows, progress.columns)}
    size = progress.rows * progress.columns * np.dtype(progress.dtype).itemsize
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), file.tell(), size)
            else:
                file.truncate(file.tell() + size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: {progress.rows:,} embeddings of {progress.columns} {progress.dtype} take "
                f"{size / 2**30:.2f} GiB. Free space, or choose another path or dtype=np.float16",
                str(path),
            ) from error


def _found(path: Path, wanted: Progress) -> Progress | None:
    """The record beside `path` if it is one of the same embeddings; None where there is neither record nor file."""
    record = _record(path)
    if not record.exists():
        if path.exists():
            raise ValueError(
                f"{path} exists, but no record {record.name} beside it: it may be anything. {_afresh(path)}"
            )
        return None
    found = Progress.read(record)
    for name in ("tag", "rows", "dtype"):
        if getattr(found, name) != getattr(wanted, name):
            raise ValueError(
                f"{path} was begun with {name} {getattr(found, name)!r}, and asked is {getattr(wanted, name)!r}. "
                f"{_afresh(path)}"
            )
    if found.done == 0:
        return None
    held = _held(path)
    if held != (found.rows, found.columns, found.dtype):
        raise ValueError(
            f"{path} should hold ({found.rows}, {found.columns}) {found.dtype} by its record; found "
            f"{held or 'something else'}. {_afresh(path)}"
        )
    return found


def _held(path: Path) -> tuple[int, int, str] | None:
    """Rows, columns and type of a .npy file as `_create` makes them, to the byte; None where it is another file."""
    try:
        there = np.load(path, mmap_mode="r", allow_pickle=False)
        whole = there.offset + there.nbytes == path.stat().st_size
    except (OSError, EOFError, ValueError, AttributeError):
        return None
    if there.ndim != 2 or not there.flags.c_contiguous or there.dtype.newbyteorder("=") != there.dtype or not whole:
        return None
    return (*there.shape, there.dtype.name)


def _checked(dataset: Dataset[Any], batch_size: int, dtype: DTypeLike, tag: str) -> tuple[int, "np.dtype[Any]"]:
    """The length of the data set and the type of the file, in this machine's byte order, if the arguments are right."""
    if not is_count(batch_size):
        raise ValueError(f"batch_size must be a whole number, at least 1; found {batch_size!r}.")
    try:
        kind = None if dtype is None else np.dtype(np.dtype(dtype).name)
    except TypeError:
        kind = None
    if kind is None or kind not in DTYPES:  # NumPy takes None for float64
        raise ValueError(f"dtype must be float16, float32 or float64; found {dtype!r}.")
    if not isinstance(tag, str):
        raise ValueError(f"tag must be a string, such as a digest of weights and data; found {tag!r}.")
    if not isinstance(dataset, Sized) or len(dataset) == 0:
        raise ValueError("dataset must be map-style, with a length of at least 1: its items are embedded in order.")
    return len(dataset), kind


def _check_batch(batch: NDArray[np.floating[Any]], progress: Progress, batch_size: int) -> None:
    expected = (min(batch_size, progress.rows - progress.done), progress.columns)
    if batch.shape != expected:
        raise ValueError(
            f"the model gave embeddings {batch.shape} for the items from {progress.done} on, where {expected} belong: "
            "it must give one row for each item, as wide as those in the file."
        )
    bad = np.flatnonzero(~np.isfinite(batch).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(batch)} embeddings of a batch hold NaN or infinity in {progress.dtype} (first: item "
            f"{progress.done + int(bad[0])}). The {progress.done:,} rows before it stay. Look for a corrupt image or a "
            "diverged network."
        )


def _as_array(embeddings: Any, dtype: DTypeLike) -> NDArray[np.floating[Any]]:
    fits = isinstance(embeddings, Tensor) and embeddings.ndim == 2 and embeddings.is_floating_point()
    if not fits or embeddings.shape[1] == 0:
        found = f"{embeddings.dtype} {tuple(embeddings.shape)}" if isinstance(embeddings, Tensor) else type(embeddings)
        raise ValueError(f"the model must give a floating tensor (B, D), D at least 1; found {found}.")
    wide = embeddings.double() if embeddings.dtype == torch.float64 else embeddings.float()  # NumPy has no bfloat16
    with np.errstate(over="ignore"):  # infinity in float16 is found, and named, later
        array: NDArray[np.floating[Any]] = wide.cpu().numpy().astype(dtype)
    return array


def _input(batch: Any) -> Tensor:
    first = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    if not isinstance(first, Tensor):
        raise ValueError(
            f"the loader gives {type(batch).__name__}, neither a tensor nor a tuple that starts with one. Pass "
            "prepare=, which makes the model's input of a batch."
        )
    return first


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _afresh(path: Path) -> str:
    return f"To start afresh, delete {path.name} and {_record(path).name}, or give another path."
