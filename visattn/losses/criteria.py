"""What a segmentation loss computes on one map of logits; `visattn.losses` applies it to every output of a network.

A "pixel term" has a value per pixel and averages it, a "region term" has a value per image and channel. The formulas
are in `docs/losses.md`.

Legend: B batch, K output channels, *S spatial axes (2 or 3).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.errors import UserError, unknown
from visattn.labels import IGNORE, Labels


class Classes(nn.Module):
    """What the labels mean for a loss: activation, targets per output channel, weights.

    Args:
        labels: The label map.
        class_weights: Weight by name (labels, or regions if there are any); a name that is left out weighs 1.
    """

    weights: Tensor

    def __init__(self, labels: Labels, class_weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.labels = labels
        self.softmax = labels.activation == "softmax"
        names = [name for name, _ in labels.regions] if labels.regions else list(labels.names)
        weights = torch.ones(len(names))
        for name, weight in (class_weights or {}).items():
            if name not in names:
                raise unknown("class in class_weights", name, names)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise UserError(f"loss: class_weights: '{name}' needs a number of at least 0, got {weight!r}")
            weights[names.index(name)] = weight
        if not weights.any():
            raise UserError("loss: class_weights are all 0, so there is nothing to learn")
        self.register_buffer("weights", weights, persistent=False)

    def targets(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """The target of each channel (B, K, *S) as float32, and which pixels count (B, 1, *S) as bool.

        Args:
            target: Class indices (B, *S), or for a binary task soft foreground (B, 1, *S) as floats from 0 to 1, where
                a negative number or NaN marks a pixel to ignore.
        """
        if not target.is_floating_point():
            return self.labels.onehot(target, axis=1).float(), (target != IGNORE).unsqueeze(1)
        if not self.labels.binary or target.ndim < 4 or target.shape[1] != 1:
            raise ValueError(f"a soft target is for binary tasks and (B, 1, *S), got {tuple(target.shape)}")
        valid = target >= 0
        return target.to(at_least_float32(target.dtype)).masked_fill(~valid, 0), valid

    def pixel_weights(self, target: Tensor) -> Tensor:
        """Class weight of each pixel: (B, 1, *S), or (B, K, *S) for regions."""
        weights = self.weights.to(target)
        if self.labels.binary:
            return weights[0] + (weights[1] - weights[0]) * target
        per_channel = target * weights.view(1, -1, *[1] * (target.ndim - 2))
        if self.softmax:
            return per_channel.sum(dim=1, keepdim=True)
        return weights.view(1, -1, *[1] * (target.ndim - 2)).expand_as(target)

    def region_mean(self, values: Tensor, background: bool = False) -> Tensor:
        """Mean of a region term (B, K) over images and channels, by class weight.

        Args:
            values: One number per image and channel.
            background: Whether the background of a softmax counts.
        """
        if self.labels.binary:
            return values.mean()  # one channel: there is nothing to weigh it against
        weights = self.weights.to(values)
        if self.softmax and not background:
            weights, values = weights[1:], values[:, 1:]
        return (values * weights).sum() / _positive(weights.sum() * len(values))

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K, *S) logits to probabilities."""
        return logits.softmax(dim=1) if self.softmax else logits.sigmoid()

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of each pixel: over classes (B, 1, *S), or of each sigmoid (B, K, *S)."""
        if self.softmax:
            return -(target * logits.log_softmax(dim=1)).sum(dim=1, keepdim=True)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


class StructureLoss(nn.Module):
    """PraNet's loss: cross-entropy plus a soft IoU whose pixels weigh more near the border of an object.

    Args:
        classes: What the labels mean.
        pixel_weighted_bce: Whether the border weight applies to the cross-entropy too, as in the paper. The official
            code means to, but its `reduce='none'` is read as a mean, and so the weight cancels: false is that.
    """

    def __init__(self, classes: Classes, pixel_weighted_bce: bool = True) -> None:
        super().__init__()
        self.classes = classes
        self.pixel_weighted_bce = pixel_weighted_bce

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See `SegmentationLoss`."""
        classes = self.classes
        border = (1 + 5 * (_window_mean(target) - target).abs()) * valid  # (B, K, *S)
        entropy = classes.cross_entropy(logits, target)
        weights = classes.pixel_weights(target) * valid
        if self.pixel_weighted_bce:
            # A softmax has one cross-entropy per pixel: it weighs as the pixel's own class does.
            weights = weights * ((border * target).sum(dim=1, keepdim=True) if classes.softmax else border)
            per_image = _sum(entropy * weights) / _positive(_sum(weights))  # (B, K), or (B, 1) for a softmax
            pixel_term = per_image.mean() if classes.softmax else classes.region_mean(per_image)
        else:
            pixel_term = _weighted_mean(entropy, weights)
        probability = classes.probabilities(logits)
        inter = _sum(probability * target * border)
        union = _sum((probability + target) * border)
        return pixel_term + classes.region_mean(1 - (inter + 1) / (union - inter + 1))


