"""PartialNet: convolutions for a quarter of the channels, cheap attention for the others.

Paper: Huang et al., "Partial Channel Network: Compute Fewer, Perform Better", arXiv 2502.01303; "Partial Convolution
Meets Visual Attention", arXiv 2503.03148, describes the same code and calls the network PATNet.
Official code: github.com/haiduo/PartialNet, revision 679cfc0, models/partialnet.py and cfg/*.yaml (no licence file;
nothing is copied from it).

    stages 1 to 3:  x = x + mlp(mix(x))                      mix is PAT_ch
    stage 4:        x = x + mix(x);  x = x + mlp(x)          mix is PAT_sf
    mlp:            1x1 convolution, batch norm, activation, 1x1 convolution, and PAT_sp where it is switched on

The papers put PAT_sp into every MLP; the published configurations switch it on in T1 alone, and so do the names here.

Deviations:
- Blocks are channels-last from the stem to the head; 1x1 convolutions are linear layers there.
- `auto_div`, a learned division of the channels that every published configuration switches off, is left out.

Legend: B batch, H x W positions, C channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from visattn.attention import PartialChannelAttention, PartialSelfAttention, PartialSpatialAttention
from visattn.attention._norm import batch_norm
from visattn.attention.lepe import pointwise
from visattn.attention.partial import init_weights
from visattn.backbones._backbone import Backbone, Head, Stage
from visattn.backbones._build import build, config
from visattn.blocks import Scale, drop_path, drop_path_rates
from visattn.errors import UserError, unknown

ACT: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class MapNorm(nn.Module):
    """Batch normalisation of a channels-last map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return batch_norm(self.norm, x)


@register_notrace_module  # the norm asks how many positions there are
class Patches(nn.Module):
    """A convolution over patches that do not overlap, without bias, and a batch norm.

    Args:
        dim: Channels in.
        dim_out: Channels out.
        size: Side of a patch; what is left over at the end of an axis is dropped.
        image: Whether the input is an image (B, C, H, W) rather than a map (B, H, W, C).
    """

    def __init__(self, dim: int, dim_out: int, size: int, image: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, size, stride=size, bias=False)
        self.norm = nn.BatchNorm2d(dim_out)
        self.image = image

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H // size, W // size, dim_out)."""
        # In channels-last memory, so that nothing is copied where the layout changes.
        x = x.contiguous(memory_format=torch.channels_last) if self.image else x.movedim(-1, 1)
        return batch_norm(self.norm, self.conv(x).movedim(1, -1))


