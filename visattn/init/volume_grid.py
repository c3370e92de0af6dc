"""Patch, strides and kernels that suit the shape of volumes and of their voxels.

As nnU-Net plans them (Isensee et al., Nature Methods 2021): a network must not mix what lies far apart. Along an axis
whose voxels are much longer than the others', kernels are 1 and strides 1 until the other axes have become as coarse.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Size3 = tuple[int, int, int]

COARSE = 2.0
"""From this ratio to the finest axis on, an axis is not mixed or reduced yet."""

_SMALLEST = 4  # voxels along an axis of the coarsest maps
_DEEPEST = 6  # levels


@dataclass(frozen=True)
class Levels:
    """How a U-Net goes down.

    Args:
        strides: Between each two levels.
        kernels: Of each level.
    """

    strides: tuple[Size3, ...]
    kernels: tuple[Size3, ...]

    @property
    def multiple(self) -> Size3:
        """What the sides of a patch must be multiples of."""
        d, h, w = (math.prod(stride[axis] for stride in self.strides) for axis in range(3))
        return d, h, w

    @property
    def plain(self) -> bool:
        """Whether all strides are 2 and all kernels 3, which a recipe need not say."""
        return all(n == 2 for stride in self.strides for n in stride) and all(
            n == 3 for kernel in self.kernels for n in kernel
        )


def plan_levels(patch: Sequence[float], spacing: Sequence[float], most: int = _DEEPEST) -> Levels:
    """Strides and kernels for a patch of so many voxels.

    Args:
        patch: Voxels along each axis.
        spacing: Their size in mm.
        most: Levels at most.
    """
    size, mm = list(patch), list(spacing)
    kernels = [_kernel(mm, (1, 1, 1))]
    strides: list[Size3] = []
    while len(kernels) < most:
        # An axis that is too short to be reduced does not keep the others from it.
        open_axes = [axis for axis in range(3) if size[axis] >= 2 * _SMALLEST]
        if not open_axes:
            break
        finest = min(mm[axis] for axis in open_axes)
        d, h, w = (2 if axis in open_axes and mm[axis] < COARSE * finest else 1 for axis in range(3))
        strides.append((d, h, w))
        size = [n / stride for n, stride in zip(size, strides[-1], strict=True)]
        mm = [n * stride for n, stride in zip(mm, strides[-1], strict=True)]
        kernels.append(_kernel(mm, kernels[-1]))
    return Levels(tuple(strides), tuple(kernels))


def _kernel(mm: Sequence[float], before: Size3) -> Size3:
    """3 along the axes that are nearly as fine as the finest, and where it was 3 before."""
    d, h, w = (3 if mm[axis] < COARSE * min(mm) or before[axis] == 3 else 1 for axis in range(3))
    return d, h, w


def plan_patch(
    volume: Sequence[float], spacing: Sequence[float], fits: Callable[[Size3, Levels], bool], most: int = _DEEPEST
) -> tuple[Size3, Levels]:
    """The largest window that fits: a cube in mm, as far as the volume reaches.

    Args:
        volume: Voxels of a typical volume along each axis.
        spacing: Their size in mm.
        fits: Whether a window can be paid for.
        most: Levels at most.

    Returns:
        The patch and the levels for it. The smallest one where none fits.
    """
    side = max(n * mm for n, mm in zip(volume, spacing, strict=True))
    while True:
        wanted = [min(n, side / mm) for n, mm in zip(volume, spacing, strict=True)]
        levels = plan_levels([max(n, _SMALLEST) for n in wanted], spacing, most)
        whole = [n == own for n, own in zip(wanted, volume, strict=True)]
        d, h, w = (
            max(_SMALLEST, step, step * (math.ceil(n / step) if full else math.floor(n / step + 0.5)))
            for n, step, full in zip(wanted, levels.multiple, whole, strict=True)
        )
        if fits((d, h, w), levels) or side <= 2 * _SMALLEST * min(spacing):
            return (d, h, w), levels
        side *= 0.95
