"""A table of cases as arrays: what means, intervals and comparisons are computed from."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visattn.metrics.cases import METRICS

MEAN = "mean"
"""What the mean of several classes is called in tables."""


@dataclass(frozen=True)
class CaseTable:
    """The measures of every case and class.

    Attributes:
        cases: Group and name of each case; together they are unique.
        classes: The class names.
        values: Measure to (cases, classes), NaN where undefined, in the order of `METRICS`.
    """

    cases: tuple[tuple[str, str], ...]
    classes: tuple[str, ...]
    values: dict[str, NDArray[np.float64]]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> "CaseTable":
        """Arrange rows as those of `cases.csv`.

        Args:
            rows: Each with `case`, `class`, optionally `group` (default: the case), and measures, None or an empty
                text where undefined. Other keys are left alone. Every case needs a row for each class.

        Raises:
            ValueError: A case lacks a class or has it twice.
        """
        cases: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
        for row in rows:
            case = cases.setdefault((str(row.get("group") or row["case"]), str(row["case"])), {})
            if str(row["class"]) in case:
                raise ValueError(f"case '{row['case']}' has class '{row['class']}' twice")
            case[str(row["class"])] = row
        if not cases:
            return cls((), (), {})
        first = next(iter(cases.values()))
        names = tuple(first)
        for (_, case_name), case in cases.items():
            if set(case) != set(names):
                raise ValueError(f"case '{case_name}' has the classes {sorted(case)}, others have {sorted(names)}")
        values = {
            metric: np.array([[_number(case[name].get(metric)) for name in names] for case in cases.values()])
            for metric in METRICS
            if metric in first[names[0]]
        }
        return cls(tuple(cases), names, values)

    @property
    def groups(self) -> list[str]:
        """The group of each case."""
        return [group for group, _ in self.cases]

    def columns(self, metric: str) -> dict[str, NDArray[np.float64]]:
        """Class to its values (cases, 1); with several classes also, as `MEAN`, all of them (cases, classes)."""
        values = self.values[metric]
        columns = {name: values[:, [index]] for index, name in enumerate(self.classes)}
        if len(self.classes) > 1:
            columns[MEAN] = values
        return columns

    def like(self, other: "CaseTable") -> "CaseTable":
        """The same table with cases and classes in the order of `other`.

        Raises:
            ValueError: The two have different cases or classes.
        """
        if set(self.cases) != set(other.cases) or set(self.classes) != set(other.classes):
            raise ValueError("the tables hold different cases or classes")
        case_index = {case: index for index, case in enumerate(self.cases)}
        class_index = {name: index for index, name in enumerate(self.classes)}
        order = np.ix_([case_index[case] for case in other.cases], [class_index[name] for name in other.classes])
        return CaseTable(other.cases, other.classes, {metric: values[order] for metric, values in self.values.items()})


def _number(value: Any) -> float:
    return math.nan if value is None or value == "" else float(value)