class CrossEntropyLoss(nn.Module):
    """Cross-entropy: binary for sigmoid channels, over the classes for a softmax."""

    def __init__(self, classes: Classes) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See `SegmentationLoss`."""
        weights = self.classes.pixel_weights(target) * valid
        return _weighted_mean(self.classes.cross_entropy(logits, target), weights)


class FocalLoss(nn.Module):
    """Focal loss: cross-entropy times (1 - probability of the truth) ** gamma.

    Paper: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002. Its alpha is
    `class_weights` here. For a soft target the error |p - t| takes the place of 1 - p, as in quality focal loss
    (arXiv 2006.04388).

    Args:
        classes: What the labels mean.
        gamma: 0 gives the cross-entropy; else at least 1, as below that the gradient is unbounded.
    """

    def __init__(self, classes: Classes, gamma: float = 2.0) -> None:
        super().__init__()
        if 0 < gamma < 1:
            raise UserError(f"loss 'focal': gamma must be 0 or at least 1, got {gamma}")
        self.classes = classes
        self.gamma = gamma

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See `SegmentationLoss`."""
        loss = self.classes.cross_entropy(logits, target)
        if self.gamma:
            error = (self.classes.probabilities(logits) - target).abs()
            if self.classes.softmax:
                error = (error * target).sum(dim=1, keepdim=True)
            loss = loss * error**self.gamma
        return _weighted_mean(loss, self.classes.pixel_weights(target) * valid)


class DiceLoss(nn.Module):
    """Soft Dice, as MONAI computes it.

    Args:
        classes: What the labels mean.
        include_background: Whether the background of a softmax counts as a class.
        batch: Whether the pixels of the whole batch are counted together, as if it were one image.
        smooth: Added to numerator and denominator.
    """

    def __init__(
        self, classes: Classes, include_background: bool = False, batch: bool = False, smooth: float = 1e-5
    ) -> None:
        super().__init__()
        from monai.losses.dice import DiceLoss as MonaiDice  # takes seconds

        _check_region_options(classes, smooth)
        self.classes = classes
        self.include_background = include_background
        # For a soft target (binary tasks only) the plain formula would have its minimum at a wrong place.
        self.term = MonaiDice(
            reduction="none", smooth_nr=smooth, smooth_dr=smooth, batch=batch, soft_label=classes.labels.binary
        )

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See `SegmentationLoss`."""
        return _region_term(self.classes, self.term, self.include_background, logits, target, valid)


class TverskyLoss(nn.Module):
    """Tversky loss, as MONAI computes it: Dice with a price for each kind of error.

    Paper: Salehi et al., "Tversky loss function for image segmentation", 2017, arXiv 1706.05721.

    Args:
        classes: What the labels mean.
        alpha: Weight of false positives.
        beta: Weight of false negatives.
        include_background: Whether the background of a softmax counts as a class.
        batch: Whether the pixels of the whole batch are counted together, as if it were one image.
        smooth: Added to numerator and denominator.
    """

    def __init__(
        self,
        classes: Classes,
        alpha: float = 0.3,
        beta: float = 0.7,
        include_background: bool = False,
        batch: bool = False,
        smooth: float = 1e-5,
    ) -> None:
        super().__init__()
        from monai.losses.tversky import TverskyLoss as MonaiTversky

        _check_region_options(classes, smooth)
        self.classes = classes
        self.include_background = include_background
        self.term = MonaiTversky(
            alpha=alpha, beta=beta, reduction="none", smooth_nr=smooth, smooth_dr=smooth, batch=batch,
            soft_label=classes.labels.binary,
        )  # fmt: skip

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See `SegmentationLoss`."""
        return _region_term(self.classes, self.term, self.include_background, logits, target, valid)


