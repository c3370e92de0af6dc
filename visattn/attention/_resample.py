"""Resampling of channels-last maps along each axis: linear interpolation and adaptive average pooling.

Both are separable, so each is one small matrix per axis. Matrices built from sizes alone stay exact when nothing has
to be resized (they are then the identity), take any rank, need no branch on the size, and cost less on the CPU than
interpolating whole maps, forward and backward.

Legend: B batch, *S spatial axes, *T those of the result, C channels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention._backend import launch_bound
from visattn.attention._precision import exact
from visattn.attention._windows import certain, regroup

Made = TypeVar("Made")
KEPT = 2**21  # entries at most of what is kept from call to call


def kept(make: Callable[..., Made], like: Tensor, *sizes: Any) -> Made:
    """`make(*sizes, like)`, tensors of sizes alone with the device and dtype of `like`, computed once if they can be.

    They take longer to compute than to use. A tensor without values, or of a subclass, may not outlast the call.
    """
    if torch.compiler.is_compiling() or like.is_meta or type(like) not in (Tensor, nn.Parameter):
        return make(*sizes, like)
    made: Made = _kept(make, like.device, like.dtype, *sizes)
    return made


@functools.lru_cache(maxsize=64)
def _kept(make: Callable[..., Any], device: torch.device, dtype: torch.dtype, *sizes: Any) -> Any:
    with torch.inference_mode(False):  # so that a gradient may use it as well
        return make(*sizes, torch.empty(0, device=device, dtype=dtype))


def _matrix(make: Callable[[int, int, Tensor], Tensor], source: int, target: int, like: Tensor) -> Tensor:
    """`make(source, target, like)`, a matrix (target, source); kept unless it is that of a very long axis."""
    if certain(source * target <= KEPT):
        return kept(make, like, source, target)
    return make(source, target, like)


def linear_weights(source: int, target: int, like: Tensor) -> Tensor:
    """The matrix (target, source) of linear interpolation with half-pixel centres; the identity for equal sizes.

    The same numbers as `F.interpolate(mode="linear", align_corners=False)`: positions beyond the outer centres take the
    edge value.
    """
    return _matrix(_linear_weights, source, target, like)


def _linear_weights(source: int, target: int, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    at = (torch.arange(target, device=like.device, dtype=dtype) + 0.5) * (source / target) - 0.5
    at = at.clamp(0, source - 1)
    grid = torch.arange(source, device=like.device, dtype=dtype)
    return (1 - (at[:, None] - grid).abs()).clamp(min=0).to(like.dtype)


def average_weights(source: int, target: int, like: Tensor) -> Tensor:
    """The matrix (target, source) of adaptive average pooling; cells overlap and repeat where target > source."""
    return _matrix(_average_weights, source, target, like)


def _average_weights(source: int, target: int, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    cell = torch.arange(target, device=like.device)
    start = (cell * source) // target
    end = ((cell + 1) * source + target - 1) // target
    grid = torch.arange(source, device=like.device)
    inside = (grid >= start[:, None]) & (grid < end[:, None])
    return (inside.to(dtype) / (end - start)[:, None].to(dtype)).to(like.dtype)


def along_axes(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`x` (B, *S, C) with the matrix (T_i, S_i) applied along spatial axis i: (B, *T, C)."""
    size = list(x.shape)
    for axis in range(len(weights) - 1, -1, -1):
        rows, columns = math.prod(size[: axis + 1]), math.prod(size[axis + 2 :])
        x = torch.matmul(weights[axis], regroup(x, (rows, size[axis + 1], columns)))  # (rows, T_i, columns)
        size[axis + 1] = weights[axis].shape[0]
    return regroup(x, size)


def resize_linear(x: Tensor, size: Sequence[int]) -> Tensor:
    """`x` (B, *S, C) at the spatial `size`, by linear interpolation without anti-aliasing."""
    weights = [linear_weights(old, new, x) for old, new in zip(x.shape[1:-1], size, strict=True)]
    return along_axes(x, weights)


def pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """`x` (B, *S, C) averaged over the cells of a grid of `size`: (B, *size, C)."""
    if x.device.type == "cpu" and x.dim() == 4 and not torch.compiler.is_compiling():
        # A quarter of the time; on a GPU its gradient would differ from run to run.
        return F.adaptive_avg_pool2d(x.movedim(-1, 1), (size[0], size[1])).movedim(1, -1)
    if launch_bound(x) and math.prod(x.shape[1:-1]) * math.prod(size) <= KEPT:
        cells = kept(_cells, x, tuple(x.shape[1:-1]), tuple(size))
        return torch.unflatten(torch.matmul(cells, x.flatten(1, -2)), 1, tuple(size))
    weights = [average_weights(old, new, x) for old, new in zip(x.shape[1:-1], size, strict=True)]
    return along_axes(x, weights)


def _cells(source: tuple[int, ...], target: tuple[int, ...], like: Tensor) -> Tensor:
    """The matrix of `pool` for all axes at once, (positions of `target`, positions of `source`)."""
    axes = [average_weights(old, new, exact(like)) for old, new in zip(source, target, strict=True)]
    return functools.reduce(torch.kron, axes).to(like.dtype)
