"""NIfTI files in and out, with the geometry that belongs to their voxels.

nibabel interprets headers (`_nifti_header.py`); voxels are read here, because a reader for patients' data has to notice
what nibabel does not: a wrong gzip checksum, a header that announces more than the file holds.

Rules:
- A file is recognised by its content, not by its name. `.nii` and `.nii.gz` in one file; no `.hdr`/`.img` pairs.
- The affine is the sform if its code is positive, else the qform if its code is, else the voxel sizes alone. Where both
  are there and place a corner of the volume more than 1e-3 mm apart, a `NiftiWarning` says so.
- Memory is taken only after the header was checked against the file's size and a budget.
- Written files keep sform, qform, their codes and the units bit for bit. Extensions and descriptions are dropped: they
  may name the patient.

Legend: I, J, K the voxel axes in the order of the file; C channels.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from visattn.data._inflate import Inflated, Source
from visattn.data._nifti_header import (
    LENGTHS,
    Header,
    NiftiWarning,
    collect_warnings,
    new_header,
    parse_header,
    version_of,
)
from visattn.data.geometry import Geometry
from visattn.errors import UserError
from visattn.files import atomic_write
from visattn.scratch import Scratch, release

__all__ = [
    "BUDGET",
    "Geometry",
    "Header",
    "NiftiWarning",
    "StreamWriter",
    "collect_warnings",
    "is_nifti",
    "read",
    "read_header",
    "read_labels",
    "write",
]

BUDGET = 16 * 2**30
"""Bytes that a volume may take as float32, unless the caller says otherwise."""

_EXPANSION = 1040  # deflate cannot do better than 1032:1
_SURPLUS = 2**20  # bytes behind the voxels that are padding; more is something else
_PIECE = 2**18  # bytes of voxels that are converted together; they stay in a core's cache
_RELEASED = 16  # pieces after which memory is given back
_INTEGER = 1e-3  # how far a label may be from a whole number: 0.99999997 is 1
_MAX_LABEL = 65535


def is_nifti(path: Path | str) -> bool:
    """Whether the file begins like a NIfTI file, compressed or not, whatever its name."""
    try:
        with _opened(Path(path)) as stream:
            return version_of(stream.read(544)) is not None
    except UserError:
        return False


def read_header(path: Path | str, channel_axis: int | None = None, budget: int = BUDGET) -> Header:
    """Read and check the header alone.

    Args:
        path: A `.nii` or `.nii.gz` file.
        channel_axis: Which axis of the file holds channels, counted from 0, or from the end with -1; None: none does.
        budget: Bytes that the volume may take as float32.

    Raises:
        UserError: The file is missing, no NIfTI, or its header is impossible, larger than the file, or not a volume.
    """
    path = Path(path)
    with _opened(path) as stream:
        return _header(path, stream, channel_axis, budget)


def read(
    path: Path | str, channel_axis: int | None = None, budget: int = BUDGET, scratch: Scratch | None = None
) -> tuple[NDArray[np.float32], Geometry]:
    """Read a volume and its geometry.

    Args:
        path: A `.nii` or `.nii.gz` file.
        channel_axis: As for `read_header`.
        budget: Bytes that the volume may take as float32.
        scratch: Where the voxels lie.

    Returns:
        Values (I, J, K), or (C, I, J, K) with a channel axis, scaled as the header says; NaN and infinities are left.

    Raises:
        UserError: As `read_header`, and if the voxels are truncated or damaged.
    """
    flat, header = _read_flat(Path(path), channel_axis, budget, scratch or Scratch(), values=True)
    return _shaped(flat, header, channel_axis), header.geometry


def _scaled(stored: NDArray[Any], header: Header) -> NDArray[np.float32]:
    if stored.dtype.itemsize > 2 and stored.dtype.kind in "iu":  # float32 would move large integers before
        return (stored * header.slope + header.inter).astype(np.float32)
    return stored.astype(np.float32) * np.float32(header.slope) + np.float32(header.inter)


def read_labels(path: Path | str, budget: int = BUDGET) -> tuple[NDArray[np.unsignedinteger[Any]], Geometry]:
    """Read a label volume (I, J, K) as the smallest unsigned integers.

    Raises:
        UserError: As `read`, and if a value is no whole number of 0..65535 (up to 1e-3, since 1 may be stored as
            0.99999997).
    """
    path = Path(path)
    stored, header = _read(path, None, budget)
    if header.scaled:
        stored = stored * header.slope + header.inter
    if stored.dtype.kind == "f":
        if not np.isfinite(stored).all():
            raise UserError(f"{path}: {int((~np.isfinite(stored)).sum())} voxels of the labels are NaN or infinite")
        whole = np.rint(stored)
        off = np.abs(stored - whole) > _INTEGER
        if off.any():
            values = np.unique(stored[off])
            raise UserError(
                f"{path}: {int(off.sum())} voxels hold values that are no labels, as {values[0]:.4g} "
                f"({len(values)} different ones).\nIs it an image, or a mask resampled with interpolation?"
            )
        stored = whole
    low, high = stored.min(initial=0), stored.max(initial=0)
    if low < 0 or high > _MAX_LABEL:
        raise UserError(f"{path}: label values run from {low:g} to {high:g}, but labels are 0..{_MAX_LABEL}")
    return stored.astype(np.uint8 if high < 256 else np.uint16), header.geometry


def write(path: Path | str, array: NDArray[Any], geometry: Geometry, kind: Literal["labels", "image"]) -> None:
    """Write a volume into the grid of `geometry`, whole or not at all.

    Args:
        path: Ends in `.nii` or `.nii.gz`.
        array: (I, J, K), or (C, I, J, K), whose channels become the fourth axis.
        geometry: Of the volume that `array` belongs to.
        kind: `labels`: the smallest unsigned integers that hold the values. `image`: float32.

    Raises:
        ValueError: The shape is not the geometry's, or labels are no whole numbers of 0..65535.
    """
    spatial, channels = array.shape[-3:], array.shape[0] if array.ndim == 4 else None
    if array.ndim not in (3, 4) or spatial != geometry.shape:
        raise ValueError(f"array of shape {array.shape} does not lie on a grid of {geometry.shape}")
    dtype: type[np.generic] = np.float32
    if kind == "labels":
        low, high = array.min(initial=0), array.max(initial=0)
        if low < 0 or high > _MAX_LABEL or (array.dtype.kind == "f" and (array != np.rint(array)).any()):
            raise ValueError(f"labels must be whole numbers of 0..{_MAX_LABEL}, got {low:g} to {high:g}")
        dtype = np.uint8 if high < 256 else np.uint16
    with StreamWriter(path, geometry, dtype, channels, labels=kind == "labels") as writer:
        for volume in array if channels is not None else [array]:
            writer.append(volume)


class StreamWriter:
    """Writes a volume slab by slab along its last axis, so that it is never whole in memory.

    Used as a context manager; the file takes its name when all voxels have come and nothing was raised.

    Args:
        path: Ends in `.nii` or `.nii.gz`.
        geometry: Grid of the whole volume.
        dtype: uint8, uint16 or float32.
        channels: Number of volumes that follow each other along a fourth axis; None: a file of three axes.
        labels: Whether the header calls the values labels.

    Raises:
        UserError: The file's name has another ending.
        ValueError: At the end voxels are missing, or a slab does not fit.
    """

    def __init__(
        self,
        path: Path | str,
        geometry: Geometry,
        dtype: type[np.generic],
        channels: int | None = None,
        labels: bool = False,
    ) -> None:
        self.path = Path(path)
        if not self.path.name.endswith((".nii", ".nii.gz")):
            raise UserError(f"{self.path}: a volume's file ends in .nii or .nii.gz")
        self.geometry, self.dtype = geometry, np.dtype(dtype).newbyteorder("<")
        self._header = new_header(geometry, self.dtype, channels, labels)
        self._left = int(np.prod(geometry.shape)) * (channels or 1)

    def __enter__(self) -> Self:
        self._atomic = atomic_write(self.path)
        self._file: IO[bytes] = self._atomic.__enter__().open("wb")
        self._stream: IO[bytes] = self._file
        if self.path.name.endswith(".gz"):
            # No name and no time in it: equal volumes give equal files.
            self._stream = gzip.GzipFile("", "wb", compresslevel=1, fileobj=self._file, mtime=0)  # type: ignore[assignment]
        self._stream.write(self._header)
        return self

    def append(self, slab: NDArray[Any]) -> None:
        """Add planes (I, J, k)."""
        if slab.shape[:2] != self.geometry.shape[:2] or slab.ndim != 3 or slab.size > self._left:
            raise ValueError(f"a slab of shape {slab.shape} does not fit into what is left of {self.geometry.shape}")
        self._left -= slab.size
        self._stream.write(np.asarray(slab, self.dtype).tobytes(order="F"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._stream is not self._file:
                self._stream.close()
            self._file.close()
            if error is None and self._left:
                raise ValueError(f"{self._left} voxels were never written")
        except BaseException as own:
            self._atomic.__exit__(type(own), own, own.__traceback__)
            raise
        self._atomic.__exit__(kind, error, trace)


@contextmanager
def _opened(path: Path) -> Iterator[Source]:
    """The decompressed bytes; what the file system or the decompressor says becomes a `UserError` naming the file."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, not a volume")
        with path.open("rb") as file:
            start = file.read(2)
            file.seek(0)
            if not start:
                raise UserError(f"{path}: the file is empty (0 bytes)")
            if start == b"\x1f\x8b":
                yield Inflated(file)
            else:
                yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PermissionError:
        raise UserError(f"{path}: cannot be read (permission denied)") from None
    except EOFError:
        raise UserError(f"{path}: the compressed file is truncated; copy it again") from None
    except zlib.error as error:
        text = str(error)
        what = "wrong checksum" if "data check" in text or "length check" in text else text[:80]
        raise UserError(f"{path}: the compressed file is damaged ({what}); copy it again") from None


