"""Mask files of any kind, images and volumes, as class indices with the place where they lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visattn.data import nifti
from visattn.data.geometry import Geometry
from visattn.data.images import image_size, read_mask
from visattn.data.phantoms import PHANTOM
from visattn.data.volume_case import VolumeCase, read_case, read_case_label
from visattn.data.volume_names import is_volume_name
from visattn.data.volume_pairs import CHANNEL_AXIS
from visattn.errors import UserError
from visattn.labels import Labels

_VALUES = 65536  # that a mask can hold
_PIECE = 1 << 20


@dataclass(frozen=True)
class Mask:
    """A mask that was read.

    Attributes:
        path: Its file.
        indices: Class indices (H, W) or (I, J, K).
        geometry: Of a volume; None for an image.
        strays: How many values it holds that the labels do not name, so that each was taken for the nearest.
    """

    path: Path
    indices: NDArray[np.uint8]
    geometry: Geometry | None
    strays: int = 0


def read_any_mask(path: Path, labels: Labels) -> Mask:
    """Read an image file, or by the ending of its name a volume, as class indices.

    Raises:
        UserError: The file cannot be read, or holds values that the labels do not name.
    """
    values: NDArray[Any]
    values, geometry = nifti.read_labels(path) if is_volume_name(path) else (read_mask(path), None)
    indices = labels.encode(values, str(path))
    held = np.zeros(_VALUES, bool)
    flat = values.ravel("K")
    for start in range(0, flat.size, _PIECE):  # counting all at once would take eight bytes for each
        held[flat[start : start + _PIECE]] = True
    named = {value for group in (*labels.values, labels.ignore) for value in group}
    return Mask(path, indices, geometry, len(set(np.flatnonzero(held).tolist()) - named))


def check_image(path: Path, truth: Mask) -> None:
    """Refuse an image that does not lie where its true mask does, by its header alone."""
    advice = "Overlays need an image of the same size."
    if truth.geometry is None:
        _check_size(path, image_size(path), truth, advice)
    else:
        _check_grid(path, _ground_header(path).geometry, truth, truth.geometry, advice)


def check_prediction(prediction: Mask, truth: Mask) -> None:
    """Refuse a predicted mask that does not lie where its true mask does."""
    if truth.geometry is None or prediction.geometry is None:
        advice = "Resize it by nearest neighbour: scores are taken at the native size"
        _check_size(prediction.path, prediction.indices.shape, truth, advice)
    else:
        advice = "Resample it to that grid by nearest neighbour."
        _check_grid(prediction.path, prediction.geometry, truth, truth.geometry, advice)


def read_ground(path: Path) -> tuple[NDArray[np.float32], Geometry]:
    """A volume to draw on, (I, J, K): of several channels the first."""
    if len(_ground_header(path).stored) > 3:
        channels, geometry = nifti.read(path, CHANNEL_AXIS)
        return channels[0], geometry
    return nifti.read(path)


def read_volumes(
    image: Path | None, truth: Path | str, prediction: Path | None, labels: Labels
) -> tuple[NDArray[np.float32] | None, Geometry, NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Read what there is of a case whose files are volumes.

    Args:
        image: To draw on.
        truth: The true mask, or the name of a phantom.
        prediction: The predicted mask.
        labels: What the values mean.

    Returns:
        The image (I, J, K), where it lies, and the class indices of truth and prediction (I, J, K).

    Raises:
        UserError: A file is gone or cannot be read, or lies elsewhere than the truth.
    """
    with nifti.collect_warnings():  # whoever scored the case was told
        shown = None
        if isinstance(truth, str):
            head = VolumeCase(truth, (), None, truth, PHANTOM)
            channels, geometry, _ = read_case(head)
            shown, true = channels[0], Mask(Path(truth), read_case_label(head, labels), geometry)
        else:
            true = read_any_mask(truth, labels)
            if image is not None:
                check_image(image, true)
                shown, _ = read_ground(image)
        assert true.geometry is not None
        if prediction is None:
            return shown, true.geometry, true.indices, None
        predicted = read_any_mask(prediction, labels)
        check_prediction(predicted, true)
        return shown, true.geometry, true.indices, predicted.indices


def _ground_header(path: Path) -> nifti.Header:
    try:
        return nifti.read_header(path)
    except UserError as refused:
        try:
            return nifti.read_header(path, CHANNEL_AXIS)
        except UserError:
            raise refused from None


def _check_size(path: Path, shape: tuple[int, ...], truth: Mask, advice: str) -> None:
    own = truth.indices.shape
    if shape != own:
        turned = " (one of the two may carry an EXIF orientation)" if shape == own[::-1] else ""
        raise UserError(
            f"{path}: {shape[1]} x {shape[0]} pixels, but its true mask {truth.path.name} has "
            f"{own[1]} x {own[0]}{turned}. {advice}"
        )


def _check_grid(path: Path, geometry: Geometry, truth: Mask, grid: Geometry, advice: str) -> None:
    if geometry.same_grid(grid):
        return
    if geometry.shape != grid.shape:
        sizes = [" x ".join(map(str, one.shape)) for one in (geometry, grid)]
        raise UserError(f"{path}: {sizes[0]} voxels, but its true mask {truth.path.name} has {sizes[1]}. {advice}")
    axes = f" (axes {geometry.orientation} and {grid.orientation})" if geometry.orientation != grid.orientation else ""
    raise UserError(
        f"{path}: lies up to {grid.distance(geometry):.3g} mm away from its true mask {truth.path.name}{axes}. "
        f"{advice} If only the header is wrong, correct it."
    )
