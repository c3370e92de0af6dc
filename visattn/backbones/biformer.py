"""BiFormer: a pyramid whose tokens attend to the few regions that their own region finds relevant.

Paper: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023, arXiv 2303.08810.
Official code: github.com/rayleizhu/BiFormer, revision 1697bbb (MIT; nothing is copied from it): models/biformer.py,
models/biformer_stl.py, models/biformer_stl_nchw.py and, for maps, semantic_segmentation/models_mm/biformer_mm.py.

    x = x + position(x)          depthwise 3x3 convolution; not in the `stl` variants
    x = x + attn(norm1(x))       bi-level routing in stages 1 to 3, full attention with LePE in stage 4
    x = x + mlp(norm2(x))

Deviations:
- Blocks stay channels-last from the stem to the head; officially every block permutes twice.
- `auto_pad` is on by default, so that every size is accepted; on sizes that need no padding it changes nothing.

Legend: B batch, H x W positions, C channels.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visattn.attention import BiLevelRoutingAttention, LePEAttention
from visattn.attention._depthwise import depthwise
from visattn.attention.bilevel import Downsample
from visattn.attention.lepe import pointwise
from visattn.backbones._backbone import Backbone, Head, Stage
from visattn.backbones._build import build, config
from visattn.blocks import ConvMlp, Mlp, Scale, drop_path, drop_path_rates, init_linear
from visattn.errors import UserError

EPS = 1e-6  # of the layer norms in blocks and on maps
HEAD_DIM = 32  # channels of a head where routing attends
FULL_HEADS = 8  # heads of full attention, whatever its width: officially the head width is not passed on
Form = Literal["default", "stl", "stl_nchw"]


class ConvMixer(nn.Module):
    """Stands for attention where `topk` is 0: a depthwise 5x5 convolution between two of 1x1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(dim, dim, 1)
        self.local = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.last = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return pointwise(self.last, depthwise(self.local, pointwise(self.first, x)))


class Block(nn.Module):
    """Position, attention and MLP, each a residual branch.

    Args:
        dim: Channels C.
        attn: (B, H, W, C) to the same shape.
        mlp: Likewise.
        positional_conv: Whether a depthwise convolution tells positions apart.
        drop_path_rate: Stochastic depth of attention and MLP.
        layer_scale: Initial value of a learned factor per channel on both branches; None: no factor.
        pre_norm: Whether the norms stand before the branches, or after the sums.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        *,
        positional_conv: bool,
        drop_path_rate: float,
        layer_scale: float | None,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if positional_conv else None
        self.norm1, self.attn = nn.LayerNorm(dim, eps=EPS), attn
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=EPS), mlp
        self.scale1 = nn.Identity() if layer_scale is None else Scale(dim, layer_scale)
        self.scale2 = nn.Identity() if layer_scale is None else Scale(dim, layer_scale)
        self.drop_path = drop_path(drop_path_rate)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        if self.pos_embed is not None:
            x = x + depthwise(self.pos_embed, x)
        if self.pre_norm:
            x = x + self.drop_path(self.scale1(self.attn(self.norm1(x))))
            x = x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
        else:
            x = self.norm1(x + self.drop_path(self.scale1(self.attn(x))))
            x = self.norm2(x + self.drop_path(self.scale2(self.mlp(x))))
        return x


class Convolutions(nn.Module):
    """Convolutions and their norms, from one channels-last map to the next, or from the image.

    Args:
        layers: Run one after another on (B, C, H, W).
        image: Whether the input is an image (B, C, H, W) rather than a map (B, H, W, C).
    """

    def __init__(self, layers: Sequence[nn.Module], image: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.image = image

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H', W', C')."""
        # In channels-last memory throughout, so that nothing is copied where the layout changes.
        x = x.contiguous(memory_format=torch.channels_last) if self.image else x.movedim(-1, 1)
        x = self.layers(x)
        return x.movedim(1, -1)


