"""A folder that holds one DICOM series, as a volume. Needs pydicom: `pip install 'visattn[dicom]'`.

Slices are put in order by their position, not by name or number. DICOM counts mm towards left and back (LPS), volumes
here towards right and front (RAS), so the first two rows of the affine change sign.

Refused, since no grid of voxels describes them: several series in one folder, doubled or missing slices, slices at
varying distances, and the sheared stack of a tilted gantry. Multi-frame files are not read.

Standard: https://dicom.nema.org/medical/dicom/current/output/chtml/part03/sect_C.7.6.2.html (Image Plane Module).

Legend: I along the rows of a slice, J down its columns, K from slice to slice.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visattn.data.geometry import Geometry
from visattn.data.nifti import BUDGET
from visattn.data.volume_names import is_dicom, listed
from visattn.errors import UserError

_SAME_MM = 1e-3  # slices closer than this lie on each other
_STEP_SHARE, _STEP_MM = (
    0.01,
    0.02,
)  # how far a distance between slices may be off: of it, and in mm (positions are text)
_TILT_DEGREES = 0.2
_DIRECTION = 1e-4
_PLANE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")


@dataclass(frozen=True)
class _Slice:
    path: Path
    position: NDArray[np.float64]  # (3,) mm LPS, of the first voxel
    directions: NDArray[np.float64]  # (2, 3): along a row, down a column
    spacing: tuple[float, float]  # mm along a row, down a column
    shape: tuple[int, int]
    thickness: float | None
    series: str
    description: str


def read_dicom(folder: Path | str, budget: int = BUDGET) -> tuple[NDArray[np.float32], Geometry]:
    """Read the series of a folder.

    Args:
        folder: Holds the files of one series; other files are passed over, subfolders not searched.
        budget: Bytes that the volume may take as float32.

    Returns:
        Values (I, J, K), rescaled as each slice says, and the geometry.

    Raises:
        UserError: pydicom is missing, the files are not one evenly spaced stack, or one of them is damaged.
    """
    slices, geometry = _stack(Path(folder), budget)
    array = np.empty(geometry.shape, np.float32)
    for k, part in enumerate(slices):
        array[:, :, k] = _pixels(part).T
    return array, geometry


def dicom_geometry(folder: Path | str, budget: int = BUDGET) -> Geometry:
    """The geometry of the series in a folder, from its headers; raises as `read_dicom`."""
    return _stack(Path(folder), budget)[1]


def _stack(folder: Path, budget: int) -> tuple[list[_Slice], Geometry]:
    """The slices of a folder in their order."""
    slices = _slices(folder)
    first = slices[0]
    for part in slices[1:]:
        for what, same in (
            ("size", part.shape == first.shape),
            ("pixel spacing", np.allclose(part.spacing, first.spacing, rtol=1e-4)),
            ("orientation", np.abs(part.directions - first.directions).max() <= _DIRECTION),
        ):
            if not same:
                raise UserError(f"{part.path}: differs in {what} from {first.path.name}; they are not one volume")
    normal = np.cross(*first.directions)
    slices.sort(key=lambda part: float(part.position @ normal))
    step = _step(folder, slices, normal)
    affine = np.eye(4)
    affine[:3, 0] = slices[0].directions[0] * first.spacing[0]
    affine[:3, 1] = slices[0].directions[1] * first.spacing[1]
    affine[:3, 2], affine[:3, 3] = step, slices[0].position
    affine[:2] *= -1  # LPS to RAS
    shape = (first.shape[1], first.shape[0], len(slices))
    if int(np.prod(shape, dtype=object)) * 4 > budget:
        raise UserError(f"{folder}: {' x '.join(map(str, shape))} voxels are more than {budget / 2**30:.1f} GiB allow")
    return slices, Geometry(shape, affine)


def _slices(folder: Path) -> list[_Slice]:
    pydicom = _pydicom()
    series: defaultdict[str, list[_Slice]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file() or not is_dicom(path):
            continue
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except Exception as error:  # pydicom raises what the bytes provoke
            raise UserError(f"{path}: damaged DICOM file ({str(error)[:80]})") from None
        if "Rows" in header:  # else an index, a report, a presentation state
            part = _slice(path, header)
            series[part.series].append(part)
    if not series:
        raise UserError(f"{folder}: holds no DICOM images")
    if len(series) > 1:
        shown = listed((f"{parts[0].description or 'unnamed'} ({len(parts)})" for parts in series.values()), 4)
        raise UserError(f"{folder}: holds {len(series)} series, {shown}.\nPut each into a folder of its own.")
    return next(iter(series.values()))


def _slice(path: Path, header: Any) -> _Slice:
    if int(header.get("NumberOfFrames", 1) or 1) > 1:
        raise UserError(f"{path}: is a multi-frame DICOM file; convert it to NIfTI, with dcm2niix for instance")
    if int(header.get("SamplesPerPixel", 1) or 1) != 1:
        raise UserError(f"{path}: holds colours, no volume of intensities")
    if "ModalityLUTSequence" in header:
        raise UserError(
            f"{path}: its values are told by a table (Modality LUT), which is not read; convert it to NIfTI"
        )
    missing = [name for name in _PLANE if header.get(name) in (None, "")]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}, so nobody knows where the slice lies")
    try:
        position = np.array(header.ImagePositionPatient, np.float64).reshape(3)
        directions = np.array(header.ImageOrientationPatient, np.float64).reshape(2, 3)
        down, along = (float(size) for size in header.PixelSpacing)  # distance of rows, then of columns
        shape = int(header.Rows), int(header.Columns)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged DICOM header ({str(error)[:80]})") from None
    square = np.abs(directions @ directions.T - np.eye(2)).max() < 1e-3
    if not (np.isfinite(position).all() and square and 0 < down < np.inf and 0 < along < np.inf and min(shape) > 0):
        raise UserError(f"{path}: damaged DICOM header: impossible position, orientation or pixel spacing")
    thickness = header.get("SpacingBetweenSlices") or header.get("SliceThickness")
    return _Slice(
        path,
        position,
        directions,
        (along, down),
        shape,
        float(thickness) if thickness else None,
        str(header.get("SeriesInstanceUID", "")),
        str(header.get("SeriesDescription", ""))[:40],
    )


def _step(folder: Path, slices: list[_Slice], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """The vector from a slice to the next, in mm LPS."""
    if len(slices) == 1:
        thickness = slices[0].thickness
        if not thickness or not np.isfinite(thickness):
            raise UserError(f"{slices[0].path}: is a single slice without a SliceThickness; is the series complete?")
        return normal * abs(thickness)
    heights = np.array([part.position @ normal for part in slices])
    gaps = np.diff(heights)
    doubled = np.flatnonzero(gaps < _SAME_MM)
    if len(doubled):
        one, two = slices[doubled[0]].path.name, slices[doubled[0] + 1].path.name
        raise UserError(
            f"{folder}: {len(doubled)} slices lie on others, as {one} on {two}.\n"
            "Copies of files, or several echoes or time points? Keep one of each."
        )
    usual = float(np.median(gaps[gaps < 1.5 * gaps.min()]))  # missing slices may leave more wide gaps than others
    off = np.flatnonzero(np.abs(gaps - usual) > max(_STEP_SHARE * usual, _STEP_MM))
    if len(off):
        at = int(off[0])
        between = f"between {slices[at].path.name} and {slices[at + 1].path.name}"
        times = gaps[off] / usual
        if (np.abs(times - np.rint(times)) < 0.05).all():
            raise UserError(
                f"{folder}: {int((np.rint(times) - 1).sum())} of {int(np.rint(gaps / usual).sum()) + 1} slices are "
                f"missing, the first {between}.\nCopy the series again."
            )
        raise UserError(
            f"{folder}: the distance between slices varies, {gaps.min():.3g} to {gaps.max():.3g} mm, first {between}.\n"
            "Resample the series to even slices."
        )
    step = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    positions = np.array([part.position for part in slices])
    expected = slices[0].position + np.arange(len(slices))[:, None] * step
    astray = np.linalg.norm(positions - expected, axis=1)
    if astray.max() > max(_STEP_SHARE * usual, _STEP_MM) * 2:
        path = slices[int(astray.argmax())].path
        raise UserError(f"{path}: the slice lies {astray.max():.3g} mm beside the line of the others")
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if tilt > _TILT_DEGREES:
        raise UserError(
            f"{folder}: the gantry was tilted by {tilt:.1f} degrees: each slice is shifted against the one before, so "
            "that voxels are sheared.\nConvert the series with a tool that straightens it, as dcm2niix does."
        )
    return np.asarray(step)


def _pixels(part: _Slice) -> NDArray[np.float32]:
    """The values (rows, columns) of a slice."""
    pydicom = _pydicom()
    try:
        dataset = pydicom.dcmread(part.path)
        stored = dataset.pixel_array
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    except Exception as error:  # no decoder for its compression, too few bytes, ...
        text = " ".join(str(error).split())
        raise UserError(f"{part.path}: its pixels cannot be read ({text[:200]})") from None
    if stored.shape != part.shape or not np.isfinite([slope, intercept]).all():
        raise UserError(f"{part.path}: damaged DICOM file: pixels {stored.shape}, slope {slope}, intercept {intercept}")
    return np.asarray(stored * slope + intercept, np.float32)


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError:
        raise UserError(
            "DICOM folders need pydicom: pip install 'visattn[dicom]'; or convert the series to NIfTI"
        ) from None
    return pydicom
