"""Controls: what any comparison of attention blocks should contain besides them.

`Identity` mixes nothing; `DepthwiseConvolution` mixes positions with fixed weights, each channel for itself. A block
that is not better than these owes its result to the network around it. No paper, no official code.

Legend: B batch, *S spatial axes, C channels.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from visattn.attention import _checks as check
from visattn.attention._depthwise import depthwise

CONVOLUTION: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Identity(nn.Module):
    """Returns its input.

    Args:
        dim: Channels C.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = check.positive("dim", dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *S, C), unchanged; ValueError for another shape."""
        check.channels_last("Identity", x, self.dim, self.supported_ranks)
        return x

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        return f"dim={self.dim}"


class DepthwiseConvolution(nn.Module):
    """A convolution of each channel by itself, zero-padded at the borders.

    Args:
        dim: Channels C.
        kernel_size: Odd length of the kernel, for all axes or per axis.
        rank: Number of spatial axes.
        bias: Whether each channel has a bias.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def __init__(self, dim: int, *, kernel_size: int | Sequence[int] = 7, rank: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.dim = check.positive("dim", dim)
        self.rank = check.rank_of("DepthwiseConvolution", rank, self.supported_ranks)
        kernel = check.per_axis("kernel_size", kernel_size, rank)
        if any(size % 2 == 0 for size in kernel):
            raise ValueError(f"kernel_size must be odd, so that the map keeps its size, got {kernel_size}")
        padding = tuple(size // 2 for size in kernel)
        self.conv = CONVOLUTION[rank](dim, dim, kernel, padding=padding, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *S, C) -> (B, *S, C); ValueError for another shape."""
        check.channels_last("DepthwiseConvolution", x, self.dim, (self.rank,))
        return depthwise(self.conv, x)

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        return f"dim={self.dim}, rank={self.rank}"
