"""From the scores of windows to the grid of the file, a few planes at a time.

Each class is interpolated linearly along the three axes one after the other, by the parts of the matrices of
`resample.py` that are not zero, in pieces that stay in a core's cache. Blocks of planes and rows have fixed sizes and
places, so every voxel comes out of the same products, whatever was held in memory meanwhile. Where the network's grid
is the file's, scores pass unchanged.

Legend: K channels, D x H x W the network's grid, D' x H' x W' the file's grid, turned and cropped as the network's.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visattn.data.resample import linear_matrix

PLANES, ROWS = 8, 32
"""Planes and rows of the file's grid that are computed together."""

PRODUCT = 32
"""New voxels of an axis that one product makes: the matrix is nearly all zero, and wider parts hold more of that."""

_CACHED = 2**19  # numbers that pass through the three products together, where a processor's cache holds them
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Part:
    """The new voxels [low, high) of an axis, and the old ones [first, stop) that `matrix` makes them of.

    Without a matrix they are the same.
    """

    low: int
    high: int
    first: int
    stop: int
    matrix: Tensor | None


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

    def parts(self, low: int, high: int, step: int, device: torch.device = _CPU) -> list[Part]:
        """Cut the new voxels from `low` to before `high` into parts of `step`."""
        found = []
        for begin in range(low, high, step):
            end = min(begin + step, high)
            first, stop = self.needs(begin, end)
            matrix = None if self.matrix is None else self.matrix[begin:end, first:stop].to(device)
            found.append(Part(begin, end, first, stop, matrix))
        return found

    def taps(self, new: int) -> list[tuple[int, float]]:
        """The old voxels that the new one is made of, and their weights."""
        first, stop = self.needs(new, new + 1)
        if self.matrix is None:
            return [(new, 1.0)]
        weights = self.matrix[new, first:stop].tolist()
        return [(old, weight) for old, weight in zip(range(first, stop), weights, strict=True) if weight]


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
        First plane and first row on the file's grid, and a block of scores (K, planes, rows, W'), valid until the next
        one is asked for.
    """
    depth = axes[0]
    total = len(depth.first)
    blocks: _Blocks | None = None
    planes: list[Tensor] = []  # (K, h, W) each, from `start` on
    start = done = 0
    for first, scores in stream:
        if not planes:
            start = first
        planes += scores.unbind(1)
        stop = start + len(planes)
        if blocks is None:
            blocks = _Blocks(axes, rows, held, scores.device)
        while done < total:
            high = min(done + PLANES, total)
            if depth.needs(done, high)[1] > stop:
                break
            yield from blocks.of(planes, start, done, high)
            done = high
        keep = min(depth.first[done], stop) if done < total else stop
        # Copies, since the stream's own memory is about to change.
        planes, start = [plane.clone() for plane in planes[keep - start :]], keep


class _Blocks:
    """Makes blocks of planes, in memory that is taken once."""

    def __init__(self, axes: tuple[Band, Band, Band], rows: tuple[int, int], held: int, device: torch.device) -> None:
        self.axes, self.held = axes, held
        self.rows: list[tuple[Part, list[Part]]] = []
        for low in range(rows[0], rows[1], ROWS):
            high = min(low + ROWS, rows[1])
            self.rows.append((axes[1].parts(low, high, ROWS)[0], axes[1].parts(low, high, PRODUCT, device)))
        self.width = len(axes[2].first)
        self.columns = axes[2].parts(0, self.width, PRODUCT, device)
        self._memory: dict[str, Tensor] = {}

    def of(self, planes: list[Tensor], start: int, low: int, high: int) -> Iterator[tuple[int, int, Tensor]]:
        """The blocks of the planes from `low` to before `high`, made of `planes` (K, h, W), the first one `start`."""
        first, stop = self.axes[0].needs(low, high)
        planes = planes[first - start : stop - start]
        taps = [[(old - first, weight) for old, weight in self.axes[0].taps(new)] for new in range(low, high)]
        channels = len(planes[0])
        for block, products in self.rows:
            height = block.high - block.low
            result = self._take("result", planes[0], channels, high - low, height, self.width)
            # A GPU takes all channels at once: there it is calls that cost, and no cache holds them.
            step = channels if result.is_cuda else max(1, _CACHED // ((high - low) * height * self.width))
            rows = slice(block.first - self.held, block.stop - self.held)
            for k in range(0, channels, step):
                some = [plane[k : k + step, rows] for plane in planes]
                self._make(some, taps, block, products, result[k : k + step])
            yield low, block.low, result

    def _make(
        self,
        planes: list[Tensor],
        taps: list[list[tuple[int, float]]],
        block: Part,
        products: list[Part],
        result: Tensor,
    ) -> None:
        """Interpolate `planes` (k, h, W) to `result` (k, n, rows, W')."""
        channels, count = result.shape[:2]
        h_axis, w_axis = (self.axes[axis].matrix is not None for axis in (1, 2))
        old_rows, old_width = planes[0].shape[1:]
        mixed = result
        if h_axis or w_axis:
            mixed = self._take("mixed", result, channels, count, old_rows, old_width)
        _mix(planes, taps, mixed, self._take("spare", result, *planes[0].shape))
        if h_axis:
            lines = result
            if w_axis:
                lines = self._take("lines", result, channels, count, block.high - block.low, old_width)
            for part in products:
                assert part.matrix is not None
                of = mixed.flatten(0, 1)[:, part.first - block.first : part.stop - block.first]
                into = lines.flatten(0, 1)[:, part.low - block.low : part.high - block.low]
                torch.bmm(part.matrix.expand(len(of), -1, -1), of, out=into)
            mixed = lines
        if w_axis:
            for part in self.columns:
                assert part.matrix is not None
                of, into = mixed.view(-1, old_width), result.view(-1, self.width)
                torch.mm(of[:, part.first : part.stop], part.matrix.T, out=into[:, part.low : part.high])

    def _take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Memory for a tensor, what was taken under this name before."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = like.new_empty(size)
        return self._memory[name][:size].view(shape)


def _mix(planes: list[Tensor], taps: list[list[tuple[int, float]]], out: Tensor, spare: Tensor) -> None:
    """Sums of planes (k, h, W) to `out` (k, n, h, W), one for each list of planes and weights.

    One plane after the other, and products rounded before they are added: a matrix product takes other paths for other
    strides, and those of a strip would differ from those of the whole in the last bit.
    """
    for into, ((first, weight), *others) in zip(out.unbind(1), taps, strict=True):
        torch.mul(planes[first], weight, out=into)
        for other, weight in others:
            torch.mul(planes[other], weight, out=spare)
            into += spare
