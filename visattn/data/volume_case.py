"""A case of volumes and how it is read: every channel on the grid of the first, the label on the image's own grid.

Channels whose grids differ:

- by less than 1e-3 mm: they are the same;
- by the order or direction of their axes alone: turned, voxel for voxel;
- otherwise: resampled to the first channel's grid (`regrid.py`), with a note, as long as the other channel covers at
  least half of the first one's extent. Less is another body part, or a header that lost its position: refused.

Legend: C channels, I, J, K the voxel axes of the first channel's file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visattn.data import nifti
from visattn.data.geometry import Geometry
from visattn.data.phantoms import PHANTOM, drawn_name
from visattn.data.regrid import coverage, regrid, turned
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.scratch import Scratch, release

PHANTOM_COUNT = 100
"""Volumes that the word phantom means."""

MIN_COVERAGE = 0.5
"""Share of the first channel's extent that another one must cover to be resampled to it."""

_FULL = 0.999  # covered as good as wholly; nothing is said about less than a thousandth


@dataclass(frozen=True)
class VolumeCase:
    """The volumes of one case.

    Args:
        name: Unique name; for a file in a folder its path below that folder without ending and channel suffix.
        images: One file (or folder of a DICOM series) per channel, or one file that holds all channels. Empty for the
            phantom, which is drawn from the name.
        label: The label volume, where there is one.
        group: What must not be parted by a split, as a patient; the name itself where nothing was said.
        root: The root as the user wrote it; the word phantom for drawn volumes of any kind.
        channel_axis: Axis of the one file that holds the channels, counted from 0; None: one file per channel.
        picks: With a channel axis, which of its entries are the channels, in this order; None: all.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    group: str
    root: str
    channel_axis: int | None = None
    picks: tuple[int, ...] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files whose bytes make up the case; a DICOM folder stands for what it holds."""
        files: list[Path] = []
        for path in (*self.images, *([self.label] if self.label else [])):
            files += sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
        return tuple(files)


@dataclass(frozen=True)
class Problem:
    """What keeps one case from being read; the others go on.

    Args:
        name: The case.
        message: Names the file, says what is wrong and what to do.
        path: The file or folder that it is about, where there is one.
    """

    name: str
    message: str
    path: Path | None = None

    def __str__(self) -> str:
        return self.message


def read_case(
    case: VolumeCase, budget: int = nifti.BUDGET, scratch: Scratch | None = None
) -> tuple[NDArray[np.float32], Geometry, list[str]]:
    """Read all channels of a case on the grid of the first.

    Args:
        case: The case.
        budget: Bytes that each file may take as float32.
        scratch: Where the voxels lie.

    Returns:
        Values (C, I, J, K), NaN and infinities left as they are; the geometry of the first channel's file; and notes on
        what a user should know: headers that contradict themselves, channels that were resampled, voxels that are no
        numbers.

    Raises:
        UserError: A file cannot be read, or a channel lies elsewhere than the first.
    """
    if case.root == PHANTOM and not case.images:
        image, _, geometry = _phantom(case)
        return image, geometry, []
    notes: list[str] = []
    with nifti.collect_warnings() as warned:
        if case.channel_axis is not None:
            array, geometry = nifti.read(case.images[0], case.channel_axis, budget, scratch)
            array = array if case.picks is None else array[list(case.picks)]
        else:
            array, geometry = _read_channels(case, budget, notes, scratch)
    notes[:0] = warned
    for c in range(len(array)):
        odd = sum(int((~np.isfinite(plane)).sum()) for plane in _parts(array[c]))
        if odd:
            path = _path_of_channel(case, c)
            notes.append(f"{path}: {odd} voxels are NaN or infinite; the mean of the others stands for them")
    return array, geometry, notes


def read_case_label(
    case: VolumeCase, labels: Labels, geometry: Geometry | None = None, budget: int = nifti.BUDGET
) -> NDArray[np.uint8]:
    """Read the label volume of a case as class indices (I, J, K).

    Args:
        case: A case with a label.
        labels: The meaning of the values.
        geometry: Of the image, as `read_case` returns it; None: read from its header.
        budget: As for `read_case`.

    Raises:
        UserError: The file cannot be read, lies on another grid than the image, or holds values that no label names.
    """
    if case.root == PHANTOM and not case.images:
        return labels.encode(_phantom(case)[1], f"{case.name} of the phantom")
    if case.label is None:
        raise UserError(f"{case.name}: the case has no label volume")
    with nifti.collect_warnings():  # of the image they are told by read_case
        geometry = geometry or image_geometry(case, budget)
        values, own = nifti.read_labels(case.label, budget)
    if not geometry.same_grid(own):
        raise UserError(_other_grid(case, geometry, own))
    return labels.encode(values, str(case.label))


def image_geometry(case: VolumeCase, budget: int = nifti.BUDGET) -> Geometry:
    """The geometry of a case's first channel, from its header alone."""
    if case.root == PHANTOM and not case.images:
        return _phantom(case)[2]
    return check_header(case.images[0], case.channel_axis, budget)


