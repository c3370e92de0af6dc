"""MobileNetV2 with efficient local attention in its inverted residuals.

Papers: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, arXiv 1801.04381; Xu and
Wan, "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", arXiv 2403.01123.
Official code: github.com/Xuwei86/ELA_Code, revision cd4594d (no licence file; nothing is copied from it),
MbV2/models/mbv2_ela72.py: ELA-L on the expanded width, after the depthwise convolution and before the projection, in
every block but the first one, which does not expand.

Deviations:
- The variant of ELA is a choice. The 32 groups of ELA-T's norm do not divide most of the expanded widths (144, ...);
  there the norm has the greatest common divisor of both (16), as nothing else is defined.

Legend: B batch, C channels, H and W the map's sides.
"""

import math
from collections import OrderedDict
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from visattn.attention import EfficientLocalAttention
from visattn.attention.ela import SETTINGS, Variant
from visattn.backbones._backbone import Backbone, Head, Stage
from visattn.backbones._build import build, config
from visattn.backbones._residual import ChannelsLast, Residual, conv, init_convolutions, layers
from visattn.blocks import drop_path_rates
from visattn.errors import UserError, unknown

# Width and depth of the layers of each stage: a map is the last one of its resolution.
PLAN = ([(16, 1)], [(24, 2)], [(32, 3)], [(64, 4), (96, 3)], [(160, 3), (320, 1)])
EXPANSION = 6
STARTS = (1, 2, 4, 7, 14)  # where each stage begins in the official list of features


def mobilenetv2_ela(
    *,
    ela: Variant = "L",
    width_mult: float = 1.0,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    drop_rate: float = 0.1,
    drop_path_rate: float = 0.0,
) -> Backbone:
    """Build a MobileNetV2 with ELA.

    Args:
        ela: Variant of the attention, see `EfficientLocalAttention`.
        width_mult: Factor of all widths, which are rounded to multiples of 8; the last 1280 channels become no fewer.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: `avg`, `max`, or empty for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Raises:
        UserError: `ela` is no variant, or `width_mult` is not positive.
    """
    if ela not in SETTINGS:
        raise unknown("ela", str(ela), SETTINGS)
    if not width_mult > 0:
        raise UserError(f"width_mult must be above 0, got {width_mult!r}")
    rates = drop_path_rates(drop_path_rate, [sum(depth for _, depth in each) for each in PLAN])
    first = dim = layers.make_divisible(32 * width_mult)
    stages, widths = [], []
    for index, groups in enumerate(PLAN):
        blocks: list[nn.Module] = []
        for base, depth in groups:
            width = layers.make_divisible(base * width_mult)
            for _ in range(depth):
                stride = 2 if index > 0 and not blocks else 1
                blocks.append(_block(dim, width, stride, ela if index else None, rates[index][len(blocks)]))
                dim = width
        stages.append(Stage(nn.Identity(), blocks))
        widths.append(dim)
    features = layers.make_divisible(1280 * max(width_mult, 1.0))
    network = Backbone(
        conv(in_chans, first, 3, stride=2, act=nn.ReLU6),
        stages,
        widths=widths,
        reductions=(2, 4, 8, 16, 32),
        norm=conv(dim, features, act=nn.ReLU6),
        head=Head(features, num_classes, pool=global_pool, channels_last=False, drop_rate=drop_rate),
        in_chans=in_chans,
        num_classes=num_classes,
        channels_last=False,
        num_features=features,
    )
    init_convolutions(network, grouped=False)
    if num_classes:
        nn.init.normal_(network.head.fc.weight, std=0.01)  # type: ignore[arg-type]
    return network


def _block(dim: int, width: int, stride: int, ela: Variant | None, rate: float) -> Residual:
    """An inverted residual; without `ela` the first one, which does not expand."""
    inner = dim if ela is None else EXPANSION * dim
    branch: OrderedDict[str, nn.Module] = OrderedDict()
    if ela is not None:
        branch["expand"] = conv(dim, inner, act=nn.ReLU6)
    branch["depthwise"] = conv(inner, inner, 3, stride=stride, groups=inner, act=nn.ReLU6)
    if ela is not None:
        groups = math.gcd(SETTINGS[ela].norm_groups, inner)
        branch["ela"] = ChannelsLast(EfficientLocalAttention(inner, variant=ela, norm_groups=groups))
    branch["project"] = conv(inner, width)
    return Residual(branch, nn.Identity() if dim == width and stride == 1 else None, None, rate)


def official_name(key: str) -> str:
    """The authors' key of our key."""
    part, _, rest = key.partition(".")
    if part == "stem":
        return f"features.0.{_INSIDE[rest.split('.')[0]]}.{rest.partition('.')[2]}"
    if part == "norm":
        return f"conv.{_INSIDE[rest.split('.')[0]]}.{rest.partition('.')[2]}"
    if part == "head":
        return f"classifier.1.{rest.removeprefix('fc.')}"
    _, stage, _, block, _, layer, inside, *last = key.split(".")
    feature = f"features.{STARTS[int(stage)] + int(block)}.conv"
    if layer == "ela":
        return ".".join([feature, "6", *last])
    first = (_FIRST if stage == "0" else _LATER)[layer]
    return ".".join([feature, str(first + _INSIDE[inside]), *last])


_INSIDE = {"conv": 0, "bn": 1}
# The authors number the layers of a block, activations included.
_FIRST = {"depthwise": 0, "project": 3}
_LATER = {"expand": 0, "depthwise": 3, "project": 7}


def unused(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Entries that the authors' forward pass never reads: none."""
    return {}


default_cfgs = generate_default_cfgs(
    {"va_mobilenetv2_ela_l": config("stem.conv", interpolation="bilinear", paper_ids="arXiv:2403.01123")}
)


@register_model
def va_mobilenetv2_ela_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The authors' network; `width_mult` and `ela` vary it."""
    return build(mobilenetv2_ela, "va_mobilenetv2_ela_l", pretrained, **{"out_indices": (0, 1, 2, 3, 4), **kwargs})
