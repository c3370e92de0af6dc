"""The table of cases of a classifier: what `cases.csv` holds of it, written and read. This module alone knows its form.

One row for each case: `class` is the word all, `truth` and `prediction` are names of classes (with `|` between them
where a case may have several), `accuracy` the share of right answers, and `p_NAME` the probability of each class.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from visattn.class_labels import ClassLabels
from visattn.errors import UserError
from visattn.metrics.classes import ALL, ClassTable

TASK = "classification"

BETWEEN = "|"
"""Stands between the names of several classes of one case."""


def case_rows(keys: Sequence[tuple[str, str]], table: ClassTable) -> list[dict[str, Any]]:
    """The rows of cases; `keys` are their names and groups."""
    rows = []
    for (case, group), true, chosen, correct, probabilities in zip(
        keys, table.true, table.chosen, table.correct, table.probabilities, strict=True
    ):
        rows.append(
            {
                "case": case,
                "group": group,
                "class": ALL,
                "truth": BETWEEN.join(name for name, there in zip(table.names, true, strict=True) if there),
                "prediction": BETWEEN.join(name for name, there in zip(table.names, chosen, strict=True) if there),
                "accuracy": float(correct),
                **{f"p_{name}": float(p) for name, p in zip(table.names, probabilities, strict=True)},
            }
        )
    return rows


def is_classification(summary: Mapping[str, Any]) -> bool:
    """Whether a scored folder with this summary is a classifier's."""
    return summary.get("task") == TASK


def read_labels(summary: Mapping[str, Any], where: str) -> ClassLabels:
    """The classes of a scored folder, from its summary.

    Raises:
        UserError: It names none, or they make no sense.
    """
    config = summary.get("labels")
    if not isinstance(config, dict) or set(config) != {"classes", "multi_label"}:
        raise UserError(f"{where}: names no classes; was it written by a classification run?")
    return ClassLabels.from_config(**config)


def read_table(rows: Sequence[Mapping[str, str]], labels: ClassLabels, where: str) -> ClassTable:
    """The table that `case_rows` wrote, as `visattn.scored.read_cases` returns it.

    Raises:
        UserError: A column is missing, or a value makes no sense.
    """
    index = {name: number for number, name in enumerate(labels.names)}
    try:
        probabilities = np.array([[float(row[f"p_{name}"]) for name in labels.names] for row in rows], np.float64)
        if labels.multi_label:
            given = [{index[name] for name in row["truth"].split(BETWEEN) if name} for row in rows]
            truth = np.array([[int(k in true) for k in range(labels.channels)] for true in given], np.int64)
        else:
            truth = np.array([index[row["truth"]] for row in rows], np.int64)
        groups = tuple(row["group"] or row["case"] for row in rows)
        shape = (len(rows), labels.channels)
        return ClassTable(labels.names, probabilities.reshape(shape), truth.reshape(shape[: truth.ndim]), groups)
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: not the table of these classes: {error}") from error