def check_header(path: Path, channel_axis: int | None = None, budget: int = nifti.BUDGET) -> Geometry:
    """The geometry of a NIfTI file or a folder of DICOM files, from headers alone."""
    if path.is_dir():
        from visattn.data.dicom import dicom_geometry

        return dicom_geometry(path, budget)
    return nifti.read_header(path, channel_axis, budget).geometry


def _parts(channel: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Some planes of (I, J, K) at a time."""
    step = max(1, 2**22 // (channel.shape[0] * channel.shape[1]))
    for low in range(0, channel.shape[2], step):
        yield channel[:, :, low : low + step]
        release(channel)


def _path_of_channel(case: VolumeCase, channel: int) -> Path:
    return case.images[channel] if case.channel_axis is None else case.images[0]


def check_contrast(case: VolumeCase, array: NDArray[np.float32]) -> list[str]:
    """Notes on the channels of a case (C, I, J, K) that have one value alone, of which a network can tell nothing.

    Raises:
        UserError: A channel holds no number.
    """
    notes = []
    for c, channel in enumerate(array):
        first = channel[0, 0, 0]
        if np.isfinite(first):
            if all(bool((part == first).all()) for part in _parts(channel)):
                notes.append(f"{_path_of_channel(case, c)}: all of its voxels have the value {first:g}")
        elif not any(np.isfinite(part).any() for part in _parts(channel)):
            path = _path_of_channel(case, c)
            raise UserError(f"{path}: all of its voxels are NaN or infinite.\nThe values are lost; export it again.")
    return notes


def _read_channels(
    case: VolumeCase, budget: int, notes: list[str], scratch: Scratch | None
) -> tuple[NDArray[np.float32], Geometry]:
    first, geometry = _read_one(case.images[0], budget, scratch)
    if len(case.images) == 1:
        return first[None], geometry
    i, j, k = geometry.shape
    array = (scratch or Scratch()).zeros((len(case.images), k, j, i), np.float32).transpose(0, 3, 2, 1)
    for c, path in enumerate(case.images):
        other, own = (first, geometry) if c == 0 else _read_one(path, budget, scratch)
        on_grid = _on_grid(other, own, geometry, path, case.images[0], notes)
        for into, part in zip(_parts(array[c]), _parts(on_grid), strict=True):
            into[:] = part
    return array, geometry


def _read_one(path: Path, budget: int, scratch: Scratch | None = None) -> tuple[NDArray[np.float32], Geometry]:
    if path.is_dir():
        from visattn.data.dicom import read_dicom  # pydicom is an extra

        return read_dicom(path, budget)
    return nifti.read(path, budget=budget, scratch=scratch)


def _on_grid(
    other: NDArray[np.float32], own: Geometry, geometry: Geometry, path: Path, first: Path, notes: list[str]
) -> NDArray[np.float32]:
    """Bring a channel to the first one's grid."""
    if geometry.same_grid(own):
        return other
    same = turned(other, own, geometry)
    if same is not None:
        notes.append(f"{path}: its axes run {own.orientation}, those of {first.name} {geometry.orientation}; turned")
        return same
    share = coverage(own, geometry)
    apart = float(np.linalg.norm(centre(own) - centre(geometry)))
    if share < MIN_COVERAGE:
        raise UserError(
            f"{path}: covers {100 * share:.0f} % of the volume of {first.name}; their centres lie {apart:.0f} mm apart."
            "\nAre both of one patient and session? Register them, or correct the header, and try again."
        )
    covered = "" if share > _FULL else f"; it covers {100 * share:.0f} % of it, its border is repeated beyond"
    notes.append(
        f"{path}: lies on another grid ({_grid(own)}) than {first.name} ({_grid(geometry)}); resampled to that{covered}"
    )
    return regrid(other, own, geometry)


def _other_grid(case: VolumeCase, image: Geometry, label: Geometry) -> str:
    name = case.images[0].name
    if image.shape != label.shape:
        return (
            f"{case.label}: the label has {_size(label.shape)} voxels, its image {name} {_size(image.shape)}.\n"
            "Resample the label to the image's grid (nearest neighbour)."
        )
    return (
        f"{case.label}: the label lies up to {image.distance(label):.3g} mm away from its image {name} "
        f"(axes {label.orientation} and {image.orientation}).\n"
        "Correct the header of one, or resample the label to the image's grid (nearest neighbour)."
    )


def _grid(geometry: Geometry) -> str:
    return f"{_size(geometry.shape)} of {' x '.join(f'{size:.3g}' for size in geometry.zooms)} mm"


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def centre(geometry: Geometry) -> NDArray[np.float64]:
    """The middle of a volume in mm."""
    middle = geometry.affine @ np.array([*((np.array(geometry.shape) - 1) / 2), 1.0])
    return np.asarray(middle[:3])


def phantom_cases(kind: str = "head") -> list[VolumeCase]:
    """The cases of the word phantom, each a patient of its own."""
    names = [drawn_name(kind, index) for index in range(PHANTOM_COUNT)]
    return [VolumeCase(name, (), None, name, PHANTOM) for name in names]


def _phantom(case: VolumeCase) -> tuple[NDArray[np.float32], NDArray[np.uint8], Geometry]:
    from visattn.data.phantom_volumes import read_phantom  # drawn by name

    return read_phantom(case.name)
