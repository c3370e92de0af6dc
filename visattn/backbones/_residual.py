"""What convolutional families share: a residual block around any branch, a stem of convolutions, their initialisation.

Legend: B batch, C channels, H and W the map's sides.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm.layers
from timm.models import register_notrace_module
from torch import Tensor, nn

from visattn.blocks import drop_path

Act = type[nn.Module]
layers: Any = timm.layers  # which does not declare its exports to type checkers


class Residual(nn.Module):
    """A branch, a shortcut, and an activation of their sum.

    Args:
        branch: Layers by name, from (B, C, H, W) to the output.
        shortcut: The identity, or what gives the input the output's shape; None: there is no shortcut.
        act: Applied to the sum; None: nothing is.
        drop_path_rate: Stochastic depth of the branch.
    """

    def __init__(
        self,
        branch: "OrderedDict[str, nn.Module]",
        shortcut: nn.Module | None,
        act: Act | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(branch)
        self.shortcut = shortcut
        self.drop_path = drop_path(drop_path_rate)
        self.act = nn.Identity() if act is None else act()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the shape that the branch gives."""
        out: Tensor = self.drop_path(self.branch(x))
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        out = self.act(out)
        return out


@register_notrace_module  # attention chooses its way by sizes, which torch.fx cannot follow
class ChannelsLast(nn.Module):
    """A channels-last block inside of a channels-first network.

    What comes in channels-first memory leaves so: norms and sums of maps in two layouts are slow.

    Args:
        inner: (B, H, W, C) to (B, H', W', C').
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        out: Tensor = self.inner(x.movedim(1, -1)).movedim(-1, 1)
        return out.contiguous() if x.is_contiguous() else out


def conv(
    dim: int,
    dim_out: int,
    kernel_size: int = 1,
    *,
    stride: int = 1,
    groups: int = 1,
    act: Act | None = None,
) -> nn.Module:
    """Convolution, batch norm and activation (None: no activation); zeros at the border, odd kernels."""
    layer: nn.Module = layers.ConvNormAct(
        dim,
        dim_out,
        kernel_size,
        stride=stride,
        groups=groups,
        apply_act=act is not None,
        act_layer=act or nn.Identity,
    )
    return layer


def shortcut(dim: int, dim_out: int, stride: int) -> nn.Module:
    """The identity, or a strided 1x1 convolution and a norm where the shape changes."""
    return nn.Identity() if dim == dim_out and stride == 1 else conv(dim, dim_out, stride=stride)


def conv_stem(
    in_chans: int, widths: Sequence[int], strides: Sequence[int], kernel_size: int, act: Act
) -> "OrderedDict[str, nn.Module]":
    """One convolution per width, named conv1, conv2, ..."""
    inputs = [in_chans, *widths[:-1]]
    convolutions = [
        conv(dim, width, kernel_size, stride=stride, act=act)
        for dim, width, stride in zip(inputs, widths, strides, strict=True)
    ]
    return OrderedDict((f"conv{index}", layer) for index, layer in enumerate(convolutions, start=1))


def init_convolutions(network: nn.Module, *, grouped: bool = True) -> None:
    """Draw the weights of convolutions from a normal of variance 2 / fan-out, and set their biases to 0.

    Args:
        network: Its `nn.Conv2d` are drawn anew.
        grouped: Whether the fan-out of a grouped convolution counts the outputs of one group only.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // (module.groups if grouped else 1)
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_last_norms(network: nn.Module) -> None:
    """Let every residual block begin as its shortcut: the last norm of a branch gets the factor 0."""
    for block in network.modules():
        if isinstance(block, Residual) and block.shortcut is not None:
            last = [module for module in block.branch.modules() if isinstance(module, nn.BatchNorm2d)][-1]
            nn.init.zeros_(last.weight)
