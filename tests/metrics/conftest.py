from collections.abc import Callable

import numpy as np
import py_sod_metrics
import pytest
from scipy.ndimage import gaussian_filter

from visattn.labels import Labels


@pytest.fixture(scope="session")
def binary() -> Labels:
    return Labels.from_config({"background": 0, "polyp": 255})


@pytest.fixture(scope="session")
def three() -> Labels:
    return Labels.from_config({"background": 0, "liver": 1, "tumour": 2})


@pytest.fixture(scope="session")
def regions() -> Labels:
    return Labels.from_config(
        {"background": 0, "rim": 1, "core": 2}, regions={"whole": ["rim", "core"], "centre": ["core"]}
    )


@pytest.fixture(scope="session")
def blob() -> Callable[..., np.ndarray]:
    """A smooth random field in 0..1: thresholded it is a mask with a few rounded parts."""

    def make(generator: np.random.Generator, shape: tuple[int, ...], smooth: float = 3.0) -> np.ndarray:
        field = gaussian_filter(generator.normal(size=shape), smooth)
        return (field - field.min()) / (field.max() - field.min())

    return make


@pytest.fixture(scope="session")
def pysodmetrics() -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    """The oracle: pysodmetrics on an 8-bit image (H, W) and a bool truth (H, W), under our names."""

    def score(levels: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        curves = py_sod_metrics.FmeasureV2(
            metric_handlers={
                "dice": py_sod_metrics.DICEHandler(with_dynamic=True, with_adaptive=False),
                "iou": py_sod_metrics.IOUHandler(with_dynamic=True, with_adaptive=False),
            }
        )
        structure, aligned = py_sod_metrics.Smeasure(), py_sod_metrics.Emeasure()
        weighted, error = py_sod_metrics.WeightedFmeasure(), py_sod_metrics.MAE()
        for metric in (curves, structure, aligned, weighted, error):
            metric.step(levels, truth.astype(np.uint8) * 255)
        over_thresholds = curves.get_results()
        curve = aligned.get_results()["em"]["curve"]
        return {
            "pranet_dice": over_thresholds["dice"]["dynamic"].mean(),
            "pranet_iou": over_thresholds["iou"]["dynamic"].mean(),
            "s_measure": structure.get_results()["sm"],
            "e_mean": curve.mean(),
            "e_max": curve.max(),
            "wfm": weighted.get_results()["wfm"],
            "mae": error.get_results()["mae"],
        }

    return score
