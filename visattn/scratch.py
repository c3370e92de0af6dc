"""Large arrays that lie in memory, or in files that nobody else sees where memory is bounded.

The code that fills and reads them is the same in both cases, so a bound changes where numbers lie and never which.
Files have no name: whatever ends the process, nothing is left behind.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

SMALL = 16 * 2**20
"""Bytes up to which an array lies in memory in any case."""


class Scratch:
    """Makes arrays.

    Args:
        folder: Where files are made; None: everything lies in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An array of zeros.

        Raises:
            OSError: The disk does not hold it.
        """
        dtype = np.dtype(dtype)
        size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
        if self.folder is None or size <= SMALL:
            return np.zeros(tuple(shape), dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            # A file with holes would kill the process when the disk turns out to be full.
            os.posix_fallocate(file.fileno(), 0, size)
            array = np.memmap(file, dtype, "r+", shape=tuple(shape))
        owner: Any = array.base
        start = array.__array_interface__["data"][0]
        _MAPS[start] = (start + size, weakref.ref(owner, lambda _: _MAPS.pop(start, None)))
        return array


_MAPS: dict[int, tuple[int, "weakref.ref[mmap.mmap]"]] = {}
"""First address to the one behind the last, and the map of files that are there. A tensor made of an array, and an
array made of that tensor, know the address and nothing else."""


def release(array: NDArray[Any]) -> None:
    """Give back the memory of an array that lies in a file; its content stays. Nothing happens for any other."""
    owner = _owner(array)
    if owner is not None:
        owner.madvise(mmap.MADV_DONTNEED)


def copied(view: NDArray[Any]) -> NDArray[Any]:
    """A copy of a part of an array; where that lies in a file, little of the file is in memory at a time.

    A slab along the axis that is closest together in memory touches every page of the file, however thin it is.
    """
    if _owner(view) is None or not view.size:
        return view.copy()
    slowest = int(np.argmax(np.abs(view.strides)))
    step = max(1, SMALL // max(1, abs(view.strides[slowest])))
    result = np.empty(view.shape, view.dtype)
    into, source = np.moveaxis(result, slowest, 0), np.moveaxis(view, slowest, 0)
    for low in range(0, len(source), step):
        into[low : low + step] = source[low : low + step]
        release(view)
    return result


def _owner(array: NDArray[Any]) -> mmap.mmap | None:
    """The map of the file that an array lies in."""
    address = array.__array_interface__["data"][0]
    for start, (stop, reference) in list(_MAPS.items()):
        if start <= address < stop:
            return reference()
    return None


class Pieces:
    """A volume (C, D, H, W) from which windows are cut, one at a time, without keeping what was read of its file."""

    def __init__(self, array: NDArray[np.float32]) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, D, H, W)."""
        return self.array.shape

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        piece = np.array(self.array[index])
        release(self.array)
        return piece
