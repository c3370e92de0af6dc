"""What `volumes.csv` says about a mask, found in passes over a few planes at a time.

Components are connected through faces, edges and corners (26 neighbours). Planes are labelled slab by slab, and labels
that touch across two slabs are one component (Rosenfeld & Pfaltz, J. ACM 1966), so memory does not grow with the depth.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import cdist

from visattn.data.geometry import Geometry
from visattn.labels import Labels
from visattn.scratch import release

COLUMNS = (
    *("class", "voxels", "ml", "components", "largest_ml", "largest_diameter_mm"),
    *("centroid_r_mm", "centroid_a_mm", "centroid_s_mm"),
)

_NEIGHBOURS = np.ones((3, 3, 3))
_SLAB = 2**23  # voxels


def slabs(shape: tuple[int, int, int], voxels: int = _SLAB) -> Iterator[slice]:
    """Slices of the last axis, each of about so many voxels."""
    step = max(1, voxels // (shape[0] * shape[1]))
    for low in range(0, shape[2], step):
        yield slice(low, min(low + step, shape[2]))


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
        found = _parts(indices, table)
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


@dataclass(frozen=True)
class _Parts:
    """Components of a mask: which slab holds which, their sizes, the sum of all voxels' indices."""

    voxels: int
    sums: NDArray[np.float64]
    sizes: NDArray[np.int64]
    slabs: list[tuple[slice, tuple[slice, slice, slice] | None, NDArray[np.int64]]]


def _parts(indices: NDArray[np.uint8], table: NDArray[np.bool_]) -> _Parts:
    shape = indices.shape
    assert len(shape) == 3
    sums = np.zeros(3)
    counts: list[NDArray[np.int64]] = []
    pairs: list[NDArray[np.int64]] = []
    held: list[tuple[slice, tuple[slice, slice, slice] | None, int, int]] = []
    total = 0
    last: tuple[tuple[slice, slice, slice], NDArray[np.int32], int] | None = None
    for part in slabs(shape):
        mask = table[indices[:, :, part]]
        release(indices)
        box = _box(mask)
        if box is None:
            last = None
            held.append((part, None, total, 0))
            continue
        marks, count = ndimage.label(mask[box], _NEIGHBOURS)
        counts.append(np.bincount(marks.ravel(), minlength=count + 1)[1:].astype(np.int64))
        for axis in range(3):
            line = mask[box].sum(axis=tuple(a for a in range(3) if a != axis), dtype=np.int64)
            offset = box[axis].start + (part.start if axis == 2 else 0)
            sums[axis] += float((line * (np.arange(len(line)) + offset)).sum())
        if last is not None and last[0][2].stop == last[2] and box[2].start == 0:
            pairs.append(_touching(last[0], last[1], (box[0], box[1]), marks[:, :, 0] + total * (marks[:, :, 0] > 0)))
        ending = marks[:, :, -1] + total * (marks[:, :, -1] > 0)
        last = (box, ending, part.stop - part.start)
        held.append((part, box, total, count))
        total += count
    sizes = np.concatenate(counts) if counts else np.zeros(0, np.int64)
    edges = np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0] - 1, edges[:, 1] - 1)), shape=(total, total))
    number, roots = connected_components(graph, directed=False) if total else (0, np.zeros(0, np.int64))
    whole = np.bincount(roots, weights=sizes, minlength=number).astype(np.int64)
    owners = [(part, box, np.asarray(roots[low : low + count], np.int64)) for part, box, low, count in held]
    return _Parts(int(sizes.sum()), sums, whole, owners)


def _box(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice] | None:
    bounds = []
    for axis in range(3):
        line = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(line):
            return None
        bounds.append(slice(int(line[0]), int(line[-1]) + 1))
    return bounds[0], bounds[1], bounds[2]


def _touching(
    box: tuple[slice, slice, slice], plane: NDArray[Any], other: tuple[slice, slice], following: NDArray[Any]
) -> NDArray[np.int64]:
    """Pairs of labels of two neighbouring planes, each given within its box, that touch by a face, edge or corner."""
    height = max(box[0].stop, other[0].stop) + 2
    width = max(box[1].stop, other[1].stop) + 2
    one, two = np.zeros((height, width), np.int64), np.zeros((height, width), np.int64)
    one[box[0].start + 1 : box[0].stop + 1, box[1].start + 1 : box[1].stop + 1] = plane
    two[other[0].start + 1 : other[0].stop + 1, other[1].start + 1 : other[1].stop + 1] = following
    found = []
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            moved = np.roll(two, (di, dj), (0, 1))
            both = (one > 0) & (moved > 0)
            found.append(np.unique(np.stack([one[both], moved[both]], axis=1), axis=0))
    return np.unique(np.concatenate(found), axis=0)


def _diameter(indices: NDArray[np.uint8], table: NDArray[np.bool_], found: _Parts, geometry: Geometry) -> float:
    """The largest distance of two voxel centres of the largest component, in mm."""
    largest = int(found.sizes.argmax())
    corners = np.zeros((0, 3))
    for part, box, owners in found.slabs:
        if box is None or not (owners == largest).any():
            continue
        marks, _ = ndimage.label(table[indices[:, :, part]][box], _NEIGHBOURS)
        release(indices)
        own = np.concatenate([[False], owners == largest])[marks]
        # Only the ends of each line of voxels can be corners of the hull.
        ends = own.copy()
        ends[1:-1] &= ~(own[:-2] & own[2:])
        points = np.argwhere(ends) + np.array([box[0].start, box[1].start, box[2].start + part.start])
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
