"""The scores of one case: one row per foreground class, and what counts where there is nothing to measure.

A mean must not improve when a lesion is missed, so no measure may be dropped or rewarded because a prediction is empty.
For each class of each case, by truth and prediction (`docs/metrics.md` has the table and the reasons):

* both present: the formulas;
* truth alone (a miss): the worst value of every measure, which is the image diagonal for HD95. The measures of a
  probability map judge the map instead, unless it is constant and so finds nothing either;
* prediction alone (a false alarm): the worst value as well, but no recall, as there was nothing to find, and no HD95 in
  pixels: it has no worst value across image sizes, so a false alarm on a small image could improve the mean;
* neither: undefined (None). Only `fpr_empty` says 0 here, 1 for a false alarm, and None where the class is present.

`volume_error` alone needs no exception, since its formula means the same for empty masks.

Pixels whose truth is `IGNORE` are background in truth and prediction, belong to no count, histogram or stretch of the
probability map, and carry no error.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from visattn.metrics.lesions import DETAILS, RULE, LesionRule, find_lesions, lesion_measures
from visattn.metrics.maps import map_metrics, protocol_levels
from visattn.metrics.overlap import Mask, count, overlap_metrics
from visattn.metrics.surface import bounding_box, diagonal, hausdorff, surface_dice, surface_distances

if TYPE_CHECKING:
    from visattn.labels import Labels  # imports torch, which scoring masks does not need

Suite = Literal["headline", "surface", "full", "volume"]
CaseRow = dict[str, float | None]

NSD_TOLERANCE = 2.0
"""Default tolerance of the surface Dice, in pixels or in the unit of `spacing`."""

_IGNORE = 255  # visattn.labels.IGNORE; a test keeps the two equal


@dataclass(frozen=True)
class MetricInfo:
    """What a reader of a table has to know about a measure.

    Args:
        title: Name for headings.
        suite: The smallest suite that holds it.
        best: The value of a perfect prediction.
        worst: The value of a miss or a false alarm; infinity where that depends on the case.
        unit: "ml"; "px", which is mm in a table of the suite "volume" (`metrics_of`); else empty.
    """

    title: str
    suite: Suite
    best: float = 1.0
    worst: float = 0.0
    unit: str = ""

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better."""
        return self.best > self.worst


METRICS: dict[str, MetricInfo] = {
    "dice": MetricInfo("Dice", "headline"),
    "iou": MetricInfo("IoU", "headline"),
    "precision": MetricInfo("Precision", "headline"),
    "recall": MetricInfo("Recall", "headline"),
    "specificity": MetricInfo("Specificity", "headline"),
    "fpr_empty": MetricInfo("False positives on empty images", "headline", best=0.0, worst=1.0),
    "hd95": MetricInfo("HD95", "surface", best=0.0, worst=math.inf, unit="px"),
    "hd95_rel": MetricInfo("HD95 / diagonal", "surface", best=0.0, worst=1.0),
    "nsd": MetricInfo("NSD", "surface"),
    "volume_error": MetricInfo("Volume error", "volume", best=0.0, worst=math.inf, unit="ml"),
    "volume_similarity": MetricInfo("Volumetric similarity", "volume"),
    "lesion_precision": MetricInfo("Precision over lesions", "volume"),
    "lesion_recall": MetricInfo("Recall over lesions", "volume"),
    "lesion_f1": MetricInfo("F1 over lesions", "volume"),
    "pranet_dice": MetricInfo("mean Dice (PraNet's protocol)", "full"),
    "pranet_iou": MetricInfo("mean IoU (PraNet's protocol)", "full"),
    "s_measure": MetricInfo("S-measure", "full"),
    "e_mean": MetricInfo("mean E-measure", "full"),
    "e_max": MetricInfo("max E-measure", "full"),
    "wfm": MetricInfo("weighted F-measure", "full"),
    "mae": MetricInfo("MAE", "full", best=0.0, worst=1.0),
}
"""Every measure, in the order of tables."""

SUITES: dict[Suite, tuple[str, ...]] = {
    "headline": tuple(name for name, info in METRICS.items() if info.suite == "headline"),
    "surface": tuple(name for name, info in METRICS.items() if info.suite in ("headline", "surface")),
    "full": tuple(name for name, info in METRICS.items() if info.suite != "volume"),
    "volume": tuple(name for name, info in METRICS.items() if info.suite != "full"),
}
"""The measures of each suite: `headline` counts pixels and `surface` adds distances. To that, `full` adds the measures
of the map, for images, and `volume` those of volume and of lesions, for volumes."""


