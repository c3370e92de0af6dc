"""Losses of segmentation, by the name that recipes use.

A loss is called with what a network returns (logits, or a tuple of them for deep supervision, the prediction first) and
a target. It computes in float32 even under autocast; logits of another size than the target are resized linearly;
pixels of class `IGNORE` take no part. `docs/losses.md` has the formulas.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.errors import UserError, chosen, did_you_mean
from visattn.labels import Labels
from visattn.losses.criteria import (
    Classes,
    CrossEntropyLoss,
    DiceCELoss,
    DiceLoss,
    FocalLoss,
    StructureLoss,
    TverskyLoss,
    at_least_float32,
)

LOSSES: dict[str, Callable[..., nn.Module]] = {
    "bce": CrossEntropyLoss,
    "dice": DiceLoss,
    "dice_ce": DiceCELoss,
    "focal": FocalLoss,
    "structure": StructureLoss,
    "tversky": TverskyLoss,
}
"""Losses by the name that recipes use; called with `Classes` and their options."""

COMMON = ("class_weights", "deep_supervision")
"""Options that every loss takes."""


class SegmentationLoss(nn.Module):
    """A criterion applied to each output of a network.

    Args:
        classes: What the labels mean.
        criterion: Loss of one map: called with logits (B, K, *S), targets (B, K, *S) and the pixels that count
            (B, 1, *S), it gives a scalar. Logits and targets are 0 where a pixel does not count.
        deep_supervision: Weight of each output, the prediction first; None weighs all of them 1. The weighted losses
            are added up, as PraNet's are.
    """

    def __init__(self, classes: Classes, criterion: nn.Module, deep_supervision: Sequence[float] | None = None) -> None:
        super().__init__()
        self.classes = classes
        self.criterion = criterion
        self.deep_supervision = None if deep_supervision is None else [float(weight) for weight in deep_supervision]

    def forward(self, outputs: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """The loss, a scalar in float32 (float64 if the logits are).

        Args:
            outputs: Logits (B, K, *T), or a tuple of such maps, the prediction first.
            target: Class indices (B, *S) as integers, or for a binary task a soft target (B, 1, *S) as floats.

        Raises:
            UserError: `deep_supervision` has another number of weights than the network has outputs.
            ValueError: Target and logits do not fit each other.
        """
        maps = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        factors = [1.0] * len(maps) if self.deep_supervision is None else self.deep_supervision
        if len(factors) != len(maps):
            raise UserError(
                f"loss: deep_supervision has {len(factors)} weights, but the network has {len(maps)} output(s).\n"
                "Give one weight for each output, the prediction first, or leave it out."
            )
        with torch.autocast(device_type=maps[0].device.type, enabled=False):
            channels, valid = self.classes.targets(target)
            if maps[0].shape[:2] != channels.shape[:2] or maps[0].ndim != channels.ndim:
                raise ValueError(
                    f"logits {tuple(maps[0].shape)} and target {tuple(target.shape)} do not fit: the labels have "
                    f"{channels.shape[1]} output channel(s)"
                )
            total = maps[0].new_zeros((), dtype=at_least_float32(maps[0].dtype))
            for factor, logits in zip(factors, maps, strict=True):
                logits = _resize(logits.to(at_least_float32(logits.dtype)), channels.shape[2:])
                # Filled, not multiplied: 0 times an infinite logit would be NaN.
                logits = logits.masked_fill(~valid, 0.0)
                total = total + factor * self.criterion(logits, channels.to(logits.dtype), valid)
            return total


def build_loss(config: Mapping[str, Any], labels: Labels) -> SegmentationLoss:
    """The loss that the `loss` block of a recipe describes.

    Args:
        config: `name`, a key of `LOSSES`, with its options; and for every loss `class_weights` ({name: weight}) and
            `deep_supervision` (a list of weights, the prediction first).
        labels: The label map of the data.

    Raises:
        UserError: An unknown loss or option (the nearest valid one is named), or a value that cannot be.
    """
    check_loss(config)
    options = {key: value for key, value in config.items() if key not in ("name", *COMMON)}
    if config.get("class_weights") and labels.binary and config["name"] in ("dice", "tversky"):
        raise UserError(f"loss '{config['name']}': class_weights have no effect with two classes; remove them")
    classes = Classes(labels, config.get("class_weights"))
    criterion = LOSSES[config["name"]](classes, **options)
    return SegmentationLoss(classes, criterion, config.get("deep_supervision"))


def check_loss(config: Mapping[str, Any]) -> None:
    """Check names, options and their types, which needs no labels.

    Raises:
        UserError: As for `build_loss`.
    """
    name = chosen("loss", config, LOSSES)
    parameters = list(inspect.signature(LOSSES[name]).parameters.values())[1:]
    valid = {parameter.name: parameter.default for parameter in parameters}
    for key, value in config.items():
        if key in ("name", *COMMON):
            continue
        if key not in valid:
            hint = did_you_mean(key, [*valid, *COMMON])
            raise UserError(f"loss '{name}' has no option '{key}'.{hint}\nIt takes: {', '.join([*valid, *COMMON])}")
        if isinstance(valid[key], bool) != isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"loss '{name}': {key} must be like {valid[key]!r}, got {value!r}")
        if not isinstance(value, bool) and not 0 <= value < float("inf"):
            raise UserError(f"loss '{name}': {key} must be a number of at least 0, got {value!r}")
    weights = config.get("deep_supervision")
    if weights is not None and not (
        isinstance(weights, list | tuple)
        and weights
        and all(isinstance(w, int | float) and not isinstance(w, bool) and 0 <= w < float("inf") for w in weights)
        and any(weights)
    ):
        raise UserError(f"loss: deep_supervision needs a list of numbers of at least 0, not all 0, got {weights!r}")
    if not isinstance(config.get("class_weights", {}), Mapping | None):
        raise UserError(
            f"loss: class_weights needs names with numbers, as in {{polyp: 2.0}}, got {config['class_weights']!r}"
        )


def _resize(logits: Tensor, size: torch.Size) -> Tensor:
    if logits.shape[2:] == size:
        return logits
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return F.interpolate(logits, size=tuple(size), mode=mode, align_corners=False)
