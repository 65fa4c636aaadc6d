"""Labels -> which images show which identity, as a CSR table of NumPy arrays."""

import hashlib
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class IdentityTable:
    """Image indices grouped by identity. All arrays are read-only.

    identities: (C,) the distinct labels, sorted, in the labels' own type (int64 or str where they came as a list).
    offsets: (C + 1,) int64; images[offsets[c]:offsets[c + 1]] are the images of identities[c].
    images: (N,) int32 or int64 image indices, grouped by identity, ascending within one.
    counts: (C,) int64 images per identity.
    """

    identities: NDArray[Any]
    offsets: NDArray[np.int64]
    images: NDArray[np.integer[Any]]
    counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        for array in (self.identities, self.offsets, self.images, self.counts):
            array.setflags(write=False)

    @property
    def num_identities(self) -> int:
        """C, the number of distinct labels."""
        return len(self.counts)

    @property
    def num_images(self) -> int:
        """N, the number of labels."""
        return len(self.images)

    def images_of(self, row: int) -> NDArray[np.integer[Any]]:
        """Ascending image indices of identities[row]."""
        return self.images[self.offsets[row] : self.offsets[row + 1]]

    @cached_property
    def digest(self) -> str:
        """Hex hash of labels and their order; equal for equal labels of any integer width or array type."""
        # In one fixed type: int32 and int64 labels that say the same shall hash the same, on any machine.
        whole = hashlib.blake2b(digest_size=16)
        if self.identities.dtype.kind in "iu":
            narrow = np.int64 if self.identities[-1] <= np.iinfo(np.int64).max else np.uint64
            whole.update(self.identities.astype(np.dtype(narrow).newbyteorder("<")).data)
        else:
            whole.update(repr(self.identities.tolist()).encode())
        whole.update(self.offsets.astype("<i8").data)
        whole.update(self.images.astype("<i8").data)
        return whole.hexdigest()


def group_by_identity(
    labels: Sequence[int] | Sequence[str] | NDArray[Any] | torch.Tensor, *, name: str = "labels"
) -> IdentityTable:
    """Group image indices 0..N-1 by their label.

    labels: (N,) whole numbers of any width and sign, or strings; list, NumPy array (memory-mapped too), pandas column
        or tensor. They are compared as they are and never pass through floating point.
    name: what errors call them.
    Returns the IdentityTable. Raises ValueError for no labels, another number of dimensions, and labels that are
    neither whole numbers nor strings (floats, booleans, missing values, a mixture).
    """
    array = _one_dimensional(labels, name)
    if array.dtype.kind in "iu":
        return _group(array, names=None)
    names, codes = _factorised(array, name)
    return _group(codes, names)


def _group(labels: NDArray[Any], names: NDArray[Any] | None) -> IdentityTable:
    """Group integer labels by one stable sort; where `names` is given, label i stands for names[i]."""
    order = np.argsort(labels, kind="stable")
    if len(order) <= np.iinfo(np.int32).max:
        order = order.astype(np.int32)  # before anything else is made: at 10 million images these are 80 MB each
    ordered = labels[order]
    starts = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    offsets = np.concatenate(([0], starts, [len(ordered)])).astype(np.int64)
    identities = np.array(ordered[offsets[:-1]])
    del ordered
    return IdentityTable(identities if names is None else names[identities], offsets, order, np.diff(offsets))


def _one_dimensional(labels: Any, name: str) -> NDArray[Any]:
    if isinstance(labels, torch.Tensor):
        if labels.numel() and (labels.is_floating_point() or labels.is_complex()):
            raise _wrong_type(name, f"a tensor of {labels.dtype}")  # here, since NumPy has no bfloat16
        labels = labels.detach().cpu().numpy()
    array = labels if isinstance(labels, np.ndarray) else _from_sequence(labels)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, one for each image; these have shape {array.shape}.")
    if len(array) == 0:
        raise ValueError(f"{name} are empty: there is no image to sample. Pass one for each image.")
    if array.dtype.kind not in "iuUSTO":
        raise _wrong_type(name, f"an array of {array.dtype}")
    return array


def _from_sequence(labels: Any) -> NDArray[Any]:
    """A list (or pandas column) as an array, without NumPy's silent 2**63 -> float64 and (1, "a") -> ("1", "a")."""
    array = np.asarray(labels)
    if array.ndim != 1 or len(array) == 0 or not isinstance(labels, list | tuple):
        return array
    objects = np.empty(len(labels), dtype=object)
    objects[:] = labels
    if array.dtype.kind in "iu" or (array.dtype.kind == "U" and all(isinstance(label, str) for label in labels)):
        return array
    return objects


def _factorised(array: NDArray[Any], name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Sorted distinct names and, for each image, which of them it has."""
    if array.dtype.kind in "US":
        names, codes = np.unique(array, return_inverse=True)
        return names, codes
    labels = array.tolist()
    whole = all(isinstance(label, numbers.Integral) and not isinstance(label, bool) for label in labels)
    if not (whole or any(all(isinstance(label, kind) for label in labels) for kind in (str, bytes))):
        raise _wrong_type(name, "objects of type " + ", ".join(sorted({type(label).__name__ for label in labels})))
    distinct = sorted(set(labels))
    rows = {label: row for row, label in enumerate(distinct)}
    names = np.empty(len(distinct), dtype=object)
    names[:] = distinct
    return names, np.fromiter((rows[label] for label in labels), dtype=np.int64, count=len(labels))


def _wrong_type(name: str, found: str) -> ValueError:
    return ValueError(
        f"{name} must be whole numbers or strings, found {found}. Floats merge identities above 2**24 and are never "
        "accepted: convert with .long(), .astype(np.int64) or .astype(str)."
    )
