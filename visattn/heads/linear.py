"""Linear classification of every position over all maps: what the features tell without a decoder.

As Oquab et al., "DINOv2", arXiv 2304.07193, section 7.4, probe frozen features, over the maps of a pyramid here. Linear
interpolation and a 1x1 convolution commute, so each map is classified at its own resolution and the logits are summed.

Legend: B batch, C channels, K classes, *S spatial axes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visattn.blocks import CONV, resize


class LinearHead(nn.Module):
    """A 1x1 convolution of all maps, interpolated to the output's size.

    Args:
        features: (channels, reduction) of the maps, finest first.
        classes: Output channels K.
        dims: Spatial axes, 2 or 3.
    """

    output_names = ("logits",)

    def __init__(self, features: Sequence[tuple[int, Any]], classes: int, *, dims: int = 2) -> None:
        super().__init__()
        self.classifiers = nn.ModuleList(
            CONV[dims](width, classes, 1, bias=i == 0) for i, (width, _) in enumerate(features)
        )

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits (B, K, *size) of `maps` (B, C, *S), finest first."""
        finest = maps[0].shape[2:]
        logits = [layer(x) for layer, x in zip(self.classifiers, maps, strict=True)]
        return resize(torch.stack([resize(each, finest) for each in logits]).sum(0), size)