class DiceCELoss(nn.Module):
    """Dice plus cross-entropy, as MONAI's DiceCELoss adds them.

    Args:
        classes: What the labels mean.
        dice_weight: Factor of Dice.
        ce_weight: Factor of the cross-entropy.
        include_background: Whether the background of a softmax counts as a class of Dice.
        batch: Whether Dice counts the pixels of the whole batch together.
        smooth: Added to numerator and denominator of Dice.
    """

    def __init__(
        self,
        classes: Classes,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        include_background: bool = False,
        batch: bool = False,
        smooth: float = 1e-5,
    ) -> None:
        super().__init__()
        self.dice = DiceLoss(classes, include_background, batch, smooth)
        self.cross_entropy = CrossEntropyLoss(classes)
        self.dice_weight = dice_weight
        self.ce_weight = ce_weight

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See `SegmentationLoss`."""
        dice: Tensor = self.dice(logits, target, valid)
        cross_entropy: Tensor = self.cross_entropy(logits, target, valid)
        return self.dice_weight * dice + self.ce_weight * cross_entropy


def _check_region_options(classes: Classes, smooth: float) -> None:
    if not smooth > 0:
        raise UserError(f"loss: smooth must be above 0, got {smooth}; without it an empty image divides 0 by 0")
    if not (classes.weights[1:] if classes.softmax else classes.weights).any():
        raise UserError("loss: class_weights leave no foreground class to learn")


def _region_term(
    classes: Classes, term: nn.Module, background: bool, logits: Tensor, target: Tensor, valid: Tensor
) -> Tensor:
    # Probabilities are masked here, because MONAI's own masking would count a masked logit of 0 as probability 0.5.
    values: Tensor = term(classes.probabilities(logits) * valid, target * valid)
    return classes.region_mean(values.reshape(-1, target.shape[1]), background)


def _window_mean(x: Tensor) -> Tensor:
    """Mean over a window of 31 pixels a side, of which those outside the image count as 0; one axis after the other."""
    rank = x.ndim - 2
    pool = F.avg_pool2d if rank == 2 else F.avg_pool3d
    for axis in range(rank):
        kernel, margins = [1] * rank, [0] * (2 * rank)
        kernel[axis] = 31
        margins[2 * (rank - 1 - axis)] = margins[2 * (rank - 1 - axis) + 1] = 15  # F.pad counts axes from the last
        # Padded here: avg_pool3d refuses an axis shorter than the window, whatever its own padding.
        x = pool(F.pad(x, margins), kernel, stride=1)
    return x


def _sum(x: Tensor) -> Tensor:
    """Sum over the spatial axes: (B, K, *S) to (B, K)."""
    return x.flatten(2).sum(dim=2)


def _weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Mean of `x` over everything, by `weights` of the same shape; 0 where all of them are 0."""
    return (x * weights).sum() / _positive(weights.sum())


def _positive(x: Tensor) -> Tensor:
    """A denominator that may be 0 only together with its numerator."""
    return torch.where(x > 0, x, torch.ones_like(x))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute a loss in: float64 if asked for, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
