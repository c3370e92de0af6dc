"""Measures of a probability map under PraNet's test protocol: its Dice and IoU, S-, E-, weighted F-measure and MAE.

PraNet's test script stretches each map to 0..1, writes it as an 8-bit image and scores that image. So do we: every
measure here takes `levels`, the grey values of that image, and equals what pysodmetrics computes from the PNG.

* Dice and IoU: mean over the thresholds t = 0..255 of the measure of {levels >= t}.
* S-measure: Fan et al., Structure-measure, ICCV 2017, alpha = 0.5.
* E-measure: Fan et al., Enhanced-alignment measure, IJCAI 2018, at each of the 256 thresholds.
* Weighted F: Margolin et al., How to evaluate foreground maps?, CVPR 2014, beta = 1.

Two axes only, as in the papers. All but the last are functions of grey-level histograms of eight parts of the image
(four quadrants around the centre of the truth, inside and outside the truth), so the image is read once and the sums
are exact integers. Deviations: E is cut at 1, which the authors' division by N - 1 exceeds by 1 / (N - 1) for a perfect
mask; in S, a quadrant without pixels weighs nothing instead of making S undefined, and a quadrant in which map and
truth are both constant always scores the 1 of the authors' rule, which in floating point depends on rounding noise.

Legend: N counted pixels, `fg` inside the truth, `bg` outside.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, distance_transform_edt

from visattn.metrics.overlap import Mask

Levels = NDArray[np.uint8]
Counts = NDArray[np.int64]

_EPS = float(np.spacing(1))  # the authors' guard, part of the published formulas
_GREY = np.arange(256)


def protocol_levels(probability: NDArray[Any], valid: Mask | None = None) -> Levels:
    """The 8-bit image that PraNet's protocol scores: stretched to 0..255 by the map's own minimum and maximum.

    A constant map cannot be stretched and keeps its value.

    Args:
        probability: (H, W) in 0..1.
        valid: (H, W), False at pixels that are left out; they neither stretch the map nor count later.

    Raises:
        ValueError: The map holds NaN or infinity.
    """
    counted = probability if valid is None else probability[valid]
    if counted.size == 0:
        return np.zeros(probability.shape, np.uint8)
    low, high = float(counted.min()), float(counted.max())
    if not math.isfinite(low + high):
        raise ValueError("the probability map holds NaN or infinite values")
    scale, shift = (255.0, 0.0) if low == high else (255.0 / (high - low), low)
    stretched = (probability.astype(np.float64) - shift) * scale
    return np.clip(stretched + 0.5, 0, 255.5).astype(np.uint8)


def map_metrics(levels: Levels, truth: Mask, valid: Mask | None = None) -> tuple[dict[str, float], NDArray[np.float64]]:
    """All measures of one map against a truth that is not empty.

    Args:
        levels: (H, W) grey values from `protocol_levels`.
        truth: (H, W), at least one pixel True, False where `valid` is.
        valid: (H, W), False at ignored pixels: they are in no histogram and carry no error.

    Returns:
        pranet_dice, pranet_iou, s_measure, e_mean, e_max, wfm, mae; and the E-measure at thresholds 0..255, (256,).

    Raises:
        ValueError: Not two axes, or the truth is empty.
    """
    if truth.ndim != 2:
        raise ValueError(f"the measures of PraNet's protocol are defined on images (H, W), not on shape {truth.shape}")
    parts = _histograms(levels, truth, valid)
    bg, fg = parts.sum(axis=(0, 1))
    curve = e_curve(fg, bg)
    dice, iou = protocol_dice_iou(fg, bg)
    metrics = {
        "pranet_dice": dice,
        "pranet_iou": iou,
        "s_measure": _s_measure(parts),
        "e_mean": min(1.0, float(curve.mean())),
        "e_max": min(1.0, float(curve.max())),
        "wfm": weighted_f(levels, truth, valid),
        "mae": (_sum(bg) + int(fg.sum()) * 255 - _sum(fg)) / (255 * int(fg.sum() + bg.sum())),
    }
    return metrics, curve


def protocol_dice_iou(fg: Counts, bg: Counts) -> tuple[float, float]:
    """PraNet's mean Dice and mean IoU from the grey-level histograms (256,) inside and outside the truth."""
    tp, fp = _at_least(fg), _at_least(bg)
    union = int(fg.sum()) + fp
    return float(np.mean(2 * tp / (union + tp))), float(np.mean(tp / union))


def e_curve(fg: Counts, bg: Counts) -> NDArray[np.float64]:
    """Enhanced-alignment measure at thresholds 0..255, as published: N / (N - 1) for a perfect mask, so not cut at 1.

    With phi the mask minus its mean, xi = 2 phi_t phi_p / (phi_t^2 + phi_p^2) and E = sum((xi + 1)^2 / 4) / (N - 1).
    Truth and thresholded map are binary, so xi has one value in each of four parts of the image.

    Args:
        fg: Grey-level histogram (256,) inside the truth, not empty.
        bg: The same outside.
    """
    true, total = int(fg.sum()), int(fg.sum() + bg.sum())
    tp, fp = _at_least(fg), _at_least(bg)
    if true == total:
        # A truth that fills the image has no structure to align with: the published rule is the predicted share.
        return tp / (total - 1 + _EPS)
    mean_true, mean_map = true / total, (tp + fp) / total
    aligned = np.zeros(256)
    for pixels, in_map, in_truth in ((tp, 1, 1), (fp, 1, 0), (true - tp, 0, 1), (total - true - fp, 0, 0)):
        phi_map, phi_true = in_map - mean_map, in_truth - mean_true
        xi = 2 * phi_map * phi_true / (phi_map**2 + phi_true**2 + _EPS)
        aligned += pixels * (xi + 1) ** 2 / 4
    return aligned / (total - 1 + _EPS)


