"""Linear resampling of volumes, axis by axis, as matrix products.

A row of a matrix holds what one new voxel takes from the old ones; rows sum to 1. Both grids cover the same extent, so
new voxel o of m lies at old coordinate (o + 1/2) n / m - 1/2. When an axis shrinks, the triangle of linear
interpolation is stretched to the new voxels' size, so that fine detail is averaged and not aliased. An axis that keeps
its length is left alone, to the last bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_matrix(old: int, new: int) -> Tensor:
    """The matrix (new, old) that resamples an axis of `old` voxels to `new`, float32."""
    scale = old / new
    width = max(scale, 1.0)
    position = (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * scale - 0.5
    distance = (torch.arange(old, dtype=torch.float64)[None, :] - position.clamp(0, old - 1)).abs()
    weights = (1 - distance / width).clamp_min(0)
    return (weights / weights.sum(dim=1, keepdim=True)).to(torch.float32)


def resample(volume: Tensor, size: Sequence[int]) -> Tensor:
    """Resample `volume` (..., D, H, W) to (..., *size); a view of it where nothing changes."""
    for axis, new in zip((-3, -2, -1), size, strict=True):
        old = volume.shape[axis]
        if old == new:
            continue
        matrix = linear_matrix(old, new).to(volume.device)
        if axis == -1:
            volume = volume @ matrix.T
        elif axis == -2:
            volume = matrix @ volume
        else:
            flat = volume.flatten(-2)  # (..., D, H W)
            volume = (matrix @ flat).reshape(*volume.shape[:-3], new, *volume.shape[-2:])
    return volume


def resample_labels(indices: Tensor, size: Sequence[int], classes: Sequence[int]) -> Tensor:
    """Resample class indices (D, H, W), class by class: each voxel takes the class of which most lies there.

    Args:
        indices: uint8.
        size: The new size.
        classes: The indices that occur. Of equal shares the first one listed wins.
    """
    if tuple(indices.shape) == tuple(size):
        return indices
    best: Tensor | None = None
    result = torch.full(tuple(size), classes[0], dtype=torch.uint8)
    for index in classes:
        share = resample((indices == index).float(), size)
        if best is None:
            best = share
            continue
        result.masked_fill_(share > best, index)
        torch.maximum(best, share, out=best)
    return result
