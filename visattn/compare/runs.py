"""Reading the runs of a comparison, and refusing those that were not scored on the same things."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from visattn.class_scored import is_classification, read_labels, read_table
from visattn.data.nifti import collect_warnings
from visattn.errors import UserError
from visattn.files import read_small
from visattn.labels import Labels
from visattn.mask_files import read_any_mask
from visattn.metrics.classes import ALL, ClassTable
from visattn.metrics.table import CaseTable
from visattn.scored import CASES, SUMMARY, Input, Scored, read_scored

_NAMED = 4  # cases that a refusal names on either side
# Folders whose name says nothing without that of the folder around them: evaluations of a run, folds, its time.
_BARE_NAME = re.compile(r"test|validate|fold-\d+|\d{8}-\d{6}(-\d+)?")

Case = tuple[str, str]
"""Group and name; a case without a group is its own."""


@dataclass(frozen=True)
class Run:
    """A scored folder in a comparison.

    Attributes:
        name: What it is called; no two runs of a comparison have the same.
        scored: What was read.
        table: Its measures, with cases and classes in the baseline's order.
        splits: Of each case.
        answers: What a classifier made of the cases, in the order of the table; None for segmentation.
    """

    name: str
    scored: Scored
    table: CaseTable
    splits: dict[Case, str]
    answers: ClassTable | None = None

    @property
    def recipe(self) -> str | None:
        """The recipe it was trained by, where it is a run of ours."""
        name = self.scored.summary.get("recipe")
        return name if isinstance(name, str) else None

    @property
    def data(self) -> str:
        """The data set in words; empty where the summary does not say."""
        about = self.scored.summary.get("data")
        return str(about.get("description", "")) if isinstance(about, dict) else ""


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read scored folders that are to be compared, the baseline first.

    Raises:
        UserError: There are fewer than two, one cannot be read, or they differ in cases, classes, splits, labels or
            truth.
    """
    if len(folders) < 2:
        raise UserError(
            f"compare: needs at least two runs, got {'only ' + str(folders[0]) if folders else 'none'}.\n"
            "Name the baseline first, as in visattn compare BASELINE RUN"
        )
    runs: list[Run] = []
    for folder, name in zip(folders, display_names(folders), strict=True):
        run = _read(folder, name)
        if runs:
            _check_comparable(runs[0], run)
            run = _like(run, runs[0])
        runs.append(run)
    return runs


def display_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart; a folder that is given twice is numbered.

    Names that say nothing alone, such as `test` or a time, stand with the folder around them. The last folder of
    MASKS/evaluation, where `visattn evaluate` writes, is left out.
    """
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    paths = [parts[:-1] if parts[-1] == "evaluation" and len(parts) > 2 else parts for parts in paths]
    names = [_name(parts, set(paths) - {parts}) for parts in paths]
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            names[index] = f"{name} ({seen[name]})"
    return names


def inputs_of(run: Run) -> dict[Case, Input]:
    """Where the files of each case are, as far as the run says so."""
    return {(group or case, case): entry for (group, case), entry in run.scored.inputs.items()}


def printable(text: str, limit: int = 60) -> str:
    """`text` on one line, without what would steer a terminal, and cut if it is long."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    return clean if len(clean) <= limit else f"{clean[: limit - 1]}…"


def _name(parts: tuple[str, ...], others: set[tuple[str, ...]]) -> str:
    length = 1
    while length < len(parts) and (
        _BARE_NAME.fullmatch(parts[-length]) or any(other[-length:] == parts[-length:] for other in others)
    ):
        length += 1
    return "/".join(part.strip("/") for part in parts[-length:])