class MapNorm(nn.Module):
    """Batch normalisation of a channels-last map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        out: Tensor = self.norm(x.movedim(-1, 1)).movedim(1, -1)
        return out


def stem(form: Form, in_chans: int, dim: int) -> nn.Module:
    """Image to the first map, at a quarter of the resolution."""
    if form != "default":
        return Convolutions([nn.Conv2d(in_chans, dim, 4, stride=4), nn.BatchNorm2d(dim)], image=True)
    half = dim // 2
    first = [nn.Conv2d(in_chans, half, 3, stride=2, padding=1), nn.BatchNorm2d(half), nn.GELU()]
    return Convolutions([*first, nn.Conv2d(half, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim)], image=True)


def downsample(form: Form, dim: int, dim_out: int) -> nn.Module:
    """From one stage to the next: half the resolution."""
    if form != "default":
        return Convolutions([nn.BatchNorm2d(dim), nn.Conv2d(dim, dim_out, 2, stride=2)])
    return Convolutions([nn.Conv2d(dim, dim_out, 3, stride=2, padding=1), nn.BatchNorm2d(dim_out)])


def biformer(
    *,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    form: Form = "default",
    depths: Sequence[int] = (2, 2, 8, 2),
    widths: Sequence[int] = (64, 128, 256, 512),
    mlp_ratio: float = 3.0,
    topks: Sequence[int] = (1, 4, 16, -2),
    n_win: int = 7,
    auto_pad: bool = True,
    side_dwconv: int = 5,
    kv_downsample_mode: Downsample = "identity",
    kv_per_wins: Sequence[int] = (4, 4, 4, 4),
    param_routing: bool = False,
    diff_routing: bool = False,
    soft_routing: bool = False,
    mlp_dwconv: bool = False,
    positional_conv: bool | None = None,
    pre_norm: bool = True,
    layer_scale: float | None = None,
    extra_norms: bool = False,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Backbone:
    """Build a BiFormer.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: `avg`, `max`, or empty for none.
        form: `default`: overlapping convolutions between stages and a positional one in each block; `stl`: patches
            merge without overlap and no positional convolution; `stl_nchw`: likewise, with the authors' later routing.
        depths: Blocks of each stage.
        widths: Channels of each stage.
        mlp_ratio: Width of the MLP over that of the stage.
        topks: Regions that each region attends to, per stage; -2: full attention with LePE; -1: full attention (with
            LePE in `stl_nchw`); 0: convolutions.
        n_win: Regions per axis; officially 7, and 8 for maps.
        auto_pad: Whether sizes that are no multiple of `n_win` are padded or refused.
        side_dwconv: Kernel size of the routing blocks' depthwise convolution of the values; 0: none.
        kv_downsample_mode: How keys are pooled inside each region, see `BiLevelRoutingAttention`.
        kv_per_wins: Keys per axis of a region, or the ratio, where they are pooled; per stage.
        param_routing: See `BiLevelRoutingAttention`.
        diff_routing: Likewise.
        soft_routing: Likewise.
        mlp_dwconv: Whether a depthwise convolution stands inside the MLPs.
        positional_conv: Whether blocks begin with a depthwise convolution; None: as `form` has it.
        pre_norm: Whether the norms stand before the branches, or after the sums.
        layer_scale: Initial value of learned factors on the branches; None: none.
        extra_norms: A layer norm on each map of `features_only`, as for dense prediction. Only maps see these norms,
            logits do not.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Raises:
        UserError: An argument does not fit; the message says what would.
    """
    if not len(depths) == len(widths) == len(topks) == 4:
        raise UserError(f"depths, widths and topks need 4 entries, got {len(depths)}, {len(widths)} and {len(topks)}")
    if len(kv_per_wins) != 4:
        raise UserError(f"kv_per_wins needs 4 entries, got {len(kv_per_wins)}")
    if form not in ("default", "stl", "stl_nchw"):
        raise UserError(f"form must be 'default', 'stl' or 'stl_nchw', got {form!r}")
    bad = [width for width, topk in zip(widths, topks, strict=True) if topk > 0 and width % HEAD_DIM]
    if bad:
        raise UserError(f"widths must be multiples of {HEAD_DIM} where regions are routed, got {bad}")
    route = partial(
        BiLevelRoutingAttention,
        variant="nchw" if form == "stl_nchw" else "legacy",
        n_win=n_win,
        side_dwconv=side_dwconv,
        kv_downsample_mode=kv_downsample_mode,
        param_routing=param_routing,
        diff_routing=diff_routing,
        soft_routing=soft_routing,
        auto_pad=auto_pad,
    )

    def mixer(dim: int, topk: int, per_win: int) -> nn.Module:
        if topk > 0:
            return route(dim, dim // HEAD_DIM, topk=topk, kv_per_win=per_win, kv_downsample_ratio=per_win)
        if topk == 0:
            return ConvMixer(dim)
        if topk not in (-1, -2):
            raise UserError(f"topks are numbers of regions, or 0, -1 or -2 for no routing, got {topk}")
        if form == "stl_nchw":
            return LePEAttention(dim, FULL_HEADS, variant="nchw")
        return LePEAttention(dim, FULL_HEADS, side_dwconv=5 if topk == -2 else 0)

    rates = drop_path_rates(drop_path_rate, depths)
    stages = []
    for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        hidden = int(mlp_ratio * width)
        blocks = [
            Block(
                width,
                mixer(width, topks[index], kv_per_wins[index]),
                ConvMlp(width, hidden, 2) if mlp_dwconv else Mlp(width, hidden),
                positional_conv=form == "default" if positional_conv is None else positional_conv,
                drop_path_rate=rates[index][i],
                layer_scale=layer_scale,
                pre_norm=pre_norm,
            )
            for i in range(depth)
        ]
        down = nn.Identity() if index == 0 else downsample(form, widths[index - 1], width)
        stages.append(Stage(down, blocks))
    network = Backbone(
        stem(form, in_chans, widths[0]),
        stages,
        widths=widths,
        reductions=(4, 8, 16, 32),
        norm=MapNorm(widths[-1]),
        head=Head(widths[-1], num_classes, pool=global_pool, channels_last=True, drop_rate=drop_rate),
        in_chans=in_chans,
        num_classes=num_classes,
        channels_last=True,
        map_norms=[nn.LayerNorm(width, eps=EPS) for width in widths] if extra_norms else None,
    )
    if form == "stl_nchw":
        return network  # only the classifier is a linear layer there: convolutions keep torch's initialisation
    return network.apply(init_linear)


# Names inside a block that are not the authors', by what they begin with.
_INSIDE = {
    "mlp.fc1.": "mlp.0.",
    "mlp.conv.conv.": "mlp.1.dwconv.",
    "mlp.fc2.": "mlp.3.",
    "scale1.gamma": "gamma1",
    "scale2.gamma": "gamma2",
    "attn.first.": "attn.1.",
    "attn.local.": "attn.2.",
    "attn.last.": "attn.3.",
}


def official_name(key: str) -> str:
    """The authors' name of our entry `key`."""
    parts = key.split(".")
    match parts[0]:
        case "stem":  # stem.layers.0.weight
            return ".".join(["downsample_layers", "0", *parts[2:]])
        case "map_norms":
            return ".".join(["extra_norms", *parts[1:]])
        case "head" | "norm":
            return f"{parts[0]}.{parts[-1]}"
    if parts[2] == "downsample":  # stages.1.downsample.layers.0.weight
        return ".".join(["downsample_layers", parts[1], *parts[4:]])
    inside = ".".join(parts[4:])  # stages.1.blocks.0.mlp.fc1.weight
    ours = next((each for each in _INSIDE if inside.startswith(each)), "")
    return f"stages.{parts[1]}.{parts[3]}.{_INSIDE.get(ours, '')}{inside.removeprefix(ours)}"


