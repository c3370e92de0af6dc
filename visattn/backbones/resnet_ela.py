"""ResNets with efficient local attention in their residual blocks.

Papers: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385; Xu and Wan, "ELA:
Efficient Local Attention for Deep Convolutional Neural Networks", arXiv 2403.01123.
Official code: github.com/Xuwei86/ELA_Code, revision cd4594d (no licence file; nothing is copied from it). It holds no
ResNet for classification. Its DeepLabV3 has ELA in the residual form x + ELA(x) behind the 3x3 convolution of each
bottleneck, and once more behind the stem and each stage.

So here, for there is no network to be equal to:
- x + ELA(x) behind the 3x3 convolution, norm and ReLU that the last convolution of the block follows: the only one of a
  bottleneck, the first one of the two of ResNet-18's basic block.
- None behind the stem and the stages: that belongs to the segmentation network.
- The frame is the usual one: a 7x7 stem with max pooling, strides in the 3x3 convolutions.

Legend: B batch, C channels, H and W the map's sides.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visattn.attention import EfficientLocalAttention
from visattn.attention.ela import SETTINGS, Variant
from visattn.backbones._backbone import Backbone, Head, Stage
from visattn.backbones._build import build, config
from visattn.backbones._residual import (
    ChannelsLast,
    Residual,
    conv,
    conv_stem,
    init_convolutions,
    init_last_norms,
    shortcut,
)
from visattn.blocks import drop_path_rates
from visattn.errors import unknown

WIDTHS = (64, 128, 256, 512)


class Added(nn.Module):
    """`x` plus what a block makes of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        out: Tensor = x + self.inner(x)
        return out


def resnet_ela(
    *,
    depths: Sequence[int],
    bottleneck: bool,
    ela: Variant = "L",
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Backbone:
    """Build a ResNet with ELA.

    Args:
        depths: Blocks of each stage.
        bottleneck: Whether blocks have three convolutions, otherwise two.
        ela: Variant of the attention, see `EfficientLocalAttention`.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: `avg`, `max`, or empty for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Raises:
        UserError: `ela` is no variant.
    """
    if ela not in SETTINGS:
        raise unknown("ela", str(ela), SETTINGS)
    stem = conv_stem(in_chans, (64,), (2,), 7, nn.ReLU)
    stem["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    outputs = [4 * width if bottleneck else width for width in WIDTHS]
    rates = drop_path_rates(drop_path_rate, depths)
    stages, dim = [], 64
    for index, depth in enumerate(depths):
        blocks = []
        for i in range(depth):
            stride = 2 if index > 0 and i == 0 else 1
            blocks.append(_block(dim, WIDTHS[index], outputs[index], stride, bottleneck, ela, rates[index][i]))
            dim = outputs[index]
        stages.append(Stage(nn.Identity(), blocks))
    network = Backbone(
        nn.Sequential(stem),
        stages,
        widths=outputs,
        reductions=(4, 8, 16, 32),
        norm=nn.Identity(),
        head=Head(dim, num_classes, pool=global_pool, channels_last=False, drop_rate=drop_rate),
        in_chans=in_chans,
        num_classes=num_classes,
        channels_last=False,
    )
    init_convolutions(network)
    init_last_norms(network)
    return network


def _block(dim: int, inner: int, width: int, stride: int, bottleneck: bool, ela: Variant, rate: float) -> Residual:
    attention = Added(ChannelsLast(EfficientLocalAttention(inner, variant=ela)))
    layers: list[tuple[str, nn.Module]]
    if bottleneck:
        layers = [
            ("conv1", conv(dim, inner, act=nn.ReLU)),
            ("conv2", conv(inner, inner, 3, stride=stride, act=nn.ReLU)),
            ("ela", attention),
            ("conv3", conv(inner, width)),
        ]
    else:
        layers = [
            ("conv1", conv(dim, inner, 3, stride=stride, act=nn.ReLU)),
            ("ela", attention),
            ("conv2", conv(inner, width, 3)),
        ]
    return Residual(OrderedDict(layers), shortcut(dim, width, stride), nn.ReLU, rate)


_CONFIG = config("stem.conv1.conv", interpolation="bilinear", paper_ids="arXiv:2403.01123")

default_cfgs = generate_default_cfgs({"va_resnet18_ela_l": _CONFIG, "va_resnet50_ela_l": _CONFIG})


def _build(variant: str, pretrained: bool, plan: Mapping[str, Any], kwargs: Mapping[str, Any]) -> nn.Module:
    return build(resnet_ela, variant, pretrained, **{**plan, **kwargs})


@register_model
def va_resnet18_ela_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 with ELA-L; `ela` varies it."""
    return _build("va_resnet18_ela_l", pretrained, {"depths": (2, 2, 2, 2), "bottleneck": False}, kwargs)


@register_model
def va_resnet50_ela_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with ELA-L; `ela` varies it."""
    return _build("va_resnet50_ela_l", pretrained, {"depths": (3, 4, 6, 3), "bottleneck": True}, kwargs)