def weighted_f(levels: Levels, truth: Mask, valid: Mask | None = None) -> float:
    """Weighted F-measure: errors count less where neighbours make up for them and more far from the truth.

    Args:
        levels: (H, W) grey values.
        truth: (H, W), not empty.
        valid: (H, W), False at pixels whose error is taken as 0; near the truth such a pixel is background like any.
    """
    error = np.abs(levels / 255.0 - truth)
    if valid is not None:
        error[~valid] = 0.0
    distance, nearest = distance_transform_edt(~truth, return_indices=True)

    # Only the truth and what the 7 x 7 window sees from it matter for the smoothed error.
    rows, columns = np.flatnonzero(truth.any(axis=1)), np.flatnonzero(truth.any(axis=0))
    box = slice(max(0, rows[0] - 3), rows[-1] + 4), slice(max(0, columns[0] - 3), columns[-1] + 4)
    true = truth[box]
    # Background pixels lend the window the error of the nearest pixel of the truth, so the rim is smoothed fairly.
    lent = error[tuple(nearest[:, *box])]
    window = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 5.0**2))
    window /= window.sum()
    smooth = correlate1d(correlate1d(lent, window, axis=0, mode="constant"), window, axis=1, mode="constant")
    inside = np.minimum(error[box], smooth)[true]

    wrong = ~truth & (error > 0)
    far = 2.0 - np.exp(math.log(0.5) / 5 * distance[wrong])
    weighted_tp = inside.size - inside.sum()
    precision = weighted_tp / (weighted_tp + (error[wrong] * far).sum() + _EPS)
    recall = 1 - inside.mean()
    return float(2 * recall * precision / (recall + precision + _EPS))


def _histograms(levels: Levels, truth: Mask, valid: Mask | None) -> Counts:
    """Grey-level histograms (2 upper/lower, 2 left/right, 2 bg/fg, 256) around the centre of the truth."""
    rows, columns = truth.sum(axis=1), truth.sum(axis=0)
    total = int(rows.sum())
    if total == 0:
        raise ValueError("the measures of PraNet's protocol need a truth that is not empty")
    # The centre's own row and column belong to the upper left, as in the authors' code.
    middle = int(np.round((rows * np.arange(len(rows))).sum() / total)) + 1
    centre = int(np.round((columns * np.arange(len(columns))).sum() / total)) + 1
    parts = np.zeros((2, 2, 2, 256), np.int64)
    for i, vertical in enumerate((slice(0, middle), slice(middle, None))):
        for j, horizontal in enumerate((slice(0, centre), slice(centre, None))):
            grey, inside = levels[vertical, horizontal], truth[vertical, horizontal]
            counted = grey.ravel() if valid is None else grey[valid[vertical, horizontal]]
            parts[i, j, 1] = np.bincount(grey[inside], minlength=256)
            parts[i, j, 0] = np.bincount(counted, minlength=256) - parts[i, j, 1]
    return parts


def _s_measure(parts: Counts) -> float:
    bg, fg = parts.sum(axis=(0, 1))
    total = int(fg.sum() + bg.sum())
    if not bg.any():
        return _sum(fg) / (255 * total)
    share = int(fg.sum()) / total
    mean_fg, spread_fg = _moments(fg)
    mean_bg, spread_bg = _moments(bg)
    objects = share * _similarity(mean_fg, spread_fg) + (1 - share) * _similarity(1 - mean_bg, spread_bg)
    regions = sum(
        int(parts[i, j].sum()) / total * _structure(parts[i, j, 1], parts[i, j, 0]) for i in (0, 1) for j in (0, 1)
    )
    return max(0.0, 0.5 * objects + 0.5 * regions)


def _similarity(mean: float, spread: float) -> float:
    """How near a region's grey values are to 1: 2 x / (x^2 + 1 + sigma)."""
    return 2 * mean / (mean**2 + 1 + spread + _EPS)


def _structure(fg: Counts, bg: Counts) -> float:
    """Structural similarity of map and truth in one quadrant: 4 x y cov / ((x^2 + y^2)(var_x + var_y))."""
    true, pixels = int(fg.sum()), int(fg.sum() + bg.sum())
    if pixels == 0:
        return 0.0
    total, squares = _sum(fg) + _sum(bg), _sum(fg, 2) + _sum(bg, 2)
    # n times the sums of squares around the means, as whole numbers: exactly zero where something is constant.
    spread_map = (pixels * squares - total**2) / 255**2
    spread_true = float(pixels * true - true**2)
    together = (pixels * _sum(fg) - total * true) / 255
    norm = pixels * (pixels - 1 + _EPS)
    mean_map, mean_true = total / (255 * pixels), true / pixels
    alpha = 4 * mean_map * mean_true * together / norm
    beta = (mean_map**2 + mean_true**2) * (spread_map + spread_true) / norm
    if alpha != 0:
        return alpha / (beta + _EPS)
    return 1.0 if beta == 0 else 0.0


def _moments(histogram: Counts) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) of the grey values as shares of 255."""
    pixels, total = int(histogram.sum()), _sum(histogram)
    if pixels == 1:
        return total / 255, 0.0
    variance = (pixels * _sum(histogram, 2) - total**2) / (pixels * (pixels - 1))
    return total / (255 * pixels), math.sqrt(variance) / 255


def _sum(histogram: Counts, power: int = 1) -> int:
    """Sum of the grey values, or of their squares; a Python integer, which cannot overflow in products."""
    return int((histogram * _GREY**power).sum())


def _at_least(histogram: Counts) -> Counts:
    """Pixels with a grey value of at least t, for t = 0..255."""
    return histogram[::-1].cumsum()[::-1]
