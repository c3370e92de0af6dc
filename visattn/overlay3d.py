"""Pictures of a volume and its masks: the axial, coronal and sagittal plane through the largest lesion.

The planes are those of the voxels whose directions are nearest to the anatomical ones; an oblique volume is not cut
anew, so that each pixel shows a voxel of the file. They stand upright, as radiologists look at them: the patient's
right is on the left of the axial and the coronal plane, the front on the left of the sagittal one, and letters say so.
All three have one scale, whatever the voxels' sides: a thick slice becomes a wide band.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from visattn.data.geometry import Geometry
from visattn.labels import IGNORE, Labels
from visattn.overlay import draw_overlay, font

_SIDE, _LARGEST = 480, 640  # pixels of the longest side: aimed at where voxels are enlarged, and at most
ACROSS = 3  # planes in a montage, for `draw_overlay`
_GROUND = 72  # grey where no image is known
_PAPER, _INK = (22, 24, 29), (240, 240, 240)
_BARS = (1, 2, 5, 10, 20, 50, 100, 200)  # mm
# Of axes that run to the right, to the front and up: the fixed one, those of rows and columns, and what stands at the
# left, right, top and bottom when both are shown backwards.
_VIEWS = (
    ("axial", 2, (1, 0), "RLAP"),
    ("coronal", 1, (2, 0), "RLSI"),
    ("sagittal", 0, (2, 1), "APSI"),
)


class Plane(NamedTuple):
    """One plane of a volume.

    Attributes:
        image: RGB (H, W, 3).
        truth: Class indices (H, W); None where there are none.
        prediction: Class indices (H, W); None where there are none.
        mm: Side of a pixel.
        name: "axial", "coronal" or "sagittal".
        letters: The directions at its left, right, top and bottom, as "RLAP".
    """

    image: NDArray[np.uint8]
    truth: NDArray[np.uint8] | None
    prediction: NDArray[np.uint8] | None
    mm: float
    name: str
    letters: str


def planes(
    image: NDArray[np.floating[Any]] | None,
    geometry: Geometry,
    truth: NDArray[np.uint8] | None = None,
    prediction: NDArray[np.uint8] | None = None,
) -> list[Plane]:
    """Cut the three planes through the middle of the largest lesion of the truth, else of the prediction.

    A lesion is a connected set (26 neighbours) of voxels of any foreground class. Without one, the planes go through
    the middle of the volume.

    Args:
        image: (I, J, K); shown from its 0.5th to its 99.5th percentile, NaN as black. None: a plain ground.
        geometry: Of the volume.
        truth: Class indices (I, J, K).
        prediction: Class indices (I, J, K).

    Returns:
        Axial, coronal and sagittal.
    """
    centre = _centre(geometry.shape, truth, prediction)
    low, high = (0.0, 0.0) if image is None else _window(image)
    axes, forwards = _to_ras(geometry.orientation)
    zooms = [geometry.zooms[axis] for axis in axes]
    mm = _pixel([zoom * geometry.shape[axis] for zoom, axis in zip(zooms, axes, strict=True)], min(zooms))

    def cut(volume: NDArray[Any], fixed: int, sides: tuple[int, int]) -> NDArray[Any]:
        """The plane through the centre, rows along the first of `sides`, both running against RAS."""
        # By indexing: np.take first copies a volume whose axes lie in the order of the file.
        flat: NDArray[Any] = np.moveaxis(volume, axes[fixed], 0)[centre[axes[fixed]]]
        flat = flat if axes[sides[0]] < axes[sides[1]] else flat.T
        return flat[tuple(slice(None, None, -1 if forwards[side] else 1) for side in sides)]

    result = []
    for name, fixed, sides, letters in _VIEWS:
        spacing = (zooms[sides[0]], zooms[sides[1]])
        masks = [
            None if mask is None else _nearest(cut(mask, fixed, sides), spacing, mm) for mask in (truth, prediction)
        ]
        if image is None:
            counts = [_count(geometry.shape[axes[side]], zooms[side], mm) for side in sides]
            grey = np.full(counts, _GROUND, np.uint8)
        else:
            shown = _linear(_grey(cut(image, fixed, sides), low, high), spacing, mm)
            grey = np.rint(shown).astype(np.uint8)
        result.append(Plane(np.stack([grey] * 3, axis=-1), masks[0], masks[1], mm, name, letters))
    return result


def montage(
    image: NDArray[np.floating[Any]] | None,
    geometry: Geometry,
    truth: NDArray[np.uint8] | None = None,
    prediction: NDArray[np.uint8] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None, NDArray[np.uint8] | None]:
    """The three planes side by side on dark paper, with their directions and a scale bar.

    A constant margin, as around a skull-stripped brain, is left out.

    Args:
        image: As `planes`.
        geometry: As `planes`.
        truth: As `planes`.
        prediction: As `planes`.

    Returns:
        RGB (H, W, 3), and the class indices of truth and prediction (H, W), background between the planes. Nothing is
        written on a plane itself.
    """
    if image is not None:
        box, geometry = _within_margin(image, geometry, [mask for mask in (truth, prediction) if mask is not None])
        image = image[box]
        truth, prediction = (None if mask is None else mask[box] for mask in (truth, prediction))
    views = planes(image, geometry, truth, prediction)
    size = max(13, round(max(max(view.image.shape[:2]) for view in views) / 22))
    edge = round(1.6 * size)
    height = max(view.image.shape[0] for view in views) + 2 * edge + round(1.4 * size)
    widths = [view.image.shape[1] + 2 * edge for view in views]
    paper = Image.new("RGB", (sum(widths), height), _PAPER)
    draw = ImageDraw.Draw(paper)
    masks = [None if mask is None else np.zeros((height, sum(widths)), np.uint8) for mask in (truth, prediction)]
    left = edge
    for view, width in zip(views, widths, strict=True):
        rows, columns = view.image.shape[:2]
        # Centred, since the planes have different heights; the scale bar's line below stays free.
        top = edge + (height - 2 * edge - round(1.4 * size) - rows) // 2
        paper.paste(Image.fromarray(view.image), (left, top))
        for canvas, mask in zip(masks, (view.truth, view.prediction), strict=True):
            if canvas is not None and mask is not None:
                canvas[top : top + rows, left : left + columns] = mask
        places = (
            (left - edge / 2, top + rows / 2),
            (left + columns + edge / 2, top + rows / 2),
            (left + columns / 2, top - edge / 2),
            (left + columns / 2, top + rows + edge / 2),
        )
        for letter, place in zip(view.letters, places, strict=True):
            draw.text(place, letter, _INK, font(size), anchor="mm")
        left += width
    _scale_bar(draw, views[0], edge, height - round(1.1 * size), size)
    return np.asarray(paper), masks[0], masks[1]


def draw_planes(
    image: NDArray[np.floating[Any]] | None,
    geometry: Geometry,
    prediction: NDArray[np.uint8],
    labels: Labels,
    truth: NDArray[np.uint8] | None = None,
    note: str = "",
) -> NDArray[np.uint8]:
    """Draw the outlines of the prediction, and of the truth where there is one, on the three planes.

    Args:
        image: (I, J, K), or None for a plain ground.
        geometry: Of the volume.
        prediction: Class indices (I, J, K).
        labels: What the indices mean.
        truth: Class indices (I, J, K). Ignored voxels are darkened.
        note: A few words for the right end of the legend, as a score.

    Returns:
        RGB (H, W, 3).
    """
    ground, true, predicted = montage(image, geometry, truth, prediction)
    assert predicted is not None
    return draw_overlay(ground, predicted, labels, true, note, across=ACROSS)


def _centre(shape: tuple[int, int, int], *masks: NDArray[np.uint8] | None) -> tuple[int, ...]:
    """The voxel of the largest lesion that is nearest to its centroid, which itself may lie outside."""
    for mask in masks:
        if mask is None:
            continue
        foreground = (mask > 0) & (mask != IGNORE)
        box = ndimage.find_objects(foreground.view(np.uint8))
        if not box:
            continue
        numbers, _ = ndimage.label(foreground[box[0]], np.ones((3, 3, 3)))
        sizes = np.bincount(numbers.ravel())
        sizes[0] = 0
        voxels = np.argwhere(numbers == sizes.argmax())
        nearest = voxels[((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1).argmin()]
        return tuple(int(place + part.start) for place, part in zip(nearest, box[0], strict=True))
    return tuple(size // 2 for size in shape)


def _to_ras(orientation: str) -> tuple[list[int], list[bool]]:
    """The axis of the volume along right-left, front-back and up-down, and whether it runs right, to the front, up."""
    axes = [next(i for i, letter in enumerate(orientation) if letter in pair) for pair in ("LR", "PA", "IS")]
    return axes, [orientation[axis] in "RAS" for axis in axes]


def _pixel(extents: list[float], finest: float) -> float:
    """Side of a pixel in mm: that of the smallest voxel side, or a whole part of it where the volume has few voxels."""
    longest = max(extents)
    if longest / finest > _LARGEST:
        return longest / _LARGEST
    return finest / max(1, round(_SIDE / (longest / finest)))


def _count(voxels: int, zoom: float, mm: float) -> int:
    return max(1, round(voxels * zoom / mm))


def _places(voxels: int, zoom: float, mm: float) -> NDArray[np.float64]:
    """Where the pixels' middles lie in voxels; voxel 0 reaches from 0 to 1."""
    return np.asarray((np.arange(_count(voxels, zoom, mm)) + 0.5) * mm / zoom, np.float64)


