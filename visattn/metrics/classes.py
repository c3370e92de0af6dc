"""Measures of a classification, from the probabilities and true classes of all cases.

AUC and accuracy are those of the `medmnist` evaluator (Yang et al., "MedMNIST v2", Scientific Data 2023,
https://doi.org/10.1038/s41597-022-01721-8), written from its definitions:

* one of two classes: AUC of the second class; accuracy with that class from a probability above 0.5 on;
* one of several classes, ordered ones among them: the mean over classes of the AUC of each against the rest; the class
  with the largest probability;
* several classes at once: the mean over classes of each one's AUC, and of its accuracy at 0.5.

The AUC is that of the empirical ROC curve: the share of pairs of a positive and a negative case in which the positive
one has the larger probability, ties counted half. A class that all cases or none have has no AUC and is left out of the
mean, where `medmnist` has no result. `docs/classification.md` has the other measures.

Every measure is computed from weights of the cases, so that the bootstrap draws them many times at once.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visattn.metrics.calibration import BINS, bins_of, describe_bins, sum_bins
from visattn.metrics.cases import MetricInfo
from visattn.metrics.intervals import Summary, resample_interval

Array = NDArray[np.float64]

ALL = "all"
"""What the measures over all classes are called in tables."""

CLASS_METRICS: dict[str, MetricInfo] = {
    "auc": MetricInfo("AUC", "headline"),
    "accuracy": MetricInfo("Accuracy", "headline"),
    "balanced_accuracy": MetricInfo("Balanced accuracy", "headline"),
    "ece": MetricInfo("Calibration error (ECE)", "headline", best=0.0, worst=1.0),
    "recall": MetricInfo("Recall", "headline"),
    "precision": MetricInfo("Precision", "headline"),
}
"""Every measure, in the order of tables."""

_OVERALL = ("auc", "accuracy", "balanced_accuracy", "ece")
_BY_CLASS = ("auc", "recall", "precision")
_WORK = 4_000_000_000  # draws x cases x classes that the intervals may cost
_CELLS = 8_000_000  # numbers held at a time


@dataclass(frozen=True)
class ClassTable:
    """What a classifier made of a set of cases.

    Args:
        names: The classes.
        probabilities: (N, K) in 0..1.
        truth: The true class (N,), or which classes are true (N, K) where a case may have several.
        groups: The group of each case; default: each its own.
    """

    names: tuple[str, ...]
    probabilities: Array
    truth: NDArray[np.int64]
    groups: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        count, classes = self.probabilities.shape
        shape = (count, classes) if self.multi_label else (count,)
        if classes != len(self.names) or self.truth.shape != shape:
            raise ValueError(f"{self.probabilities.shape} probabilities, {self.truth.shape} truths: {self.names}")
        if count and not (self.probabilities.min() >= 0 and self.probabilities.max() <= 1 + 1e-6):  # NaN fails too
            raise ValueError("a probability is not in 0..1")
        if not self.multi_label and count and not 0 <= self.truth.min() <= self.truth.max() < classes:
            raise ValueError(f"a true class is none of the {classes}")

    @property
    def multi_label(self) -> bool:
        """Whether a case may have several classes."""
        return self.truth.ndim == 2

    @property
    def binary(self) -> bool:
        """Whether a case has one of two classes."""
        return len(self.names) == 2 and not self.multi_label

    @cached_property
    def true(self) -> NDArray[np.bool_]:
        """Which classes each case has, (N, K)."""
        return self.truth.astype(bool) if self.multi_label else self.truth[:, None] == np.arange(len(self.names))

    @cached_property
    def chosen(self) -> NDArray[np.bool_]:
        """Which classes were predicted, (N, K)."""
        return choose_classes(self.probabilities, self.multi_label)

    @cached_property
    def correct(self) -> Array:
        """The share of right answers for each case, (N,): 0 or 1, but for several labels at once."""
        agree = self.true == self.chosen
        return np.asarray(agree.mean(axis=1) if self.multi_label else agree.all(axis=1), np.float64)

    def headline(self) -> dict[str, float]:
        """AUC and accuracy."""
        once = np.ones((1, len(self.truth)))
        return {"auc": float(self._overall_auc(once)[0]), "accuracy": _single(_mean(once, self.correct))}

    def means(self) -> dict[str, float]:
        """Every measure as `<class>/<measure>`, and under `all` those over all classes."""
        return {f"{name}/{metric}": value for (name, metric), value in zip(self.columns(), self._all(), strict=True)}

    def summarise(self, n: int = 2000, seed: int = 0) -> list[Summary]:
        """Every measure with its interval, by a bootstrap over groups.

        Args:
            n: Number of resamples; fewer, but at least 100, where cases and classes are very many.
            seed: Of the draws.
        """
        count, classes = self.probabilities.shape
        n = max(100, min(n, _WORK // max(1, count * classes)))
        groups = self.groups or tuple(map(str, range(count)))
        chunk = max(1, min(64, _CELLS // max(1, count)))
        ends = resample_interval(self.statistics, groups, n, seed, chunk=chunk)
        return [
            Summary(name, metric, value, float(low), float(high), count, 0)
            for (name, metric), value, (low, high) in zip(self.columns(), self._all(), ends, strict=True)
        ]

    def confusion(self) -> dict[str, Any]:
        """Counts as `visattn.metrics.confusion` has them: one matrix, or [[TN, FP], [FN, TP]] of each label."""
        true, chosen = self.true.astype(np.int64), self.chosen.astype(np.int64)
        if not self.multi_label:
            return {"names": list(self.names), "counts": (true.T @ chosen).tolist()}
        found: dict[str, Any] = {}
        for index, name in enumerate(self.names):
            t, c = true[:, index], chosen[:, index]
            pairs = [[(1 - t) @ (1 - c), (1 - t) @ c], [t @ (1 - c), t @ c]]
            found[name] = [[int(number) for number in line] for line in pairs]
        return {"regions": found}

    def calibration(self) -> dict[str, dict[str, Any]]:
        """The reliability of the probabilities of each class; where there are two, of the second alone."""
        first = 1 if self.binary else 0
        bins = {
            name: sum_bins(self.probabilities[:, index], self.true[:, index])
            for index, name in enumerate(self.names)
            if index >= first
        }
        return describe_bins(bins)

    def columns(self) -> list[tuple[str, str]]:
        """Name and measure of each column of `statistics`."""
        return [(ALL, metric) for metric in _OVERALL] + [(name, metric) for name in self.names for metric in _BY_CLASS]

    def _all(self) -> list[float]:
        return [float(value) for value in self.statistics(np.ones((1, len(self.truth))))[0]]

    def statistics(self, weights: Array) -> Array:
        """The measures (m, columns) of cases that count as often as `weights` (m, N) says."""
        true, chosen = self.true.astype(np.float64), self.chosen.astype(np.float64)
        total = weights.sum(axis=1, keepdims=True)
        positive, predicted, hits = weights @ true, weights @ chosen, weights @ (true * chosen)
        recall, precision = _ratio(hits, positive), _ratio(hits, predicted)
        if self.multi_label:
            specificity = _ratio(total - positive - predicted + hits, total - positive)
            balanced = _mean_of_defined((recall + specificity) / 2)
        else:
            balanced = _mean_of_defined(recall)
        aucs = np.stack([self._auc(weights, index) for index in range(len(self.names))], axis=1)
        auc = aucs[:, 1] if self.binary else _mean_of_defined(aucs)
        overall = np.stack([auc, _mean(weights, self.correct), balanced, self._ece(weights)], axis=1)
        by_class = np.stack([aucs, recall, precision], axis=2).reshape(len(weights), -1)
        return np.concatenate([overall, by_class], axis=1)

    def _overall_auc(self, weights: Array) -> Array:
        if self.binary:
            return self._auc(weights, 1)
        return _mean_of_defined(np.stack([self._auc(weights, i) for i in range(len(self.names))], axis=1))

    @cached_property
    def _orders(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """For each class the cases in the order of its probability, and where each run of equal ones begins."""
        orders = []
        for scores in self.probabilities.T:
            order = np.argsort(scores, kind="stable")
            steps = np.flatnonzero(np.diff(scores[order])) + 1
            orders.append((order, np.concatenate([[0], steps]) if len(scores) else steps))
        return orders

    def _auc(self, weights: Array, index: int) -> Array:
        """Area under the ROC curve (m,) of one class."""
        order, starts = self._orders[index]
        if not len(order):
            return np.full(len(weights), math.nan)
        ordered, true = weights[:, order], self.true[order, index]
        positive = np.add.reduceat(ordered * true, starts, axis=1)
        negative = np.add.reduceat(ordered * ~true, starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative / 2
        return _ratio((positive * below).sum(axis=1), positive.sum(axis=1) * negative.sum(axis=1))

    def _ece(self, weights: Array) -> Array:
        """Expected calibration error (m,): of the class that was chosen, or the mean over labels."""
        if not len(self.truth):
            return np.full(len(weights), math.nan)
        if self.multi_label:
            columns = [(p, t) for p, t in zip(self.probabilities.T, self.true.T, strict=True)]
        else:
            sure = np.where(self.chosen, self.probabilities, 0).max(axis=1)
            columns = [(sure, self.correct > 0)]
        errors = []
        for probability, true in columns:
            inside = bins_of(probability)[:, None] == np.arange(BINS)
            gap = weights @ (inside * (true - probability)[:, None])
            errors.append(_ratio(np.abs(gap).sum(axis=1), weights.sum(axis=1)))
        return np.asarray(np.mean(errors, axis=0))


def choose_classes(probabilities: NDArray[np.floating[Any]], multi_label: bool) -> NDArray[np.bool_]:
    """Which classes probabilities (N, K) in 0..1 predict, (N, K), by the rules of `medmnist`."""
    if multi_label:
        return np.asarray(probabilities > 0.5)
    binary = probabilities.shape[1] == 2
    best = (probabilities[:, 1] > 0.5).astype(np.int64) if binary else probabilities.argmax(axis=1)
    return np.asarray(best[:, None] == np.arange(probabilities.shape[1]))


def _ratio(part: Array, whole: Array) -> Array:
    return np.asarray(np.divide(part, whole, out=np.full(np.shape(part), math.nan), where=whole > 0))


def _mean(weights: Array, values: Array) -> Array:
    return _ratio(weights @ values, weights.sum(axis=1))


def _mean_of_defined(values: Array) -> Array:
    """The mean (m,) over the columns of (m, K) that are defined."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(axis=1), known.sum(axis=1).astype(np.float64))


def _single(values: Array) -> float:
    return float(values[0])
