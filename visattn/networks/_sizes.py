"""Padding to sizes that a network can halve, and cropping back."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: int | Sequence[int]) -> Tensor:
    """`x` (B, C, *S) with zeros at the end of each axis, up to a multiple of `multiple` (one for all, or one each)."""
    sizes = x.shape[2:]
    steps = [multiple] * len(sizes) if isinstance(multiple, int) else list(multiple)
    missing = [-size % step for size, step in zip(sizes, steps, strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [side for amount in reversed(missing) for side in (0, amount)])


def crop(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The first `sizes` voxels of each axis of `x` (B, C, *S)."""
    index: tuple[Any, ...] = (..., *(slice(size) for size in sizes))
    return x[index]
