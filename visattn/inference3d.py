"""Volumes through a network that sees windows of them, in memory that does not grow with the volume's depth.

Pure functions over a callable. Windows are spread evenly and overlap; where they do, their logits are averaged with
Gaussian weights (Isensee et al., nnU-Net, 2021), so the middle of a window, which has seen most of its surroundings,
counts most. Several networks or mirrored views of a window are averaged as probabilities first.

Memory: windows are taken in planes along the first axis. When all windows that reach a plane are done, it leaves, so
only as many planes as a window is deep are kept. If that is still too much, the second axis is cut into strips that are
done one after the other; windows that reach into two strips are computed twice. Every voxel sums the same terms in the
same order, so the result does not depend on any of this.

Legend: C channels, K outputs, D x H x W the volume, d x h x w a window, B windows in a call.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from visattn.errors import unknown
from visattn.inference import Activation

ViewsOf3d = Literal["none", "flips"]

VIEWS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "flips": tuple(
        tuple(axis for axis, on in zip((-3, -2, -1), flags, strict=True) if on) for flags in product((0, 1), repeat=3)
    ),
}
"""Name to the views that are averaged, each a tuple of the axes it is flipped along."""

SIGMA = 0.125
"""Standard deviation of the weights, as a share of the window; nnU-Net's and MONAI's value."""

_SMALLEST = 1e-7  # probabilities below it are taken for it before their logarithm


class Volume(Protocol):
    """What windows are cut from: a tensor, an array, a memory map, or anything that gives float pieces (C, d, h, w)."""

    @property
    def shape(self) -> Sequence[int]:
        """(C, D, H, W)."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """A piece, by four slices."""
        ...


@dataclass(frozen=True)
class Grid:
    """Where the windows lie.

    Args:
        size: (D, H, W) of the volume.
        patch: (d, h, w) of a window.
        starts: First voxel of the windows along each axis; negative where the volume is smaller than a window.
    """

    size: tuple[int, int, int]
    patch: tuple[int, int, int]
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @property
    def count(self) -> int:
        """Number of windows."""
        return math.prod(len(starts) for starts in self.starts)


def plan_windows(size: Sequence[int], patch: Sequence[int], overlap: float = 0.5) -> Grid:
    """Spread windows evenly, neighbours overlapping by at least the share `overlap`.

    An axis shorter than the window gets one window with the volume in its middle.

    Args:
        size: (D, H, W) of the volume.
        patch: (d, h, w) of a window.
        overlap: 0 to below 1.

    Raises:
        ValueError: A size is below 1, or the overlap is no such share.
    """
    if len(size) != 3 or len(patch) != 3 or min(*size, *patch) < 1:
        raise ValueError(f"windows of {tuple(patch)} cannot cover a volume of {tuple(size)}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be a share of 0 to below 1, got {overlap}")
    starts: list[tuple[int, ...]] = []
    for length, window in zip(size, patch, strict=True):
        room = length - window
        if room <= 0:
            starts.append((-((window - length) // 2),))
            continue
        count = math.ceil(room / max(1, math.floor(window * (1 - overlap)))) + 1
        starts.append(tuple(room * index // (count - 1) for index in range(count)))
    (d, h, w), (i, j, k) = size, patch
    return Grid((d, h, w), (i, j, k), (starts[0], starts[1], starts[2]))


def gaussian(length: int) -> Tensor:
    """Weights (length,) of a window along one axis, 1 in the middle."""
    position = torch.arange(length, dtype=torch.float64) - (length - 1) / 2
    return torch.exp(-0.5 * (position / (SIGMA * length)).square()).to(torch.float32)


def window_logits(
    networks: Sequence[Callable[[Tensor], Any]],
    windows: Tensor,
    activation: Activation,
    tta: ViewsOf3d = "none",
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Logits (B, K, d, h, w) of windows (B, C, d, h, w), averaged over networks and views as probabilities.

    One network without further views gives its logits as they are: softmax forgets what is added to all classes of a
    voxel, so logits and log-probabilities blend to the same.
    """
    return merged(member_logits(networks, windows, tta, autocast), activation)


def member_logits(
    networks: Sequence[Callable[[Tensor], Any]],
    windows: Tensor,
    tta: ViewsOf3d = "none",
    autocast: torch.dtype | None = None,
) -> list[Tensor]:
    """Logits (B, K, d, h, w) of windows (B, C, d, h, w), one for each network and view, turned back."""
    views = VIEWS[tta]
    with torch.autocast(windows.device.type, autocast, enabled=autocast is not None):
        results = [_flip(_first(network(_flip(windows, axes))), axes) for network in networks for axes in views]
    return [logits.float() for logits in results]