def _read(folder: Path, name: str) -> Run:
    inside = folder / "evaluation"
    if folder.is_dir() and not (folder / CASES).is_file() and (inside / CASES).is_file():
        raise UserError(f"{folder}: holds no scores itself. Did you mean {inside}?")
    scored = read_scored(folder)
    splits = {(row["group"] or row["case"], row["case"]): row.get("split", "") for row in scored.rows}
    if is_classification(scored.summary):
        labels = read_labels(scored.summary, str(folder / SUMMARY))
        answers = read_table(scored.rows, labels, str(folder / CASES))
        cases = tuple((row["group"] or row["case"], row["case"]) for row in scored.rows)
        if len(set(cases)) < len(cases):
            raise UserError(f"{folder / CASES}: holds a case twice.\nScore the cases again.")
        return Run(name, scored, CaseTable(cases, (ALL,), {"accuracy": answers.correct[:, None]}), splits, answers)
    try:
        table = CaseTable.from_rows(scored.rows)
    except ValueError as error:
        raise UserError(f"{folder / CASES}: {error}.\nScore the cases again.") from error
    if any(np.isinf(values).any() for values in table.values.values()):
        raise UserError(f"{folder / CASES}: holds infinite values.\nLeave a cell empty where a measure is undefined.")
    return Run(name, scored, table, splits)


def _like(run: Run, baseline: Run) -> Run:
    """The same run with cases and classes in the order of the baseline's."""
    table = run.table.like(baseline.table)
    if run.answers is None:
        return replace(run, table=table)
    order = {case: index for index, case in enumerate(run.table.cases)}
    rows = np.array([order[case] for case in table.cases], np.int64)
    groups = tuple(run.answers.groups[row] for row in rows)
    answers = ClassTable(run.answers.names, run.answers.probabilities[rows], run.answers.truth[rows], groups)
    return replace(run, table=table, answers=answers)


def _check_comparable(baseline: Run, run: Run) -> None:
    if (baseline.answers is None) != (run.answers is None):
        kinds = ["classification" if one.answers is not None else "segmentation" for one in (baseline, run)]
        raise UserError(
            f"{_of(baseline)} is a {kinds[0]} and {_of(run)} a {kinds[1]}: they have no measure in common.\n"
            "Compare runs of one task."
        )
    if baseline.answers is not None and run.answers is not None:
        _check_classes(baseline, run, baseline.answers, run.answers)
        return
    # Labels and classes first: they say most about what went wrong where several things differ.
    if set(baseline.table.classes) != set(run.table.classes):
        raise UserError(
            f"{_of(baseline)} and {_of(run)} score different classes.\n"
            f"{_of(baseline)}: {_listed(baseline.table.classes)}\n{_of(run)}: {_listed(run.table.classes)}\n"
            "Score both with the same labels; visattn evaluate --labels does so for the masks of any tool."
        )
    ours, theirs = baseline.scored.labels.to_config(), run.scored.labels.to_config()
    if ours != theirs:
        key = next(key for key in ours if ours[key] != theirs[key])
        raise UserError(
            f"{_of(baseline)} and {_of(run)} were scored with different labels, in '{key}':\n"
            f"{_of(baseline)}: {printable(str(ours[key]), 200)}\n{_of(run)}: {printable(str(theirs[key]), 200)}\n"
            "Score both with the same labels; visattn evaluate --labels does so for the masks of any tool."
        )
    _check_cases(baseline, run)
    _check_splits(baseline, run)
    _check_truth(baseline, run)


def _check_classes(baseline: Run, run: Run, first: ClassTable, second: ClassTable) -> None:
    if (first.names, first.multi_label) != (second.names, second.multi_label):
        kinds = [", several at once" if one.multi_label else "" for one in (first, second)]
        raise UserError(
            f"{_of(baseline)} and {_of(run)} tell different classes apart.\n"
            f"{_of(baseline)}: {_listed(first.names)}{kinds[0]}\n{_of(run)}: {_listed(second.names)}{kinds[1]}\n"
            "Compare runs with the same classes in the same order."
        )
    _check_cases(baseline, run)
    _check_splits(baseline, run)
    ours, theirs = (
        dict(zip(one.table.cases, table.true, strict=True)) for one, table in ((baseline, first), (run, second))
    )
    wrong = [case for case in baseline.table.cases if not np.array_equal(ours[case], theirs[case])]
    if wrong:
        classes = [
            ", ".join(name for name, has in zip(first.names, true[wrong[0]], strict=True) if has) or "none"
            for true in (ours, theirs)
        ]
        raise UserError(
            f"The true classes of {len(wrong)} cases differ, as of '{_case(wrong[0])}': {printable(classes[0])} in "
            f"{_of(baseline)}, {printable(classes[1])} in {_of(run)}.\nScore both runs against the same classes."
        )


