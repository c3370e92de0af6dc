"""Dividing cases into training, validation and test: groups never part, and the result is a function of the seed.

A group is a patient or a video. It goes to one part as a whole, because two frames of one video in two parts would
turn validation into memory.
"""

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from visattn.data.cases import Case
from visattn.errors import UserError, unknown
from visattn.files import write_text_atomic

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """The `split` block of a recipe.

    Args:
        val: Share of the cases for validation, above 0 and below 1; unused with `folds` or `files`.
        test: Share of the cases that is set aside for `visattn test`.
        group_by: What must not be parted: a regular expression with one group, matched against the file's stem, or
            FILE.csv:COLUMN, a table whose first column holds file names. null: each image stands alone.
        folds: Number of folds for cross-validation in place of `val`.
        fold: The fold to validate on, from 0.
        files: A JSON file {"train": [...], "val": [...], "test": [...]} of case names, such as a run writes.
    """

    val: float = 0.1
    test: float = 0.0
    group_by: str | None = None
    folds: int | None = None
    fold: int = 0
    files: str | None = None

    @classmethod
    def from_config(cls, config: "Split | Mapping[str, Any] | None") -> "Split":
        """Read the block; checks what can be checked without the data."""
        if isinstance(config, Split):
            return config
        known = [entry.name for entry in fields(cls)]
        for key in config or {}:
            if key not in known:
                raise unknown("key of data.split", str(key), known)
        split = cls(**dict(config or {}))
        for key in ("group_by", "files"):
            value = getattr(split, key)
            if value is not None and not isinstance(value, str):
                raise UserError(f"data.split.{key}: needs a text, got {value!r}")
        for key in ("val", "test"):
            value = getattr(split, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise UserError(f"data.split.{key}: needs a share of 0 to below 1, got {value!r}")
        if split.folds is None and split.files is None and (split.val == 0 or split.val + split.test >= 1):
            raise UserError(
                f"data.split: val {split.val} and test {split.test} must leave something for each part; "
                "the best epoch is chosen on val, so val cannot be 0"
            )
        if split.folds is not None and not (isinstance(split.folds, int) and split.folds >= 2):
            raise UserError(f"data.split.folds: needs a whole number of at least 2, got {split.folds!r}")
        if split.folds is not None and not (isinstance(split.fold, int) and 0 <= split.fold < split.folds):
            raise UserError(
                f"data.split.fold: there are {split.folds} folds, 0 to {split.folds - 1}; got {split.fold!r}"
            )
        return split


def find_groups(cases: Sequence[Case], group_by: str | None) -> list[str]:
    """The group of each case.

    Raises:
        UserError: The expression or the table is no good, or a case is in no group.
    """
    if group_by is None:
        return [case.name for case in cases]
    table = re.fullmatch(r"(.+\.csv):(.+)", group_by)
    if table:
        groups = _groups_of_table(cases, Path(table[1]).expanduser(), table[2])
        means = f"in the first column of {table[1]}"
    else:
        groups = _groups_of_expression(cases, group_by)
        means = f"matched by {group_by!r}"
    missing = [case.name for case, group in zip(cases, groups, strict=True) if group is None]
    if missing:
        raise UserError(
            f"data.split.group_by: {len(missing)} of {len(cases)} cases are not {means}: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
        )
    return [str(group) for group in groups]


def split_cases(cases: Sequence[Case], foreground: Sequence[bool], split: Split, seed: int) -> dict[str, list[Case]]:
    """Divide the cases, which carry their groups, into train, val and test.

    Groups with and without foreground are divided alike, so that empty images do not gather in one part.

    Raises:
        UserError: There are too few groups, or the file of `split.files` does not fit the cases.
    """
    if split.files is not None:
        return _from_file(cases, Path(split.files).expanduser())
    order = sorted(range(len(cases)), key=lambda i: cases[i].name)
    groups: dict[str, list[int]] = defaultdict(list)
    for i in order:
        groups[cases[i].group].append(i)
    needed = (split.folds or 2) + (split.test > 0)
    if len(groups) < needed:
        raise UserError(
            f"data.split: {len(cases)} cases in {len(groups)} groups cannot be divided into {needed} parts; "
            "groups stay whole (group_by)"
        )
    rng = np.random.default_rng(seed)
    filled = {name: any(foreground[i] for i in members) for name, members in groups.items()}
    rest = list(groups)
    test = _draw(rest, groups, filled, split.test, rng, keep=split.folds or 2)
    rest = [name for name in rest if name not in test]
    if split.folds is not None:
        val = _folds(rest, groups, filled, split.folds, rng)[split.fold]
    else:
        val = _draw(rest, groups, filled, split.val * len(cases) / sum(len(groups[g]) for g in rest), rng, keep=1)
    part = {name: "test" if name in test else "val" if name in val else "train" for name in groups}
    result: dict[str, list[Case]] = {name: [] for name in PARTS}
    for i in order:
        result[part[cases[i].group]].append(cases[i])
    return result


def write_splits(path: Path | str, cases: Mapping[str, Sequence[Case]]) -> None:
    """Write the names of the cases of each part, as `split.files` reads them."""
    write_text_atomic(path, json.dumps({part: [case.name for case in cases[part]] for part in PARTS}, indent=1) + "\n")


def _draw(
    names: Sequence[str],
    groups: Mapping[str, Sequence[int]],
    filled: Mapping[str, bool],
    share: float,
    rng: np.random.Generator,
    keep: int,
) -> set[str]:
    """Choose groups that hold about `share` of the cases, of those with and of those without foreground.

    At least one group is chosen, and at least `keep` are left. Within a stratum the count is off by at most half of
    its largest group.
    """
    chosen: set[str] = set()
    shuffled = [names[i] for i in rng.permutation(len(names))]
    if share == 0:
        return chosen
    owed = 0.0  # what rounding left over in one stratum is made up for in the next
    for stratum in (True, False):
        members = [name for name in shuffled if filled[name] is stratum]
        goal = share * sum(len(groups[name]) for name in members) + owed
        count = 0
        for name in members:
            if len(chosen) < len(names) - keep and abs(count + len(groups[name]) - goal) < abs(count - goal):
                chosen.add(name)
                count += len(groups[name])
        owed = goal - count
    return chosen or {min(shuffled, key=lambda name: len(groups[name]))}


def _folds(
    names: Sequence[str],
    groups: Mapping[str, Sequence[int]],
    filled: Mapping[str, bool],
    folds: int,
    rng: np.random.Generator,
) -> list[set[str]]:
    """Deal the groups, the largest first, each to the fold that has least of its kind, then least of all."""
    result: list[set[str]] = [set() for _ in range(folds)]
    counts = np.zeros((folds, 2), np.int64)
    shuffled = [names[i] for i in rng.permutation(len(names))]
    for name in sorted(shuffled, key=lambda name: -len(groups[name])):
        kind = int(filled[name])
        fold = min(range(folds), key=lambda f: (counts[f, kind], counts[f].sum()))
        result[fold].add(name)
        counts[fold, kind] += len(groups[name])
    return result


def _groups_of_expression(cases: Sequence[Case], expression: str) -> list[str | None]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(f"data.split.group_by: {expression!r} is no regular expression ({error})") from None
    if pattern.groups != 1:
        raise UserError(
            f"data.split.group_by: {expression!r} needs exactly one group in parentheses, as in '^(patient[0-9]+)_', "
            "or FILE.csv:COLUMN"
        )
    matches = [pattern.search(case.image.stem) for case in cases]
    return [match[1] if match else None for match in matches]


def _groups_of_table(cases: Sequence[Case], path: Path, column: str) -> list[str | None]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.split.group_by: cannot read {path} ({error})") from None
    if not rows:
        raise UserError(f"data.split.group_by: {path} holds no rows")
    first = next(iter(rows[0]))
    if column not in rows[0]:
        raise unknown(f"column of {path}", column, [key for key in rows[0] if key])
    groups: dict[str, str] = {}
    for row in rows:
        stem = Path(row[first] or "").stem if Path(row[first] or "").suffix else (row[first] or "")
        value = (row[column] or "").strip()
        if groups.setdefault(stem, value) != value:
            raise UserError(f"data.split.group_by: {path} puts '{stem}' into '{groups[stem]}' and into '{value}'")
    return [groups.get(case.image.stem) or None for case in cases]


def _from_file(cases: Sequence[Case], path: Path) -> dict[str, list[Case]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.split.files: cannot read {path} ({error})") from None
    if not isinstance(content, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in content.values()
    ):
        raise UserError(
            f'data.split.files: {path} must hold {{"train": [...], "val": [...], "test": [...]}} of case names'
        )
    for part in content:
        if part not in PARTS:
            raise unknown(f"part in {path}", str(part), PARTS)
    known = {case.name: case for case in cases}
    names = [name for part in content.values() for name in part]
    strange = [name for name in names if name not in known]
    if strange:
        raise UserError(
            f"data.split.files: {path} names {len(strange)} cases that are not in the data: "
            f"{', '.join(strange[:4])}{', ...' if len(strange) > 4 else ''}"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"data.split.files: {path} names {twice[0]} twice; a case belongs to one part")
    for part in ("train", "val"):
        if not content.get(part):
            raise UserError(f"data.split.files: {path} names no case for {part}")
    result = {part: [known[name] for name in content.get(part, [])] for part in PARTS}
    homes: dict[str, str] = {}
    for part, members in result.items():
        for case in members:
            if homes.setdefault(case.group, part) != part:
                raise UserError(
                    f"data.split.files: {path} parts the group '{case.group}' into {homes[case.group]} and {part}"
                )
    return result
