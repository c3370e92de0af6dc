"""From the scores of windows to the grid of the file, a few planes at a time.

Each class is interpolated linearly along the three axes one after the other, by the part of the matrix of `resample.py`
that is not zero. Blocks of planes and rows have fixed sizes and places, so every voxel comes out of the same products,
whatever was held in memory meanwhile. Where the network's grid is the file's, scores pass unchanged.

Legend: K channels, D x H x W the network's grid, D' x H' x W' the file's grid, turned and cropped as the network's.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visattn.data.resample import linear_matrix

PLANES, ROWS = 8, 64
"""Planes and rows of the file's grid that are computed together."""


@dataclass(frozen=True)
class Band:
    """The matrix of one axis, and which old voxels each new one takes something from.

    Args:
        matrix: (new, old); None where the axis keeps its length.
        first: First old voxel of each new one.
        stop: Behind the last one.
    """

    matrix: Tensor | None
    first: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def between(cls, old: int, new: int) -> "Band":
        """The band from `old` to `new` voxels."""
        if old == new:
            return cls(None, tuple(range(old)), tuple(range(1, old + 1)))
        matrix = linear_matrix(old, new)
        taken = matrix > 0
        first = taken.int().argmax(dim=1)
        stop = old - taken.flip(1).int().argmax(dim=1)
        return cls(matrix, tuple(first.tolist()), tuple(stop.tolist()))

    def needs(self, low: int, high: int) -> tuple[int, int]:
        """The old voxels, first and behind the last, that the new ones from `low` to before `high` are made of."""
        return self.first[low], self.stop[high - 1]

    def part(self, low: int, high: int, device: torch.device) -> Tensor:
        """The rows of the matrix from `low` to before `high` and its columns that `needs` names."""
        assert self.matrix is not None
        start, stop = self.needs(low, high)
        return self.matrix[low:high, start:stop].to(device)


def bands(old: Sequence[int], new: Sequence[int]) -> tuple[Band, Band, Band]:
    """The bands of all three axes."""
    d, h, w = (Band.between(a, b) for a, b in zip(old, new, strict=True))
    return d, h, w


def native_rows(band: Band, strip: int) -> list[tuple[int, int]]:
    """Cut the rows of the file's grid into strips of at most `strip` network rows, at places that blocks share.

    Raises:
        ValueError: Not even one block fits.
    """
    total = len(band.first)
    parts: list[tuple[int, int]] = []
    for low in range(0, total, ROWS):
        high = min(low + ROWS, total)
        begun = parts[-1][0] if parts else low
        first, stop = band.needs(begun, high)
        if parts and stop - first <= strip:
            parts[-1] = (begun, high)
            continue
        first, stop = band.needs(low, high)
        if stop - first > strip:
            raise ValueError(f"{strip} rows are fewer than the {stop - first} that one block needs")
        parts.append((low, high))
    return parts


def to_native(
    stream: Iterable[tuple[int, Tensor]], axes: tuple[Band, Band, Band], rows: tuple[int, int], held: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Interpolate planes as they come.

    Args:
        stream: First plane, and scores (K, n, h, W) of the next n planes, valid until the next ones are asked for.
        axes: The bands of the three axes.
        rows: Rows of the file's grid that are wanted, first and behind the last.
        held: The network's row that the stream's first row is.

    Yields:
        First plane and first row on the file's grid, and a block of scores (K, planes, rows, W').
    """
    depth = axes[0]
    pending: Tensor | None = None
    start = done = 0
    total = len(depth.first)
    for first, scores in stream:
        if pending is None:
            pending, start = scores, first
        else:
            pending = torch.cat([pending, scores], dim=1)
        stop = start + pending.shape[1]
        while done < total:
            high = min(done + PLANES, total)
            low_plane, stop_plane = depth.needs(done, high)
            if stop_plane > stop:
                break
            planes = pending[:, low_plane - start : stop_plane - start]
            yield from _block(planes, axes, (done, high), rows, held)
            done = high
        keep = depth.first[done] if done < total else stop
        # A copy, since the stream's own memory is about to change.
        pending, start = pending[:, keep - start :].clone(), keep


def _block(
    planes: Tensor, axes: tuple[Band, Band, Band], wanted: tuple[int, int], rows: tuple[int, int], held: int
) -> Iterator[tuple[int, int, Tensor]]:
    device = planes.device
    if axes[0].matrix is not None:
        planes = _mixed(planes, axes[0].part(*wanted, torch.device("cpu")).tolist())
    for low in range(rows[0], rows[1], ROWS):
        high = min(low + ROWS, rows[1])
        first, stop = axes[1].needs(low, high)
        block = planes[:, :, first - held : stop - held]
        if axes[1].matrix is not None:
            block = axes[1].part(low, high, device) @ block
        if axes[2].matrix is not None:
            block = block @ axes[2].matrix.T.to(device)
        yield wanted[0], low, block


def _mixed(planes: Tensor, weights: list[list[float]]) -> Tensor:
    """Sums of planes (K, p, h, W), one for each row of `weights`.

    One plane after the other, and products rounded before they are added: a matrix product takes other paths for other
    numbers of rows, and those of a strip would differ from those of the whole in the last bit.
    """
    result = planes.new_empty(planes.shape[0], len(weights), *planes.shape[2:])
    for out, row in zip(result.unbind(1), weights, strict=True):
        taps = [(plane, weight) for plane, weight in zip(planes.unbind(1), row, strict=True) if weight]
        torch.mul(taps[0][0], taps[0][1], out=out)
        for plane, weight in taps[1:]:
            out += plane * weight
    return result
