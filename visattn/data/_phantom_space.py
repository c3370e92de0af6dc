"""Where the voxels of a synthetic head lie, and what its anatomy is drawn with.

Legend: x right, y front, z up, in mm of the head about the middle of its cavity; I, J, K the voxel axes.
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visattn.data.geometry import Geometry

Field = NDArray[Any]
"""float32 (I, J, K)."""

Box = tuple[slice, slice, slice]
Point = tuple[float, float, float]

_EXTENT = (176.0, 214.0, 190.0)  # mm along x, y, z that an image covers
_SIDES = (64, 128)


@dataclass(frozen=True, eq=False)
class Scan:
    """How a head lies in its image: its grid, and the matrix (3, 4) from voxel indices to mm of the head."""

    geometry: Geometry
    to_head: NDArray[np.float64]


def draw_scan(rng: np.random.Generator) -> Scan:
    """A grid about a head: axes in any order and direction, mostly with thicker slices along one, mostly tilted."""
    draw = rng.uniform
    fine, thick = draw(1.75, 2.2), draw(2.3, 2.7)
    zooms = [fine, fine, fine]
    if draw() < 0.7:  # thick slices along one axis
        zooms[int(rng.integers(3))] = thick
    order = rng.permutation(3)
    signs = np.where(rng.random(3) < 0.5, -1.0, 1.0)
    axes = np.zeros((3, 3))
    for axis, world in enumerate(order):
        axes[world, axis] = signs[axis] * zooms[world]
    sizes = [round(_EXTENT[world] / zooms[world]) for world in order]
    i, j, k = (min(max(size, _SIDES[0]), _SIDES[1]) for size in sizes)
    # The slices follow the head not quite, and the head lies tilted in the scanner.
    linear = _rotation(*(math.radians(draw(-6, 6)) for _ in range(3))) @ axes
    middle = np.array([draw(-4, 4), draw(-4, 4), draw(-18, -12)])
    half = (np.array([i, j, k]) - 1) / 2
    to_head = np.column_stack([linear, middle - linear @ half])
    tilt = 0.0 if draw() < 0.25 else 20.0
    place = np.column_stack(
        [_rotation(*(math.radians(draw(-tilt, tilt)) for _ in range(3))), [draw(-30, 30) for _ in range(3)]]
    )
    affine = np.eye(4)
    affine[:3] = place @ np.vstack([to_head, [0, 0, 0, 1]])
    # As a file keeps it.
    return Scan(Geometry((i, j, k), affine.astype(np.float32).astype(np.float64)), to_head)


def _rotation(a: float, b: float, c: float) -> NDArray[np.float64]:
    """Rotation about x by `a`, then y by `b`, then z by `c`."""
    x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    y = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    z = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    return np.asarray(z @ y @ x)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int, int], zooms: Sequence[float], grain: float) -> Field:
    """A smooth field of mean 0 and a variance near 1, with grains of some `grain` mm, on voxels of `zooms` mm."""
    counts = [math.ceil(n * zoom / grain) + 3 for n, zoom in zip(shape, zooms, strict=True)]
    field = rng.standard_normal(counts, np.float32)
    for axis in (2, 1, 0):  # the first axis last: its slices are contiguous
        at = np.arange(shape[axis], dtype=np.float32) * np.float32(zooms[axis] / grain)
        start = at.astype(np.int64)  # floor, all are positive
        t = at - start
        taps = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)  # cubic B-spline
        wide = [1, 1, 1]
        wide[axis] = -1
        total = np.take(field, start, axis)
        total *= taps[0].reshape(wide)
        part = np.empty_like(total)
        for tap in (1, 2, 3):
            np.take(field, start + tap, axis, part, mode="clip")  # the other modes buffer
            part *= taps[tap].reshape(wide)
            total += part
        field = total
    field *= np.float32(2.0 / 216.0)
    return field


class Space:
    """Coordinates of the voxels in mm of an average head, and smooth random fields on them."""

    def __init__(self, rng: np.random.Generator, scan: Scan) -> None:
        self.rng, self.shape = rng, scan.geometry.shape
        self.zooms = scan.geometry.zooms
        self.edge = float(np.mean(self.zooms))  # over so many mm one tissue gives way to another
        scale = rng.uniform(0.93, 1.05)
        stretch = [scale * rng.uniform(0.97, 1.03) for _ in range(3)]
        square = np.vstack([np.diag(1 / np.array(stretch)) @ scan.to_head, [0, 0, 0, 1]])
        self._to_index = np.linalg.inv(square)[:3]
        indices = np.ogrid[tuple(slice(n) for n in self.shape)]
        fields = []
        for row, by in zip(scan.to_head, stretch, strict=True):
            parts = [np.asarray(row[axis] / by * indices[axis], np.float32) for axis in range(3)]
            fields.append(parts[0] + parts[1] + (parts[2] + np.float32(row[3] / by)))
        for field in fields:  # nobody is an ellipsoid
            field += 1.6 * self.noise(45)
        self.x, self.y, self.z = fields

    def noise(self, grain: float) -> Field:
        """A smooth field of mean 0 and a variance near 1, with grains of some `grain` mm."""
        return smooth_noise(self.rng, self.shape, self.zooms, grain)

    def ball(self, centre: Point, radii: Point) -> Field:
        """How deep in mm, about, a voxel lies within an ellipsoid; below 0 outside."""
        return _ball((self.x, self.y, self.z), centre, radii)

    def paint(self, image: Field, value: float, centre: Point, radii: Point, turn: float | None = None) -> None:
        """Blend `value` into an ellipsoid; only the voxels about it are looked at.

        Args:
            image: Changed in place.
            value: Of the tissue.
            centre: Of the ellipsoid.
            radii: Of the ellipsoid.
            turn: A number: draw it on both sides, as far apart as `turn` times the distance behind the middle says.
        """
        x, y, z = centre
        wide, deep, tall = radii
        if turn is not None:
            x, wide = 0.0, wide + abs(x) + 20 * turn
        box = self.box((x, y, z), (wide, deep, tall))
        across, along = self.x[box], self.y[box]
        if turn is not None:
            across = np.abs(across) - np.float32(turn) * np.maximum(-along, 0)
        blend(image[box], value, self.soft(_ball((across, along, self.z[box]), centre, radii)))

    def box(self, centre: Point, radii: Point) -> Box:
        """The voxels about an ellipsoid, with 9 mm to spare for what makes heads uneven."""
        middle = self._to_index @ np.array([*centre, 1.0])
        half = np.sqrt(((self._to_index[:, :3] * (np.array(radii) + 9)) ** 2).sum(axis=1))
        low, high = np.floor(middle - half).astype(int), np.ceil(middle + half).astype(int) + 1
        i, j, k = (slice(max(a, 0), max(b, 0)) for a, b in zip(low.tolist(), high.tolist(), strict=True))
        return i, j, k

    def crop(self, box: Box) -> "Space":
        """The same coordinates on the voxels of `box` alone."""
        part = copy(self)
        part.x, part.y, part.z = self.x[box], self.y[box], self.z[box]
        i, j, k = part.x.shape
        part.shape = (i, j, k)
        part._to_index = self._to_index.copy()
        part._to_index[:, 3] -= [one.start for one in box]
        return part

    def soft(self, depth: Field) -> Field:
        """Share of a voxel that lies inside a surface, from its depth in mm."""
        share = np.asarray(depth, np.float32) * np.float32(1 / self.edge)
        share += np.float32(0.5)
        return np.clip(share, 0, 1, out=share)


def _ball(place: tuple[Field, Field, Field], centre: Point, radii: Point) -> Field:
    total: Field | None = None
    for field, middle, radius in zip(place, centre, radii, strict=True):
        part = field - np.float32(middle)
        part *= np.float32(1 / radius)
        part *= part
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    np.sqrt(total, out=total)
    total -= 1
    total *= np.float32(-min(radii))
    return total


def blend(image: Field, value: float | Field, share: Field) -> None:
    """Replace `share` of each voxel by `value`, in place."""
    image += share * (value - image)


def step(values: Field, start: float, width: float) -> Field:
    """0 up to `start`, 1 from `start` + `width` on, smooth between."""
    t = np.clip((values - np.float32(start)) * np.float32(1 / width), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)