def _check_cases(baseline: Run, run: Run) -> None:
    ours, theirs = set(baseline.table.cases), set(run.table.cases)
    if ours == theirs:
        return
    if Counter(case for _, case in ours) == Counter(case for _, case in theirs):
        group, case = next(key for key in baseline.table.cases if key not in theirs)
        other = next(group for group, name in run.table.cases if name == case and (group, name) not in ours)
        raise UserError(
            f"{_of(baseline)} and {_of(run)} hold the same cases in different groups: '{printable(case)}' is in "
            f"'{printable(group)}' and in '{printable(other)}'.\n"
            "Score both with the same group_by: the groups decide how sure a difference is."
        )
    lines = [f"{_of(baseline)} and {_of(run)} score different cases: {len(ours)} and {len(theirs)}."]
    for one, keys, others in ((baseline, run.table.cases, ours), (run, baseline.table.cases, theirs)):
        missing = [_case(key) for key in keys if key not in others]
        if missing:
            lines.append(f"{len(missing)} missing from {_of(one)}: {_listed(missing)}")
    lines.append("Compare runs of one split, or score the masks of both on the same true masks with visattn evaluate.")
    raise UserError("\n".join(lines))


def _check_splits(baseline: Run, run: Run) -> None:
    for case, split in baseline.splits.items():
        # What `visattn evaluate` scored belongs to no split.
        if split and run.splits[case] and split != run.splits[case]:
            raise UserError(
                f"{_of(baseline)} and {_of(run)} were scored on different splits: '{_case(case)}' is in "
                f"'{printable(split)}' and in '{printable(run.splits[case])}'.\n"
                "Compare RUN/test with RUN/test, or a run folder (validation cases) with a run folder."
            )


def _check_truth(baseline: Run, run: Run) -> None:
    """Refuse where the true masks differ: by the scores, or by the files where both runs name some."""
    if "fpr_empty" in baseline.table.values and "fpr_empty" in run.table.values:
        _check_presence(baseline, run)
    ours, theirs = inputs_of(baseline), inputs_of(run)
    for case in baseline.table.cases:
        first, second = (inputs[case].truth if case in inputs else None for inputs in (ours, theirs))
        if first is None or second is None or first == second:
            continue
        try:
            same = read_small(first) == read_small(second) or _same_mask(baseline.scored.labels, first, second)
        except (OSError, UserError):
            continue  # gone or replaced since: there is nothing to compare
        if not same:
            paths = "\n".join(printable(str(path), 200) for path in (first, second))
            raise UserError(
                f"The true masks of '{_case(case)}' differ:\n{paths}\n"
                "Score both runs against the same true masks with visattn evaluate."
            )


def _same_mask(labels: Labels, first: Path, second: Path) -> bool:
    with collect_warnings():  # of headers, told when the cases were scored
        masks = [read_any_mask(path, labels) for path in (first, second)]
    places = [mask.geometry for mask in masks]
    if places[0] is not None and places[1] is not None and not places[0].same_grid(places[1]):
        return False
    return np.array_equal(masks[0].indices, masks[1].indices)


def _check_presence(baseline: Run, run: Run) -> None:
    """Refuse where a class was in the true mask for one run and not for the other."""
    empty, other = (np.isfinite(one.table.values["fpr_empty"]) for one in (baseline, run))
    for case, name in np.argwhere(empty != other):
        with_class, without = (run, baseline) if empty[case, name] else (baseline, run)
        lesion = printable(baseline.table.classes[name])
        raise UserError(
            f"'{_case(baseline.table.cases[case])}' holds '{lesion}' in the true mask of {_of(with_class)}, but not in "
            f"that of {_of(without)}.\nThey were scored against different true masks. Score both again with visattn "
            "evaluate."
        )


def _of(run: Run) -> str:
    return printable(run.name)


def _case(key: Case) -> str:
    group, case = key
    return printable(case) if group == case else f"{printable(case)} (group {printable(group)})"


def _listed(names: Sequence[Any]) -> str:
    shown = ", ".join(printable(str(name), 40) for name in names[:_NAMED])
    return shown + (", ..." if len(names) > _NAMED else "")