def merged(results: Sequence[Tensor], activation: Activation) -> Tensor:
    """The logits of the mean of the probabilities that `results` (B, K, d, h, w) stand for."""
    if len(results) == 1:
        return results[0]
    if activation == "softmax":
        mean = torch.stack([logits.softmax(dim=1) for logits in results]).mean(dim=0)
        return mean.clamp_min(_SMALLEST).log()
    mean = torch.stack([logits.sigmoid() for logits in results]).mean(dim=0)
    return torch.logit(mean, eps=_SMALLEST)


def _first(output: Any) -> Tensor:
    logits: Tensor = output[0] if isinstance(output, tuple | list) else output
    return logits


def _flip(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.flip(axes) if axes else x


@torch.no_grad()
def stream_logits(
    call: Callable[[Tensor], Tensor],
    volume: Volume,
    grid: Grid,
    *,
    batch: int = 2,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
    rows: slice | None = None,
    advance: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Weighted sums of the windows' logits, a few planes at a time.

    Args:
        call: Windows (B, C, d, h, w) to logits (B, K, d, h, w), as `window_logits` does.
        volume: (C, D, H, W).
        grid: Where the windows lie.
        batch: Windows in a call at most, all of one row along the last axis; halved for good when the device's memory
            does not suffice.
        device: Where `call` computes, and where the planes that are not finished are kept.
        memory_format: Of the windows, such as `torch.channels_last_3d`.
        rows: The strip of the second axis that is wanted; None: all of it.
        advance: Called with the number of windows that were done.

    Yields:
        First plane; the sums (K, n, H, W) of the next n planes, valid until the next ones are asked for; and the sums
        of the weights (n, H, W), by which they are to be divided. H is the strip's height with `rows`. For the largest
        class the division does not matter.

    Raises:
        torch.OutOfMemoryError: Not even one window fits.
    """
    depth, height, width = grid.size
    wanted = rows or slice(0, height)
    # Along an axis with one window there is nothing to weigh.
    weight = [
        (gaussian(length) if len(starts) > 1 else torch.ones(length)).to(device)
        for length, starts in zip(grid.patch, grid.starts, strict=True)
    ]
    kernel = weight[0][:, None, None] * weight[1][None, :, None] * weight[2][None, None, :]
    # The weights that a voxel receives are a product of sums along the axes, since windows lie on a grid.
    total = [_received(starts, own, size) for starts, own, size in zip(grid.starts, weight, grid.size, strict=True)]
    plane_weight = total[1][wanted, None] * total[2][None, :]
    inner = [start for start in grid.starts[1] if start < wanted.stop and start + grid.patch[1] > wanted.start]
    kept: Tensor | None = None  # (K, planes, strip, W): sums of the planes from `first` on
    first = 0
    for index, start in enumerate(grid.starts[0]):
        # A call never spans two rows: kernels are chosen by the number of windows, and which ones go together must not
        # depend on the strip.
        rest = [[(start, row, column) for column in grid.starts[2]] for row in inner]
        while rest:
            chosen = rest[0][: math.ceil(len(rest[0]) / math.ceil(len(rest[0]) / batch))]
            try:
                logits = call(_cut(volume, grid, chosen).to(device, memory_format=memory_format))
            except torch.OutOfMemoryError:
                if len(chosen) == 1:
                    raise
                batch = len(chosen) // 2
                continue
            if kept is None:
                deep = min(grid.patch[0], depth)
                kept = logits.new_zeros((logits.shape[1], deep, wanted.stop - wanted.start, width))
            for position, window in zip(chosen, logits, strict=True):
                _add(kept, window, kernel, grid, position, first, wanted)
            del logits, window  # before the next ones take as much again
            rest[0] = rest[0][len(chosen) :]
            rest = rest if rest[0] else rest[1:]
            if advance is not None:
                advance(len(chosen))
        assert kept is not None
        following = grid.starts[0][index + 1] if index + 1 < len(grid.starts[0]) else depth
        ready = following - first
        yield first, kept[:, :ready], total[0][first:following, None, None] * plane_weight
        left = kept.shape[1] - ready
        if left:
            for k in range(len(kept)):  # one by one, so that planes which overlap their new place need no copy of all
                kept[k, :left] = kept[k, ready:].clone() if ready < left else kept[k, ready:]
        kept[:, left:] = 0
        first = following


def _received(starts: Sequence[int], weight: Tensor, size: int) -> Tensor:
    """The sum of the windows' weights at each voxel of an axis."""
    total = torch.zeros(size, device=weight.device)
    for start in starts:
        low, high = max(start, 0), min(start + len(weight), size)
        total[low:high] += weight[low - start : high - start]
    return total


def _cut(volume: Volume, grid: Grid, positions: Sequence[tuple[int, int, int]]) -> Tensor:
    """Windows (B, C, d, h, w); what lies outside the volume is 0."""
    windows = []
    for position in positions:
        spans = [
            (max(start, 0), min(start + length, size))
            for start, length, size in zip(position, grid.patch, grid.size, strict=True)
        ]
        piece = volume[(slice(None), *(slice(*span) for span in spans))]
        window = piece if isinstance(piece, Tensor) else torch.from_numpy(np.ascontiguousarray(piece))
        around = []
        for (low, high), start, length in zip(spans, position, grid.patch, strict=True):
            around.append((low - start, start + length - high))
        if any(side for pair in around for side in pair):
            window = F.pad(window, [side for pair in reversed(around) for side in pair])
        windows.append(window.to(torch.float32))
    return torch.stack(windows)


def _add(
    kept: Tensor,
    window: Tensor,
    kernel: Tensor,
    grid: Grid,
    position: tuple[int, int, int],
    first: int,
    wanted: slice,
) -> None:
    """Add the weighted window (K, d, h, w) to the planes that are kept."""
    bounds = ((first, first + kept.shape[1]), (wanted.start, wanted.stop), (0, grid.size[2]))
    into, out_of = [], []
    for start, length, (low, high) in zip(position, grid.patch, bounds, strict=True):
        begin, end = max(start, low), min(start + length, high)
        into.append(slice(begin - low, end - low))
        out_of.append(slice(begin - start, end - start))
    kept[(slice(None), *into)].addcmul_(window[(slice(None), *out_of)], kernel[tuple(out_of)])


def strips(grid: Grid, channels: int, memory: int) -> list[slice]:
    """Cut the second axis so that the planes that are kept take at most `memory` bytes.

    Args:
        grid: Where the windows lie.
        channels: K.
        memory: Bytes for the sums, in float32, and as much again for what is made of them.

    Raises:
        ValueError: Not even one row fits.
    """
    row = 2 * 4 * channels * min(grid.patch[0], grid.size[0]) * grid.size[2]
    height = min(grid.size[1], memory // row)
    if height < 1:
        raise ValueError(f"{memory} bytes hold no row of {row} bytes")
    count = math.ceil(grid.size[1] / height)
    edges = [round(grid.size[1] * index / count) for index in range(count + 1)]
    return [slice(low, high) for low, high in pairwise(edges)]


def largest(logits: Tensor) -> Tensor:
    """The index (uint8) of the largest of `logits` (K, ...), the first of equals; many times faster than argmax."""
    if logits.device.type == "cpu":
        return torch.from_numpy(_largest(logits.numpy()))
    best = logits[0].clone()
    index = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
    for k in range(1, len(logits)):
        index.masked_fill_(logits[k] > best, k)
        torch.maximum(best, logits[k], out=best)
    return index


def _largest(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Numpy compares eight times as fast as torch does; and as k rises, a maximum of bytes takes the place of masks."""
    best = logits[0].copy()
    index = np.zeros(best.shape, np.uint8)
    larger = np.empty(best.shape, bool)
    number = larger.view(np.uint8)
    for k in range(1, len(logits)):
        np.greater(logits[k], best, out=larger)
        np.multiply(number, np.uint8(k), out=number)
        np.maximum(index, number, out=index)
        np.maximum(best, logits[k], out=best)
    return index


def probabilities(logits: Tensor, activation: Activation) -> Tensor:
    """Probabilities of logits (K, ...)."""
    if activation not in ("sigmoid", "softmax"):
        raise unknown("activation", activation, ("sigmoid", "softmax"))
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(dim=0)


def require_eval(networks: Sequence[Any]) -> None:
    """Refuse networks in training mode, whose batch statistics would mix the windows."""
    if any(isinstance(network, nn.Module) and network.training for network in networks):
        raise ValueError("a network is in training mode: call eval() first")