class PartialMlp(nn.Module):
    """Two 1x1 convolutions without bias, a batch norm and an activation between, and PAT_sp behind."""

    def __init__(self, dim: int, hidden: int, act: type[nn.Module], pat_sp: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.act = act()
        self.conv2 = nn.Conv2d(hidden, dim, 1, bias=False)
        self.pat_sp = PartialSpatialAttention(dim) if pat_sp else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = self.act(batch_norm(self.norm, pointwise(self.conv1, x)))
        x = self.pat_sp(pointwise(self.conv2, x))
        return x


class Block(nn.Module):
    """Mixing of positions and channels, and an MLP.

    Args:
        mix: (B, H, W, C) to the same shape.
        mlp: Likewise.
        drop_path_rate: Stochastic depth of the MLP's branch.
        scale: A learned factor per channel of that branch, or the identity.
        shortcut: Whether `mix` is a residual branch of its own.
    """

    def __init__(self, mix: nn.Module, mlp: nn.Module, drop_path_rate: float, scale: nn.Module, shortcut: bool) -> None:
        super().__init__()
        self.mix, self.mlp, self.scale = mix, mlp, scale
        self.drop_path = drop_path(drop_path_rate)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        mixed = self.mix(x)
        if self.shortcut:
            x = mixed = x + mixed
        x = x + self.drop_path(self.scale(self.mlp(mixed)))
        return x


class PreLogits(nn.Module):
    """A 1x1 convolution without bias and an activation, on pooled features."""

    def __init__(self, dim: int, dim_out: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, 1, bias=False)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to (B, ..., dim_out)."""
        out: Tensor = self.act(pointwise(self.conv, x))
        return out


def partialnet(
    *,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    embed_dim: int = 32,
    depths: Sequence[int] = (1, 2, 8, 2),
    act: Literal["gelu", "relu"] = "relu",
    pat_sp: bool = False,
    mlp_ratio: float = 2.0,
    n_div: int = 4,
    num_heads: int = 4,
    feature_dim: int = 1280,
    layer_scale: float | None = None,
    extra_norms: bool = False,
    attn_drop_rate: float = 0.1,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Backbone:
    """Build a PartialNet.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: `avg`, `max`, or empty for none.
        embed_dim: Channels of the first stage; each later one has twice as many.
        depths: Blocks of each stage.
        act: Activation, `gelu` or `relu`.
        pat_sp: Whether partial spatial attention stands behind every MLP.
        mlp_ratio: Width of the MLP over that of the stage.
        n_div: One channel in `n_div` is convolved.
        num_heads: Heads of stage 4.
        feature_dim: Width of the features before the classifier.
        layer_scale: Initial value of learned factors on the MLPs' branches; None: none.
        extra_norms: A batch norm on each map of `features_only`, as for dense prediction. Only maps see these norms,
            logits do not.
        attn_drop_rate: Dropout of weights and outputs of stage 4's attention, in training.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Raises:
        UserError: An argument does not fit; the message says what would.
    """
    if len(depths) != 4:
        raise UserError(f"depths needs 4 entries, got {len(depths)}")
    if act not in ACT:
        raise unknown("act", act, ACT)
    layer = ACT[act]
    widths = [embed_dim * 2**index for index in range(4)]
    rates = drop_path_rates(drop_path_rate, depths)
    stages = []
    for index, width in enumerate(widths):
        last = index == 3
        blocks = []
        for rate in rates[index]:
            mix: nn.Module = PartialChannelAttention(width, n_div=n_div) if not last else PartialSelfAttention(
                width, num_heads, n_div=n_div, attn_drop=attn_drop_rate, proj_drop=attn_drop_rate
            )  # fmt: skip
            mlp = PartialMlp(width, int(width * mlp_ratio), layer, pat_sp)
            scale = nn.Identity() if layer_scale is None else Scale(width, layer_scale)
            blocks.append(Block(mix, mlp, rate, scale, shortcut=last))
        stages.append(Stage(nn.Identity() if index == 0 else Patches(widths[index - 1], width, 2), blocks))
    network = Backbone(
        Patches(in_chans, embed_dim, 4, image=True),
        stages,
        widths=widths,
        reductions=(4, 8, 16, 32),
        norm=nn.Identity(),
        head=Head(
            widths[-1],
            num_classes,
            pool=global_pool,
            channels_last=True,
            hidden=PreLogits(widths[-1], feature_dim, layer),
            hidden_features=feature_dim,
            drop_rate=drop_rate,
        ),
        in_chans=in_chans,
        num_classes=num_classes,
        channels_last=True,
        map_norms=[MapNorm(width) for width in widths] if extra_norms else None,
    )
    init_weights(network)
    return network


# Names inside a block that are not the authors', by what they begin with.
_INSIDE = {
    "mix.": "spatial_mixing.",
    "mlp.conv1.": "mlp.0.",
    "mlp.norm.": "mlp.1.",
    "mlp.conv2.": "mlp.3.",
    "mlp.pat_sp.": "mlp.4.",
    "scale.gamma": "layer_scale",
}


def official_name(key: str) -> str:
    """The authors' name of our entry `key`."""
    parts = key.split(".")
    match parts[0]:
        case "stem":
            return ".".join(["patch_embed", "proj" if parts[1] == "conv" else "norm", *parts[2:]])
        case "map_norms":  # map_norms.1.norm.weight
            return f"norm{2 * int(parts[1])}.{parts[-1]}"
        case "head":
            return f"avgpool_pre_head.1.{parts[-1]}" if parts[1] == "pre_logits" else f"head.{parts[-1]}"
    stage = 2 * int(parts[1])  # the authors count the mergings between the stages as well
    if parts[2] == "downsample":
        return ".".join([f"stages.{stage - 1}", "reduction" if parts[3] == "conv" else "norm", *parts[4:]])
    inside = ".".join(parts[4:])
    ours = next(each for each in _INSIDE if inside.startswith(each))
    return f"stages.{stage}.blocks.{parts[3]}.{_INSIDE[ours]}{inside.removeprefix(ours)}"


def unused(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Official entries that no output depends on, with their shapes: none."""
    return {}


def arguments(official: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a checkpoint says about the model: whether PAT_sp is on, and whether maps have norms."""
    found: dict[str, Any] = {"pat_sp": "stages.0.blocks.0.mlp.4.conv.weight" in official}
    if "norm0.weight" in official:
        found["extra_norms"] = True
    return found


_CFG = config(
    "stem.conv",
    crop_pct=0.9,  # as in the authors' test
    origin_url="https://github.com/haiduo/PartialNet",
    paper_ids=("arXiv:2502.01303", "arXiv:2503.03148"),
)
_PLANS: dict[str, dict[str, Any]] = {
    "t0": {"act": "gelu"},
    "t1": {"embed_dim": 48, "act": "gelu", "pat_sp": True, "drop_path_rate": 0.02},
    "t2": {"embed_dim": 64, "depths": (2, 2, 6, 4), "drop_path_rate": 0.05},
    "s": {"embed_dim": 96, "depths": (2, 2, 9, 4), "drop_path_rate": 0.1},
    "m": {"embed_dim": 128, "depths": (2, 3, 16, 4), "drop_path_rate": 0.2},
    "l": {"embed_dim": 160, "depths": (2, 3, 20, 4), "drop_path_rate": 0.3},
}

default_cfgs = generate_default_cfgs({f"va_partialnet_{size}": _CFG for size in _PLANS})


@register_model
def va_partialnet_t0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PartialNet-T0, 3.5 M parameters."""
    return build(partialnet, "va_partialnet_t0", pretrained, **{**_PLANS["t0"], **kwargs})


@register_model
def va_partialnet_t1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PartialNet-T1, with PAT_sp, 6.1 M parameters."""
    return build(partialnet, "va_partialnet_t1", pretrained, **{**_PLANS["t1"], **kwargs})


@register_model
def va_partialnet_t2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PartialNet-T2, 12.3 M parameters."""
    return build(partialnet, "va_partialnet_t2", pretrained, **{**_PLANS["t2"], **kwargs})


@register_model
def va_partialnet_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PartialNet-S, 28.0 M parameters."""
    return build(partialnet, "va_partialnet_s", pretrained, **{**_PLANS["s"], **kwargs})


@register_model
def va_partialnet_m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PartialNet-M, 59.2 M parameters."""
    return build(partialnet, "va_partialnet_m", pretrained, **{**_PLANS["m"], **kwargs})


@register_model
def va_partialnet_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PartialNet-L, 100.6 M parameters."""
    return build(partialnet, "va_partialnet_l", pretrained, **{**_PLANS["l"], **kwargs})