def _nearest(plane: NDArray[Any], spacing: tuple[float, float], mm: float) -> NDArray[np.uint8]:
    rows, columns = (
        np.minimum(_places(voxels, zoom, mm).astype(np.int64), voxels - 1)
        for voxels, zoom in zip(plane.shape, spacing, strict=True)
    )
    return np.asarray(plane[np.ix_(rows, columns)], np.uint8)


def _linear(plane: NDArray[Any], spacing: tuple[float, float], mm: float) -> NDArray[Any]:
    for axis, zoom in enumerate(spacing):
        voxels = plane.shape[axis]
        place = np.clip(_places(voxels, zoom, mm) - 0.5, 0, voxels - 1)
        before = np.minimum(place.astype(np.int64), max(0, voxels - 2))
        after = np.minimum(before + 1, voxels - 1)
        part = (place - before)[:, None] if axis == 0 else place - before
        plane = plane.take(before, axis) * (1 - part) + plane.take(after, axis) * part
    return plane


def _within_margin(
    image: NDArray[np.floating[Any]], geometry: Geometry, masks: list[NDArray[np.uint8]]
) -> tuple[tuple[slice, slice, slice], Geometry]:
    """The box around all that differs from the first corner's value or is marked, a twentieth wider, and its grid."""
    step = _sparing(image)
    sparse = (slice(None, None, step),) * 3
    kept = image[sparse] != image[0, 0, 0]
    for mask in masks:
        kept |= (mask[sparse] > 0) & (mask[sparse] != IGNORE)
    start, stop = np.zeros(3, np.int64), np.array(geometry.shape)
    if kept.any():
        for axis, size in enumerate(geometry.shape):
            line = np.flatnonzero(kept.any(axis=tuple(other for other in range(3) if other != axis))) * step
            edge = max(step, size // 20)
            start[axis], stop[axis] = max(0, line[0] - edge), min(size, line[-1] + edge + 1)
    i, j, k = (slice(int(low), int(high)) for low, high in zip(start, stop, strict=True))
    affine = geometry.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ start
    di, dj, dk = (int(size) for size in stop - start)
    return (i, j, k), Geometry((di, dj, dk), affine)


def _sparing(image: NDArray[Any]) -> int:
    """Two million voxels tell the percentiles and the extent of any volume: every how many along each axis."""
    return max(1, round(float((image.size / 2e6) ** (1 / 3))))


def _window(image: NDArray[np.floating[Any]]) -> tuple[float, float]:
    step = _sparing(image)
    sample = image[::step, ::step, ::step]
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return 0.0, 0.0
    low, high = np.percentile(sample, [0.5, 99.5])
    return float(low), float(high)


def _grey(plane: NDArray[Any], low: float, high: float) -> NDArray[np.float64]:
    values = np.nan_to_num(np.asarray(plane, np.float64), nan=low, posinf=high, neginf=low)
    if high <= low:
        return np.where(values > low, 255.0, 0.0)
    shown: NDArray[np.float64] = np.clip((values - low) * (255 / (high - low)), 0, 255)
    return shown


def _scale_bar(draw: ImageDraw.ImageDraw, view: Plane, left: int, bottom: int, size: int) -> None:
    """A bar of a round length, up to a third of the plane, and the length beside it."""
    longest = view.image.shape[1] * view.mm / 3
    length = max((bar for bar in _BARS if bar <= longest), default=_BARS[0])
    pixels = length / view.mm
    thick = max(2, size // 7)
    draw.rectangle((left, bottom - thick // 2, left + round(pixels) - 1, bottom + (thick - 1) // 2), _INK)
    draw.text((left + pixels + size / 2, bottom), f"{length} mm", _INK, font(size), anchor="lm")
