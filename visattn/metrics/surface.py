"""Distances between the edges of two masks: 95th percentile Hausdorff distance and surface Dice.

Both follow MONAI (`monai.metrics.compute_hausdorff_distance(percentile=95)` and `compute_surface_dice` without
subvoxels), for any number of axes and any spacing:

* an edge pixel is one of the mask that touches, along an axis, a pixel that is not; outside the image nothing is;
* each edge pixel of one mask has its Euclidean distance to the nearest edge pixel of the other;
* HD95 is the larger of the two directions' 95th percentiles, linearly interpolated;
* NSD is the share of edge pixels, of both masks together, whose distance is at most the tolerance
  (Nikolov et al., https://arxiv.org/abs/1809.04430, with pixels counted where DeepMind's code measures contour length).

MONAI returns NaN or infinity where a mask is empty; what we do there is decided in `cases.py`. Distances are float64
here and float32 in MONAI, so numbers agree to about 1e-7 of their size.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree

from visattn.metrics.overlap import Mask

# Below this many edge pixels per pixel of the box a tree over them is faster than a distance transform of the box.
_DENSE = 1 / 16
# Spacings are decimal fractions: 3 steps of 0.1 mm must lie within a tolerance of 0.3 mm.
_SLACK = 1e-9


def diagonal(shape: Sequence[int], spacing: Sequence[float] | None = None) -> float:
    """Length of an image's diagonal, corner to corner: the distance that a missed case counts.

    Args:
        shape: Pixels along each axis.
        spacing: Size of a pixel along each axis; default 1, so that the result is in pixels.
    """
    sides = np.asarray(shape, np.float64) * _spacing(len(shape), spacing)
    return float(np.sqrt(np.sum(sides**2)))


def edges(mask: Mask) -> Mask:
    """The pixels of `mask` with a neighbour along some axis that is not in it, or that border the image's outside."""
    inner = mask.copy()
    for axis in range(mask.ndim):
        here, there = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
        here[1:] &= there[:-1]
        here[:-1] &= there[1:]
        here[[0, -1]] = False
    return mask & ~inner


def bounding_box(mask: Mask) -> tuple[slice, ...]:
    """The smallest box that holds all of `mask`; slices of no length where that is nothing."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        # What is known already is cut off, so that the later axes cost little.
        rest = mask[tuple(box)]
        occupied = np.flatnonzero(rest.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1) if len(occupied) else slice(0, 0))
    return tuple(box)


def surface_distances(
    prediction: Mask, truth: Mask, spacing: Sequence[float] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances from each edge pixel of one mask to the nearest of the other.

    Args:
        prediction: Mask of any number of axes, not empty.
        truth: Mask of the same shape, not empty.
        spacing: Size of a pixel along each axis; default 1.

    Returns:
        Prediction to truth, and truth to prediction, in the unit of `spacing`.

    Raises:
        ValueError: Shapes differ, a mask is empty, or `spacing` has another number of axes.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth {truth.shape}")
    if not (prediction.any() and truth.any()):
        raise ValueError("an empty mask has no edge to measure from")
    sides = _spacing(truth.ndim, spacing)
    # Nothing of either mask lies outside the box, so that its border is an edge as the image's outside is.
    box = bounding_box(prediction | truth)
    predicted, true = edges(prediction[box]), edges(truth[box])
    if np.count_nonzero(predicted) + np.count_nonzero(true) > predicted.size * _DENSE:
        return _by_transform(predicted, true, sides), _by_transform(true, predicted, sides)
    return _by_tree(predicted, true, sides), _by_tree(true, predicted, sides)


def hausdorff(distances: tuple[NDArray[np.float64], NDArray[np.float64]], percentile: float = 95) -> float:
    """The larger of both directions' percentiles of the distances from `surface_distances`, in their unit."""
    return float(max(np.quantile(direction, percentile / 100) for direction in distances))


def surface_dice(distances: tuple[NDArray[np.float64], NDArray[np.float64]], tolerance: float) -> float:
    """Share (0..1) of all edge pixels whose distance is at most `tolerance`, in the unit of the distances."""
    near = sum(int(np.count_nonzero(direction <= tolerance * (1 + _SLACK))) for direction in distances)
    return near / sum(len(direction) for direction in distances)


def _by_tree(start: Mask, goal: Mask, spacing: NDArray[np.float64]) -> NDArray[np.float64]:
    tree = KDTree(np.argwhere(goal) * spacing, leafsize=32)
    apart = ~goal[start]  # an edge that both share lies at no distance
    found = np.zeros(len(apart))
    found[apart] = tree.query(np.argwhere(start)[apart] * spacing)[0]
    return found


def _by_transform(start: Mask, goal: Mask, spacing: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = distance_transform_edt(~goal, sampling=spacing)[start]
    return found


def _spacing(axes: int, spacing: Sequence[float] | None) -> NDArray[np.float64]:
    if spacing is None:
        return np.ones(axes)
    sides = np.asarray(spacing, np.float64)
    if sides.shape != (axes,) or not (np.isfinite(sides) & (sides > 0)).all():
        raise ValueError(f"spacing needs {axes} positive numbers, one for each axis; got {spacing}")
    return sides
