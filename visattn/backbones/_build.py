"""How a family's builder becomes a model of timm: defaults, feature maps, and official weights by name."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn

from visattn.errors import UserError

SMALLEST = 32  # pixels of a side: the coarsest map is then one position


def config(first_conv: str, classifier: str = "head.fc", **overrides: Any) -> dict[str, Any]:
    """A record of timm's default configuration: ImageNet at 224 unless told otherwise, no weights to download."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        **overrides,
    }


def image_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of `img_size`, one integer for both or two.

    Raises:
        UserError: It is neither, or too small.
    """
    sides = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < SMALLEST for side in sides):
        raise UserError(f"img_size must be an integer of at least {SMALLEST}, or two of them (H, W), got {img_size!r}")
    return sides[0], sides[1]


def build(
    builder: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    *,
    out_indices: tuple[int, ...] = (0, 1, 2, 3),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The model `variant`, as timm's `create_model` wants it.

    Args:
        builder: Makes the model from its arguments.
        variant: The registered name.
        pretrained: Whether to load the weights that the configuration names.
        out_indices: Maps that `features_only=True` gives by default.
        device: Where the parameters are made; None: where torch makes tensors.
        dtype: Of floating-point parameters; None: torch's default.
        kwargs: Arguments of the builder, and timm's own (`features_only`, `out_indices`, `pretrained_cfg`, ...).
    """
    feature_cfg = {"out_indices": out_indices, "feature_cls": "getter"}

    def placed(**arguments: Any) -> nn.Module:
        with nullcontext() if device is None else torch.device(device):
            return builder(**arguments).to(dtype=dtype)

    model: nn.Module = build_model_with_cfg(placed, variant, pretrained, feature_cfg=feature_cfg, **kwargs)
    return model
