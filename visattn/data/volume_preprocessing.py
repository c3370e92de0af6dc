"""What happens to a volume before the network sees it, and the way back to its own grid.

Order: axes turned to an anatomical orientation, cropped to what is not background, resampled to a spacing or a size,
normalised channel by channel. The way back takes it all apart, so that a prediction lies on the voxels of its file.

Legend: C channels, K outputs, I x J x K the file's voxels, D x H x W the network's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visattn.data.geometry import Geometry
from visattn.data.intensity import Normalise
from visattn.data.network_grid import to_network
from visattn.data.resample import resample, resample_labels
from visattn.errors import UserError
from visattn.scratch import Scratch, release

Box = tuple[slice, slice, slice]
Size3 = tuple[int, int, int]

_PART = 2**22  # voxels that are looked at together
_OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))


@dataclass(frozen=True)
class Plan:
    """The steps that one volume went through.

    Args:
        shape: (I, J, K) of the file.
        axes: For each of D, H, W the file's axis it comes from.
        flips: Which of D, H, W run against that axis.
        box: What was kept of the turned volume.
        size: (D, H, W) that the network's grid has.
        spacing: Distance of neighbouring voxels on the network's grid, in mm.
    """

    shape: Size3
    axes: Size3
    flips: tuple[int, ...]
    box: Box
    size: Size3
    spacing: tuple[float, float, float]

    @property
    def cropped(self) -> Size3:
        """(D, H, W) before resampling."""
        d, h, w = (part.stop - part.start for part in self.box)
        return d, h, w

    def turn(self, volume: Tensor) -> Tensor:
        """(..., I, J, K) to (..., D, H, W), not yet cropped; a view."""
        lead = volume.ndim - 3
        turned = volume.permute(*range(lead), *(lead + axis for axis in self.axes))
        return turned.flip([lead + axis for axis in self.flips]) if self.flips else turned

    def turn_back(self, volume: Tensor) -> Tensor:
        """The inverse of `turn`."""
        lead = volume.ndim - 3
        if self.flips:
            volume = volume.flip([lead + axis for axis in self.flips])
        return volume.permute(*range(lead), *(lead + self.axes.index(axis) for axis in range(3)))

    def forward_labels(self, indices: NDArray[np.uint8], classes: Sequence[int]) -> Tensor:
        """Class indices (I, J, K) of the file to (D, H, W) of the network."""
        turned = self.turn(torch.from_numpy(indices))[self.box]
        return resample_labels(turned, self.size, classes).contiguous()

    def labels_native(self, scores: Tensor) -> NDArray[np.uint8]:
        """The class with the largest of `scores` (K, D, H, W) on the file's voxels (I, J, K); 0 outside the crop.

        Class by class, so that one class alone is held at the file's size.
        """
        best: Tensor | None = None
        index = torch.zeros(self.cropped, dtype=torch.uint8)
        for k in range(len(scores)):
            native = resample(scores[k], self.cropped)
            if best is None:
                best = native.clone() if native.data_ptr() == scores[k].data_ptr() else native
                continue
            index.masked_fill_(native > best, k)
            torch.maximum(best, native, out=best)
        return self._paste(index, 0)

    def channel_native(self, channel: Tensor, outside: float = 0.0) -> NDArray[np.float32]:
        """One map (D, H, W) on the file's voxels (I, J, K), with `outside` beyond the crop."""
        return self._paste(resample(channel, self.cropped), outside)

    def _paste(self, part: Tensor, outside: float) -> NDArray[Any]:
        full = [self.shape[axis] for axis in self.axes]
        if tuple(part.shape) == tuple(full):
            whole = part
        else:
            whole = part.new_full(full, outside)
            whole[self.box] = part
        return self.turn_back(whole).numpy()


