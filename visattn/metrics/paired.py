"""Differences of runs that scored the same cases: intervals, p values, wins and losses, with respect to groups.

A difference is *run minus baseline*, taken case by case and then averaged as means are. The interval is the bootstrap
of `metrics.intervals` applied to these differences: whole groups (patients, videos) are drawn, each with the cases of
both runs. The p value is a sign-flip test over groups: if baseline and run were the same thing, swapping their names
within a group would change nothing but the signs of the group's differences. All 2^G signs are tried up to
`EXACT_GROUPS` groups that differ at all, else `FLIPS` random ones, counted so that p is never too small (Phipson and
Smyth 2010, https://doi.org/10.2202/1544-6115.1585). Several p values are corrected by Holm's method (1979).

Cases that are undefined for both runs are left out. Where one run alone is undefined it made no mistake that could be
measured, and counts as the best value: of two runs on an image without the class, the one that rightly finds nothing
has no Dice and the one with a false alarm has 0. Without the pair the false alarm would cost nothing
(`docs/compare.md`).
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visattn.metrics.cases import METRICS
from visattn.metrics.intervals import bootstrap_interval, mean_of_means
from visattn.metrics.table import CaseTable

EXACT_GROUPS = 20
"""Up to so many groups that differ, every choice of signs is tried: half a million."""
FLIPS = 10_000
"""Random choices of signs with more groups; the smallest p is then 1 / (FLIPS + 1)."""

_TIE = 1e-9  # cases closer than this are equal; tables hold six digits
_ROUNDING = 1e-13  # contributions smaller than this are none
_CHUNK = 4_000_000  # signs held at a time: 32 MB


@dataclass(frozen=True)
class Difference:
    """One measure of one class in which a run is compared with the baseline.

    Attributes:
        name: The class, or "mean" for the mean of the classes' means.
        metric: A key of `METRICS`.
        baseline_mean: The baseline's mean over the pairs.
        run_mean: The run's mean over the pairs.
        difference: `run_mean` - `baseline_mean`; NaN without pairs.
        low: Lower end of the confidence interval of the difference; NaN with fewer than two groups.
        high: Upper end.
        p: Of the sign-flip test, two-sided; NaN with fewer than two groups.
        p_holm: Corrected over the comparisons of this measure: all runs, and all classes with their mean.
        family: Over how many comparisons.
        wins: Cases in which the run is better.
        ties: Cases in which both are equal.
        losses: Cases in which the baseline is better.
        pairs: Values compared: cases, times classes for their mean.
        filled: Of these, how many are undefined for one of the two and count as the best value there.
        undefined: Values left out, undefined for both.
        groups: How many groups hold a pair.
    """

    name: str
    metric: str
    baseline_mean: float
    run_mean: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    family: int
    wins: int
    ties: int
    losses: int
    pairs: int
    filled: int
    undefined: int
    groups: int

    @property
    def counted(self) -> bool:
        """Whether single cases have a value in this measure, so that wins and losses mean something."""
        return self.wins + self.ties + self.losses > 0


def compare_tables(
    baseline: CaseTable,
    runs: Sequence[CaseTable],
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[list[Difference]]:
    """Compare each of `runs` with the baseline, in all measures that the two have in common.

    Args:
        baseline: What the others are compared with.
        runs: Tables of the same cases and classes, in any order.
        n: Number of resamples of the intervals.
        seed: Of the resamples and of random signs; equal input gives equal output.
        level: Coverage of the intervals, which are not corrected for their number.

    Returns:
        For each run its differences by measure and class, the mean of several classes last.

    Raises:
        ValueError: A table has other cases or classes.
    """
    results = [_compare(baseline, run.like(baseline), n, seed, level) for run in runs]
    correct(results)
    return results


def correct(results: list[list[Difference]]) -> None:
    """Put in the corrected p values, in place: one family for each measure, over all runs and classes."""
    for metric in {entry.metric for found in results for entry in found}:
        places = [(i, j) for i, found in enumerate(results) for j, entry in enumerate(found) if entry.metric == metric]
        raw = [results[i][j].p for i, j in places]
        family = sum(not math.isnan(p) for p in raw)
        for (i, j), p in zip(places, holm(raw), strict=True):
            results[i][j] = replace(results[i][j], p_holm=p, family=family)


def pair_up(
    baseline: NDArray[np.float64], run: NDArray[np.float64], metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two arrays of equal shape with the best value where the other alone is defined, NaN where neither is."""
    best = METRICS[metric].best
    only_baseline = np.isnan(run) & ~np.isnan(baseline)
    only_run = np.isnan(baseline) & ~np.isnan(run)
    return np.where(only_run, best, baseline), np.where(only_baseline, best, run)


