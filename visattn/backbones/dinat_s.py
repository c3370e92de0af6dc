"""DiNAT_s: Swin's plan with neighbourhood attention for its windows, dilated in every second block for its shifts.

Paper: Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv 2209.15001.
Official code: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer, revision d334f5b (MIT). The blocks, the
builder and the deviations are those of `nat`; stem and downsampling are Swin's, padded with zeros at the end where a
side is no multiple of the patch.

Legend: B batch, H and W sides of the map, C channels.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from visattn.backbones import nat
from visattn.backbones._build import build, config
from visattn.backbones.nat import DILATIONS, ORIGIN, neighborhood_transformer
from visattn.backbones.pyramid import patch_stem
from visattn.blocks import PatchMerging

PATCH = 4


def _stem(in_chans: int, dim: int) -> nn.Module:
    return patch_stem(in_chans, dim, (PATCH, PATCH), nn.LayerNorm)


def official_name(key: str) -> str:
    """The official name of our entry; there a stage, a `layer`, ends with the merging that begins our next one."""
    return nat.official_name(key, "layers", ("", "proj", "norm"))


def unused(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Official entries that no output depends on: none."""
    return {}


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2},
    "small": {"dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.3},
    "base": {"dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5},
    "large": {"dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35},
}

default_cfgs = generate_default_cfgs({f"va_dinat_s_{size}": config("stem.1", **ORIGIN) for size in SIZES})


def _dinat_s(size: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    plan = {"mlp_ratio": 4, "dilations": DILATIONS, "stem": _stem, "downsample": PatchMerging}
    arguments = {**plan, **SIZES[size], **kwargs}
    return build(neighborhood_transformer, f"va_dinat_s_{size}", pretrained, **arguments)


@register_model
def va_dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """28 million parameters."""
    return _dinat_s("tiny", pretrained, kwargs)


@register_model
def va_dinat_s_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """50 million parameters."""
    return _dinat_s("small", pretrained, kwargs)


@register_model
def va_dinat_s_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """88 million parameters."""
    return _dinat_s("base", pretrained, kwargs)


@register_model
def va_dinat_s_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """197 million parameters; the official checkpoint for 384 pixels takes `dilations=(13, 6, 3, 1)`."""
    return _dinat_s("large", pretrained, kwargs)
