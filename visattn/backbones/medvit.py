"""MedViTV2, as its released code computes it; `medvit_dina` holds what the paper describes.

Paper: Manzari et al., "Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood
Attention", arXiv 2502.13693. Stem of four convolutions, then stages of local (LFP) and global (GFP) perception:
LFP LFP | LFP GFP | LFP LFP GFP LFP LFP GFP | GFP (tiny) or GFP GFP.
Official code: https://github.com/Omid-Nejati/MedViTV2, revision 8d54f66 (MIT), with natten 0.17.

As the released code does, and the paper does not:
- No dilation anywhere.
- Neighbourhood attention and KAN read channels-first memory as if it were channels-last (`_medvit_block`).
- Every GFP has a convolutional layer, `conv`, that it never uses: `unused` here.
- The feed-forward layer of LFP adds its input, and LFP adds that once more to the residual stream.

Deviations: the official code fails on images under 97 pixels, whose third map is smaller than the attention's window,
and on those whose second map is not square. Here such an image is computed in the same way, with the window clipped to
the map; `any_size=False` refuses it.

Legend: B batch, C channels, H and W sides of the image.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from visattn.backbones._backbone import Backbone, Head, Stage
from visattn.backbones._build import build, config
from visattn.backbones._medvit_block import ConvNorm, GlobalPerception, LocalPerception
from visattn.blocks import drop_path_rates, init_linear

STEM = (64, 32, 64, 64)  # channels after each convolution
PLAN = ("LL", "LG", "LLGLLG")  # blocks of the first three stages, local and global; the fourth is global throughout
SR_RATIOS = (8, 4, 2, 1)


@register_notrace_module
class OfficialSizes(nn.Module):
    """Refuses the images that the official code fails on."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, C, H, W) itself."""
        height, width = x.shape[2:]
        if min(height, width) <= 96 or -(-height // 8) != -(-width // 8):
            raise ValueError(
                "with any_size=False, MedViT takes square images of at least 97 pixels, as the official code does; "
                f"got {height}x{width}. Resize or pad the image, or leave any_size out."
            )
        return x


class ChannelsLastMemory(nn.Module):
    """The same map (B, C, H, W) with the channels of a position side by side in memory."""

    def forward(self, x: Tensor) -> Tensor:
        """`x`, copied unless its memory has that order."""
        return x.contiguous(memory_format=torch.channels_last)


def medvit(
    *,
    widths: Sequence[int],
    last_depth: int,
    scrambled: bool,
    dilations: Sequence[Sequence[int]] = ((1, 1), (1,), (1, 1, 1, 1)),
    any_size: bool = True,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
) -> Backbone:
    """Build a MedViT.

    Args:
        widths: Channels of each stage, multiples of 32.
        last_depth: Blocks of the last stage.
        scrambled: Whether memory is reshaped as in the released code.
        dilations: Of each LFP of the first three stages.
        any_size: Whether images are taken that the official code fails on.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: `avg`, `max`, or empty for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: `dilations` does not name each LFP once.
    """
    wanted = [kinds.count("L") for kinds in PLAN]
    if [len(each) for each in dilations] != wanted:
        raise ValueError(f"dilations must have {wanted} entries, one for each LFP of three stages; got {dilations!r}")
    plan = (*PLAN, "G" * last_depth)
    rates = drop_path_rates(drop_path_rate, [len(kinds) for kinds in plan])
    dim = STEM[-1]
    stages = []
    for index, (kinds, width) in enumerate(zip(plan, widths, strict=True)):
        blocks: list[nn.Module] = []
        for i, kind in enumerate(kinds):
            common: Any = {
                "stride": 2 if index and not i else 1,
                "scrambled": scrambled,
                "drop_path_rate": rates[index][i],
            }
            if kind == "L":
                dilation = dilations[index][kinds[:i].count("L")]
                blocks.append(LocalPerception(dim, width, kernel_size=3 if index else 7, dilation=dilation, **common))
            else:
                blocks.append(GlobalPerception(dim, width, sr_ratio=SR_RATIOS[index], **common))
            dim = width
        stages.append(Stage(nn.Identity(), blocks))
    network = Backbone(
        _stem(in_chans, scrambled, any_size),
        stages,
        widths=widths,
        reductions=(4, 8, 16, 32),
        norm=nn.BatchNorm2d(widths[-1]),
        head=Head(widths[-1], num_classes, pool=global_pool, channels_last=False, drop_rate=drop_rate),
        in_chans=in_chans,
        num_classes=num_classes,
        channels_last=False,
    )
    return network.apply(_initialise)


def _stem(in_chans: int, scrambled: bool, any_size: bool) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if not any_size:
        layers["sizes"] = OfficialSizes()
    if not scrambled:
        layers["memory"] = ChannelsLastMemory()
    for index, (before, width) in enumerate(zip((in_chans, *STEM[:-1]), STEM, strict=True)):
        stride = 2 if index in (0, 3) else 1
        layers[str(index)] = ConvNorm(before, width, 3, stride)
        layers[f"relu{index}"] = nn.ReLU()
    return nn.Sequential(layers)


def _initialise(module: nn.Module) -> None:
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)


