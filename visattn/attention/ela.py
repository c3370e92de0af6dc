"""Efficient local attention: where along each axis to look, from strip averages and a 1-D convolution.

Paper: Xu and Wan, "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", arXiv 2403.01123: z_h and
z_w are the means over the other axis, y = sigmoid(GN(Conv1d(z))), out = x * y_h * y_w.
Official code: github.com/Xuwei86/ELA_Code, revision cd4594d (no licence file; nothing is copied from it). The names
T, B, S and L are the paper's; that code has classes ELA72 and ELA73 whose settings differ from folder to folder.

Deviations:
- Rank 3: the strip of an axis is the mean over both others, and out = x * y_d * y_h * y_w, with the same convolution.
- A strip of a single value (one group of one channel, a map of one position along the axis, batch of one) is normalised
  like any other, to the norm's bias; torch's GroupNorm layer refuses it in training.

As in the official code, convolution and norm are shared by all axes, while the norm's statistics are each axis's own.

Legend: B batch, *S spatial axes, C channels, L length of an axis.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from visattn.attention import _checks as check
from visattn.attention._windows import certain

Variant = Literal["T", "B", "S", "L"]


@dataclass(frozen=True)
class Setting:
    """What distinguishes a variant: the kernel, the channels of a convolution group, the groups of the norm."""

    kernel_size: int
    group_channels: int
    norm_groups: int


SETTINGS: dict[str, Setting] = {
    "T": Setting(5, 1, 32),
    "B": Setting(7, 1, 16),
    "S": Setting(5, 8, 16),
    "L": Setting(7, 8, 16),
}


class EfficientLocalAttention(nn.Module):
    """`x` times one gate per axis, each from the averages of `x` over the other axes.

    Border policy: the convolution along an axis sees zeros beyond its ends. The parameters do not depend on the rank,
    so one block takes maps and volumes.

    Args:
        dim: Channels C, a multiple of the norm's groups: 32 for `T`, else 16.
        variant: `T`: kernel 5, depthwise. `B`: kernel 7, depthwise. `S`: kernel 5, 8 channels a group. `L`: kernel 7,
            8 channels a group.
        norm_groups: Groups of the norm, a divisor of `dim`; None: the variant's. For widths that those do not divide.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(self, dim: int, *, variant: Variant = "L", norm_groups: int | None = None) -> None:
        super().__init__()
        self.dim = check.positive("dim", dim)
        self.variant = check.choice("variant", variant, tuple(SETTINGS))
        setting = SETTINGS[variant]
        groups = setting.norm_groups if norm_groups is None else check.positive("norm_groups", norm_groups)
        step = math.lcm(groups, setting.group_channels)
        if dim % step:
            raise ValueError(
                f"variant {variant!r} with {groups} norm groups needs dim to be a multiple of {step}, got {dim}"
            )
        self.conv = nn.Conv1d(
            dim,
            dim,
            setting.kernel_size,
            padding=setting.kernel_size // 2,
            groups=dim // setting.group_channels,
            bias=False,
        )
        self.gn = nn.GroupNorm(groups, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Gate `x` (B, *S, C), of two or three spatial axes; the same shape comes back."""
        # TorchScript cannot express the check.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            check.channels_last("EfficientLocalAttention", x, self.dim, self.supported_ranks)
        # All sums run in the order of memory: a convolutional network's map is a view of channels-first memory.
        first = 1 if x.is_contiguous() else 2
        maps = x if first == 1 else x.movedim(-1, 1)
        for axis, gate in enumerate(self._gates(maps, first)):
            for other in range(x.ndim - 2):
                if other != axis:
                    gate = gate.unsqueeze(first + other)
            # What the first factor made is ours to change, unless its gradient needs it.
            maps = maps * gate if axis == 0 or torch.is_grad_enabled() else maps.mul_(gate)
        return maps if first == 1 else maps.movedim(1, -1)

    def gates(self, x: Tensor) -> list[Tensor]:
        """One gate (B, L, C) per spatial axis of `x`, between 0 and 1, in the dtype of `x`."""
        return self._gates(x, 1)

    def _gates(self, maps: Tensor, first: int) -> list[Tensor]:
        """Gates (B, L, C) of (B, *S, C), whose `first` spatial axis is 1, or (B, C, L) of (B, C, *S), where it is 2."""
        strips: list[Tensor] = []  # (B, C, L)
        for axis in range(maps.ndim - 2):
            others = list(range(first, maps.ndim - 2 + first))
            others.remove(axis + first)
            strip = self._average(maps, others)
            strips.append(strip if first == 2 else strip.mT)
        if self._alike(strips):  # all at once, as a larger batch: half the operators
            gates = list(self._gate(torch.cat(strips)).to(maps.dtype).chunk(len(strips)))
        else:
            gates = [self._gate(strip).to(maps.dtype) for strip in strips]
        return gates if first == 2 else [gate.mT for gate in gates]

    def _alike(self, strips: list[Tensor]) -> bool:
        """Whether all strips are of one length for sure."""
        alike = True
        for strip in strips:
            if torch.jit.is_scripting():  # type: ignore[attr-defined]
                alike = alike and strip.shape[-1] == strips[0].shape[-1]
            else:
                alike = alike and certain(strip.shape[-1] == strips[0].shape[-1])
        return alike

    def _average(self, maps: Tensor, axes: list[int]) -> Tensor:
        """The mean over `axes`; its gradient divides before it is expanded to the map, where that is as exact."""
        if maps.element_size() < 4:
            return maps.mean(axes)
        count = 1
        for axis in axes:
            count *= maps.shape[axis]
        return maps.sum(axes) / count

    def _gate(self, strip: Tensor) -> Tensor:
        """The gate of the averages `strip` (B, C, L)."""
        norm = self.gn
        # nn.GroupNorm refuses a group of one value, which is a legitimate map here.
        normed = torch.group_norm(self.conv(strip), norm.num_groups, norm.weight, norm.bias, norm.eps)
        return torch.sigmoid(normed)

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        return f"dim={self.dim}, variant={self.variant!r}, norm_groups={self.gn.num_groups}"
