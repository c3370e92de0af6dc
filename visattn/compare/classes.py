"""Runs of classifiers, compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from visattn.compare.result import LEVEL, RESAMPLES, SHOWN, Change, Result, group_notes
from visattn.compare.runs import Run
from visattn.metrics.classes import ALL, ClassTable
from visattn.metrics.paired_classes import compare_class_tables, truth_gains

MEASURE = "auc"
GAIN = "probability of the truth"


@dataclass(frozen=True)
class Answer:
    """A case that baseline and run answer very differently.

    Attributes:
        case: Its name.
        group: Its group; empty where the case is its own.
        truth: Its classes.
        baseline: What the baseline says, with the probability of that.
        run: What the run says.
        gain: By how much more probability the run gives to the truth.
    """

    case: str
    group: str
    truth: str
    baseline: str
    run: str
    gain: float


def compare_classes(runs: Sequence[Run]) -> Result:
    """Compare runs with the first of them.

    Args:
        runs: As `read_runs` gives them, all of classifiers.
    """
    tables = [_answers(run) for run in runs]
    baseline, others = runs[0], list(runs[1:])
    differences = compare_class_tables(tables[0], tables[1:], RESAMPLES, level=LEVEL)
    changes = [_largest(baseline, tables[0], table, index) for index, table in enumerate(tables[1:])]
    result = Result(
        baseline, others, differences, MEASURE, changes, [], tables[0].names, ALL, "classification", GAIN,
        "two-sided permutation test that swaps the answers of the two runs within groups",
    )  # fmt: skip
    result.notes.extend(group_notes(result))
    return result


def answers(result: Result, change: Change) -> Answer:
    """What baseline and run say of a case."""
    row = result.baseline.table.cases.index(change.case)
    group, case = change.case
    first, second = (_answers(run) for run in (result.baseline, result.runs[change.run]))
    truth = _named(first.names, first.true[row])
    return Answer(case, "" if group == case else group, truth, _said(first, row), _said(second, row), change.gain)


def _answers(run: Run) -> ClassTable:
    assert run.answers is not None  # the caller asked
    return run.answers


def _said(table: ClassTable, row: int) -> str:
    chosen = table.chosen[row]
    shares = table.probabilities[row]
    named = [f"{name} {share:.3f}" for name, share, there in zip(table.names, shares, chosen, strict=True) if there]
    return ", ".join(named) or "none"


def _named(names: Sequence[str], there: Sequence[bool]) -> str:
    return ", ".join(name for name, has in zip(names, there, strict=True) if has) or "none"


def _largest(baseline: Run, first: ClassTable, second: ClassTable, index: int) -> list[Change]:
    gain = truth_gains(first, second)
    order = sorted(
        (Change(index, baseline.table.cases[case], float(gain[case])) for case in np.flatnonzero(np.abs(gain) > 1e-9)),
        key=lambda change: (-abs(change.gain), change.case),
    )
    better = [change for change in order if change.gain > 0]
    return better[:SHOWN] + [change for change in order if change.gain < 0][:SHOWN]
