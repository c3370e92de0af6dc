"""HaloNet: residual networks whose bottlenecks hold blocked local attention instead of, or among, 3x3 convolutions.

Paper: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", CVPR 2021,
arXiv 2103.12731, section 3.2 and table 1. The authors published no code and no weights.
Code: `halonet26t`, `halonet50ts`, `sehalonet33ts` and `haloregnetz_b` are timm 1.0.31's own networks (Apache-2.0),
timm/models/byoanet.py and byobnet.py; nothing is copied from it, and its weights fit. `halonet_h0` to `halonet_h7` are
the paper's, put together from its table as two public transcriptions read it:

    width w of a stage: 64, 128, 256, 512; blocks: 3, 3, l3, 3; heads: 4, 8, 8, 8
    1x1 convolution to w, attention with queries and keys of w and values of r_v w, 1x1 convolution to r_b w

with a norm and a ReLU after the first two and after the sum, a norm after the third, a strided 1x1 convolution as
shortcut where the shape changes, a 7x7 stem with max pooling, and a last 1x1 convolution to d_f channels in H3 to H7.
The parameter counts are the table's, rounded to 0.1 million (H6: 43.46 where it says 43.4).

Deviations:
- Any image size: a map that is no multiple of the block is treated as if it lay in a larger one. timm refuses it.
- Maps are the outputs of the stages; timm's last one is the output of the last 1x1 convolution where there is one.

Legend: B batch, C channels, H and W the map's sides.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import generate_default_cfgs, register_model
from torch import nn

from visattn.attention import HaloAttention
from visattn.backbones._backbone import Backbone, Head, Stage
from visattn.backbones._build import build, config
from visattn.backbones._residual import (
    Act,
    ChannelsLast,
    Residual,
    conv,
    conv_stem,
    init_convolutions,
    init_last_norms,
    layers,
    shortcut,
)
from visattn.blocks import drop_path_rates

TIERED = ((24, 32, 64), (2, 1, 1), 3)


@dataclass(frozen=True)
class Halo:
    """The attention of a network.

    Attributes:
        block: Side of a block, b.
        halo: Tokens added on either side, h.
        qk_ratio: Width of queries and keys over that of the values, rounded; only where they are not set apart.
    """

    block: int
    halo: int
    qk_ratio: float = 1.0


@dataclass(frozen=True)
class Stages:
    """The plan of the stages; every sequence has one entry per stage.

    Attributes:
        blocks: A letter per block, `B` bottleneck or `H` attention.
        widths: Channels C of the output.
        inner: Channels between the 1x1 convolutions; None: 3 times those of the block's input.
        values: Channels of the values; None: those of the queries.
        heads: Heads of the attention.
        strides: Of the first block.
        group: Channels of a group of the 3x3 convolutions; 0: one group.
        squeeze: Width of squeeze and excitation in bottlenecks over that of the map; None: there is none.
        linear: Whether blocks end without an activation, and without a shortcut where the shape changes.
    """

    blocks: Sequence[str]
    widths: Sequence[int]
    inner: Sequence[int] | None
    halo: Halo
    values: Sequence[int] | None = None
    heads: Sequence[int] = (8, 8, 8, 8)
    strides: Sequence[int] = (1, 2, 2, 2)
    group: int = 0
    squeeze: float | None = None
    linear: bool = False


def halonet(
    *,
    plan: Stages,
    stem: tuple[Sequence[int], Sequence[int], int] = TIERED,
    pool: bool = True,
    act: Act = nn.ReLU,
    final: int | None = None,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Backbone:
    """Build a HaloNet.

    Args:
        plan: The stages.
        stem: Channels and strides of the stem's convolutions, and their kernel size.
        pool: Whether max pooling of stride 2 follows them.
        act: Activation.
        final: Channels of a 1x1 convolution after the last stage; None: there is none.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: `avg`, `max`, or empty for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
    """
    widths, strides, kernel = stem
    first = conv_stem(in_chans, widths, strides, kernel, act)
    reduction = 1
    for stride in strides:
        reduction *= stride
    if pool:
        first["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
        reduction *= 2
    rates = drop_path_rates(drop_path_rate, [len(letters) for letters in plan.blocks])
    dim = widths[-1]
    stages, reductions = [], []
    for index, letters in enumerate(plan.blocks):
        blocks = []
        for i, letter in enumerate(letters):
            stride = plan.strides[index] if i == 0 else 1
            blocks.append(_block(plan, index, letter, dim, stride, act, rates[index][i]))
            dim = plan.widths[index]
        reduction *= plan.strides[index]
        reductions.append(reduction)
        stages.append(Stage(nn.Identity(), blocks))
    features = final or dim
    network = Backbone(
        first["conv1"] if len(first) == 1 else nn.Sequential(first),  # as timm names them
        stages,
        widths=plan.widths,
        reductions=reductions,
        norm=nn.Identity() if final is None else conv(dim, final, act=act),
        head=Head(features, num_classes, pool=global_pool, channels_last=False, drop_rate=drop_rate),
        in_chans=in_chans,
        num_classes=num_classes,
        channels_last=False,
        num_features=features,
    )
    init_convolutions(network)
    init_last_norms(network)
    for module in network.modules():
        if isinstance(module, HaloAttention):
            module.reset_parameters()
    return network


def _block(plan: Stages, index: int, letter: str, dim: int, stride: int, act: Act, rate: float) -> Residual:
    """A block of stage `index` for maps of `dim` channels."""
    width = plan.widths[index]
    inner = 3 * dim if plan.inner is None else plan.inner[index]
    branch: OrderedDict[str, nn.Module] = OrderedDict(conv1_1x1=conv(dim, inner, act=act))
    if letter == "B":
        groups = inner // plan.group if plan.group else 1
        branch["conv2_kxk"] = conv(inner, inner, 3, stride=stride, groups=groups, act=act)
        if plan.squeeze is not None:
            branch["attn"] = layers.SqueezeExcite(inner, rd_ratio=plan.squeeze)
    else:
        values = inner if plan.values is None else plan.values[index]
        attention = HaloAttention(
            inner,
            plan.heads[index],
            dim_out=values,
            stride=stride,
            block_size=plan.halo.block,
            halo_size=plan.halo.halo,
            dim_head=None if plan.values is None else inner // plan.heads[index],
            qk_ratio=plan.halo.qk_ratio,
        )
        branch["self_attn"] = ChannelsLast(attention)
        branch["post_attn"] = layers.BatchNormAct2d(values, act_layer=act)
        inner = values
    branch["conv3_1x1"] = conv(inner, width)
    if plan.linear:
        same = dim == width and stride == 1
        return Residual(branch, nn.Identity() if same else None, None, rate)
    return Residual(branch, shortcut(dim, width, stride), act, rate)


def official_name(key: str) -> str:
    """The key in timm of our key."""
    for ours, theirs in ((".blocks.", "."), (".branch.", "."), (".inner.", ".")):
        key = key.replace(ours, theirs, 1)
    return f"final_conv.{key.removeprefix('norm.')}" if key.startswith("norm.") else key


def unused(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Entries that timm's forward pass never reads: none."""
    return {}