@dataclass(frozen=True)
class VolumePreprocessing:
    """The preprocessing of a recipe; it rides in the checkpoint.

    Args:
        channels: Names of the channels, in the order of the network's input.
        normalise: One method for each channel.
        orientation: Anatomical directions of D, H, W, as RAS; None: the axes of the file.
        spacing: Voxel size along D, H, W in mm that volumes are resampled to; None: each its own.
        size: (D, H, W) that whole volumes are resized to; None: they keep the size that the spacing gives.
        patch: (d, h, w) of a window of the network; None: it sees whole volumes.
        crop_foreground: Whether a margin of constant background is cut away.
    """

    rank: ClassVar[int] = 3

    channels: tuple[str, ...]
    normalise: tuple[Normalise, ...]
    orientation: str | None = "RAS"
    spacing: tuple[float, float, float] | None = None
    size: Size3 | None = None
    patch: Size3 | None = None
    crop_foreground: bool = False

    def __post_init__(self) -> None:
        if not self.channels or len(set(self.channels)) != len(self.channels):
            raise UserError(f"data.channels: needs different names, got {list(self.channels)}")
        if len(self.normalise) != len(self.channels):
            raise UserError(f"data.normalise: {len(self.normalise)} methods for {len(self.channels)} channels")
        if self.orientation is not None:
            letters = self.orientation.upper()
            if (
                len(letters) != 3
                or len({min(x, _OPPOSITE.get(x, x)) for x in letters}) != 3
                or set(letters) - set(_OPPOSITE)
            ):
                raise UserError(
                    f"data.orientation: needs three different directions, as RAS or LPS; got {self.orientation!r}"
                )
        if self.spacing is not None and not (len(self.spacing) == 3 and all(0 < mm < 1000 for mm in self.spacing)):
            raise UserError(f"data.spacing: needs three numbers of mm above 0, got {list(self.spacing)}")
        if self.spacing is not None and self.size is not None:
            raise UserError("data.size: a whole-volume size leaves no choice of spacing; give one of the two")
        for key, value in (("size", self.size), ("patch", self.patch)):
            if value is not None and not (len(value) == 3 and all(isinstance(n, int) and n >= 1 for n in value)):
                raise UserError(f"data.{key}: needs three whole numbers of voxels above 0, got {list(value)}")

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return len(self.channels)

    def to_config(self) -> dict[str, Any]:
        """Plain Python that `from_config` reads back."""
        return {
            "rank": self.rank,
            "channels": list(self.channels),
            "normalise": [method.to_config() for method in self.normalise],
            "orientation": self.orientation,
            "spacing": None if self.spacing is None else list(self.spacing),
            "size": None if self.size is None else list(self.size),
            "patch": None if self.patch is None else list(self.patch),
            "crop_foreground": self.crop_foreground,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "VolumePreprocessing":
        """The inverse of `to_config`."""
        triples = {key: None if config[key] is None else tuple(config[key]) for key in ("spacing", "size", "patch")}
        return cls(
            channels=tuple(config["channels"]),
            normalise=tuple(Normalise.from_config(method) for method in config["normalise"]),
            orientation=config["orientation"],
            crop_foreground=bool(config["crop_foreground"]),
            **triples,
        )

    def plan(self, array: NDArray[np.float32], geometry: Geometry) -> Plan:
        """The steps for a volume (C, I, J, K) on the grid `geometry`."""
        axes, flips = _turn(geometry.orientation, self.orientation)
        turned = array.transpose(0, *(1 + axis for axis in axes))
        full = turned.shape[1:]
        box: Box = (slice(0, full[0]), slice(0, full[1]), slice(0, full[2]))
        if self.crop_foreground:
            reversed_ = turned[(slice(None), *(slice(None, None, -1 if a in flips else 1) for a in range(3)))]
            box = _foreground(reversed_, axes.index(2))
        zooms = [geometry.zooms[axis] for axis in axes]
        lengths = [part.stop - part.start for part in box]
        if self.size is not None:
            d, h, w = self.size
        elif self.spacing is not None:
            d, h, w = (max(1, round(n * own / mm)) for n, own, mm in zip(lengths, zooms, self.spacing, strict=True))
        else:
            d, h, w = lengths
        x, y, z = (own * n / m for own, n, m in zip(zooms, lengths, (d, h, w), strict=True))
        return Plan(geometry.shape, axes, flips, box, (d, h, w), (x, y, z))

    def forward(
        self, array: NDArray[np.float32], geometry: Geometry, scratch: Scratch | None = None
    ) -> tuple[Tensor, Plan]:
        """Prepare a volume.

        Args:
            array: (C, I, J, K) in the order of `channels`.
            geometry: Its grid.
            scratch: Where large arrays lie; the result does not depend on it.

        Returns:
            (C, D, H, W) float32, and the plan that leads back.

        Raises:
            ValueError: The number of channels is another.
        """
        if array.ndim != 4 or len(array) != len(self.channels):
            raise ValueError(f"expected {len(self.channels)} channels (C, I, J, K), got {array.shape}")
        scratch = scratch or Scratch()
        plan = self.plan(array, geometry)
        result = scratch.zeros((len(array), *plan.size), np.float32)
        for channel, method, out in zip(array, self.normalise, result, strict=True):
            to_network(_kept(channel, plan), out)
            method.fit(torch.from_numpy(out)).apply(torch.from_numpy(out))
        return torch.from_numpy(result), plan


def _kept(channel: NDArray[np.float32], plan: Plan) -> NDArray[np.float32]:
    """What is kept of (I, J, K) as (D, H, W), not yet resampled; a view."""
    turned = tuple(slice(None, None, -1 if axis in plan.flips else 1) for axis in range(3))
    return channel.transpose(plan.axes)[turned][plan.box]


def _turn(own: str, wanted: str | None) -> tuple[Size3, tuple[int, ...]]:
    """For each wanted axis the file's axis it comes from, and which of the wanted axes run against theirs."""
    if wanted is None:
        return (0, 1, 2), ()
    axes, flips = [], []
    for place, letter in enumerate(wanted.upper()):
        if letter in own:
            axes.append(own.index(letter))
        else:
            axes.append(own.index(_OPPOSITE[letter]))
            flips.append(place)
    d, h, w = axes
    return (d, h, w), tuple(flips)


def _foreground(volume: NDArray[np.float32], along: int) -> Box:
    """The box around all voxels of (C, D, H, W) that differ from the background, whose value the corners show.

    `along` is the axis in whose planes the volume lies on disk.
    """
    shape = volume.shape[1:]
    lines = [np.zeros(n, bool) for n in shape]
    background = []
    for channel in volume:
        values, counts = np.unique(channel[np.ix_(*([0, n - 1] for n in shape))], return_counts=True)
        background.append(values[counts.argmax()])
    step = max(1, _PART * shape[along] // math.prod(shape))
    for low in range(0, shape[along], step):
        part = (*[slice(None)] * along, slice(low, low + step))
        keep = np.zeros(volume[0][part].shape, bool)
        for channel, value in zip(volume, background, strict=True):
            keep |= (channel[part] != value) & np.isfinite(channel[part])
        for axis, line in enumerate(lines):
            found = keep.any(axis=tuple(other for other in range(3) if other != axis))
            line[slice(low, low + step) if axis == along else slice(None)] |= found
        release(volume)
    if not lines[0].any():
        return slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])
    box = []
    for line in lines:
        at = np.flatnonzero(line)
        box.append(slice(int(at[0]), int(at[-1]) + 1))
    return box[0], box[1], box[2]
