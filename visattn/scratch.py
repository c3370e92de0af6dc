"""Large arrays that lie in memory, or in files that nobody else sees where memory is bounded.

The code that fills and reads them is the same in both cases, so a bound changes where numbers lie and never which.
Files have no name: whatever ends the process, nothing is left behind.
"""

import mmap
import os
import tempfile
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
            return np.memmap(file, dtype, "r+", shape=tuple(shape))


def release(array: NDArray[Any]) -> None:
    """Give back the memory of an array that lies in a file; its content stays. Nothing happens for any other."""
    owner: Any = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = getattr(owner, "base", None)
    if owner is not None:
        owner.madvise(mmap.MADV_DONTNEED)


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
