"""NAT and DiNAT: hierarchical networks whose every block attends to a neighbourhood; DiNAT dilates every second one.

Papers: Hassani et al., "Neighborhood Attention Transformer", arXiv 2204.07143; Hassani and Shi, "Dilated Neighborhood
Attention Transformer", arXiv 2209.15001. In every block
    x = x + gamma1 * attn(norm1(x));  x = x + gamma2 * mlp(norm2(x)),  with factors gamma in few of the sizes only.
Official code: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer, revision d334f5b (MIT), with natten 0.14:
a map that is smaller than kernel * dilation is padded with zeros at the end before the projection to queries, keys and
values, so that padding takes part with the projection's bias. `small_maps="clip"` clips the window instead.

Deviations: `drop_rate` acts before the classifier only, where the official one, 0 in all published models, acts in the
blocks too.

Legend: B batch, H and W sides of the map, C channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visattn.attention import NeighborhoodAttention
from visattn.attention.neighborhood import SmallMaps
from visattn.backbones._backbone import Backbone, Head, Stage
from visattn.backbones._build import build, config
from visattn.blocks import Block, Mlp, ToChannelsLast, drop_path_rates, init_linear

Dilations = Sequence[int | Sequence[int]]


class Downsample(nn.Module):
    """A strided 3x3 convolution and a norm: (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.norm(self.reduction(x.movedim(-1, 1)).movedim(1, -1))
        return out


def _stem(in_chans: int, dim: int) -> nn.Module:
    """Two strided convolutions with nothing between, and a norm: (B, in_chans, H, W) to (B, H / 4, W / 4, dim)."""
    first = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
    second = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
    return nn.Sequential(first, second, ToChannelsLast(), nn.LayerNorm(dim))


def neighborhood_transformer(
    *,
    dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: float,
    stem: Callable[[int, int], nn.Module] = _stem,
    downsample: Callable[[int], nn.Module] = Downsample,
    kernel_size: int = 7,
    dilations: Dilations = (1, 1, 1, 1),
    small_maps: SmallMaps = "pad",
    layer_scale: float | None = None,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.2,
) -> Backbone:
    """Build a NAT.

    Args:
        dim: Channels of the first stage; every later one has twice those before.
        depths: Blocks of each stage.
        num_heads: Of each stage.
        mlp_ratio: Width of the MLP over that of the stage.
        stem: Makes the stem from (in_chans, dim).
        downsample: Makes the layer before every later stage from the channels of its input.
        kernel_size: Side of the window.
        dilations: For each stage the dilation of every second block, where the others have none; or one per block.
        small_maps: What happens where the window is larger than the map; see `NeighborhoodAttention`.
        layer_scale: Initial value of the factors gamma; None: no factors.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: `avg`, `max`, or empty for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: `dilations` or `num_heads` does not fit the stages.
    """
    if not len(dilations) == len(num_heads) == len(depths):
        raise ValueError(
            f"dilations and num_heads need one entry for each of {len(depths)} stages, got {dilations!r}, {num_heads!r}"
        )
    rates = drop_path_rates(drop_path_rate, depths)
    stages = []
    for index, depth in enumerate(depths):
        width = dim << index
        blocks = []
        for dilation, rate in zip(_per_block(dilations[index], depth), rates[index], strict=True):
            attention = NeighborhoodAttention(
                width, num_heads[index], kernel_size=kernel_size, dilation=dilation, small_maps=small_maps
            )
            mlp = Mlp(width, int(width * mlp_ratio))
            blocks.append(Block(width, attention, mlp, nn.LayerNorm, 2, False, rate, layer_scale))
        stages.append(Stage(downsample(width // 2) if index else nn.Identity(), blocks))
    widths = [dim << index for index in range(len(depths))]
    network = Backbone(
        stem(in_chans, dim),
        stages,
        widths=widths,
        reductions=[4 << index for index in range(len(depths))],
        norm=nn.LayerNorm(widths[-1]),
        head=Head(widths[-1], num_classes, pool=global_pool, channels_last=True, drop_rate=drop_rate),
        in_chans=in_chans,
        num_classes=num_classes,
        channels_last=True,
        no_decay=("rpb",),
    )
    return network.apply(init_linear)


def _per_block(dilation: int | Sequence[int], depth: int) -> Sequence[int]:
    if isinstance(dilation, int):
        return [dilation if i % 2 else 1 for i in range(depth)]
    if len(dilation) != depth:
        raise ValueError(f"dilations of a stage must be one number, or one for each of {depth} blocks, got {dilation}")
    return dilation


_NAMES = {"mixer": "attn", "scale1.gamma": "gamma1", "scale2.gamma": "gamma2"}


def official_name(key: str, stages: str = "levels", stem: tuple[str, str, str] = ("proj.0", "proj.1", "norm")) -> str:
    """The official name of our entry; there a stage ends with the downsampling that begins our next one.

    Args:
        key: Ours.
        stages: What the stages are called.
        stem: What the stem's layers are called: ours at 0, 1 and 3.
    """
    parts = key.split(".")
    if parts[0] == "stem":
        layer = dict(zip(("0", "1", "3"), stem, strict=True))[parts[1]]
        return f"patch_embed.{layer}.{parts[2]}"
    if parts[0] == "stages" and parts[2] == "downsample":
        return ".".join((stages, str(int(parts[1]) - 1), *parts[2:]))
    if parts[0] == "stages":
        inside = ".".join(parts[4:])
        for own, theirs in _NAMES.items():
            inside = inside.replace(own, theirs)
        return f"{stages}.{parts[1]}.blocks.{parts[3]}.{inside}"
    return key.replace("head.fc.", "head.")


def unused(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Official entries that no output depends on: none."""
    return {}


DILATIONS = (8, 4, 2, 1)
SIZES: dict[str, dict[str, Any]] = {
    "mini": {"dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3, "drop_path_rate": 0.2},
    "tiny": {"dim": 64, "depths": (3, 4, 18, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3, "drop_path_rate": 0.2},
    "small": {"dim": 96, "depths": (3, 4, 18, 5), "num_heads": (3, 6, 12, 24), "mlp_ratio": 2, "drop_path_rate": 0.3},
    "base": {"dim": 128, "depths": (3, 4, 18, 5), "num_heads": (4, 8, 16, 32), "mlp_ratio": 2, "drop_path_rate": 0.5},
    "large": {
        "dim": 192, "depths": (3, 4, 18, 5), "num_heads": (6, 12, 24, 48), "mlp_ratio": 2, "drop_path_rate": 0.35
    },
}  # fmt: skip
ORIGIN: dict[str, Any] = {
    "license": "mit",
    "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    "paper_ids": ("arXiv:2204.07143", "arXiv:2209.15001"),
}
_NAT = [f"va_nat_{size}" for size in ("mini", "tiny", "small", "base")]
_DINAT = [f"va_dinat_{size}" for size in SIZES]

default_cfgs = generate_default_cfgs({name: config("stem.0", **ORIGIN) for name in (*_NAT, *_DINAT)})


def _nat(size: str, pretrained: bool, kwargs: dict[str, Any], **settings: Any) -> nn.Module:
    return build(neighborhood_transformer, f"va_nat_{size}", pretrained, **{**SIZES[size], **settings, **kwargs})


def _dinat(size: str, pretrained: bool, kwargs: dict[str, Any], **settings: Any) -> nn.Module:
    arguments = {**SIZES[size], "dilations": DILATIONS, **settings, **kwargs}
    return build(neighborhood_transformer, f"va_dinat_{size}", pretrained, **arguments)


@register_model
def va_nat_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """20 million parameters."""
    return _nat("mini", pretrained, kwargs)


@register_model
def va_nat_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """28 million parameters."""
    return _nat("tiny", pretrained, kwargs)


@register_model
def va_nat_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """51 million parameters."""
    return _nat("small", pretrained, kwargs, layer_scale=1e-5)


@register_model
def va_nat_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """90 million parameters."""
    return _nat("base", pretrained, kwargs, layer_scale=1e-5)


@register_model
def va_dinat_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """20 million parameters."""
    return _dinat("mini", pretrained, kwargs)


@register_model
def va_dinat_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """28 million parameters."""
    return _dinat("tiny", pretrained, kwargs)


@register_model
def va_dinat_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """51 million parameters."""
    return _dinat("small", pretrained, kwargs)


@register_model
def va_dinat_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """90 million parameters."""
    return _dinat("base", pretrained, kwargs, layer_scale=1e-5)


@register_model
def va_dinat_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """200 million parameters.

    The official checkpoints for 384 pixels take `dilations=(13, 6, 3, 1)`, or `kernel_size=11` with the usual ones.
    """
    return _dinat("large", pretrained, kwargs)
