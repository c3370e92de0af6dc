"""Augmentation of volumes in a batch: what a recipe with volumes may list under `augment`.

It runs on tensors, on the device where the batch is: on a GPU after the transfer, else in the processes that load. What
is drawn comes for each sample from its own generator, seeded by (seed, epoch, position in the epoch), so that a sample
is the same on any number of workers and after resuming. All geometry (mirror, affine, elastic) becomes one map in mm
and costs one interpolation, linear for images and nearest for labels; intensities follow in the order of the list.
Where slices are more than three times as thick as wide, rotations stay within them (Isensee et al., nnU-Net, 2021).
What enters from outside is 0, the mean of a normalised volume, and background.

Legend: B samples, C channels, q the size that is cut, p the size that is kept (d, h, w).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from visattn.data._augment_list import check, check_pair, read_entries, swap_table
from visattn.errors import UserError
from visattn.labels import Labels

Matrix = NDArray[np.float64]
Size3 = tuple[int, int, int]

THICK = 3.0
"""Above this ratio of the largest to the smallest voxel side slices are thick."""


@dataclass(frozen=True)
class Mirror:
    """Mirror along axes, each with probability `p`.

    Args:
        axes: Which of the axes 0, 1, 2 of the network's grid; in the orientation RAS axis 0 runs from left to right.
        swap_labels: Pairs of label names that change places in a mirrored volume, [[left_lung, right_lung]] say; then
            `axes` names the one axis that this holds for.
        p: Probability.
    """

    axes: Sequence[int] = (0, 1, 2)
    swap_labels: Sequence[Sequence[str]] = ()
    p: float = 0.5

    def __post_init__(self) -> None:
        if not self.axes or len(set(self.axes)) != len(self.axes) or not set(self.axes) <= {0, 1, 2}:
            raise UserError(f"augment: mirror.axes needs some of 0, 1, 2, got {self.axes!r:.60}")
        if self.swap_labels and len(self.axes) != 1:
            raise UserError("augment: mirror with swap_labels needs the one axis they hold for, as axes: [0]")


@dataclass(frozen=True)
class Affine:
    """Rotate and zoom about the centre of the patch, then shift.

    Args:
        rotate: Largest angle in degrees, either way, about each axis.
        scale: Smallest and largest zoom; above 1 things get larger. Drawn evenly in the logarithm.
        shift: Largest shift, either way, as a share of each side. Patches are cut at random places anyway.
        p: Probability.
    """

    rotate: float = 30.0
    scale: Sequence[float] = (0.7, 1.4)
    shift: float = 0.0
    p: float = 0.5

    def __post_init__(self) -> None:
        check("affine", "rotate", self.rotate, 0, 180)
        check("affine", "shift", self.shift, 0, 1)
        check_pair("affine", "scale", self.scale, 0.1, 10)


@dataclass(frozen=True)
class Elastic:
    """Bend the volume smoothly: random displacements on a coarse grid, joined by cubic B-splines.

    Args:
        strength: Standard deviation of the displacement at a grid point, as a share of the shortest side in mm.
        cells: Grid cells along a side; more makes smaller bends.
        p: Probability.
    """

    strength: float = 0.05
    cells: int = 4
    p: float = 0.2

    def __post_init__(self) -> None:
        check("elastic", "strength", self.strength, 0, 0.2)
        check("elastic", "cells", self.cells, 1, 16, whole=True)


@dataclass(frozen=True)
class Gamma:
    """Raise each channel, scaled to 0..1, to a power; its mean and spread are kept.

    Args:
        gamma: Smallest and largest power, drawn evenly in the logarithm.
        invert: Probability that bright and dark change places before, and back after.
        p: Probability.
    """

    gamma: Sequence[float] = (0.7, 1.5)
    invert: float = 0.25
    p: float = 0.3

    def __post_init__(self) -> None:
        check_pair("gamma", "gamma", self.gamma, 0.1, 10)
        check("gamma", "invert", self.invert, 0, 1)

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Change (C, d, h, w)."""
        power = math.exp(rng.uniform(math.log(self.gamma[0]), math.log(self.gamma[1])))
        sign = -1.0 if rng.random() < self.invert else 1.0
        flat = sign * image.flatten(1)  # (C, n)
        low = flat.amin(dim=1, keepdim=True)
        reach = (flat.amax(dim=1, keepdim=True) - low).clamp_min(1e-7)
        raised = ((flat - low) / reach).pow(power)
        new = (raised - raised.mean(dim=1, keepdim=True)) / raised.std(dim=1, keepdim=True).clamp_min(1e-7)
        kept = new * flat.std(dim=1, keepdim=True) + flat.mean(dim=1, keepdim=True)
        return (sign * kept).view_as(image)


