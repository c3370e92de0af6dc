"""What a comparison found, as plain values for the terminal, JSON, CSV and the page."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from visattn import NOTICE, __version__
from visattn.cells import cell
from visattn.compare.runs import Case, Run
from visattn.metrics import METRICS
from visattn.metrics.intervals import mean_of_means
from visattn.metrics.paired import Difference, compare_tables, gains, smallest_p
from visattn.metrics.table import MEAN

SHOWN = 3  # cases on either side that differ most
RESAMPLES = 2000
LEVEL = 0.95
FAMILY = "within each measure, over all runs and all classes with their mean"
_FEW = 10  # groups; with fewer, intervals cover less than they say


@dataclass(frozen=True)
class Change:
    """A case in which a run differs much from the baseline.

    Attributes:
        run: Index of the run.
        case: Group and name.
        gain: By how much the run is better in `Result.measure`; negative where it is worse.
    """

    run: int
    case: Case
    gain: float


@dataclass(frozen=True)
class Result:
    """A comparison.

    Attributes:
        baseline: What the runs are compared with.
        runs: The others.
        differences: For each of them, by measure and class.
        measure: By which cases are ranked: Dice where there is one.
        changes: For each run the cases that gain most, then those that lose most, each the largest first.
        notes: What a reader has to know about these numbers.
        classes: Names of the classes.
        overall: The name under which all classes are reported.
        task: segmentation or classification.
        gain: What `changes` are measured in, in words.
        test: What the p values are of.
    """

    baseline: Run
    runs: list[Run]
    differences: list[list[Difference]]
    measure: str
    changes: list[list[Change]]
    notes: list[str]
    classes: tuple[str, ...]
    overall: str
    task: str
    gain: str
    test: str

    @property
    def groups(self) -> int:
        """How many groups the cases come from."""
        return len(set(self.baseline.table.groups))

    def entry(self, run: int, metric: str, name: str | None = None) -> Difference | None:
        """The difference of one run in a measure, of all classes unless `name` says which."""
        wanted = (metric, name or self.overall)
        return next((entry for entry in self.differences[run] if (entry.metric, entry.name) == wanted), None)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; what is undefined is None."""
        return {
            "notice": NOTICE,
            "visattn": __version__,
            "baseline": self.baseline.name,
            "runs": [
                {"name": run.name, "folder": str(run.scored.folder), "recipe": run.recipe}
                for run in (self.baseline, *self.runs)
            ],
            "cases": len(self.baseline.table.cases),
            "groups": self.groups,
            "splits": sorted(set(self.baseline.splits.values())),
            "task": self.task,
            "classes": list(self.classes),
            "method": {
                "difference": "run - baseline",
                "interval": f"{LEVEL:.0%}, bootstrap over groups, {RESAMPLES} resamples",
                "p": self.test,
                "p_holm": f"Holm, {FAMILY}",
            },
            "differences": [
                {"run": run.name, **_plain(entry)}
                for run, found in zip(self.runs, self.differences, strict=True)
                for entry in found
            ],
            "largest": [
                {"run": self.runs[change.run].name, "group": change.case[0], "case": change.case[1],
                 "measure": self.gain, "gain": change.gain}
                for changes in self.changes for change in changes
            ],
            "notes": self.notes,
        }  # fmt: skip

    def to_csv(self) -> str:
        """The table of differences, safe to open in a spreadsheet."""
        text = io.StringIO()
        rows = self.to_json()["differences"]
        # Quoted whole, so that no line break in a name can be taken for the end of a row.
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: cell(value) for key, value in row.items()})
        return text.getvalue()


def compare(runs: Sequence[Run]) -> Result:
    """Compare runs with the first of them.

    Args:
        runs: As `read_runs` gives them: same cases, same classes, in the same order.
    """
    baseline, others = runs[0], list(runs[1:])
    differences = compare_tables(baseline.table, [run.table for run in others], RESAMPLES, level=LEVEL)
    common = [m for m in baseline.table.values if all(m in run.table.values for run in others)]
    measure = "dice" if "dice" in common else next(iter(common), "")
    changes = [_largest(baseline, run, index, measure) if measure else [] for index, run in enumerate(others)]
    classes = baseline.table.classes
    overall = classes[0] if len(classes) == 1 else MEAN
    test = "two-sided sign-flip test over groups"
    result = Result(
        baseline, others, differences, measure, changes, [], classes, overall, "segmentation", measure, test
    )
    result.notes.extend(_notes(result))
    return result


def _largest(baseline: Run, run: Run, index: int, measure: str) -> list[Change]:
    gain = gains(baseline.table, run.table, measure)
    order = sorted(
        (Change(index, baseline.table.cases[case], float(gain[case])) for case in np.flatnonzero(np.abs(gain) > 1e-9)),
        key=lambda change: (-abs(change.gain), change.case),
    )
    better = [change for change in order if change.gain > 0]
    return better[:SHOWN] + [change for change in order if change.gain < 0][:SHOWN]


def group_notes(result: Result) -> list[str]:
    """What has to be said of groups and splits, whatever is compared."""
    notes = []
    groups = result.groups
    if groups == 1:
        notes.append("All cases belong to one group, so there is neither an interval nor a p value.")
    elif groups < _FEW:
        notes.append(
            f"Only {groups} groups: intervals are too short, and no p value can be below {smallest_p(groups):.3g}."
        )
    if groups == len(result.baseline.table.cases):
        notes.append("Every case is its own group. If cases share a patient or video, score them with group_by.")
    if set(result.baseline.splits.values()) == {"val"}:
        notes.append("Validation cases: a run's best checkpoint was chosen on them, so expect less on new data.")
    return notes


def _notes(result: Result) -> list[str]:
    notes = group_notes(result)
    for run, found in zip(result.runs, result.differences, strict=True):
        filled = {entry.metric: entry.filled for entry in found if entry.name == result.overall and entry.filled}
        if filled:
            metric = "dice" if "dice" in filled else next(iter(filled))
            alone = [mean_of_means(one.table.values[metric]) for one in (result.baseline, run)]
            values = "one value" if filled[metric] == 1 else f"{filled[metric]} values"
            notes.append(
                f"{run.name}: {values} of {metric} undefined for one of the two alone, which was right to find nothing "
                f"there: counted as {METRICS[metric].best:g}, so the means differ from those that each reports alone, "
                f"{alone[0]:.4f} for the baseline and {alone[1]:.4f} for the run."
            )
        lost = set(run.table.values) ^ set(result.baseline.table.values)
        if lost:
            notes.append(f"{run.name}: not compared, as one of the two lacks it: {', '.join(sorted(lost))}.")
    return notes


def _plain(entry: Difference) -> dict[str, Any]:
    values = asdict(entry)
    values["class"] = values.pop("name")
    order = ["class", *(key for key in values if key != "class")]
    return {key: None if isinstance(values[key], float) and math.isnan(values[key]) else values[key] for key in order}
