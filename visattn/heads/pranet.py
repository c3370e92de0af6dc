"""PraNet's decoder: a partial decoder for a global map, then reverse attention from coarse to fine.

Paper: Fan et al., "PraNet: Parallel Reverse Attention Network for Polyp Segmentation", MICCAI 2020, arXiv 2006.11392.
The partial decoder is that of Wu et al., "Cascaded Partial Decoder", CVPR 2019, arXiv 1904.08739; its receptive-field
blocks are a variant of Liu et al., "Receptive Field Block Net", ECCV 2018, arXiv 1711.07767.
Official code: github.com/DengPingFan/PraNet, revision 95f12bd, lib/PraNet_Res2Net.py (it states no licence; nothing is
copied from it). With its feature maps (reductions 8, 16, 32) and one class this head computes the same numbers.

What the official code does and the paper does not say, kept here:
- No activation follows the convolutions of the receptive-field blocks and of the partial decoder, nor the first and the
  last one of a reverse-attention branch: the code's class for "convolution, norm, ReLU" never applies its ReLU.
- The partial decoder up-samples with aligned corners, everything else with half-pixel centres.
- The last convolution of each branch is followed by a norm, so a branch's correction of the logits is normalised.

Deviations: maps are resized to each other's sizes instead of by fixed factors, so any three maps fit, equal sizes
included; any number of classes (see `visattn.attention.reverse`).

Legend: B batch, C channels, K classes; level 0 is the finest of the three maps, level 2 the coarsest.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visattn.attention.reverse import Activation, ReverseAttention, resize_linear


class PraNetHead(nn.Module):
    """Four side outputs of PraNet from three feature maps; 2-D.

    Args:
        features: (channels, reduction) of the three maps, finest first.
        classes: Number of output channels K.
        channels: Width of the receptive-field blocks (32 in the paper).
        activation: How the logits will be read, see `ReverseAttention`; None means sigmoid for one class, softmax for
            several.
    """

    output_names: ClassVar[tuple[str, ...]] = ("map2", "map3", "map4", "map5")

    def __init__(
        self,
        features: Sequence[tuple[int, Any]],
        classes: int = 1,
        channels: int = 32,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        if len(features) != 3:
            raise ValueError(f"PraNet's head reads three feature maps, got {len(features)}: {list(features)}")
        if any(fine[1] > coarse[1] for fine, coarse in pairwise(features)):
            raise ValueError(f"PraNet's head needs the finest map first, got reductions {[r for _, r in features]}")
        widths = [width for width, _ in features]
        self.receptive = nn.ModuleList(ReceptiveField(width, channels) for width in widths)
        self.decoder = PartialDecoder(channels, classes)
        # The coarsest branch is wider, deeper and has larger kernels, but ends in a 1x1 convolution.
        self.branches = nn.ModuleList(
            [
                Refinement(widths[0], 64, kernel=3, depth=2, last=3, classes=classes),
                Refinement(widths[1], 64, kernel=3, depth=2, last=3, classes=classes),
                Refinement(widths[2], 256, kernel=5, depth=3, last=1, classes=classes),
            ]
        )
        self.reverse = ReverseAttention(activation)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int] | torch.Size) -> tuple[Tensor, ...]:
        """Decode.

        Args:
            maps: The three feature maps (B, C_i, H_i, W_i), finest first.
            size: Height and width of the outputs in pixels.

        Returns:
            Logits (B, K, *size) in the order of `output_names`: the prediction, the two coarser refinements, and the
            global map of the partial decoder.
        """
        fine, middle, coarse = (block(feature) for block, feature in zip(self.receptive, maps, strict=True))
        logits = self.decoder(coarse, middle, fine)  # (B, K, H_0, W_0)
        outputs = [resize_linear(logits, size)]
        for level in (2, 1, 0):
            feature = maps[level]
            guide = resize_linear(logits, feature.shape[2:])
            # Views only: the block is channels-last, and weighting keeps the memory order.
            hidden = self.reverse(feature.movedim(1, -1), guide.movedim(1, -1)).movedim(-1, 1)
            logits = self.branches[level](hidden) + guide  # (B, K, H_level, W_level)
            outputs.append(resize_linear(logits, size))
        return tuple(reversed(outputs))


class ConvNorm(nn.Module):
    """Convolution without bias and batch norm, the size unchanged.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Odd kernel size, one number or (height, width).
        dilation: Spacing of a 3x3 kernel.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], dilation: int = 1) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2 * dilation, width // 2 * dilation)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), padding=padding, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        y: Tensor = self.bn(self.conv(x))
        return y


