"""Connected components of a volume, found in passes over a few planes at a time.

Planes are labelled slab by slab, and labels that touch across two slabs are one component (Rosenfeld & Pfaltz, J. ACM
1966), so memory does not grow with the depth, and where a slab ends changes nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Box = tuple[slice, slice, slice]
Size3 = tuple[int, int, int]

SLAB = 2**23  # voxels


def slabs(shape: Size3, voxels: int = SLAB) -> Iterator[slice]:
    """Slices of the last axis, each of about so many voxels."""
    step = max(1, voxels // (shape[0] * shape[1]))
    for low in range(0, shape[2], step):
        yield slice(low, min(low + step, shape[2]))


@dataclass(frozen=True)
class Held:
    """The components that lie in one slab.

    Args:
        part: The slab, a slice of the last axis.
        box: Within the slab, what holds all of the mask; None where there is none of it.
        owners: For each label that `marks` gives, from 1 on, the number of its component.
    """

    part: slice
    box: Box | None
    owners: NDArray[np.int64]


@dataclass(frozen=True)
class Components:
    """The components of a mask, numbered from 0.

    Args:
        sizes: Voxels of each.
        sums: The sum of all voxels' indices, (3,).
        at_border: Which have a voxel on the border of the array; an axis of a single plane has none.
        held: The slabs, in their order.
        faces_only: Whether voxels touch by faces alone.
    """

    sizes: NDArray[np.int64]
    sums: NDArray[np.float64]
    at_border: NDArray[np.bool_]
    held: tuple[Held, ...]
    faces_only: bool

    @property
    def voxels(self) -> int:
        """Voxels of all together."""
        return int(self.sizes.sum())

    def chosen(self, mask: NDArray[np.bool_], held: Held, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which voxels of a slab's box belong to components for which `wanted` holds.

        Args:
            mask: The slab's mask within `held.box`, as it was when the components were found.
            held: The slab.
            wanted: For each component.
        """
        marks, _ = ndimage.label(mask, _structure(self.faces_only))
        return np.asarray(np.concatenate([[False], wanted[held.owners]])[marks], np.bool_)


def find_components(
    read: Callable[[slice], NDArray[np.bool_]], shape: Size3, faces_only: bool = False, voxels: int = SLAB
) -> Components:
    """The components of a mask (I, J, K).

    Args:
        read: Gives a slab of the mask, (I, J, k).
        shape: (I, J, K).
        faces_only: Whether voxels touch by faces alone (6 neighbours), not by edges and corners too (26).
        voxels: Of a slab, about.
    """
    sums = np.zeros(3)
    borders: list[NDArray[np.bool_]] = []
    counts: list[NDArray[np.int64]] = []
    pairs: list[NDArray[np.int64]] = []
    held: list[tuple[slice, Box | None, int, int]] = []
    total = 0
    last: tuple[Box, NDArray[np.int64], int] | None = None
    for part in slabs(shape, voxels):
        mask = read(part)
        box = bounding_box(mask)
        if box is None:
            last = None
            held.append((part, None, total, 0))
            continue
        marks, count = ndimage.label(mask[box], _structure(faces_only))
        counts.append(np.bincount(marks.ravel(), minlength=count + 1)[1:].astype(np.int64))
        borders.append(_at_border(marks, count, box, part, shape))
        for axis in range(3):
            line = mask[box].sum(axis=tuple(a for a in range(3) if a != axis), dtype=np.int64)
            offset = box[axis].start + (part.start if axis == 2 else 0)
            sums[axis] += float((line * (np.arange(len(line)) + offset)).sum())
        if last is not None and last[0][2].stop == last[2] and box[2].start == 0:
            following = marks[:, :, 0] + total * (marks[:, :, 0] > 0)
            pairs.append(_touching(last[0], last[1], (box[0], box[1]), following, faces_only))
        ending = marks[:, :, -1] + total * (marks[:, :, -1] > 0)
        last = (box, ending, part.stop - part.start)
        held.append((part, box, total, count))
        total += count
    sizes = np.concatenate(counts) if counts else np.zeros(0, np.int64)
    edges = np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0] - 1, edges[:, 1] - 1)), shape=(total, total))
    number, roots = connected_components(graph, directed=False) if total else (0, np.zeros(0, np.int64))
    whole = np.bincount(roots, weights=sizes, minlength=number).astype(np.int64)
    border = np.zeros(number, np.bool_)
    border[roots[np.concatenate(borders)] if borders else []] = True
    owners = (Held(part, box, np.asarray(roots[low : low + count], np.int64)) for part, box, low, count in held)
    return Components(whole, sums, border, tuple(owners), faces_only)


def bounding_box(mask: NDArray[np.bool_]) -> Box | None:
    """The smallest box that holds all of a mask; None where it is empty."""
    bounds = []
    for axis in range(3):
        line = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(line):
            return None
        bounds.append(slice(int(line[0]), int(line[-1]) + 1))
    return bounds[0], bounds[1], bounds[2]


def _at_border(marks: NDArray[Any], count: int, box: Box, part: slice, shape: Size3) -> NDArray[np.bool_]:
    """Which labels of a slab lie on the border of the whole array."""
    found = np.zeros(count + 1, np.bool_)
    for axis in (axis for axis in range(3) if shape[axis] > 1):
        offset = part.start if axis == 2 else 0
        if box[axis].start + offset == 0:
            found[marks.take(0, axis)] = True
        if box[axis].stop + offset == shape[axis]:
            found[marks.take(-1, axis)] = True
    return found[1:]


def _structure(faces_only: bool) -> NDArray[Any]:
    return np.asarray(ndimage.generate_binary_structure(3, 1 if faces_only else 3))


def _touching(
    box: Box, plane: NDArray[Any], other: tuple[slice, slice], following: NDArray[Any], faces_only: bool
) -> NDArray[np.int64]:
    """Pairs of labels of two neighbouring planes, each given within its box, that touch."""
    height = max(box[0].stop, other[0].stop) + 2
    width = max(box[1].stop, other[1].stop) + 2
    one, two = np.zeros((height, width), np.int64), np.zeros((height, width), np.int64)
    one[box[0].start + 1 : box[0].stop + 1, box[1].start + 1 : box[1].stop + 1] = plane
    two[other[0].start + 1 : other[0].stop + 1, other[1].start + 1 : other[1].stop + 1] = following
    found = []
    steps = (0,) if faces_only else (-1, 0, 1)
    for di in steps:
        for dj in steps:
            moved = np.roll(two, (di, dj), (0, 1))
            both = (one > 0) & (moved > 0)
            found.append(np.unique(np.stack([one[both], moved[both]], axis=1), axis=0))
    return np.unique(np.concatenate(found), axis=0)