def gains(baseline: CaseTable, run: CaseTable, metric: str) -> NDArray[np.float64]:
    """How much better the run is in each case, (cases,): the mean over the classes with a pair, NaN where none has.

    Args:
        baseline: What the run is compared with.
        run: A table of the same cases and classes in the same order.
        metric: A measure that both have. Positive results mean a better run, whether it is to be high or low.
    """
    first, second = pair_up(baseline.values[metric], run.values[metric], metric)
    return _by_case(second - first, metric)


def sign_flip(contributions: NDArray[np.float64], seed: int = 0) -> float:
    """Two-sided p value of a sum of independent contributions whose signs are arbitrary if there is no difference.

    Args:
        contributions: One for each group: its part of the mean difference.
        seed: Of the random signs that are used with more than `EXACT_GROUPS` contributions other than 0.

    Returns:
        The share of sign choices whose sum is at least as far from 0 as the sum itself; 1 if nothing differs, NaN
        with fewer than two groups.
    """
    if len(contributions) < 2:
        return math.nan
    # What is left of differences that cancel within a group is rounding.
    parts = contributions[np.abs(contributions) > _ROUNDING]
    # Sums that are equal on paper differ in the last digits; they count as equal.
    threshold = abs(float(parts.sum())) - 1e-9 * float(np.abs(parts).sum())
    if len(parts) <= EXACT_GROUPS:
        # A choice of signs and its mirror image are equally far from 0, so the first sign stays.
        sums = parts[:1]
        for part in parts[1:]:
            sums = np.concatenate([sums + part, sums - part])
        return float(np.mean(np.abs(sums) >= threshold)) if len(sums) else 1.0
    generator = np.random.default_rng(seed)
    extreme = 0
    step = max(1, _CHUNK // len(parts))
    for start in range(0, FLIPS, step):
        signs = generator.integers(0, 2, (min(step, FLIPS - start), len(parts)), np.int8)
        extreme += int(np.count_nonzero(np.abs(2 * (signs @ parts) - parts.sum()) >= threshold))
    return (extreme + 1) / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN stays NaN and belongs to no comparison.

    Args:
        p_values: One for each comparison of the family.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[index] = largest
    return corrected


def smallest_p(groups: int) -> float:
    """The smallest p value that so many groups can give: that of two signs out of 2^groups."""
    return 2.0 ** (1 - groups) if groups <= EXACT_GROUPS else 1 / (FLIPS + 1)


def _compare(baseline: CaseTable, run: CaseTable, n: int, seed: int, level: float) -> list[Difference]:
    found = []
    for metric in baseline.values:
        if metric not in run.values:
            continue
        other = run.columns(metric)
        for name, column in baseline.columns(metric).items():
            found.append(_difference(name, metric, column, other[name], baseline.groups, n, seed, level))
    return found


def _difference(
    name: str,
    metric: str,
    baseline: NDArray[np.float64],
    run: NDArray[np.float64],
    groups: Sequence[Hashable],
    n: int,
    seed: int,
    level: float,
) -> Difference:
    """Compare two columns (cases, classes)."""
    first, second = pair_up(baseline, run, metric)
    differences = second - first
    low, high = bootstrap_interval(differences, groups, n, seed, level)
    contributions = _contributions(differences, groups)
    gain = _by_case(differences, metric)
    pairs = int(np.count_nonzero(~np.isnan(differences)))
    return Difference(
        name=name,
        metric=metric,
        baseline_mean=mean_of_means(first),
        run_mean=mean_of_means(second),
        difference=mean_of_means(differences),
        low=low,
        high=high,
        p=sign_flip(contributions, seed),
        p_holm=math.nan,
        family=0,
        wins=int(np.count_nonzero(gain > _TIE)),
        ties=int(np.count_nonzero(np.abs(gain) <= _TIE)),
        losses=int(np.count_nonzero(gain < -_TIE)),
        pairs=pairs,
        filled=int(np.count_nonzero(np.isnan(baseline) != np.isnan(run))),
        undefined=differences.size - pairs,
        groups=len(contributions),
    )


def _contributions(differences: NDArray[np.float64], groups: Sequence[Hashable]) -> NDArray[np.float64]:
    """What each group that holds a pair adds to the mean difference; their sum is that mean."""
    defined = ~np.isnan(differences)
    counts = defined.sum(axis=0)
    weights = np.divide(1.0, counts, out=np.zeros(counts.shape), where=counts > 0)
    share = (np.where(defined, differences, 0.0) * weights).sum(axis=1) / max(1, np.count_nonzero(counts))
    by_group: dict[Hashable, float] = {}
    for index in np.flatnonzero(defined.any(axis=1)):
        by_group[groups[index]] = by_group.get(groups[index], 0.0) + float(share[index])
    return np.array(list(by_group.values()))


def _by_case(differences: NDArray[Any], metric: str) -> NDArray[np.float64]:
    defined = ~np.isnan(differences)
    counts = defined.sum(axis=1)
    sums = np.where(defined, differences, 0.0).sum(axis=1)
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    return means if METRICS[metric].higher_is_better else -means
