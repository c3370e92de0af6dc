"""MedViTV2 as its paper describes it: attention and KAN see the channels of a position, and attention is dilated.

Paper: Manzari et al., "Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood
Attention", arXiv 2502.13693. The builder, and what is the same as in the released code, is in `medvit`.

The dilations follow DiNAT ("Dilated Neighborhood Attention Transformer", arXiv 2209.15001), whose maps have the same
sizes: every second LFP of a stage is dilated so far that at 224 pixels its window spans the map, by 8 at 56 and by 2 at
14 positions per side; the second stage has one LFP only. On a smaller map the window is clipped.

Weights of the released code were trained on another computation, so `visattn.load_official` refuses them here.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from visattn.backbones._build import build
from visattn.backbones.medvit import CONFIG, SIZES, medvit

DILATIONS = ((1, 8), (1,), (1, 2, 1, 2))

default_cfgs = generate_default_cfgs({f"va_medvit_dina_{size}": CONFIG for size in SIZES})


def _described(size: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    arguments = {**SIZES[size], "dilations": DILATIONS, **kwargs}
    return build(medvit, f"va_medvit_dina_{size}", pretrained, scrambled=False, **arguments)


@register_model
def va_medvit_dina_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Widths 64 to 384."""
    return _described("tiny", pretrained, kwargs)


@register_model
def va_medvit_dina_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Widths 64 to 512."""
    return _described("small", pretrained, kwargs)


@register_model
def va_medvit_dina_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Widths 96 to 768."""
    return _described("base", pretrained, kwargs)


@register_model
def va_medvit_dina_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Widths 96 to 1024."""
    return _described("large", pretrained, kwargs)
