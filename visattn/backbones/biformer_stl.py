"""BiFormer-STL: bi-level routing in the plan of Swin-T, as the authors use it for comparisons.

Paper, code and blocks: see `biformer`. Stages merge patches without overlap, blocks have no positional convolution.
`va_biformer_stl_nchw` is the authors' later form: regions of floor(size / n_win) tokens, zeros padded after the
projection, and LePE computed from the values instead of from the input.
"""

from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visattn.backbones import biformer as default
from visattn.backbones._build import build, config

_CFG = config("stem.layers.0", **default.ORIGIN)
_STL: dict[str, Any] = {"form": "stl", "depths": (2, 2, 6, 2), "widths": (96, 192, 384, 768), "mlp_ratio": 4.0}
_NCHW: dict[str, Any] = {**_STL, "form": "stl_nchw", "topks": (1, 4, 16, -1)}

unused = default.unused
default_cfgs = generate_default_cfgs({"va_biformer_stl": _CFG, "va_biformer_stl_nchw": _CFG})


def official_name(key: str) -> str:
    """The authors' name of our entry `key`."""
    name = default.official_name(key)
    if not name.startswith("stages."):
        return name
    _, stage, block, inside = name.split(".", 3)
    return f"stages.{stage}.blocks.{block}.{inside.replace('mlp.3.', 'mlp.2.')}"


def translate(official: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' entries; the MLPs' weights, 1x1 convolutions in `stl_nchw`, as those of linear layers."""
    return {
        key: value.flatten(1) if ".mlp." in key and value.shape[2:] == (1, 1) else value
        for key, value in official.items()
    }


@register_model
def va_biformer_stl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-STL, 28.4 M parameters."""
    return build(default.biformer, "va_biformer_stl", pretrained, **{**_STL, **kwargs})


@register_model
def va_biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-STL in the authors' later form, 28.4 M parameters."""
    return build(default.biformer, "va_biformer_stl_nchw", pretrained, **{**_NCHW, **kwargs})