def _explain(path: Path, start: bytes) -> UserError:
    """What a file is that is no NIfTI."""
    if start[344:348] == b"ni1\0":
        return UserError(f"{path}: header of a .hdr/.img pair; convert it to one .nii.gz file")
    known = {
        b"NRRD": "an NRRD file",
        b"\x89PNG": "a PNG image",
        b"\xff\xd8\xff": "a JPEG image",
        b"PK": "a zip archive",
    }
    kind = next((name for magic, name in known.items() if start.startswith(magic)), None)
    if start[128:132] == b"DICM":
        kind = "a DICOM file; give its folder"
    if len(start) < 348:
        return UserError(f"{path}: the file is truncated: {len(start)} bytes are no NIfTI header")
    return UserError(f"{path}: not a NIfTI file{f', but {kind}' if kind else ''}")


def _header(path: Path, stream: Source, channel_axis: int | None, budget: int) -> Header:
    start = stream.read(LENGTHS[1])
    version = version_of(start)
    if version is None:
        raise _explain(path, start)
    start += stream.read(LENGTHS[version] - LENGTHS[1])
    size = path.stat().st_size
    return parse_header(path, start, channel_axis, budget, size * _EXPANSION if _compressed(path) else size)


def _compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _read(path: Path, channel_axis: int | None, budget: int) -> tuple[NDArray[Any], Header]:
    """The stored numbers, unscaled, (I, J, K) or (C, I, J, K)."""
    flat, header = _read_flat(path, channel_axis, budget, Scratch(), values=False)
    return _shaped(flat, header, channel_axis), header


