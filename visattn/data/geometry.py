"""Where the voxels of a volume lie. A volume is never passed on without its geometry."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

TOLERANCE_MM = 1e-3
"""Geometries that agree to this are the same; also how far sform and qform may lie apart unmentioned."""

_AXES = ("LR", "PA", "IS")


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the voxels of a volume lie, and what its file said about it.

    Args:
        shape: Voxels along I, J, K.
        affine: (4, 4) float64 from voxel indices to mm in RAS.
        header: The header's bytes, NIfTI-1 or -2, from which a written file takes sform, qform, codes and units; None
            for a geometry that comes from no file.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    header: bytes | None = None

    @cached_property
    def zooms(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along each axis, in mm."""
        i, j, k = (float(size) for size in np.linalg.norm(self.affine[:3, :3], axis=0))
        return i, j, k

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in ml; right under shear too."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def orientation(self) -> str:
        """The direction of each axis by its nearest anatomical one, as RAS."""
        unit = self.affine[:3, :3] / np.asarray(self.zooms)
        letters = ["", "", ""]
        left = np.abs(unit)
        for _ in range(3):  # the closest pair of axes first, so that no direction is given twice
            world, voxel = np.unravel_index(int(left.argmax()), left.shape)
            letters[voxel] = _AXES[world][int(unit[world, voxel] > 0)]
            left[world, :], left[:, voxel] = -1.0, -1.0
        return "".join(letters)

    @property
    def shear(self) -> float:
        """The largest cosine between two axes; 0 where all are perpendicular."""
        unit = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(np.abs(unit.T @ unit - np.eye(3)).max())

    def distance(self, other: "Geometry") -> float:
        """How far apart, in mm, the two affines put a corner of this volume at most."""
        return corner_distance(self.affine, other.affine, self.shape)

    def same_grid(self, other: "Geometry") -> bool:
        """Whether both have the same shape and agree to 1e-3 mm."""
        return self.shape == other.shape and self.distance(other) <= TOLERANCE_MM


def corner_distance(one: NDArray[np.float64], other: NDArray[np.float64], shape: tuple[int, int, int]) -> float:
    """How far apart, in mm, two affines put a corner of a volume of `shape` at most."""
    corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)], np.float64)
    corners[:, :3] *= np.array(shape) - 1
    return float(np.linalg.norm(((one - other) @ corners.T)[:3], axis=0).max())