_BASE = {"first_conv": "stem.conv1.conv", "license": "apache-2.0", "paper_ids": "arXiv:2103.12731"}


def _config(size: int, **overrides: Any) -> dict[str, Any]:
    side = -(-size // 32)  # rounded up, as every strided layer does
    return config(**{**_BASE, "input_size": (3, size, size), "pool_size": (side, side), **overrides})


_REGNETZ = {"first_conv": "stem.conv", "mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD}

default_cfgs = generate_default_cfgs(
    {
        "va_halonet26t": _config(256, crop_pct=0.95),
        "va_halonet50ts": _config(256, crop_pct=0.94),
        "va_sehalonet33ts": _config(256, crop_pct=0.94),
        "va_haloregnetz_b": _config(224, crop_pct=0.94, **_REGNETZ),
        "va_halonet_h0": _config(256),
        "va_halonet_h1": _config(256),
        "va_halonet_h2": _config(256),
        "va_halonet_h3": _config(320),
        "va_halonet_h4": _config(384),
        "va_halonet_h5": _config(448),
        "va_halonet_h6": _config(512),
        "va_halonet_h7": _config(600),
    }
)
_RESNET = (256, 512, 1024, 2048)


@register_model
def va_halonet26t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-26 with attention in the last two stages."""
    plan = Stages(("BB", "BB", "BH", "HH"), _RESNET, (64, 128, 256, 512), Halo(8, 2))
    return build(halonet, "va_halonet26t", pretrained, **{"plan": plan, **kwargs})


@register_model
def va_halonet50ts(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with attention in every other block of the last stages."""
    blocks = ("BBB", "BBBH", "BHBHBH", "BHB")
    plan = Stages(blocks, _RESNET, (64, 128, 256, 512), Halo(8, 3), heads=(8, 4, 8, 8))
    return build(halonet, "va_halonet50ts", pretrained, **{"plan": plan, "act": nn.SiLU, **kwargs})


@register_model
def va_sehalonet33ts(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-33 with attention in the last blocks, and squeeze and excitation in the others."""
    widths, inner = (256, 512, 1024, 1536), (64, 128, 256, 512)
    plan = Stages(("BB", "BBH", "BBH", "HH"), widths, inner, Halo(8, 3), squeeze=1 / 16)
    default = {"plan": plan, "stem": ((24, 32, 64), (2, 1, 2), 3), "pool": False, "act": nn.SiLU, "final": 1280}
    return build(halonet, "va_sehalonet33ts", pretrained, **{**default, **kwargs})


@register_model
def va_haloregnetz_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RegNetZ with attention in every fourth block of the third stage and in the last one."""
    blocks = ("BB", "BBBBBB", "BBBHBBBHBBBH", "HH")
    attention = Halo(7, 2, 0.33)
    options = {"strides": (2, 2, 2, 2), "group": 16, "squeeze": 0.25, "linear": True}
    plan = Stages(blocks, (48, 96, 192, 288), None, attention, **options)  # type: ignore[arg-type]
    default = {"plan": plan, "stem": ((32,), (2,), 3), "pool": False, "act": nn.SiLU, "final": 1536}
    return build(halonet, "va_haloregnetz_b", pretrained, **{**default, **kwargs})


def _paper(
    variant: str, pretrained: bool, kwargs: Mapping[str, Any], halo: Halo, values: float, output: float, depth: int
) -> nn.Module:
    """One of the paper's networks: r_v `values`, r_b `output`, l3 `depth`."""
    inner = (64, 128, 256, 512)
    plan = Stages(
        ("HHH", "HHH", "H" * depth, "HHH"),
        tuple(int(output * width) for width in inner),
        inner,
        halo,
        values=tuple(int(values * width) for width in inner),
        heads=(4, 8, 8, 8),
    )
    return build(halonet, variant, pretrained, **{"plan": plan, "stem": ((64,), (2,), 7), **kwargs})


@register_model
def va_halonet_h0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's H0."""
    return _paper("va_halonet_h0", pretrained, kwargs, Halo(8, 3), 1, 0.5, 7)


@register_model
def va_halonet_h1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's H1."""
    return _paper("va_halonet_h1", pretrained, kwargs, Halo(8, 3), 1, 1, 10)


@register_model
def va_halonet_h2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's H2."""
    return _paper("va_halonet_h2", pretrained, kwargs, Halo(8, 3), 1, 1.25, 11)


@register_model
def va_halonet_h3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's H3."""
    return _paper("va_halonet_h3", pretrained, {"final": 1024, **kwargs}, Halo(10, 3), 1, 1.5, 12)


@register_model
def va_halonet_h4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's H4."""
    return _paper("va_halonet_h4", pretrained, {"final": 1280, **kwargs}, Halo(12, 2), 1, 3, 12)


@register_model
def va_halonet_h5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's H5."""
    return _paper("va_halonet_h5", pretrained, {"final": 1536, **kwargs}, Halo(14, 2), 2.5, 2, 23)


@register_model
def va_halonet_h6(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's H6."""
    return _paper("va_halonet_h6", pretrained, {"final": 1536, **kwargs}, Halo(8, 4), 3, 2.75, 24)


@register_model
def va_halonet_h7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's H7."""
    return _paper("va_halonet_h7", pretrained, {"final": 2048, **kwargs}, Halo(10, 3), 4, 3.5, 26)
