"""Differences of classifiers that answered for the same cases: intervals and p values, with respect to groups.

A difference is *run minus baseline* in a measure over all cases. AUC and calibration error are no means over cases, so
they are computed anew for every draw: the interval is the bootstrap of `metrics.intervals`, in which a drawn group
brings the answers of both runs, and the p value that of a permutation test. If baseline and run were the same thing,
swapping their answers within a group would change nothing. Up to `EXACT_GROUPS` groups in which they differ all swaps
are tried, else random ones, counted so that p is never too small, as in `metrics.paired`.

Both are computed on one table that holds the answers of baseline and run below each other: a draw gives the rows of one
of the two weight, so each class is sorted once, and not for every draw.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from visattn.metrics.classes import ALL, ClassTable
from visattn.metrics.intervals import resample_interval
from visattn.metrics.paired import FLIPS, Difference, correct

EXACT_GROUPS = 12
"""Up to so many groups that differ, every swap is tried: two thousand."""

_LEFT_OUT = "precision"  # undefined wherever a class is predicted for no case, which a swap can change
_WORK = 1_000_000_000  # draws x cases x classes that intervals and p values may cost, each
_CELLS = 8_000_000  # numbers held at a time
_LEAST = 999

Array = NDArray[np.float64]


def compare_class_tables(
    baseline: ClassTable, runs: Sequence[ClassTable], n: int = 2000, seed: int = 0, level: float = 0.95
) -> list[list[Difference]]:
    """Compare each of `runs` with the baseline.

    Args:
        baseline: What the others are compared with.
        runs: Answers for the same cases in the same order, with the same classes.
        n: Number of resamples of the intervals; fewer, but at least 999, where cases and classes are very many.
        seed: Of resamples and random swaps; equal input gives equal output.
        level: Coverage of the intervals, which are not corrected for their number.

    Returns:
        For each run its differences: those over all classes under the name `ALL`, then class by class. Wins, ties and
        losses count cases, for the measures that a case has by itself: accuracy, and the recall of each class.

    Raises:
        ValueError: A table has other cases or classes.
    """
    for run in runs:
        if (
            run.names != baseline.names
            or run.groups != baseline.groups
            or not np.array_equal(run.truth, baseline.truth)
        ):
            raise ValueError("the tables hold different cases or classes")
    results = [_compare(baseline, run, n, seed, level) for run in runs]
    correct(results)
    return results


def truth_gains(baseline: ClassTable, run: ClassTable) -> Array:
    """By how much more probability the run gives to the truth of each case, (N,): the mean over several labels."""

    def given(table: ClassTable) -> Array:
        right = np.where(table.true, table.probabilities, 1 - table.probabilities)
        if table.multi_label:
            return np.asarray(right.mean(axis=1))
        return np.asarray(table.probabilities[table.true])

    return given(run) - given(baseline)


def _compare(baseline: ClassTable, run: ClassTable, n: int, seed: int, level: float) -> list[Difference]:
    count, classes = baseline.probabilities.shape
    groups = baseline.groups or tuple(map(str, range(count)))
    both = ClassTable(
        baseline.names,
        np.concatenate([baseline.probabilities, run.probabilities]),
        np.concatenate([baseline.truth, run.truth]),
    )
    budget = _WORK // max(1, 4 * count * classes)
    chunk = max(1, min(64, _CELLS // max(1, 2 * count)))
    zero = np.zeros((1, count))

    def measures(of_baseline: Array, of_run: Array) -> Array:
        return both.statistics(np.concatenate([of_baseline, of_run], axis=1))

    def resampled(times: Array) -> Array:
        none = np.broadcast_to(zero, times.shape)
        return measures(none, times) - measures(times, none)

    once = np.ones((1, count))
    first, second = measures(once, zero)[0], measures(zero, once)[0]
    ends = resample_interval(resampled, groups, max(_LEAST, min(n, budget)), seed, level, chunk)

    def swapped(swaps: Array) -> Array:
        return measures(swaps, 1 - swaps) - measures(1 - swaps, swaps)

    changed = (baseline.probabilities != run.probabilities).any(axis=1)
    index = _indices([group for group, differs in zip(groups, changed, strict=True) if differs])
    places = np.full(count, -1)
    places[changed] = index
    p_values = _p_values(
        second - first, swapped, places, len(set(groups)), max(_LEAST, min(FLIPS, budget)), seed, chunk
    )
    found = []
    for column, (name, metric) in enumerate(baseline.columns()):
        same = baseline.binary and metric == "auc" and name != ALL  # each class's is that of both
        if metric == _LEFT_OUT or same:
            continue
        wins, ties, losses = _by_case(baseline, run, name, metric)
        found.append(
            Difference(
                name=name,
                metric=metric,
                baseline_mean=float(first[column]),
                run_mean=float(second[column]),
                difference=float(second[column] - first[column]),
                low=float(ends[column, 0]),
                high=float(ends[column, 1]),
                p=float(p_values[column]),
                p_holm=math.nan,
                family=0,
                wins=wins,
                ties=ties,
                losses=losses,
                pairs=count if math.isfinite(first[column]) else 0,
                filled=0,
                undefined=0,
                groups=len(set(groups)),
            )
        )
    return found


def _p_values(
    observed: Array,
    swapped: Callable[[Array], Array],
    places: NDArray[np.int64],
    groups: int,
    n: int,
    seed: int,
    chunk: int,
) -> Array:
    """The two-sided p value of each measure; NaN with fewer than two groups and where the measure is undefined.

    Args:
        observed: The differences (K,).
        swapped: From whose answers are swapped, (m, N) of 0 and 1, to the differences (m, K).
        places: For each case the index of its group among those that differ, -1 for others.
        groups: How many groups there are.
        n: Random swaps.
        seed: Of these.
        chunk: Swaps in a call.
    """
    if groups < 2:
        return np.full(len(observed), math.nan)
    differing = int(places.max(initial=-1)) + 1
    # Differences that are equal on paper differ in the last digits; they count as equal.
    threshold = np.abs(observed) - 1e-9
    extreme, total = np.zeros(len(observed)), 0
    # Swapping all groups turns the sign and nothing else, so the first one stays.
    exact = 2 ** max(0, differing - 1) if differing <= EXACT_GROUPS else 0
    generator = np.random.default_rng(seed)
    for start in range(0, exact or n, chunk):
        size = min(chunk, (exact or n) - start)
        if exact:
            swaps = (np.arange(start, start + size)[:, None] >> np.arange(differing)) & 1
        else:
            swaps = generator.integers(0, 2, (size, differing), np.int8)
        table = np.concatenate([swaps, np.zeros((size, 1), swaps.dtype)], axis=1)  # the last for what does not differ
        extreme += (np.abs(swapped(table[:, places].astype(np.float64))) >= threshold).sum(axis=0)
        total += size
    p = extreme / total if exact else (extreme + 1) / (total + 1)
    return np.where(np.isnan(observed), math.nan, p)


def _by_case(baseline: ClassTable, run: ClassTable, name: str, metric: str) -> tuple[int, int, int]:
    """In how many cases the run's answer is better, as good, and worse."""
    if (name, metric) == (ALL, "accuracy"):
        gain = run.correct - baseline.correct
    elif metric == "recall":
        column = baseline.names.index(name)
        having = baseline.true[:, column]
        gain = run.chosen[having, column].astype(np.float64) - baseline.chosen[having, column]
    else:
        return 0, 0, 0
    return int((gain > 0).sum()), int((gain == 0).sum()), int((gain < 0).sum())


def _indices(groups: Sequence[str]) -> NDArray[np.int64]:
    order: dict[str, int] = {}
    return np.array([order.setdefault(group, len(order)) for group in groups], np.int64)
