"""Bringing a volume onto another grid through both affines.

`resample.py` changes the size of a volume along its own axes. Here the grids may be turned against each other by any
angle: each voxel of the new grid takes the linear interpolation of the old volume at its position in mm. Voxels beyond
the old volume take the value at its border.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from visattn.data.geometry import TOLERANCE_MM, Geometry

_SAMPLES = 40  # points along each axis at which the common extent is measured


def index_map(source: Geometry, target: Geometry) -> NDArray[np.float64]:
    """(4, 4) from voxel indices of `target` to those of `source`."""
    return np.asarray(np.linalg.solve(source.affine, target.affine))


def turned(volume: NDArray[np.float32], source: Geometry, target: Geometry) -> NDArray[np.float32] | None:
    """`volume` with its axes permuted and flipped, if that alone puts it onto `target` to 1e-3 mm; else None."""
    matrix = np.rint(index_map(source, target))
    linear = np.abs(matrix[:3, :3])
    if not ((linear.sum(0) == 1).all() and (linear.sum(1) == 1).all()):
        return None
    axes = tuple(int(axis) for axis in linear.argmax(0))  # the axis of the source that runs along each of the target's
    result = volume.transpose(axes)
    flips = tuple(axis for axis in range(3) if matrix[axes[axis], axis] < 0)
    result = np.flip(result, flips)
    placed = Geometry(target.shape, source.affine @ matrix)
    starts = [target.shape[t] - 1 if t in flips else 0 for t in range(3)]
    expected = matrix[:3, :3] @ starts + matrix[:3, 3]
    if result.shape != target.shape or expected.any() or target.distance(placed) > TOLERANCE_MM:
        return None
    return result


def regrid(volume: NDArray[np.float32], source: Geometry, target: Geometry) -> NDArray[np.float32]:
    """`volume` (I, J, K) of `source` at the voxels of `target`."""
    matrix = index_map(source, target)
    result = np.empty(target.shape, np.float32)
    ndimage.affine_transform(
        volume, matrix[:3, :3], matrix[:3, 3], output_shape=target.shape, output=result, order=1, mode="nearest"
    )
    return result


def coverage(source: Geometry, target: Geometry) -> float:
    """Share of the extent of `target` that lies within `source`; both reach half a voxel beyond their outer centres."""
    steps = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
    grid = np.stack(np.meshgrid(*(steps * size - 0.5 for size in target.shape), indexing="ij"), -1).reshape(-1, 3)
    matrix = index_map(source, target)
    at = grid @ matrix[:3, :3].T + matrix[:3, 3]
    slack = 0.5 + 1e-6
    inside = ((at >= -slack) & (at <= np.array(source.shape) - 1 + slack)).all(1)
    return float(inside.mean())
