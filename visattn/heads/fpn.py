"""Feature pyramids: context handed from coarse to fine, and all levels read together.

Papers: Lin et al., "Feature Pyramid Networks", CVPR 2017, arXiv 1612.03144, with the segmentation branch of Kirillov et
al., "Panoptic Feature Pyramid Networks", CVPR 2019, arXiv 1901.02446; Xiao et al., "Unified Perceptual Parsing", ECCV
2018, arXiv 1807.10221 (UPerNet: pyramid pooling at the top, all levels concatenated). Status: no parity target; written
from these descriptions.

Legend: B batch, C channels, K classes, *S spatial axes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visattn.blocks import ADAPTIVE, CONV, conv_norm, resize
from visattn.errors import UserError


def _conv(dims: int, width: int, out: int, kernel: int, norm: str) -> nn.Sequential:
    conv = CONV[dims](width, out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, conv_norm(norm, dims, out), nn.ReLU())


def _top_down(maps: list[Tensor]) -> list[Tensor]:
    """Each of `maps`, finest first and of one width, plus what comes from the coarser ones."""
    out = [maps[-1]]
    for x in reversed(maps[:-1]):
        out.append(x + resize(out[-1], x.shape[2:]))
    return out[::-1]


class FPNHead(nn.Module):
    """Panoptic FPN's segmentation branch.

    Args:
        features: (channels, reduction) of the maps, finest first.
        classes: Output channels K.
        dims: Spatial axes, 2 or 3.
        width: Channels of the pyramid.
        branch_width: Channels of the segmentation branch.
        drop_rate: Dropout of whole channels before the classifier.
    """

    output_names = ("logits",)

    def __init__(
        self,
        features: Sequence[tuple[int, Any]],
        classes: int,
        *,
        dims: int = 2,
        width: int = 256,
        branch_width: int = 128,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(CONV[dims](each, width, 1) for each, _ in features)
        self.smooth = nn.ModuleList(CONV[dims](width, width, 3, padding=1) for _ in features)
        # A level as coarse as the n-th doubling passes n convolutions on its way to the finest.
        finest = _mean(features[0][1])
        steps = [max(1, round(math.log2(_mean(each) / finest))) for _, each in features]
        self.branches = nn.ModuleList(
            nn.ModuleList(
                _conv(dims, width if i == 0 else branch_width, branch_width, 3, "group") for i in range(number)
            )
            for number in steps
        )
        self.drop = (nn.Dropout2d if dims == 2 else nn.Dropout3d)(drop_rate)
        self.classifier = CONV[dims](branch_width, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits (B, K, *size) of `maps` (B, C, *S), finest first."""
        pyramid = _top_down([layer(x) for layer, x in zip(self.lateral, maps, strict=True)])
        sizes = [x.shape[2:] for x in maps]
        total = torch.zeros((), device=maps[0].device)
        for i, (x, smooth, branch) in enumerate(zip(pyramid, self.smooth, self.branches, strict=True)):
            x = smooth(x)
            # Up by one level after each convolution; where levels lie further apart, the rest in one go.
            for j, conv in enumerate(branch.children()):
                x = resize(conv(x), sizes[max(i - 1 - j, 0)])
            total = total + resize(x, sizes[0])
        return resize(self.classifier(self.drop(total)), size)


class UPerHead(nn.Module):
    """UPerNet: pyramid pooling of the coarsest map, a feature pyramid, and all levels concatenated.

    Args:
        features: (channels, reduction) of the maps, finest first.
        classes: Output channels K.
        dims: Spatial axes, 2 or 3.
        width: Channels of every layer.
        bins: Sizes that the coarsest map is pooled to.
        norm: `batch`, `instance` or `group`.
        drop_rate: Dropout of whole channels before the classifier.
    """

    output_names = ("logits",)

    def __init__(
        self,
        features: Sequence[tuple[int, Any]],
        classes: int,
        *,
        dims: int = 2,
        width: int = 256,
        bins: Sequence[int] = (1, 2, 3, 6),
        norm: str = "batch",
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        if any(type(each) is not int or each < 1 for each in bins):
            raise UserError(f"bins must be whole numbers above 0, got {bins!r}")
        # A batch norm sees one value a channel behind the coarsest pooling, which in training means nothing.
        pooled_norm = "group" if norm == "instance" or min(bins, default=1) == 1 else norm
        deepest = features[-1][0]
        self.pools = nn.ModuleList(
            nn.Sequential(ADAPTIVE[dims](each), *_conv(dims, deepest, width, 1, pooled_norm)) for each in bins
        )
        self.top = _conv(dims, deepest + width * len(bins), width, 3, norm)
        self.lateral = nn.ModuleList(_conv(dims, each, width, 1, norm) for each, _ in features[:-1])
        self.smooth = nn.ModuleList(_conv(dims, width, width, 3, norm) for _ in features[:-1])
        self.fuse = _conv(dims, width * len(features), width, 3, norm)
        self.drop = (nn.Dropout2d if dims == 2 else nn.Dropout3d)(drop_rate)
        self.classifier = CONV[dims](width, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits (B, K, *size) of `maps` (B, C, *S), finest first."""
        deepest = maps[-1]
        pooled = [resize(pool(deepest), deepest.shape[2:]) for pool in self.pools]
        top = self.top(torch.cat([deepest, *pooled], dim=1))
        pyramid = _top_down([*(layer(x) for layer, x in zip(self.lateral, maps[:-1], strict=True)), top])
        levels = [*(layer(x) for layer, x in zip(self.smooth, pyramid[:-1], strict=True)), top]
        finest = maps[0].shape[2:]
        fused = self.fuse(torch.cat([resize(x, finest) for x in levels], dim=1))
        return resize(self.classifier(self.drop(fused)), size)


def _mean(reduction: Any) -> float:
    axes = (reduction,) if isinstance(reduction, int) else tuple(reduction)
    return float(math.prod(axes) ** (1 / len(axes)))