@dataclass(frozen=True)
class Intensity:
    """Multiply all values, and change their contrast about the mean of their channel.

    Args:
        brightness: Largest change of the factor, either way: 0.25 draws from 0.75..1.25.
        contrast: The same for the contrast.
        p: Probability.
    """

    brightness: float = 0.25
    contrast: float = 0.25
    p: float = 0.3

    def __post_init__(self) -> None:
        check("intensity", "brightness", self.brightness, 0, 1)
        check("intensity", "contrast", self.contrast, 0, 1)

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Change (C, d, h, w)."""
        gain = 1 + rng.uniform(-self.brightness, self.brightness)
        contrast = 1 + rng.uniform(-self.contrast, self.contrast)
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        return gain * (mean + contrast * (image - mean))


@dataclass(frozen=True)
class Noise:
    """Add Gaussian noise, drawn for each voxel and channel.

    Args:
        std: Smallest and largest standard deviation, in units of the normalised values.
        p: Probability.
    """

    std: Sequence[float] = (0.0, 0.2)
    p: float = 0.15

    def __post_init__(self) -> None:
        check_pair("noise", "std", self.std, 0, 10)

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Change (C, d, h, w)."""
        std = float(rng.uniform(self.std[0], self.std[1]))
        generator = torch.Generator(image.device).manual_seed(int(rng.integers(2**63)))
        return image + std * torch.randn(image.shape, generator=generator, device=image.device)


@dataclass(frozen=True)
class Blur:
    """Blur with a Gaussian.

    Args:
        sigma: Smallest and largest standard deviation in voxels.
        p: Probability.
    """

    sigma: Sequence[float] = (0.5, 1.0)
    p: float = 0.15

    def __post_init__(self) -> None:
        check_pair("blur", "sigma", self.sigma, 0.1, 10)

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Change (C, d, h, w)."""
        sigma = float(rng.uniform(self.sigma[0], self.sigma[1]))
        reach = math.ceil(3 * sigma)
        place = torch.arange(-reach, reach + 1, device=image.device, dtype=image.dtype)
        weights = torch.exp(-0.5 * (place / sigma).square())
        weights = weights / weights.sum()
        result = image[:, None]  # (C, 1, d, h, w)
        for axis in range(3):
            shape, pad = [1, 1, 1, 1, 1], [0] * 6
            shape[2 + axis] = len(weights)
            pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = reach
            result = F.conv3d(F.pad(result, pad, mode="replicate"), weights.view(shape))
        return result[:, 0]


@dataclass(frozen=True)
class LowResolution:
    """Take fewer voxels, as a coarser scan has, and interpolate back.

    Args:
        zoom: Smallest and largest share of voxels that are left along each axis.
        p: Probability.
    """

    zoom: Sequence[float] = (0.5, 1.0)
    p: float = 0.15

    def __post_init__(self) -> None:
        check_pair("low_resolution", "zoom", self.zoom, 0.05, 1)

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Change (C, d, h, w)."""
        zoom = rng.uniform(self.zoom[0], self.zoom[1])
        coarse = [max(1, round(zoom * side)) for side in image.shape[1:]]
        small = F.interpolate(image[None], coarse, mode="nearest-exact")
        return F.interpolate(small, image.shape[1:], mode="trilinear", align_corners=False)[0]


