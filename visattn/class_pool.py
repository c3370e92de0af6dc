"""The pooled out-of-fold answers of a classifier's cross-validation, for `visattn.folds_pool`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from visattn.class_scored import TASK, read_labels, read_table
from visattn.class_scored import is_classification as summary_is_classification
from visattn.metrics.classes import ALL
from visattn.scored import CASES, SUMMARY, Row, Scored


def is_classification(part: Scored) -> bool:
    """Whether a scored folder is a classifier's."""
    return summary_is_classification(part.summary)


def pooled_scores(parts: Sequence[Scored]) -> dict[str, Any]:
    """What `summary.json` says of the cases of all folds together.

    Raises:
        UserError: A fold's table has another form.
    """
    folder = parts[0].folder
    labels = read_labels(parts[0].summary, str(folder / SUMMARY))
    table = read_table([row for part in parts for row in part.rows], labels, str(folder.parent / CASES))
    return {
        "task": TASK,
        "metrics": [asdict(entry) for entry in table.summarise()],
        "means": table.means(),
        "confusion": table.confusion(),
        "calibration": table.calibration(),
        "labels": labels.to_config(),
    }


def fold_means(part: Scored) -> dict[str, float]:
    """The measures of one fold on its own validation cases."""
    labels = read_labels(part.summary, str(part.folder / SUMMARY))
    return read_table(part.rows, labels, str(part.folder / CASES)).means()


def pooled_row(row: Row) -> dict[str, Any]:
    """A row of a fold as the table of all folds has it."""
    return {key: text for key, text in row.items() if key != "split"}


def tell(summary: dict[str, Any]) -> str:
    """The pooled and the folds' own AUC and accuracy, for the terminal."""
    lines = [
        f"{entry['run']:>10}: {_shown(entry['means'], f'{ALL}/auc', f'{ALL}/accuracy')}, {entry['cases']} cases"
        for entry in summary["folds"]
    ]
    pooled = _shown(summary["means"], f"{ALL}/auc", f"{ALL}/accuracy")
    return "\n".join([*lines, f"    pooled: {pooled}, {summary['cases']} cases"])


def _shown(means: dict[str, float | None], auc: str, accuracy: str) -> str:
    values = ["undefined" if means.get(key) is None else f"{means[key]:.4f}" for key in (auc, accuracy)]
    return f"AUC {values[0]}, accuracy {values[1]}"
