"""Depthwise convolutions of channels-last maps, in the memory layout that PyTorch computes rightly and quickly.

Measured and seen with PyTorch 2.15 on the CPU:
- bfloat16, volumes: the gradient of the kernel is wrong in channels-last memory where an axis is shorter than the
  kernel. So volumes are made channels-first.
- images: channels-last is up to twice as quick, except that the gradient of a kernel longer than three is up to three
  times slower where there are few positions. So in training these are made channels-first.

Legend: B batch, *S spatial axes, C channels.
"""

import math

import torch
from torch import Tensor, nn

from visattn.attention._windows import certain

FEW = 256  # positions of a map up to which channels-first memory is quicker


def depthwise(conv: nn.Module, x: Tensor) -> Tensor:
    """`conv` of a channels-last map `x` (B, *S, C) that keeps its size: (B, *S, C), in any memory layout."""
    maps = x.movedim(-1, 1)
    if x.dim() != 4 or _slow_gradient(conv, x):
        maps = maps.contiguous()
    out: Tensor = conv(maps)
    return out.movedim(1, -1)


def _slow_gradient(conv: nn.Module, x: Tensor) -> bool:
    """Whether the kernel's gradient is computed for a map of few positions on the CPU."""
    kernel: tuple[int, ...] = conv.kernel_size  # type: ignore[assignment]
    return (
        max(kernel) > 3
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and certain(math.prod(x.shape[1:-1]) <= FEW)
    )