Geometric = Mirror | Affine | Elastic
Voxelwise = Gamma | Intensity | Noise | Blur | LowResolution
Augmentation3d = Geometric | Voxelwise

AUGMENT3D: dict[str, type[Augmentation3d]] = {
    "mirror": Mirror,
    "affine": Affine,
    "elastic": Elastic,
    "gamma": Gamma,
    "intensity": Intensity,
    "noise": Noise,
    "blur": Blur,
    "low_resolution": LowResolution,
}
"""What an entry of `augment` may be called where the data are volumes."""


class Augmenter3d:
    """Applies the entries of a recipe's `augment` list. Build it with `build_augmenter3d`.

    Args:
        entries: The augmentations.
        labels: The label map, to find the names in `swap_labels`.
    """

    def __init__(self, entries: Sequence[Augmentation3d], labels: Labels) -> None:
        self.entries = tuple(entries)
        self._swaps = [_swap_table(entry, labels) for entry in self.entries]

    def reach(self, patch: Size3, spacing: Sequence[float]) -> Size3:
        """The size q that has to be cut so that a rotated and shrunk patch finds voxels in its corners.

        Each side is longer than the patch's by an even number, so that the middle of both is the same.
        """
        half = needed = np.array(patch) * spacing / 2
        for entry in self.entries:
            if not isinstance(entry, Affine) or entry.p == 0:
                continue
            turns = np.radians([-entry.rotate, 0.0, entry.rotate])
            extents = [np.abs(_rotation(angles, spacing)) @ half for angles in product(turns, repeat=3)]
            zoom_out = max(1.0, 1 / entry.scale[0])
            needed = np.maximum(needed, np.max(extents, axis=0) * zoom_out + 2 * entry.shift * half)
        voxels = [max(0, math.ceil(2 * (n - h) / mm - 1e-6)) for n, h, mm in zip(needed, half, spacing, strict=True)]
        d, h, w = (side + more + more % 2 for side, more in zip(patch, voxels, strict=True))
        return d, h, w

    def __call__(
        self,
        image: Tensor,
        target: Tensor,
        spacing: Sequence[Sequence[float]],
        patch: Size3,
        seeds: Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            image: (B, C, *q), normalised.
            target: (B, *q), class indices uint8.
            spacing: Of each sample along its three axes, in mm.
            patch: p, the size that is kept.
            seeds: For each sample the numbers that its generator is seeded by.

        Returns:
            (B, C, *p) and (B, *p).
        """
        device, images, targets = image.device, [], []
        for i, numbers in enumerate(seeds):
            rng, mm = np.random.default_rng(tuple(numbers)), spacing[i]
            matrix, shift, bend, swaps, later = np.eye(3), np.zeros(3), None, [], []
            for entry, swap in zip(self.entries, self._swaps, strict=True):
                if isinstance(entry, Mirror):
                    for axis in entry.axes:
                        if rng.random() < entry.p:
                            matrix = matrix @ np.diag([-1.0 if a == axis else 1.0 for a in range(3)])
                            swaps += [] if swap is None else [swap]
                elif rng.random() >= entry.p:
                    continue
                elif isinstance(entry, Affine):
                    matrix = matrix @ _rotation(np.radians(rng.uniform(-entry.rotate, entry.rotate, 3)), mm)
                    matrix = matrix / math.exp(rng.uniform(math.log(entry.scale[0]), math.log(entry.scale[1])))
                    shift = shift + rng.uniform(-entry.shift, entry.shift, 3) * patch * mm
                elif isinstance(entry, Elastic):
                    moved = _displacement(entry, rng, patch, mm)
                    bend = moved if bend is None else bend + moved
                else:
                    later.append(entry)
            for swap in swaps:
                target[i] = swap.to(device)[target[i].long()]
            changed, indices = _warp(image[i], target[i], matrix, shift, bend, patch, mm)
            for voxelwise in later:
                changed = voxelwise(changed, rng)
            images.append(changed)
            targets.append(indices)
        return torch.stack(images), torch.stack(targets)


def build_augmenter3d(config: Sequence[str | Mapping[str, Any]] | None, labels: Labels) -> Augmenter3d:
    """Read a recipe's `augment` list, as `visattn.data.augment.build_augmenter` does for images."""
    return Augmenter3d(read_entries(config, AUGMENT3D, "augmentation of volumes"), labels)


def _rotation(angles: Sequence[float] | NDArray[np.float64], spacing: Sequence[float]) -> Matrix:
    """Turn about the axes 0, 1 and 2 in mm; about the thick axis alone where slices are thick."""
    turn = np.eye(3)
    thick = int(np.argmax(spacing)) if max(spacing) > THICK * min(spacing) else None
    for axis, angle in enumerate(angles):
        if thick is not None and axis != thick:
            continue
        one, other = (a for a in range(3) if a != axis)
        single = np.eye(3)
        single[[one, other], [one, other]] = math.cos(angle)
        single[one, other], single[other, one] = -math.sin(angle), math.sin(angle)
        turn = turn @ single
    return turn


def _displacement(entry: Elastic, rng: np.random.Generator, patch: Size3, spacing: Sequence[float]) -> Tensor:
    """Shifts in mm along the three axes, (3, *p)."""
    strength = entry.strength * min(side * mm for side, mm in zip(patch, spacing, strict=True))
    points = torch.from_numpy(rng.standard_normal((3, *[entry.cells + 3] * 3), np.float32) * np.float32(strength))
    along = [_spline(side, entry.cells) for side in patch]
    return torch.einsum("caeg,da,he,wg->cdhw", points, *along)


def _spline(length: int, cells: int) -> Tensor:
    """What each of `length` voxels takes of `cells` + 3 points: the cubic B-spline."""
    place = (torch.arange(length) + 0.5) / length * cells
    distance = (place[:, None] - torch.arange(-1, cells + 2)[None, :]).abs()
    near = 2 / 3 - distance.square() + distance.pow(3) / 2
    return torch.where(distance < 1, near, (2 - distance).clamp_min(0).pow(3) / 6)


def _warp(
    image: Tensor,
    target: Tensor,
    matrix: Matrix,
    shift: NDArray[np.float64],
    bend: Tensor | None,
    patch: Size3,
    spacing: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Fetch each voxel of the patch from matrix @ its place + shift (+ bend), in mm from the middle of what was cut."""
    size = target.shape
    signs = np.sign(np.diag(matrix))
    if bend is None and not shift.any() and np.array_equal(matrix, np.diag(signs)):
        inner = tuple(slice((q - p) // 2, (q - p) // 2 + p) for q, p in zip(size, patch, strict=True))
        axes = [axis - 3 for axis in range(3) if signs[axis] < 0]
        cut, indices = image[(slice(None), *inner)], target[inner]
        return (cut.flip(axes), indices.flip(axes)) if axes else (cut, indices)
    mm = np.asarray(spacing)
    # Coordinates of grid_sample run from -1 to 1 over a volume's extent, and its axes in the order w, h, d.
    to_grid = 2 / (np.asarray(size) * mm)
    theta = np.zeros((3, 4))
    theta[:, :3] = to_grid[:, None] * matrix * (np.asarray(patch) * mm / 2)
    theta[:, 3] = to_grid * shift
    theta[:, :3] = theta[::-1, 2::-1]
    theta[:, 3] = theta[::-1, 3]
    grid = F.affine_grid(torch.from_numpy(theta).to(image)[None], [1, 1, *patch], align_corners=False)
    if bend is not None:
        grid = grid + (bend.to(image).permute(1, 2, 3, 0) * torch.from_numpy(to_grid).to(image)).flip(-1)
    warped = F.grid_sample(image[None], grid, mode="bilinear", align_corners=False)[0]
    nearest = F.grid_sample(target[None, None].to(image.dtype), grid, mode="nearest", align_corners=False)[0, 0]
    return warped, nearest.to(torch.uint8)


def _swap_table(entry: Augmentation3d, labels: Labels) -> Tensor | None:
    table = swap_table(entry.swap_labels, labels) if isinstance(entry, Mirror) else None
    return None if table is None else torch.from_numpy(table)