class ReceptiveField(nn.Module):
    """Four branches of growing receptive field, fused, with a residual; (B, inputs, H, W) to (B, channels, H, W)."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(ConvNorm(inputs, channels, 1))])
        for kernel in (3, 5, 7):
            self.branches.append(
                nn.Sequential(
                    ConvNorm(inputs, channels, 1),
                    ConvNorm(channels, channels, (1, kernel)),
                    ConvNorm(channels, channels, (kernel, 1)),
                    ConvNorm(channels, channels, 3, dilation=kernel),
                )
            )
        self.fuse = ConvNorm(4 * channels, channels, 3)
        self.shortcut = ConvNorm(inputs, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, channels, H, W)."""
        fused = self.fuse(torch.cat([branch(x) for branch in self.branches], dim=1))
        return torch.relu(fused + self.shortcut(x))


class PartialDecoder(nn.Module):
    """Aggregates three maps of `channels` channels into logits at the size of the finest."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        # Numbered as in the official code: which up-sampled map a convolution follows is said in `forward`.
        self.upsample1 = ConvNorm(channels, channels, 3)
        self.upsample2 = ConvNorm(channels, channels, 3)
        self.upsample3 = ConvNorm(channels, channels, 3)
        self.upsample4 = ConvNorm(channels, channels, 3)
        self.upsample5 = ConvNorm(2 * channels, 2 * channels, 3)
        self.concat2 = ConvNorm(2 * channels, 2 * channels, 3)
        self.concat3 = ConvNorm(3 * channels, 3 * channels, 3)
        self.conv4 = ConvNorm(3 * channels, 3 * channels, 3)
        self.conv5 = nn.Conv2d(3 * channels, classes, 1)

    def forward(self, coarse: Tensor, middle: Tensor, fine: Tensor) -> Tensor:
        """Three maps (B, channels, H_i, W_i) to logits (B, classes, H_fine, W_fine)."""
        up_coarse = resize_linear(coarse, middle.shape[2:], align_corners=True)
        up_up_coarse = resize_linear(up_coarse, fine.shape[2:], align_corners=True)
        up_middle = resize_linear(middle, fine.shape[2:], align_corners=True)
        middle_gated = self.upsample1(up_coarse) * middle
        fine_gated = self.upsample2(up_up_coarse) * self.upsample3(up_middle) * fine
        middle_joined = self.concat2(torch.cat((middle_gated, self.upsample4(up_coarse)), dim=1))
        up_joined = resize_linear(middle_joined, fine.shape[2:], align_corners=True)
        fine_joined = self.concat3(torch.cat((fine_gated, self.upsample5(up_joined)), dim=1))
        logits: Tensor = self.conv5(self.conv4(fine_joined))
        return logits


class Refinement(nn.Module):
    """One reverse-attention branch: narrow the features, convolve `depth` times, and correct the logits.

    Args:
        inputs: Channels of the feature map.
        hidden: Channels inside.
        kernel: Kernel size of the `depth` inner convolutions, each followed by a ReLU.
        depth: Their number.
        last: Kernel size of the convolution that gives the logits.
        classes: Number of output channels.
    """

    def __init__(self, inputs: int, hidden: int, *, kernel: int, depth: int, last: int, classes: int) -> None:
        super().__init__()
        self.narrow = ConvNorm(inputs, hidden, 1)
        self.inner = nn.ModuleList(ConvNorm(hidden, hidden, kernel) for _ in range(depth))
        self.last = ConvNorm(hidden, classes, last)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, classes, H, W)."""
        x = self.narrow(x)
        for convolution in self.inner:
            x = torch.relu(convolution(x))
        y: Tensor = self.last(x)
        return y