def unused(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Official entries that no output depends on, with their shapes: none."""
    return {}


def arguments(official: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a checkpoint says about the model: one of dense prediction has norms on its maps, and 8 regions per axis."""
    return {"extra_norms": True, "n_win": 8} if "extra_norms.0.weight" in official else {}


ORIGIN: dict[str, Any] = {
    "license": "mit",
    "origin_url": "https://github.com/rayleizhu/BiFormer",
    "paper_ids": "arXiv:2303.08810",
}
_CFG = config("stem.layers.0", **ORIGIN)
# Stochastic depth as in the authors' training commands.
_TINY: dict[str, Any] = {"drop_path_rate": 0.1}
_SMALL: dict[str, Any] = {"depths": (4, 4, 18, 4), "drop_path_rate": 0.15}
_BASE: dict[str, Any] = {"depths": (4, 4, 18, 4), "widths": (96, 192, 384, 768), "drop_path_rate": 0.4}

default_cfgs = generate_default_cfgs({"va_biformer_tiny": _CFG, "va_biformer_small": _CFG, "va_biformer_base": _CFG})


@register_model
def va_biformer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-T, 13.1 M parameters."""
    return build(biformer, "va_biformer_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def va_biformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-S, 25.5 M parameters."""
    return build(biformer, "va_biformer_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def va_biformer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-B, 56.8 M parameters."""
    return build(biformer, "va_biformer_base", pretrained, **{**_BASE, **kwargs})
