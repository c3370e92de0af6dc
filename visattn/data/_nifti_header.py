"""NIfTI headers: what a file announces, and what a written file says. The only file that imports nibabel.

Format: https://nifti.nimh.nih.gov/nifti-1 (nifti1.h, nifti2.h).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from visattn import __version__
from visattn.data.geometry import TOLERANCE_MM, Geometry, corner_distance
from visattn.errors import UserError

_HEADERS: dict[int, Any] = {1: nibabel.Nifti1Header, 2: nibabel.Nifti2Header}

LENGTHS = {1: 348, 2: 540}
"""Bytes of a header of each version."""

_LABEL_INTENT = 1002  # NIFTI_INTENT_LABEL
_KEPT = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)


class NiftiWarning(UserWarning):
    """A file can be read, but its header contradicts itself."""


_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Collect the texts of NiftiWarnings in place of warning.

    Files are read by several threads at once, where `warnings.catch_warnings` would catch those of the others.
    """
    texts: list[str] = []
    token = _collected.set(texts)
    try:
        yield texts
    finally:
        _collected.reset(token)


def _warn(text: str) -> None:
    texts = _collected.get()
    if texts is None:
        warnings.warn(text, NiftiWarning, stacklevel=4)
    else:
        texts.append(text)


@dataclass(frozen=True)
class Header:
    """What a file announces, checked as far as it can be without reading its voxels.

    Args:
        geometry: Grid of the volume.
        channels: Number of channels; 1 without a channel axis.
        dtype: Type on disk.
        slope: Values are stored times slope plus inter.
        inter: See `slope`.
        offset: Where the voxels begin.
        stored: Sizes of the axes on disk.
    """

    geometry: Geometry
    channels: int
    dtype: np.dtype[Any]
    slope: float
    inter: float
    offset: int
    stored: tuple[int, ...]

    @property
    def scaled(self) -> bool:
        """Whether stored numbers are not the values themselves."""
        return (self.slope, self.inter) != (1.0, 0.0)


def version_of(start: bytes) -> int | None:
    """1 or 2 for the beginning of a one-file NIfTI of that version."""
    if start[344:348] == b"n+1\0":
        return 1
    return 2 if start[4:12] == b"n+2\0\r\n\032\n" else None


def parse_header(path: Path, start: bytes, channel_axis: int | None, budget: int, held: int) -> Header:
    """Check the header `start` of `path`.

    Args:
        path: To name in errors.
        start: `LENGTHS[version]` bytes.
        channel_axis: Axis of the channels, or None.
        budget: Bytes that the volume may take as float32.
        held: Bytes that the file can hold at most, decompressed.

    Raises:
        UserError: Something is impossible, too large, or no volume.
    """
    version = version_of(start)
    assert version is not None
    try:
        raw = _HEADERS[version](start, check=False)
    except Exception as error:  # nibabel raises HeaderDataError, ValueError, KeyError ... for what bytes can hold
        raise UserError(f"{path}: damaged header ({str(error)[:80]})") from None
    stored = _sizes(path, raw)
    dtype = _dtype(path, raw)
    offset = int(raw["vox_offset"]) if np.isfinite(raw["vox_offset"]) else -1
    if not len(start) <= offset <= 2**31:
        raise UserError(f"{path}: damaged header: the voxels would begin at byte {offset}")
    slope, inter = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == 0 or np.isnan(slope) or np.isnan(inter):  # by the standard: stored values are the values
        slope, inter = 1.0, 0.0
    if not np.isfinite([slope, inter]).all():
        raise UserError(f"{path}: damaged header: values are scaled by {slope} and shifted by {inter}")
    count = int(np.prod(stored, dtype=object))
    if count * 4 > budget:
        raise UserError(
            f"{path}: {' x '.join(map(str, stored))} voxels take {count * 4 / 2**30:.1f} GiB, more than the limit of "
            f"{budget / 2**30:.1f} GiB"
        )
    if offset + count * dtype.itemsize > held:
        raise UserError(
            f"{path}: the header announces {' x '.join(map(str, stored))} voxels ({count * dtype.itemsize} bytes), "
            f"more than the file holds.\nIt is truncated or damaged; copy it again."
        )
    shape, channels = _axes(path, stored, channel_axis)
    return Header(Geometry(shape, _affine(path, raw, shape), start), channels, dtype, slope, inter, offset, stored)


def _sizes(path: Path, raw: Any) -> tuple[int, ...]:
    rank = int(raw["dim"][0])
    if not 1 <= rank <= 7:
        raise UserError(f"{path}: damaged header: {rank} axes")
    sizes = tuple(int(size) for size in raw["dim"][1 : rank + 1])
    if min(sizes) < 1:
        raise UserError(f"{path}: no volume: its sizes are {' x '.join(map(str, sizes))}")
    return sizes


