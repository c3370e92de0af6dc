"""The scores of a data set as a torchmetrics metric: one case at a time, on any number of processes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from visattn.labels import Labels
from visattn.metrics.calibration import BINS, Sums, count_bins, describe_calibration
from visattn.metrics.cases import METRICS, NSD_TOLERANCE, SUITES, CaseRow, Suite, score_case
from visattn.metrics.collected import CaseMetric
from visattn.metrics.confusion import Counts, confusion_shape, count_confusion, describe_confusion
from visattn.metrics.intervals import mean_of_means
from visattn.metrics.lesions import DETAILS, RULE, LesionRule

_COLUMNS = (*METRICS, *DETAILS)


class SegmentationMetrics(CaseMetric):
    """Collects the scores of cases and averages them.

    In the suites "full" and "volume" the confusion matrix of each case (only the cells that are not zero, since a case
    seldom holds all of many classes) is kept too, and its calibration bins.

    Args:
        labels: The label map; one set of scores for each of `labels.foreground`.
        suite: "headline", "surface", "full" or "volume"; see `visattn.metrics.case_metrics`.
        nsd_tolerance: Tolerance of the surface Dice, in pixels or in the unit of a case's spacing.
        lesions: When a lesion counts and is found, in the suite "volume".
        **kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: A class is called "mean", which is the key of the means over classes.
    """

    records: list[Tensor]
    pixels: list[Tensor]

    def __init__(
        self,
        labels: Labels,
        suite: Suite = "headline",
        nsd_tolerance: float = NSD_TOLERANCE,
        lesions: LesionRule = RULE,
        **kwargs: Any,
    ) -> None:
        super().__init__("records", "pixels", **kwargs)
        if "mean" in labels.foreground:
            raise ValueError("a class cannot be called 'mean': that is the name of the mean over classes")
        self.labels, self.suite, self.nsd_tolerance, self.lesions = labels, suite, nsd_tolerance, lesions

    def update(
        self,
        case: str,
        prediction: NDArray[np.integer[Any]],
        truth: NDArray[np.integer[Any]],
        probabilities: NDArray[np.floating[Any]] | None = None,
        *,
        group: str = "",
        suite: Suite | None = None,
        spacing: Sequence[float] | None = None,
        voxel_ml: float | None = None,
    ) -> None:
        """Score one case and add it.

        Args:
            case: Its name, unique in the data set together with `group`; a second case of that name is not counted.
            prediction: Class indices (H, W) or (I, J, K).
            truth: Class indices of the same shape, `IGNORE` where a pixel counts for nothing.
            probabilities: (channels, H, W) in 0..1; default: the prediction as 0 and 1.
            group: What the case belongs to (patient, video).
            suite: Of this and the other cases until `reset`; default: the one of the constructor.
            spacing: Size of a pixel along each axis, in mm for the suite "volume"; default 1.
            voxel_ml: As in `visattn.metrics.case_metrics`.

        Raises:
            ValueError: Shapes do not fit, or a probability is not finite.
        """
        suite = suite or self.suite
        rows, curves = score_case(
            prediction,
            truth,
            self.labels,
            probabilities,
            suite,
            spacing=spacing,
            nsd_tolerance=self.nsd_tolerance,
            voxel_ml=voxel_ml,
            lesions=self.lesions,
        )
        values = np.full((len(rows), len(_COLUMNS)), math.nan)
        for index, row in enumerate(rows):
            for column, name in enumerate(_COLUMNS):
                value = row.get(name)
                values[index, column] = math.nan if value is None else value
        bits = curves.astype(np.float32).view(np.int64)
        record = np.concatenate([[list(SUITES).index(suite)], values.view(np.int64).ravel(), bits.ravel()])
        cells, bins = np.empty((0, 2), np.int64), np.empty(0, np.int64)
        if suite in ("full", "volume"):
            counts = count_confusion(prediction, truth, self.labels).ravel()
            cells = np.stack([counts.nonzero()[0], counts[counts > 0]], axis=1)
            if probabilities is not None:  # a mask alone says nothing about how sure it was
                bins = count_bins(probabilities, truth, self.labels).view(np.int64).ravel()
        pixels = np.concatenate([[len(cells), len(bins)], cells.ravel(), bins])
        self.add_name(case, group)
        self.records.append(torch.from_numpy(record).to(self.device))
        self.pixels.append(torch.from_numpy(pixels).to(self.device))

    def compute(self) -> dict[str, float]:
        """Means over all cases of all processes, each over the cases where the measure is defined.

        Returns:
            `<class>/<measure>`, and `mean/<measure>`, the mean over classes; NaN where no case defines it.
            `<class>/undefined`: cases without the class in truth and prediction, which have no Dice.
            `<class>/e_max_curve` (suite "full"): maximum of the mean curve, as published tables have it, where
            `e_max` is the mean of each case's own maximum. `cases`: their number.
        """
        names, values, curves, suite = self._gathered()
        result: dict[str, float] = {"cases": len(names)}
        classes = self.labels.foreground
        for column, metric in enumerate(_COLUMNS):
            if metric not in SUITES[suite]:
                continue
            for index, name in enumerate(classes):
                result[f"{name}/{metric}"] = mean_of_means(values[:, [index], column])
            result[f"mean/{metric}"] = mean_of_means(values[:, :, column])
        undefined = np.isnan(values[:, :, list(METRICS).index("dice")]).sum(axis=0)
        result |= {f"{name}/undefined": int(undefined[index]) for index, name in enumerate(classes)}
        if suite == "full":
            # What published tables call max E: the best threshold for the whole set, not for each image.
            best = [_peak(curves[:, index]) for index in range(len(classes))]
            result |= {f"{name}/e_max_curve": best[index] for index, name in enumerate(classes)}
            result["mean/e_max_curve"] = mean_of_means(np.array([best]))
        return result

    def rows(self) -> list[dict[str, str | float | None]]:
        """The table of cases of all processes, each of which has to call this: `case`, `group`, `class`, measures.

        Cases come in the order of their names, whatever the number of processes; `summarise` takes them as they are.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, distributed_available=self.distributed_available_fn):
            names, values, _, suite = self._gathered()
        table: list[dict[str, str | float | None]] = []
        for (case, group), of_case in zip(names, values, strict=True):
            for name, of_class in zip(self.labels.foreground, of_case, strict=True):
                measured: CaseRow = {
                    metric: None if math.isnan(value) else float(value)
                    for metric, value in zip(_COLUMNS, of_class, strict=True)
                    if metric in SUITES[suite] or (suite == "volume" and metric in DETAILS)
                }
                table.append({"case": case, "group": group, "class": name, **measured})
        return table

    def confusion(self) -> dict[str, Any]:
        """The confusion matrix over the pixels of all cases of all processes, each of which has to call this.

        Returns:
            As `visattn.metrics.confusion.describe_confusion`; empty if no case was added in the suites "full" and
            "volume".
        """
        counts, _ = self._pixels()
        return {} if counts is None else describe_confusion(counts, self.labels)

    def calibration(self) -> dict[str, dict[str, Any]]:
        """The reliability of the probabilities over all cases of all processes, each of which has to call this.

        Returns:
            As `visattn.metrics.calibration.describe_calibration`; empty if no case came with probabilities in the suite
            "full".
        """
        _, sums = self._pixels()
        return {} if sums is None else describe_calibration(sums, self.labels)

    def _pixels(self) -> tuple[Counts | None, Sums | None]:
        """Sums over cases, each once: confusion counts and calibration bins; None of what no case has."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, distributed_available=self.distributed_available_fn):
            keys, once = self.keys()
            stream = dim_zero_cat(self.pixels).cpu().numpy()
        starts, position = [], 0
        for _ in keys:
            starts.append(position)
            position += 2 + 2 * int(stream[position]) + int(stream[position + 1])
        shape = confusion_shape(self.labels)
        counts, sums = np.zeros(math.prod(shape), np.int64), np.zeros((len(self.labels.foreground), BINS, 3))
        counted = binned = False
        for key in sorted(once):  # in one order on any number of processes, so that float sums are equal
            start = starts[once[key]]
            cells, bins = int(stream[start]), int(stream[start + 1])
            middle = start + 2 + 2 * cells
            pairs = stream[start + 2 : middle].reshape(-1, 2)
            counts[pairs[:, 0]] += pairs[:, 1]
            if bins:
                sums += stream[middle : middle + bins].view(np.float64).reshape(sums.shape)
            counted, binned = counted or cells > 0, binned or bins > 0
        return counts.reshape(shape) if counted else None, sums if binned else None

    def _gathered(self) -> tuple[list[tuple[str, str]], NDArray[np.float64], NDArray[np.float64], Suite]:
        """Name and group, values (cases, classes, measures), curves (cases, classes, 256); by name, each case once."""
        keys, once = self.keys()
        classes = len(self.labels.foreground)
        width = classes * len(_COLUMNS)
        records = dim_zero_cat(self.records).cpu().numpy().reshape(len(keys), 1 + width + classes * 128)
        if len(set(records[:, 0].tolist())) > 1:
            raise ValueError("cases of different suites were added; call reset() between them")
        chosen = [once[key] for key in sorted(once)]
        records = np.ascontiguousarray(records[chosen])
        suite = list(SUITES)[records[0, 0]] if len(records) else self.suite
        values = np.ascontiguousarray(records[:, 1 : 1 + width]).view(np.float64)
        curves = np.ascontiguousarray(records[:, 1 + width :]).view(np.float32).astype(np.float64)
        shape = (len(chosen), classes)
        return sorted(once), values.reshape(*shape, len(_COLUMNS)), curves.reshape(*shape, 256), suite


def _peak(curves: NDArray[np.float64]) -> float:
    """The maximum over thresholds of the mean of curves (cases, 256), at most 1; NaN if no case has one."""
    defined = curves[~np.isnan(curves[:, 0])]
    return min(1.0, float(defined.mean(axis=0).max())) if len(defined) else math.nan