def metrics_of(measures: Container[str]) -> dict[str, MetricInfo]:
    """`METRICS` with the units of a table that holds `measures`: volumes are always scored in mm."""
    in_mm = any(info.suite == "volume" and name in measures for name, info in METRICS.items())
    return {name: replace(info, unit="mm") if in_mm and info.unit == "px" else info for name, info in METRICS.items()}


def digits(unit: str, plain: int = 4) -> int:
    """Digits after the point that a value with this unit is shown with; `plain` without one."""
    return {"": plain, "ml": 2}.get(unit, 1)


def case_metrics(
    prediction: NDArray[np.integer[Any]],
    truth: NDArray[np.integer[Any]],
    labels: "Labels",
    probabilities: NDArray[np.floating[Any]] | None = None,
    suite: Suite = "headline",
    *,
    spacing: Sequence[float] | None = None,
    nsd_tolerance: float = NSD_TOLERANCE,
    voxel_ml: float | None = None,
    lesions: LesionRule = RULE,
) -> list[CaseRow]:
    """Score one case.

    Args:
        prediction: Class indices (H, W) as `labels.from_probabilities` gives them; other numbers of axes are fine
            except in the suite "full".
        truth: Class indices of the same shape, `IGNORE` where a pixel counts for nothing.
        labels: The label map.
        probabilities: (channels, H, W) in 0..1, the channels of `labels`; default: the prediction itself as 0 and 1.
        suite: "headline": overlap; "surface": and HD95 and NSD; "full": and PraNet's protocol, S, E, weighted F, MAE;
            "volume", of (I, J, K): "surface" and volumes and lesions.
        spacing: Size of a pixel along each axis, the unit of `hd95` and `nsd_tolerance`; default 1, so pixels. The
            suite "volume" needs it, in mm.
        nsd_tolerance: Distance within which an edge counts as right.
        voxel_ml: Volume of a voxel, where axes are not perpendicular; default: the product of `spacing` / 1000.
        lesions: When a lesion counts and is found, in the suite "volume".

    Returns:
        One row for each of `labels.foreground`, in that order: the names of `SUITES[suite]` to values, None where
        undefined; in the suite "volume" those of `DETAILS` too.

    Raises:
        ValueError: Shapes do not fit, the suite is unknown, or a probability is not finite.
    """
    return score_case(
        prediction,
        truth,
        labels,
        probabilities,
        suite,
        spacing=spacing,
        nsd_tolerance=nsd_tolerance,
        voxel_ml=voxel_ml,
        lesions=lesions,
    )[0]


def score_case(
    prediction: NDArray[np.integer[Any]],
    truth: NDArray[np.integer[Any]],
    labels: "Labels",
    probabilities: NDArray[np.floating[Any]] | None = None,
    suite: Suite = "headline",
    *,
    spacing: Sequence[float] | None = None,
    nsd_tolerance: float = NSD_TOLERANCE,
    voxel_ml: float | None = None,
    lesions: LesionRule = RULE,
) -> tuple[list[CaseRow], NDArray[np.float64]]:
    """As `case_metrics`, and the E-measure of each class at thresholds 0..255.

    Returns:
        The rows, and curves (classes, 256): NaN where undefined and in other suites than "full".
    """
    _check(prediction, truth, labels, probabilities, suite, spacing)
    shape = truth.shape
    valid = truth != _IGNORE
    counted = int(np.count_nonzero(valid))
    ignored = counted < valid.size
    if suite != "full":
        # Where both are background there is nothing to measure, and that is most of a volume.
        box = bounding_box((truth != 0) | (prediction != 0))
        prediction, truth, valid = prediction[box], truth[box], valid[box]
    if suite == "volume" and voxel_ml is None:
        voxel_ml = math.prod(spacing or ()) / 1000
    predicted_channels, true_channels = labels.onehot(prediction), labels.onehot(truth)
    first = labels.channels - len(labels.foreground)  # the background has a channel of its own under softmax
    rows, curves = [], np.full((len(labels.foreground), 256), np.nan)
    for index, channel in enumerate(range(first, labels.channels)):
        predicted, true = predicted_channels[channel], true_channels[channel]
        if ignored:
            predicted = predicted & valid
        probability = None if probabilities is None else probabilities[channel]
        one_class = _OneClass(predicted, true, valid if ignored else None, counted, shape)
        row = one_class.overlap()
        if suite != "headline":
            row |= one_class.surface(spacing, nsd_tolerance)
        if suite == "volume":
            assert voxel_ml is not None
            row |= one_class.volume(voxel_ml, lesions)
        if suite == "full":
            on_map, curves[index] = one_class.on_map(probability)
            row |= on_map
        rows.append(row)
    return rows, curves


