"""Everything a run needs to go on, in numbered files that are each whole or not there; the newest few are kept.

A file's name holds its number and the beginning of its SHA-256: a file that was cut short or changed after it was
written is noticed, and the one before it is used.
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

VERSION = 6
KEPT = 2
FOLDER = "checkpoints"
_NAME = re.compile(r"(\d{6,})-([0-9a-f]{16})\.pt")


class NotWrittenError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


def save(state: dict[str, Any], run: Path, *, kept: int = KEPT) -> Path:
    """Write `state` (tensors and plain values only) as the newest checkpoint of the run in that folder; return it.

    Older ones than the newest `kept` are deleted afterwards. A crash, a full disk or a kill at any moment leaves those
    that are there as they are. Raises NotWrittenError, naming the folder and the reason, where it cannot be written.
    """
    folder = run / FOLDER
    before = _by_age(run)
    number = 1 + (_number(before[0]) if before else 0)
    part = folder / f".{number:06d}.part"
    hashed: _Hashed | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                hashed = _Hashed(file)
                torch.save({"version": VERSION, **state}, hashed)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            made = folder / f"{number:06d}-{hashed.digest()}.pt"
            os.replace(part, made)
        finally:
            part.unlink(missing_ok=True)
        _sync(folder)
    except (OSError, RuntimeError) as error:
        why = error if hashed is None or hashed.fault is None else hashed.fault
        raise NotWrittenError(
            f"Could not write a checkpoint to {folder}: {why}. Those before it, if any, are intact; make room, and go "
            "on with --resume."
        ) from error
    for old in [*before[kept - 1 :], *folder.glob(".*.part")]:
        old.unlink(missing_ok=True)
    return made


def load(run: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Read the newest checkpoint of a run that is whole, tensors on the CPU; nothing in the file is executed.

    Where a newer one is damaged, `say` tells so. Raises FileNotFoundError where there is none, another OSError where it
    cannot be read, ValueError where all are damaged or the newest whole one is of another version.
    """
    found = _by_age(run)
    if not found:
        raise FileNotFoundError(f"There is no checkpoint in {run / FOLDER}; was the run stopped before its first one?")
    damaged = []
    for file in found:
        state = _read(file)
        if state is None:
            damaged.append(file.name)
            continue
        if damaged:
            say(f"Damaged, and passed over: {', '.join(damaged)} in {run / FOLDER}. Going on from {file.name}.")
        if state.get("version") != VERSION:
            raise ValueError(f"{file} is no checkpoint of version {VERSION}; found {state.get('version')}.")
        return state
    raise ValueError(f"No checkpoint in {run / FOLDER} is whole; damaged: {', '.join(damaged)}.")


def newest(run: Path) -> Path | None:
    """The newest checkpoint of the run in that folder, whole or not; None where there is none."""
    return next(iter(_by_age(run)), None)


class _Hashed:
    """A file that is written from its beginning to its end, and hashed on the way.

    fault: of the write that failed; torch.save tells of one in words of its own.
    """

    fault: OSError | None = None

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sum = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._sum.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.fault = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._sum.hexdigest()[:16]


def _read(file: Path) -> dict[str, Any] | None:
    """What is in a checkpoint; None where it is damaged."""
    match = _NAME.fullmatch(file.name)
    assert match is not None
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest()[:16] != match[2]:
            return None
        opened.seek(0)
        try:
            state = torch.load(opened, map_location="cpu", weights_only=True)
        except (OSError, MemoryError):
            raise
        except Exception:  # torch raises what it likes for a file that is none of its own
            return None
    return state if isinstance(state, dict) else None


def _by_age(run: Path) -> list[Path]:
    """The newest first."""
    return sorted((file for file in (run / FOLDER).glob("*.pt") if _NAME.fullmatch(file.name)), key=_number)[::-1]


def _number(file: Path) -> int:
    return int(file.name.partition("-")[0])


def _sync(folder: Path) -> None:
    """Let the renaming reach the disk, where the system can be asked for it."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
