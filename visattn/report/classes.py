"""The content of a classifier's report: what its scored folder holds, turned into what the template shows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visattn.class_scored import read_labels, read_table
from visattn.errors import UserError
from visattn.metrics import Summary
from visattn.metrics.classes import ALL, CLASS_METRICS
from visattn.scored import AGAIN, CASES, SUMMARY, Row

SPLITS = {"val": "validation", "test": "test", "train": "training"}
MISTAKES = 12  # of the wrong answers that are listed, the surest first


@dataclass(frozen=True)
class Section:
    """What was measured on the cases of a split.

    Attributes:
        split: Its name in words.
        headline: The measures over all classes.
        classes: For each class its name, its measures, and how many cases have it.
        cases: How many cases.
        groups: How many groups they come from.
        right: How many answers are right; None where a case may have several classes.
        mistakes: Case, truth, prediction and probability of the surest wrong answers; none for several labels.
    """

    split: str
    headline: list[Summary]
    classes: list[tuple[str, list[Summary], int]]
    cases: int
    groups: int
    right: int | None
    mistakes: list[tuple[str, str, str, float]]


def class_context(summary: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What the page of a classification shows besides what every page does.

    Raises:
        UserError: The summary or the table of cases has another form.
    """
    labels = read_labels(summary, SUMMARY)
    table = read_table(rows, labels, CASES)
    entries = _entries(summary)
    by_class = {name: [entry for entry in entries if entry.name == name] for name in labels.names}
    counts = table.true.sum(axis=0).tolist()
    wrong = [] if labels.multi_label else [index for index, right in enumerate(table.correct) if not right]
    sure = sorted(
        ((float(table.probabilities[i][table.chosen[i]].max()), i) for i in wrong), key=lambda e: (-e[0], e[1])
    )
    section = Section(
        SPLITS.get(str(summary.get("split")), str(summary.get("split") or "")),
        [entry for entry in entries if entry.name == ALL],
        [(name, by_class[name], count) for name, count in zip(labels.names, counts, strict=True)],
        len(rows),
        len(set(table.groups)),
        None if labels.multi_label else int(table.correct.sum()),
        [(rows[i]["case"], rows[i]["truth"], rows[i]["prediction"], share) for share, i in sure[:MISTAKES]],
    )
    return {
        "sections": [section],
        "metrics": CLASS_METRICS,
        "counted": "cases",
        "classes": labels.names,
        "multi_label": labels.multi_label,
        "folds": _folds(summary.get("folds") or []),
    }


def _folds(folds: Any) -> list[tuple[str, float, float, int]]:
    """Name, AUC, accuracy and number of cases of each fold."""
    try:
        found = []
        for fold in folds:
            auc, accuracy = (fold["means"][f"{ALL}/{key}"] for key in ("auc", "accuracy"))
            numbers = [math.nan if value is None else float(value) for value in (auc, accuracy)]
            found.append((str(fold["run"]), numbers[0], numbers[1], int(fold["cases"])))
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{SUMMARY}: its folds have another form: {error}.\n{AGAIN}") from error


def _entries(summary: Mapping[str, Any]) -> list[Summary]:
    """The measures and intervals of the summary; null, which stands for undefined, becomes NaN."""
    found = []
    try:
        for entry in summary["metrics"]:
            numbers = {
                key: float("nan") if entry[key] is None else float(entry[key]) for key in ("mean", "low", "high")
            }
            if entry["metric"] not in CLASS_METRICS:
                raise ValueError(f"no measure is called {entry['metric']!r:.40}")
            found.append(
                Summary(
                    name=str(entry["name"]),
                    metric=entry["metric"],
                    cases=int(entry["cases"]),
                    undefined=int(entry["undefined"]),
                    **numbers,
                )
            )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{SUMMARY}: its metrics have another form: {error}.\n{AGAIN}") from error
    return found
