"""Means over cases with bootstrap confidence intervals that respect groups (patients, video sequences).

Cases of one group resemble each other, so groups are drawn, not cases: each of n resamples draws as many groups as
there are, with replacement, and takes the mean over all their cases. The interval runs between two percentiles of these
means. With few groups the plain percentile interval is too short; its percentiles are therefore moved outwards as in
Hesterberg, "What teachers should know about the bootstrap", 2015 (https://arxiv.org/abs/1411.5279): alpha/2 becomes
Phi(-sqrt(G / (G - 1)) t_{1 - alpha/2, G - 1}) for G groups.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from visattn.metrics.table import CaseTable

_CHUNK = 4_000_000  # group draws held at a time: 32 MB


@dataclass(frozen=True)
class Summary:
    """One measure of one class over all cases.

    Args:
        name: The class, or "mean" for the mean of the classes' means.
        metric: A key of `METRICS`.
        mean: Mean over the cases where it is defined; NaN if there is none.
        low: Lower end of the confidence interval; NaN with fewer than two groups.
        high: Upper end.
        cases: How many cases the mean is over.
        undefined: How many cases were left out as undefined.
    """

    name: str
    metric: str
    mean: float
    low: float
    high: float
    cases: int
    undefined: int


def bootstrap_interval(
    values: Sequence[float | None] | NDArray[np.floating[Any]],
    groups: Sequence[Hashable] | None = None,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Confidence interval of a mean over cases, by a bootstrap over groups.

    Args:
        values: One value per case, or (cases, classes) for the mean of the classes' means; None and NaN are left
            out. Differences of two runs give a paired bootstrap.
        groups: The group of each case; default: each case is its own.
        n: Number of resamples.
        seed: Of the draws; equal input gives equal output.
        level: Coverage aimed at.

    Returns:
        Lower and upper end; both NaN with fewer than two groups that hold a value.

    Raises:
        ValueError: `values` and `groups` have different lengths, or `level` is not between 0 and 1.
    """
    columns = np.asarray(values, np.float64)  # None becomes NaN
    columns = columns[:, None] if columns.ndim == 1 else columns
    return _interval(*_resampled_means(columns, groups, n, seed), level)


def summarise(rows: Iterable[Mapping[str, Any]], n: int = 2000, seed: int = 0, level: float = 0.95) -> list[Summary]:
    """Means and intervals of a table of cases, as in `cases.csv`.

    Args:
        rows: Each with `case`, `class`, optionally `group` (default: the case), and measures, None or an empty text
            where undefined. Other keys are left alone. Every case needs a row for each class.
        n: Number of resamples.
        seed: Of the draws.
        level: Coverage aimed at.

    Returns:
        One entry per measure and class, in the order of `METRICS` and of the rows; with several classes also the mean
        of the classes, under the name "mean".

    Raises:
        ValueError: A case lacks a class or has it twice.
    """
    table = CaseTable.from_rows(rows)
    result = []
    for metric in table.values:
        for name, column in table.columns(metric).items():
            interval = bootstrap_interval(column, table.groups, n, seed, level)
            defined = int(np.count_nonzero(~np.isnan(column)))
            result.append(
                Summary(name, metric, mean_of_means(column), *interval, cases=defined, undefined=column.size - defined)
            )
    return result


def mean_of_means(values: NDArray[np.float64]) -> float:
    """Mean over the classes of their means over cases.

    Args:
        values: (cases, classes), NaN where undefined. A class without a value is left out; NaN if all are.
    """
    counts = (~np.isnan(values)).sum(axis=0)
    sums = np.nansum(values, axis=0)
    return float(np.mean(sums[counts > 0] / counts[counts > 0])) if counts.any() else math.nan


def resample_interval(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    groups: Sequence[Hashable],
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    chunk: int = 64,
) -> NDArray[np.float64]:
    """Confidence intervals of measures that are no means over cases, by the same bootstrap over groups.

    Args:
        statistic: How often each case was drawn, (m, cases), to the measures of these m draws (m, K); NaN where a draw
            does not define one.
        groups: The group of each case.
        n: Number of resamples.
        seed: Of the draws.
        level: Coverage aimed at.
        chunk: Draws in a call.

    Returns:
        Lower and upper ends (K, 2); NaN with fewer than two groups, and for a measure that most draws do not define.
    """
    index = _indices(groups)
    total = int(index.max(initial=-1)) + 1
    generator = np.random.default_rng(seed)
    parts = []
    for start in range(0, n, chunk):
        drawn = generator.integers(0, total, (min(chunk, n - start), total)) if total else np.zeros((1, 0), np.int64)
        times = np.zeros((len(drawn), total))
        np.add.at(times, (np.arange(len(drawn))[:, None], drawn), 1.0)
        parts.append(statistic(times[:, index]))
    values = np.concatenate(parts)
    ends = np.full((values.shape[1], 2), math.nan)
    for column, of_measure in enumerate(values.T):
        defined = of_measure[~np.isnan(of_measure)]
        if 2 * len(defined) > n:
            ends[column] = _interval(defined, total, level)
    return ends


def _resampled_means(
    values: NDArray[np.float64], groups: Sequence[Hashable] | None, n: int, seed: int
) -> tuple[NDArray[np.float64], int]:
    """The means (n,) of resampled groups, each the mean over classes of means over cases, and the number of groups.

    Args:
        values: (cases, classes), NaN where undefined.
        groups: One per case; default: each case its own.
        n: Number of resamples.
        seed: Of the draws.
    """
    index = np.arange(len(values)) if groups is None else _indices(groups)
    if len(index) != len(values):
        raise ValueError(f"{len(values)} values need as many groups, got {len(index)}")
    defined = ~np.isnan(values)
    total = int(index.max(initial=-1)) + 1
    counts, sums = np.zeros((2, total, values.shape[1]))
    np.add.at(counts, index, defined)
    np.add.at(sums, index, np.where(defined, values, 0.0))
    # A group without any value says nothing about the mean; drawing it would only shrink the sample.
    filled = counts.any(axis=1)
    counts, sums = counts[filled], sums[filled]
    total = len(counts)
    if total < 2:
        return np.full(n, math.nan), total
    generator = np.random.default_rng(seed)
    means = np.empty(n)
    step = max(1, _CHUNK // (total * values.shape[1]))
    for start in range(0, n, step):
        drawn = generator.integers(0, total, (min(step, n - start), total))
        weight = counts[drawn].sum(axis=1)
        known = weight > 0
        by_class = np.divide(sums[drawn].sum(axis=1), weight, out=np.zeros(weight.shape), where=known)
        means[start : start + len(drawn)] = by_class.sum(axis=1) / known.sum(axis=1)
    return means, total


def _interval(means: NDArray[np.float64], groups: int, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level is a share between 0 and 1, got {level}")
    if groups < 2:
        return math.nan, math.nan
    tail = (1 - level) / 2
    moved = float(ndtr(math.sqrt(groups / (groups - 1)) * stdtrit(groups - 1, tail)))
    low, high = np.quantile(means, [moved, 1 - moved])
    return float(low), float(high)


def _indices(groups: Sequence[Hashable]) -> NDArray[np.int64]:
    order: dict[Hashable, int] = {}
    return np.array([order.setdefault(group, len(order)) for group in groups], np.int64)
