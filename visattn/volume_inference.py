"""A prepared volume through the networks, and back to the voxels of its file.

Everything that has the size of a volume comes from `Scratch`, so that it lies in memory or in a file; everything else
is a few planes. What is computed does not depend on it.

Legend: C channels, K outputs, D x H x W the network's grid, I x J x K the file's voxels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visattn.data.native_grid import Band, bands, native_rows, to_native
from visattn.data.volume_preprocessing import Plan, Size3
from visattn.inference3d import (
    VIEWS,
    Grid,
    ViewsOf3d,
    largest,
    member_logits,
    merged,
    plan_windows,
    probabilities,
    stream_logits,
    window_logits,
)
from visattn.labels import Labels, own_labels
from visattn.scratch import Pieces, Scratch, release

_LANES = 32  # float32 numbers; a multiple of every vector
_CHUNK = 2**18  # voxels that are looked at together; they fit a core's cache


@dataclass(frozen=True)
class Maps:
    """What is known of a volume, each map on the file's voxels.

    Args:
        indices: Class indices (I, J, K), uint8.
        probabilities: (channels, I, J, K) float32, if asked for.
        entropy: (I, J, K) float32 from 0, certain, to 1, all classes alike; if asked for.
        variance: (I, J, K) float32: the variance of the probabilities over views and networks, the mean of all classes;
            if asked for and there are several.
    """

    indices: NDArray[np.uint8]
    probabilities: NDArray[np.float32] | None = None
    entropy: NDArray[np.float32] | None = None
    variance: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Engine:
    """The networks and how they are used.

    Args:
        networks: In eval mode, on the device.
        labels: What the outputs mean.
        threshold: Probability from which a binary or region output is foreground.
        patch: (d, h, w) of a window; None: whole volumes.
        overlap: Share by which neighbouring windows overlap.
        tta: `flips` averages over the eight mirror images of a window.
        batch: Windows in a call.
        device: Where the networks are.
        autocast: Type that convolutions compute in; None: float32.
        memory_format: Of the windows.
    """

    networks: Sequence[nn.Module | Callable[[Tensor], Any]]
    labels: Labels
    threshold: float = 0.5
    patch: Size3 | None = None
    overlap: float = 0.5
    tta: ViewsOf3d = "none"
    batch: int = 1
    device: torch.device | str = "cpu"
    autocast: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def members(self) -> int:
        """How many outputs are averaged in each window."""
        return len(self.networks) * len(VIEWS[self.tta])

    def grid(self, size: Size3) -> Grid:
        """The windows of a volume of `size`."""
        return plan_windows(size, self.patch or size, self.overlap)

    def call(self, windows: Tensor) -> Tensor:
        """Logits of windows."""
        return window_logits(self.networks, windows, self.labels.activation, self.tta, self.autocast)

    def run(
        self,
        volume: NDArray[np.float32] | Tensor,
        plan: Plan,
        scratch: Scratch | None = None,
        *,
        strip_bytes: int | None = None,
        with_probabilities: bool = False,
        with_uncertainty: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Maps:
        """Predict one volume.

        Args:
            volume: (C, D, H, W), prepared.
            plan: What it went through.
            scratch: Where large arrays lie.
            strip_bytes: Memory for the planes that are not finished; None: as much as they take.
            with_probabilities: Whether probabilities are wanted.
            with_uncertainty: Whether entropy and variance are wanted.
            advance: Called with the number of windows that were done.

        Raises:
            ValueError: `strip_bytes` does not hold the smallest strip.
            torch.OutOfMemoryError: Not even one window fits.
        """
        scratch = scratch or Scratch()
        array = volume if isinstance(volume, Tensor) else Pieces(volume)
        grid = self.grid(plan.size)
        axes = bands(plan.size, plan.cropped)
        channels = self.labels.channels
        variance = with_uncertainty and self.members > 1
        call = _with_variance(self) if variance else self.call
        full = [plan.shape[axis] for axis in plan.axes]
        sink = _Sink(self, plan, scratch, full, with_probabilities, with_uncertainty, variance)
        same = all(band.matrix is None for band in axes)
        for low, high in _strips(axes[1], grid, channels + variance, strip_bytes):
            first, stop = axes[1].needs(low, high)
            sums = stream_logits(
                call,
                array,
                grid,
                batch=self.batch,
                device=self.device,
                memory_format=self.memory_format,
                rows=slice(first, stop),
                advance=advance,
            )
            if same:
                for plane, totals, weights in sums:
                    for at, part, weight in _chunks(plane, totals, weights):
                        sink.put(at, low, part, weight)
            else:
                for at, row, block in to_native(self._scores(sums), axes, (low, high), first):
                    sink.put(at, row, block, None)
        return sink.maps()

    def _scores(self, sums: Iterator[tuple[int, Tensor, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """Probabilities (and the variance behind them), which can be interpolated."""
        for first, totals, weights in sums:
            found, extra = _means(totals, weights, self.labels)
            yield first, found if not len(extra) else torch.cat([found, extra])


def _means(totals: Tensor, weights: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """Probabilities (K, n, H, W) of sums of logits, and the mean of what lies behind these.

    Rows are padded to a whole number of vectors: the ends of a vector that is not full are computed by other
    instructions, whose last bit differs, and where those lie must not depend on the strip.
    """
    count, width = labels.channels, totals.shape[-1]
    padded = totals.new_zeros(*totals.shape[:-1], -(-width // _LANES) * _LANES)
    torch.div(totals, weights, out=padded[..., :width])
    return probabilities(padded[:count], labels.activation)[..., :width], padded[count:, ..., :width]


def _strips(rows: Band, grid: Grid, channels: int, memory: int | None) -> list[tuple[int, int]]:
    """Strips of the file's rows whose planes fit `memory`."""
    if memory is None:
        return native_rows(rows, grid.size[1])
    # Float32: the planes that are not finished, those that just were, and what is made of them.
    row = 3 * 4 * channels * min(grid.patch[0], grid.size[0]) * grid.size[2]
    return native_rows(rows, min(memory // row, grid.size[1]))


def _with_variance(engine: Engine) -> Callable[[Tensor], Tensor]:
    """Logits, and behind them one more channel: the variance over networks and views, the mean of all channels."""

    def call(windows: Tensor) -> Tensor:
        results = member_logits(engine.networks, windows, engine.tta, engine.autocast)
        soft = engine.labels.activation == "softmax"
        found = torch.stack([logits.softmax(dim=1) if soft else logits.sigmoid() for logits in results])
        variance = found.var(dim=0, correction=0).mean(dim=1, keepdim=True)
        return torch.cat([merged(results, engine.labels.activation), variance], dim=1)

    return call


def _chunks(plane: int, totals: Tensor, weights: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A few planes at a time, so that a class's part of them stays in a core's cache."""
    step = max(1, _CHUNK // (totals.shape[2] * totals.shape[3]))
    for low in range(0, totals.shape[1], step):
        yield plane + low, totals[:, low : low + step], weights[low : low + step]


class _Sink:
    """Collects the maps in the order of the network's axes and shows them in that of the file's."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        scratch: Scratch,
        full: Sequence[int],
        with_probabilities: bool,
        with_uncertainty: bool,
        with_variance: bool,
    ) -> None:
        self.engine, self.plan = engine, plan
        labels = engine.labels
        self.indices: NDArray[np.uint8] = scratch.zeros(full, np.uint8)
        self.found: NDArray[np.float32] | None = None
        self.entropy: NDArray[np.float32] | None = None
        self.variance: NDArray[np.float32] | None = None
        if with_probabilities:
            self.found = scratch.zeros((labels.channels, *full), np.float32)
            if labels.activation == "softmax" and plan.cropped != tuple(full):
                self.found[0] = 1  # beyond the crop there is background
                release(self.found)
        if with_uncertainty:
            self.entropy = scratch.zeros(full, np.float32)
        if with_variance:
            self.variance = scratch.zeros(full, np.float32)
        self.own = [labels.names.index(own[0]) for own in own_labels(labels.regions)] if labels.regions else [1]

    def put(self, plane: int, row: int, block: Tensor, weights: Tensor | None) -> None:
        """Take up a block (K, n, h, W') of sums with their weights, or of probabilities without."""
        labels, count = self.engine.labels, self.engine.labels.channels
        soft = labels.activation == "softmax"
        wanted = self.found is not None or self.entropy is not None
        found, extra = block[:count], block[count:]
        if weights is not None and (wanted or not soft):
            found, extra = _means(block, weights, labels)
        # Of sums as of probabilities: the same mask, whether probabilities are wanted or not.
        index = largest(block[:count]) if soft else self._painted(found)
        box = self.plan.box
        at = (
            slice(box[0].start + plane, box[0].start + plane + block.shape[1]),
            slice(box[1].start + row, box[1].start + row + block.shape[2]),
            box[2],
        )
        self._store(self.indices, at, index)
        if self.found is not None:
            self._store(self.found, (slice(None), *at), found)
        if self.entropy is not None:
            self._store(self.entropy, at, entropy(found, labels.activation))
        if self.variance is not None:
            self._store(self.variance, at, extra[0])

    def _painted(self, found: Tensor) -> Tensor:
        index = torch.zeros(found.shape[1:], dtype=torch.uint8, device=found.device)
        for probability, own in zip(found, self.own, strict=True):
            index.masked_fill_(probability >= self.engine.threshold, own)
        return index

    def _store(self, array: NDArray[Any], at: tuple[slice, ...], values: Tensor) -> None:
        array[at] = values.cpu().numpy()
        release(array)

    def maps(self) -> Maps:
        """All maps, as views in the order of the file's axes."""
        return Maps(
            file_view(self.indices, self.plan),
            None if self.found is None else file_view(self.found, self.plan),
            None if self.entropy is None else file_view(self.entropy, self.plan),
            None if self.variance is None else file_view(self.variance, self.plan),
        )


def entropy(found: Tensor, activation: str) -> Tensor:
    """Entropy of probabilities (K, ...) as a share of the largest possible; with sigmoids the mean of all channels."""
    if activation == "softmax":
        return -torch.xlogy(found, found).sum(dim=0) / math.log(len(found))
    other = 1 - found
    return -(torch.xlogy(found, found) + torch.xlogy(other, other)).mean(dim=0) / math.log(2)


def file_view(array: NDArray[Any], plan: Plan) -> NDArray[Any]:
    """(..., D, H, W), turned but not cropped, as (..., I, J, K): the same memory."""
    lead = array.ndim - 3
    turned: tuple[Any, ...] = tuple(slice(None, None, -1 if axis in plan.flips else 1) for axis in range(3))
    view: NDArray[Any] = array[(..., *turned)]
    return view.transpose(*range(lead), *(lead + plan.axes.index(axis) for axis in range(3)))
