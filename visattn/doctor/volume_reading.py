"""One look at the files of every case of volumes, in threads; little is kept of each.

Legend: I, J, K the voxel axes of a file.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from visattn.data import nifti
from visattn.data.geometry import Geometry
from visattn.data.phantoms import PHANTOM
from visattn.data.volumes import VolumeCase, read_case
from visattn.errors import UserError
from visattn.progress import Bar

SIDE = 16
"""Voxels a side of a signature."""

SPECK = 3
"""A part of a label of up to so many voxels is a speck."""

_TOUCHING = np.ones((3, 3, 3), np.int8)  # 26 neighbours
_PERCENTILES = tuple(range(5, 100, 5))


@dataclass(frozen=True, eq=False)
class ChannelPrint:
    """What is kept of a channel.

    Args:
        constant: Its value, where it has only one.
        odd: How many voxels are NaN or infinite.
        spread: Percentiles 5, 10, ... 95 after taking off the mean and dividing by the standard deviation.
        signature: (16, 16, 16) in RAS, mean 0 and norm 1; zero where it is constant.
    """

    constant: float | None
    odd: int
    spread: NDArray[np.float64]
    signature: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LabelPrint:
    """What is kept of a label.

    Args:
        values: Its values, ascending.
        counts: How many voxels have each.
        digest: Of grid and values.
        specks: Parts of 1 to 3 voxels, where there are larger ones.
        on_background: Share of what is not 0 that lies where the first channel has its background's value.
        stored_float: Whether the file holds floating-point numbers.
    """

    values: NDArray[np.int64]
    counts: NDArray[np.int64]
    digest: bytes
    specks: int
    on_background: float
    stored_float: bool


@dataclass(eq=False)
class SeenVolume:
    """A case and what was learned from its files.

    Args:
        case: The case.
        geometry: Of the first channel.
        label_geometry: Of the label.
        channels: Of each channel; empty where they cannot be read.
        digest: Of the voxels of all channels.
        label: Of the label, or None.
        errors: What the strict readers said, each with its file.
        notes: What they told besides.
    """

    case: VolumeCase
    geometry: Geometry | None = None
    label_geometry: Geometry | None = None
    channels: tuple[ChannelPrint, ...] = ()
    digest: bytes = b""
    label: LabelPrint | None = None
    errors: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_volumes(cases: Sequence[VolumeCase]) -> list[SeenVolume]:
    """Look at every case once."""
    with Bar("examining", len(cases)) as bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def look(case: VolumeCase) -> SeenVolume:
            seen = _look(case)
            bar.advance()
            return seen

        return list(pool.map(look, cases))


def _look(case: VolumeCase) -> SeenVolume:
    seen = SeenVolume(case)
    drawn = case.root == PHANTOM and not case.images
    image: NDArray[np.float32] | None = None
    first = Path(case.name) if drawn else case.images[0]
    try:
        image, seen.geometry, seen.notes = read_case(case)
        seen.digest = hashlib.sha256(image.tobytes() + str(image.shape).encode()).digest()
        seen.channels = tuple(_channel(channel, seen.geometry) for channel in image)
    except (UserError, MemoryError) as error:
        seen.errors.append((_named(str(error), case, first), str(error) or "not enough memory to read it"))
    if not drawn and case.label is None:
        return seen
    where = first if drawn else case.label
    assert where is not None
    try:
        if drawn:
            from visattn.data.phantom_volumes import read_phantom

            _, values, seen.label_geometry = read_phantom(case.name)
            stored_float = False
        else:
            with nifti.collect_warnings() as warned:
                values, seen.label_geometry = nifti.read_labels(where)
                stored_float = nifti.read_header(where).dtype.kind == "f"
            seen.notes += warned
        seen.label = _label(values, image, seen.label_geometry, stored_float)
    except (UserError, MemoryError) as error:
        seen.errors.append((where, str(error) or "not enough memory to read it"))
    return seen


def _named(text: str, case: VolumeCase, first: Path) -> Path:
    """The file that an error is about: its message begins with it."""
    return next((path for path in case.images if text.startswith(f"{path}:")), first)


def _channel(channel: NDArray[np.float32], geometry: Geometry) -> ChannelPrint:
    finite = np.isfinite(channel)
    odd = channel.size - int(finite.sum())
    values = channel[finite] if odd else channel.ravel()
    if not values.size:
        return ChannelPrint(None, odd, np.zeros(len(_PERCENTILES)), np.zeros((SIDE,) * 3, np.float32))
    low, high = float(values.min()), float(values.max())
    mean, deviation = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    spread = np.asarray((np.percentile(values, _PERCENTILES) - mean) / max(deviation, 1e-12), np.float64)
    filled = np.where(finite, channel, np.float32(mean)) if odd else channel
    return ChannelPrint(low if low == high else None, odd, spread, _signature(filled, geometry))


def _signature(channel: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    """Means of 16 x 16 x 16 blocks, the axes turned to RAS."""
    small: NDArray[Any] = channel
    for axis in range(3):
        size = small.shape[axis]
        starts = np.arange(SIDE) * size // SIDE
        sums = np.add.reduceat(small, starts, axis, dtype=np.float64)
        shape = [1, 1, 1]
        shape[axis] = SIDE
        small = sums / np.maximum(np.diff([*starts, size]), 1).reshape(shape)
    letters = geometry.orientation
    order = [next(i for i, letter in enumerate(letters) if letter in pair) for pair in ("LR", "PA", "IS")]
    small = small.transpose(order)
    small = np.flip(small, [place for place, i in enumerate(order) if letters[i] in "LPI"])
    small = small - small.mean()
    norm = float(np.sqrt((small * small).sum()))
    return np.asarray(small / norm if norm > 1e-9 * max(1.0, abs(float(channel.max()))) else small * 0, np.float32)


def _label(
    values: NDArray[Any], image: NDArray[np.float32] | None, geometry: Geometry, stored_float: bool
) -> LabelPrint:
    found, counts = np.unique(values, return_counts=True)
    digest = hashlib.sha256(values.tobytes() + str(values.shape).encode()).digest()
    inside = values != 0
    specks, on_background = 0, 0.0
    if inside.any() and not inside.all():
        box = ndimage.find_objects(inside.astype(np.uint8))[0]
        parts, number = ndimage.label(inside[box], _TOUCHING)
        sizes = np.bincount(parts.ravel())[1:]
        specks = int((sizes <= SPECK).sum()) if number > 1 and sizes.max() > 10 * SPECK else 0
        if image is not None and image.shape[1:] == values.shape:
            corners = image[0][np.ix_(*([0, n - 1] for n in values.shape))]
            levels, times = np.unique(corners, return_counts=True)
            background = levels[times.argmax()]
            if times.max() >= len(corners.ravel()) // 2:  # an image that is masked or padded
                on_background = float((image[0][inside] == background).mean())
    return LabelPrint(found.astype(np.int64), counts.astype(np.int64), digest, specks, on_background, stored_float)
