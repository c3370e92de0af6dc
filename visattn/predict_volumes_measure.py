"""What `volumes.csv` says about a mask, found in passes over a few planes at a time.

Components are connected through faces, edges and corners (26 neighbours).
"""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import cdist

from visattn.components import Components, Size3, find_components
from visattn.data.geometry import Geometry
from visattn.labels import Labels
from visattn.scratch import copied

COLUMNS = (
    *("class", "voxels", "ml", "components", "largest_ml", "largest_diameter_mm"),
    *("centroid_r_mm", "centroid_a_mm", "centroid_s_mm"),
)


def measure(indices: NDArray[np.uint8], geometry: Geometry, labels: Labels) -> list[dict[str, Any]]:
    """One row for each foreground class or region.

    Args:
        indices: Predicted class indices (I, J, K).
        geometry: Of the volume.
        labels: What the indices mean.

    Returns:
        `class`, `voxels`, `ml`, `components`, `largest_ml` and `largest_diameter_mm` of the largest component: its
        volume, and the largest distance of two of its voxels' centres; and the centroid of all voxels in mm of the
        file's world (right, anterior, superior), None where there is none.
    """
    soft = labels.activation == "softmax"
    members = labels.onehot(np.arange(256, dtype=np.uint8))[1 if soft else 0 :]  # (foreground, 256)
    rows = []
    for name, table in zip(labels.foreground, members, strict=True):
        found = find_components(partial(_slab, indices, table), _size(indices))
        row: dict[str, Any] = {"class": name, "voxels": found.voxels, "ml": round(found.voxels * geometry.voxel_ml, 6)}
        row |= {"components": len(found.sizes), "largest_ml": 0.0, "largest_diameter_mm": 0.0}
        centroid = np.full(3, np.nan)
        if found.voxels:
            centroid = geometry.affine[:3, :3] @ (found.sums / found.voxels) + geometry.affine[:3, 3]
            row["largest_ml"] = round(float(found.sizes.max()) * geometry.voxel_ml, 6)
            row["largest_diameter_mm"] = round(_diameter(indices, table, found, geometry), 3)
        for letter, value in zip("ras", centroid, strict=True):
            row[f"centroid_{letter}_mm"] = round(float(value), 3) if np.isfinite(value) else None
        rows.append(row)
    return rows


def _slab(indices: NDArray[np.uint8], table: NDArray[np.bool_], part: slice) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = table[copied(indices[:, :, part])]
    return mask


def _size(indices: NDArray[np.uint8]) -> Size3:
    i, j, k = indices.shape
    return i, j, k


def _diameter(indices: NDArray[np.uint8], table: NDArray[np.bool_], found: Components, geometry: Geometry) -> float:
    """The largest distance of two voxel centres of the largest component, in mm."""
    largest = int(found.sizes.argmax())
    corners = np.zeros((0, 3))
    for held in found.held:
        box = held.box
        if box is None or not (held.owners == largest).any():
            continue
        own = found.chosen(_slab(indices, table, held.part)[box], held, np.arange(len(found.sizes)) == largest)
        # Only the ends of each line of voxels can be corners of the hull.
        ends = own.copy()
        ends[1:-1] &= ~(own[:-2] & own[2:])
        points = np.argwhere(ends) + np.array([box[0].start, box[1].start, box[2].start + held.part.start])
        corners = _hull(np.concatenate([corners, points @ geometry.affine[:3, :3].T]))
    chunks = range(0, len(corners), 1000)  # the hull of a large ball has ten thousand corners
    return max(float(cdist(corners[low : low + 1000], corners).max()) for low in chunks)


def _hull(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The corners of the convex hull of `points` (N, 3)."""
    if len(points) < 50:
        return points
    try:
        kept: NDArray[np.float64] = points[ConvexHull(points).vertices]
    except QhullError:  # all in one plane or on one line: a little noise of 1e-6 mm gives the hull a volume
        noise = np.random.default_rng(0).uniform(-1e-6, 1e-6, points.shape)
        kept = points[ConvexHull(points + noise).vertices]
    return kept