def official_name(key: str) -> str:
    """The official name of our entry: its blocks are numbered through all stages, its classifier is `proj_head`."""
    parts = key.split(".")
    if parts[0] == "stages":
        first = sum(len(kinds) for kinds in PLAN[: int(parts[1])])
        return ".".join(("features", str(first + int(parts[3])), *parts[4:]))
    return key.replace("head.fc.", "proj_head.0.")


def unused(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The convolutional layers that the official GFP blocks hold and never run."""
    entries: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, GlobalPerception):
            block = official_name(f"{name}.")
            dim = module.norm2.num_features
            entries |= {f"{block}conv.conv.{key}": shape for key, shape in _dead_layer(dim).items()}
    return entries


def _dead_layer(dim: int) -> dict[str, tuple[int, ...]]:
    hidden = 2 * dim
    convolutions = {"0": (hidden, dim, 1, 1), "3": (hidden, 1, 3, 3), "7": (dim, hidden, 1, 1)}
    squeeze = {"fc.0.weight": (2, hidden), "fc.0.bias": (2,), "fc.2.weight": (hidden, 2), "fc.2.bias": (hidden,)}
    entries: dict[str, tuple[int, ...]] = {f"{key}.weight": shape for key, shape in convolutions.items()}
    entries |= {f"6.{key}": shape for key, shape in squeeze.items()}
    for key, width in {"1": hidden, "4": hidden, "8": dim}.items():
        entries |= {f"{key}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
        entries[f"{key}.num_batches_tracked"] = ()
    return entries


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"widths": (64, 128, 192, 384), "last_depth": 1, "drop_path_rate": 0.1},
    "small": {"widths": (64, 128, 256, 512), "last_depth": 2, "drop_path_rate": 0.1},
    "base": {"widths": (96, 192, 384, 768), "last_depth": 2, "drop_path_rate": 0.2},
    "large": {"widths": (96, 256, 512, 1024), "last_depth": 2, "drop_path_rate": 0.2},
}
CONFIG = config(
    "stem.0.conv",
    mean=IMAGENET_INCEPTION_MEAN,
    std=IMAGENET_INCEPTION_STD,
    crop_pct=1.0,
    interpolation="bilinear",
    license="mit",
    origin_url="https://github.com/Omid-Nejati/MedViTV2",
    paper_ids="arXiv:2502.13693",
)

default_cfgs = generate_default_cfgs({f"va_medvit_{size}": CONFIG for size in SIZES})


def _released(size: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    return build(medvit, f"va_medvit_{size}", pretrained, scrambled=True, **{**SIZES[size], **kwargs})


@register_model
def va_medvit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """11.7 million official parameters, of which 1.0 are never used."""
    return _released("tiny", pretrained, kwargs)


@register_model
def va_medvit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """30.1 million official parameters."""
    return _released("small", pretrained, kwargs)


@register_model
def va_medvit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """67.0 million official parameters."""
    return _released("base", pretrained, kwargs)


@register_model
def va_medvit_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """118.3 million official parameters."""
    return _released("large", pretrained, kwargs)