def _dtype(path: Path, raw: Any) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = raw.get_data_dtype()
    except Exception:  # an unknown code is a KeyError or a HeaderDataError
        raise UserError(f"{path}: damaged header: unknown type of voxels, code {int(raw['datatype'])}") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        what = "colours" if dtype.names else "complex numbers" if dtype.kind == "c" else f"of type {dtype}"
        raise UserError(f"{path}: its voxels are {what}; save it with one integer or float a voxel")
    return dtype


def _axes(path: Path, stored: tuple[int, ...], channel_axis: int | None) -> tuple[tuple[int, int, int], int]:
    """The spatial shape and the number of channels of axes on disk."""
    shown = " x ".join(map(str, stored))
    if channel_axis is None:
        extra = [size for size in stored[3:] if size > 1]
        if extra:
            raise UserError(
                f"{path}: {shown} has {len(stored)} axes; say which one holds channels, or extract one volume"
            )
        i, j, k = (*stored[:3], 1, 1)[:3]
        return (i, j, k), 1
    axis = channel_axis + len(stored) if channel_axis < 0 else channel_axis
    if not 0 <= axis < len(stored):
        raise UserError(f"{path}: {shown} has no axis {channel_axis} to hold channels")
    rest = stored[:axis] + stored[axis + 1 :]
    while len(rest) > 3 and 1 in rest[3:]:
        rest = rest[:3] + tuple(size for size in rest[3:] if size > 1)
    if len(rest) > 3:
        raise UserError(f"{path}: {shown} has more axes than three and channels; extract one volume")
    i, j, k = (*rest, 1, 1)[:3]
    return (i, j, k), stored[axis]


def _affine(path: Path, raw: Any, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    sform = np.eye(4)
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        sform[row] = raw[name]
    has_sform, has_qform = int(raw["sform_code"]) > 0, int(raw["qform_code"]) > 0
    qform = None
    if has_qform or not has_sform:
        try:
            qform = np.asarray(raw.get_qform() if has_qform else raw.get_base_affine(), np.float64)
        except Exception:  # a quaternion longer than 1, or a handedness other than -1 and 1
            if not has_sform:
                raise UserError(f"{path}: damaged header: its qform is no rotation, and there is no sform") from None
            _warn(f"{path}: its qform is no rotation; the sform is used")
    affine = sform if has_sform else qform
    assert affine is not None
    if not np.isfinite(affine).all():
        raise UserError(f"{path}: damaged header: its affine holds NaN or infinities, so positions are unknown")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (lengths > 0).all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-4:
        raise UserError(
            f"{path}: its affine is singular: voxel sizes {', '.join(f'{size:g}' for size in lengths)} mm span no space"
        )
    if has_sform and qform is not None and np.isfinite(qform).all():
        apart = corner_distance(sform, qform, shape)
        if apart > TOLERANCE_MM:
            _warn(f"{path}: its sform and qform lie up to {apart:.3g} mm apart; the sform is used")
    return affine


def new_header(geometry: Geometry, dtype: np.dtype[Any], channels: int | None, labels: bool) -> bytes:
    """The header of a written file with the four bytes that say there is no extension."""
    sizes = (*geometry.shape, *([channels] if channels is not None else []))
    if geometry.header is None:
        source = _HEADERS[1]()
        source.set_sform(geometry.affine, 1)
        source.set_qform(geometry.affine, 1, strip_shears=True)
        # A quaternion cannot hold shear, and near half a turn its four bytes hold a rotation to tenths of a mm only.
        if corner_distance(geometry.affine, source.get_qform(), geometry.shape) > TOLERANCE_MM:
            source["qform_code"] = 0
        source.set_xyzt_units("mm")
    else:
        version = version_of(geometry.header)
        assert version is not None
        source = _HEADERS[version](geometry.header, check=False).as_byteswapped("<")
    large = max(sizes) > 32767 or isinstance(source, _HEADERS[2])
    new = _HEADERS[2 if large else 1](endianness="<")
    new.set_data_dtype(dtype)
    dim = np.ones(8, np.int64)
    dim[0], dim[1 : 1 + len(sizes)] = len(sizes), sizes
    new["dim"] = dim
    for key in _KEPT:
        new[key] = source[key]
    pixdim = np.ones(8)
    pixdim[:4] = source["pixdim"][:4]
    new["pixdim"] = pixdim
    new["scl_slope"], new["scl_inter"] = 1, 0
    new["vox_offset"] = 544 if large else 352
    new["intent_code"] = _LABEL_INTENT if labels else 0
    new["descrip"] = f"visattn {__version__}".encode()[:79]
    if not large:
        new["regular"] = b"r"
    return bytes(new.binaryblock) + b"\0\0\0\0"