class _OneClass:
    """One class of one case: the masks, and which of the four situations of the policy they are in."""

    def __init__(self, predicted: Mask, true: Mask, valid: Mask | None, counted: int, shape: tuple[int, ...]) -> None:
        self.predicted, self.true, self.valid, self.shape = predicted, true, valid, shape
        self.counts = count(predicted, true, counted)
        self.counted = counted
        self.has_truth = self.counts.tp + self.counts.fn > 0
        self.has_prediction = self.counts.tp + self.counts.fp > 0

    def overlap(self) -> CaseRow:
        if self.has_truth and self.has_prediction:
            return {**overlap_metrics(self.counts), "fpr_empty": None}
        row = self._without_formula("headline")
        if not self.has_truth:
            row["recall"] = None
            # A case in which everything is ignored is no empty image.
            row["fpr_empty"] = float(self.has_prediction) if self.counted else None
        else:
            row["fpr_empty"] = None
        return row

    def surface(self, spacing: Sequence[float] | None, tolerance: float) -> CaseRow:
        longest = diagonal(self.shape, spacing)
        if self.has_truth and self.has_prediction:
            distances = surface_distances(self.predicted, self.true, spacing)
            hd95 = hausdorff(distances)
            return {"hd95": hd95, "hd95_rel": hd95 / longest, "nsd": surface_dice(distances, tolerance)}
        return self._without_formula("surface") | {"hd95": longest if self.has_truth else None}

    def volume(self, voxel_ml: float, rule: LesionRule) -> CaseRow:
        counts = self.counts
        truth, prediction = (counts.tp + counts.fn) * voxel_ml, (counts.tp + counts.fp) * voxel_ml
        row: CaseRow = dict.fromkeys((name for name, info in METRICS.items() if info.suite == "volume"))
        row |= dict.fromkeys(DETAILS)
        if not self.counted:
            return row  # everything is ignored: not even a volume is known
        row |= {"volume_error": abs(prediction - truth), "true_ml": truth, "predicted_ml": prediction}
        if self.has_truth or self.has_prediction:
            row["volume_similarity"] = 1 - abs(prediction - truth) / (prediction + truth)
        box = bounding_box(self.predicted | self.true)
        return row | lesion_measures(find_lesions(self.predicted[box], self.true[box]), voxel_ml, rule)

    def on_map(self, probability: NDArray[np.floating[Any]] | None) -> tuple[CaseRow, NDArray[np.float64]]:
        levels = protocol_levels(self.predicted if probability is None else probability, self.valid)
        shown = levels if self.valid is None else levels[self.valid]
        if self.has_truth and (self.has_prediction or shown.min() < shown.max()):
            metrics, curve = map_metrics(levels, self.true, self.valid)
            return {**metrics}, curve
        undefined = not (self.has_truth or self.has_prediction)
        return self._without_formula("full"), np.full(256, np.nan if undefined else 0.0)

    def _without_formula(self, suite: Suite) -> CaseRow:
        defined = self.has_truth or self.has_prediction
        return {name: info.worst if defined else None for name, info in METRICS.items() if info.suite == suite}


def _check(
    prediction: NDArray[Any],
    truth: NDArray[Any],
    labels: "Labels",
    probabilities: NDArray[Any] | None,
    suite: Suite,
    spacing: Sequence[float] | None,
) -> None:
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth {truth.shape}")
    if probabilities is not None and probabilities.shape != (labels.channels, *truth.shape):
        raise ValueError(f"probabilities have shape {probabilities.shape}, expected {(labels.channels, *truth.shape)}")
    if suite == "full" and truth.ndim != 2:
        raise ValueError(f"the suite 'full' is for images (H, W), not shape {truth.shape}; use 'surface'")
    if suite == "volume" and (truth.ndim != 3 or spacing is None or len(spacing) != 3):
        raise ValueError(
            f"the suite 'volume' is for volumes (I, J, K) with their spacing in mm, not shape {truth.shape}"
        )
