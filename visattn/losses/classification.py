"""Losses of classification, by the name that recipes use.

A loss is called with logits (B, K) and a target: class indices (B,), or a share of each class (B, K), as several
labels at once or mixed images have it. It computes in float32 also under autocast. `docs/losses.md` has the formulas.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.class_labels import ClassLabels
from visattn.errors import UserError, chosen, unknown
from visattn.losses.criteria import at_least_float32


class _ClassLoss(nn.Module):
    """Makes targets dense and smooth.

    Args:
        labels: The classes.
        label_smoothing: Share of the target that is spread evenly: over all classes where a case has one, between yes
            and no where it may have several.
        class_weights: Weight of a class by name; a name that is left out weighs 1.
    """

    weights: Tensor

    def __init__(
        self, labels: ClassLabels, label_smoothing: float = 0.0, class_weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, int | float):
            raise UserError(f"loss: label_smoothing must be a number, got {label_smoothing!r:.60}")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"loss: label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        self.labels, self.label_smoothing = labels, float(label_smoothing)
        weights = torch.ones(labels.channels)
        for name, weight in (class_weights or {}).items():
            if name not in labels.names:
                raise unknown("class in class_weights", str(name), labels.names)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise UserError(f"loss: class_weights: '{name}' needs a number of at least 0, got {weight!r:.60}")
            weights[labels.names.index(name)] = weight
        if not weights.any():
            raise UserError("loss: class_weights are all 0, so there is nothing to learn")
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: (B, K).
            target: Class indices (B,), or shares (B, K) in 0..1.
        """
        with torch.autocast(device_type=logits.device.type, enabled=False):
            logits = logits.to(at_least_float32(logits.dtype))
            dense = dense_target(target, self.labels.channels).to(logits)
            rest = 0.5 if self.labels.multi_label else 1 / self.labels.channels
            dense = dense * (1 - self.label_smoothing) + self.label_smoothing * rest
            return self.of_dense(logits, dense)

    def of_dense(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and a smoothed target, both (B, K)."""
        raise NotImplementedError


class CrossEntropy(_ClassLoss):
    """Cross-entropy of the softmax, the mean over cases; with class weights the mean weighted by them."""

    def of_dense(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and a smoothed target, both (B, K)."""
        weighted = target * self.weights.to(logits)
        return -(weighted * F.log_softmax(logits, dim=1)).sum() / weighted.sum().clamp_min(1e-12)


class BinaryCrossEntropy(_ClassLoss):
    """Cross-entropy of a sigmoid for each class, the mean over cases and classes."""

    def of_dense(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and a smoothed target, both (B, K)."""
        weights = self.weights.to(logits).expand_as(logits)
        values = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (values * weights).sum() / weights.sum()


CLASS_LOSSES: dict[str, Callable[..., nn.Module]] = {"bce": BinaryCrossEntropy, "cross_entropy": CrossEntropy}
"""Losses by the name that recipes use; called with `ClassLabels` and their options."""


def dense_target(target: Tensor, classes: int) -> Tensor:
    """Class indices (B,) as shares (B, K) in float32; shares stay as they are."""
    return F.one_hot(target, classes).float() if target.ndim == 1 else target.float()


def check_class_loss(config: Mapping[str, Any]) -> None:
    """Check names and options, which needs no classes.

    Raises:
        UserError: An unknown loss or option; the nearest valid one is named.
    """
    name = chosen("loss", config, CLASS_LOSSES)
    valid = list(inspect.signature(CLASS_LOSSES[name]).parameters)[1:]
    for key in config:
        if key != "name" and key not in valid:
            raise unknown(f"option of loss '{name}':", str(key), valid)
    if not isinstance(config.get("class_weights", {}), Mapping | None):
        raise UserError(
            f"loss: class_weights needs names with numbers, as {{melanoma: 2.0}}, got {config['class_weights']!r:.80}"
        )


def build_class_loss(config: Mapping[str, Any], labels: ClassLabels) -> nn.Module:
    """The loss that the `loss` block of a recipe describes.

    Raises:
        UserError: As for `check_class_loss`, or the loss does not suit the classes.
    """
    check_class_loss(config)
    if config["name"] == "cross_entropy" and labels.multi_label:
        raise UserError(
            "model.loss: cross_entropy gives each case one class, and here a case may have several.\nTake {name: bce}."
        )
    return CLASS_LOSSES[config["name"]](labels, **{key: value for key, value in config.items() if key != "name"})