def _shaped(flat: NDArray[Any], header: Header, channel_axis: int | None) -> NDArray[Any]:
    array = flat.reshape(header.stored, order="F")
    if channel_axis is not None:
        array = np.moveaxis(array, channel_axis, 0)
        return array.reshape(header.channels, *header.geometry.shape, order="F")
    return array.reshape(header.geometry.shape, order="F")


def _read_flat(
    path: Path, channel_axis: int | None, budget: int, scratch: Scratch, values: bool
) -> tuple[NDArray[Any], Header]:
    """The values, or the stored numbers unscaled, in the order of the file."""
    with _opened(path) as stream:
        header = _header(path, stream, channel_axis, budget)
        _skip(path, stream, header.offset - len(header.geometry.header or b""))
        count, width = int(np.prod(header.stored)), header.dtype.itemsize
        flat = scratch.zeros([count], np.float32 if values else header.dtype)
        step = _PIECE // width
        for low in range(0, count, step):
            part = flat[low : low + step]
            piece = stream.read(len(part) * width)
            if len(piece) < len(part) * width:
                raise UserError(
                    f"{path}: truncated: {low * width + len(piece)} of {count * width} bytes of voxels are there; "
                    "copy it again"
                )
            stored = np.frombuffer(piece, header.dtype)
            part[:] = _scaled(stored, header) if values and header.scaled else stored
            if low // step % _RELEASED == 0:
                release(flat)
        surplus = 0
        while piece := stream.read(2**16):  # to the end, where gzip keeps its checksum
            surplus += len(piece)
            if surplus > _SURPLUS:
                raise UserError(
                    f"{path}: more than {_SURPLUS} bytes follow the voxels; the header does not fit the file"
                )
    return flat, header


def _skip(path: Path, stream: Source, count: int) -> None:
    while count:
        piece = stream.read(min(count, 2**16))
        if not piece:
            raise UserError(f"{path}: truncated before its voxels begin; copy it again")
        count -= len(piece)
