"""Scores of segmentations, defined once for training, testing and for masks made by any tool.

Measures are plain functions on NumPy arrays; `SegmentationMetrics` collects them over a data set and is imported only
when asked for, since it needs torch and torchmetrics. Formulas and conventions: `docs/metrics.md`.
"""

from typing import TYPE_CHECKING, Any

from visattn.metrics.cases import (
    METRICS,
    NSD_TOLERANCE,
    SUITES,
    CaseRow,
    MetricInfo,
    Suite,
    case_metrics,
    digits,
    metrics_of,
)
from visattn.metrics.intervals import Summary, bootstrap_interval, summarise
from visattn.metrics.lesions import DETAILS, Detection, LesionRule, detections
from visattn.metrics.surface import diagonal, hausdorff, surface_dice, surface_distances

if TYPE_CHECKING:
    from visattn.metrics.segmentation import SegmentationMetrics

__all__ = [
    "DETAILS",
    "METRICS",
    "NSD_TOLERANCE",
    "SUITES",
    "CaseRow",
    "Detection",
    "LesionRule",
    "MetricInfo",
    "SegmentationMetrics",
    "Suite",
    "Summary",
    "bootstrap_interval",
    "case_metrics",
    "detections",
    "diagonal",
    "digits",
    "hausdorff",
    "metrics_of",
    "summarise",
    "surface_dice",
    "surface_distances",
]


def __getattr__(name: str) -> Any:
    if name == "SegmentationMetrics":
        from visattn.metrics.segmentation import SegmentationMetrics

        return SegmentationMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
