"""Dividing cases into training, validation and test: groups never part, and the result is a function of the seed.

A group is a patient or a video. It goes to one part as a whole, because two frames of one video in two parts would
turn validation into memory.

Cases with each class, and those with none, are shared out alike (stratification). Groups are dealt to folds one by one,
those that hold most of the data or most of something rare first, each to the fold where it adds least to

    D = sum over folds f and contents c of (n_fc / T_c - 1 / K)^2

with n_fc the cases of content c in fold f, T_c those of all folds, K the number of folds; the contents are: any case, a
case without foreground, a case with class 1, with class 2, ... Since the fold chosen is never worse than the average
fold, D ends at most at (1 - 1 / K) sum over groups g and contents c of (n_gc / T_c)^2, which is what dealing at random
has on average. After Sechidis, Tsoumakas, Vlahavas, "On the Stratification of Multi-Label Data", ECML 2011, whose order
(rarest label first) and rule (most wanted label) are here one weighted sum, so that groups can be dealt whole.
"""

import csv
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from visattn.data.cases import Case
from visattn.data.expression import match_one_group
from visattn.errors import UserError, unknown
from visattn.files import read_small, write_text_atomic

PARTS = ("train", "val", "test")
_COLUMNS = 1000  # of a table of groups


class Member(Protocol):
    """A case, as far as dividing cases goes."""

    @property
    def name(self) -> str:
        """Unique name."""
        ...

    @property
    def group(self) -> str:
        """What must not be parted."""
        ...


M = TypeVar("M", bound=Member)


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
        files: A JSON file {"train": [...], "val": [...], "test": [...]} of case names, such as a run writes; or a list
            of them, one for each fold, such as nnU-Net and `visattn fit --folds` write, of which `fold` is taken.
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
        if isinstance(split.fold, bool) or not isinstance(split.fold, int) or split.fold < 0:
            raise UserError(f"data.split.fold: needs a whole number from 0 on, got {split.fold!r}")
        return split


def find_groups(cases: Sequence[Member], group_by: str | None) -> list[str]:
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


def split_cases(cases: Sequence[M], classes: Sequence[Collection[int]], split: Split, seed: int) -> dict[str, list[M]]:
    """Divide the cases, which carry their groups, into train, val and test.

    Groups are divided alike by the rarest class that they hold, so that neither a rare class nor empty images gather in
    one part.

    Args:
        cases: The cases.
        classes: For each case the classes besides the background that its mask holds; none for an empty mask.
        split: How to divide them.
        seed: Another seed, another division.

    Raises:
        UserError: There are too few groups, or the file of `split.files` does not fit the cases.
    """
    if split.files is not None:
        return _from_file(cases, Path(split.files).expanduser(), split.fold)
    if split.folds is not None:
        return fold_cases(cases, classes, split, seed)[split.fold]
    groups, rng = _groups(cases, 2 + (split.test > 0)), np.random.default_rng(seed)
    kinds = _kinds(groups, classes)
    test = _draw(list(groups), groups, kinds, split.test, rng, keep=2)
    rest = [name for name in groups if name not in test]
    share = split.val * len(cases) / sum(len(groups[name]) for name in rest)
    return _parts(cases, test, _draw(rest, groups, kinds, share, rng, keep=1))


def fold_cases(
    cases: Sequence[M], classes: Sequence[Collection[int]], split: Split, seed: int
) -> list[dict[str, list[M]]]:
    """Train, val and test cases of each of `split.folds` folds; a case that is no test case validates in one of them.

    Args:
        cases: The cases, which carry their groups.
        classes: As for `split_cases`.
        split: `folds` says how many, `test` which share is set aside from all of them.
        seed: Another seed, other folds.

    Raises:
        UserError: There are fewer groups than folds.
    """
    assert split.folds is not None
    groups, rng = _groups(cases, split.folds + (split.test > 0)), np.random.default_rng(seed)
    test = _draw(list(groups), groups, _kinds(groups, classes), split.test, rng, keep=split.folds)
    rest = {name: members for name, members in groups.items() if name not in test}
    return [_parts(cases, test, val) for val in _deal(rest, classes, split.folds, rng)]


def write_splits(path: Path | str, cases: Mapping[str, Sequence[Member]]) -> None:
    """Write the names of the cases of each part, as `split.files` reads them."""
    write_text_atomic(path, json.dumps(part_names(cases), indent=1) + "\n")


def part_names(cases: Mapping[str, Sequence[Member]]) -> dict[str, list[str]]:
    """The names of the cases of each part."""
    return {part: [case.name for case in cases[part]] for part in PARTS}


def _groups(cases: Sequence[Member], needed: int) -> dict[str, list[int]]:
    """The cases of each group, by position, in the order of the cases' names: files may be listed in any order."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(cases)), key=lambda i: cases[i].name):
        groups[cases[i].group].append(i)
    if len(groups) < needed:
        raise UserError(
            f"data.split: {len(cases)} cases in {len(groups)} groups cannot be divided into {needed} parts; "
            "groups stay whole (group_by)"
        )
    return dict(groups)


def _parts(cases: Sequence[M], test: Collection[str], val: Collection[str]) -> dict[str, list[M]]:
    result: dict[str, list[M]] = {name: [] for name in PARTS}
    for case in sorted(cases, key=lambda case: case.name):
        result["test" if case.group in test else "val" if case.group in val else "train"].append(case)
    return result


def _kinds(groups: Mapping[str, Sequence[int]], classes: Sequence[Collection[int]]) -> dict[str, int]:
    """For each group the rank of the rarest class in it, 0 for the rarest of all; empty groups come last."""
    counts = Counter(c for found in classes for c in set(found))
    rank = {c: i for i, (c, _) in enumerate(sorted(counts.items(), key=lambda item: (item[1], item[0])))}
    return {
        name: min((rank[c] for i in group for c in classes[i]), default=len(rank)) for name, group in groups.items()
    }


def _draw(
    names: Sequence[str],
    groups: Mapping[str, Sequence[int]],
    kinds: Mapping[str, int],
    share: float,
    rng: np.random.Generator,
    keep: int,
) -> set[str]:
    """Choose groups that hold about `share` of the cases, of those of each kind.

    At least one group is chosen, and at least `keep` are left. Within a stratum the count is off by at most half of
    its largest group.
    """
    chosen: set[str] = set()
    shuffled = [names[i] for i in rng.permutation(len(names))]
    if share == 0:
        return chosen
    owed = 0.0  # what rounding left over in one stratum is made up for in the next
    for kind in sorted({kinds[name] for name in names}):
        members = [name for name in shuffled if kinds[name] == kind]
        goal = share * sum(len(groups[name]) for name in members) + owed
        count = 0
        for name in members:
            if len(chosen) < len(names) - keep and abs(count + len(groups[name]) - goal) < abs(count - goal):
                chosen.add(name)
                count += len(groups[name])
        owed = goal - count
    return chosen or {min(shuffled, key=lambda name: len(groups[name]))}


def _deal(
    groups: Mapping[str, Sequence[int]], classes: Sequence[Collection[int]], folds: int, rng: np.random.Generator
) -> list[set[str]]:
    """Deal the groups to folds, as the head of this file says.

    In whole numbers: with rounded ones a tie could be broken differently on another machine.
    """
    contents = {name: _contents(members, classes) for name, members in groups.items()}
    totals = sum(contents.values(), Counter[int]())
    whole = math.lcm(*totals.values())
    weights = {key: (whole // total) ** 2 for key, total in totals.items()}

    def weight(found: Mapping[int, int], other: Mapping[int, int]) -> int:
        return sum(weights[key] * count * other[key] for key, count in found.items())

    def deal(order: Sequence[str]) -> tuple[int, list[set[str]]]:
        result: list[set[str]] = [set() for _ in range(folds)]
        counts = [Counter[int]() for _ in range(folds)]
        for name in order:
            # What D grows by, up to what is the same in every fold. An empty fold costs nothing, so none stays empty.
            costs = [weight(contents[name], have) for have in counts]
            fold = costs.index(min(costs))
            result[fold].add(name)
            counts[fold] += contents[name]
        return sum(weight(have, have) for have in counts), result

    names = list(groups)
    orders = [[names[i] for i in rng.permutation(len(names))] for _ in range(max(1, min(64, 20_000 // len(names))))]
    # The sort keeps the order of equals. Few groups of unlike sizes may go together better in another order.
    orders[0].sort(key=lambda name: weight(contents[name], contents[name]), reverse=True)
    return min((deal(order) for order in orders), key=lambda dealt: dealt[0])[1]


def _contents(members: Sequence[int], classes: Sequence[Collection[int]]) -> "Counter[int]":
    """How many cases of a group there are (-1), are empty (0), and hold each class."""
    found: Counter[int] = Counter({-1: len(members)})
    for i in members:
        found.update(set(classes[i]) or {0})
    return found


def _stem(case: Member) -> str:
    """What `group_by` looks at: the stem of an image's file; for volumes, which may have many, the name in its root."""
    return case.image.stem if isinstance(case, Case) else case.name.rpartition("/")[2]


def _groups_of_expression(cases: Sequence[Member], expression: str) -> list[str | None]:
    try:
        return match_one_group(expression, [_stem(case) for case in cases])
    except ValueError as error:
        raise UserError(f"data.split.group_by: {expression!r:.200} {error}") from None


def _groups_of_table(cases: Sequence[Member], path: Path, column: str) -> list[str | None]:
    try:
        reader = csv.DictReader(io.StringIO(read_small(path).decode("utf-8-sig"), newline=""))
        if len(reader.fieldnames or ()) > _COLUMNS:  # each row gets them all, however short it is
            raise UserError(f"data.split.group_by: {path} has more than {_COLUMNS} columns; keep the two that count")
        rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"data.split.group_by: cannot read {path} ({reason}){_from_where(path)}") from None
    if not rows:
        raise UserError(f"data.split.group_by: {path} holds no rows")
    first = next(iter(rows[0]))
    if column not in rows[0]:
        raise unknown(f"column of {path}", column, [key for key in rows[0] if key])
    groups: dict[str, str] = {}
    for row in rows:
        named = (row[first] or "").removesuffix(".gz")  # .nii.gz
        stem = Path(named).stem if Path(named).suffix else named
        value = (row[column] or "").strip()
        if groups.setdefault(stem, value) != value:
            raise UserError(f"data.split.group_by: {path} puts '{stem}' into '{groups[stem]}' and into '{value}'")
    return [groups.get(_stem(case)) or None for case in cases]


def _from_where(path: Path) -> str:
    return "" if path.is_absolute() or path.exists() else "; relative paths count from where visattn is called"


def _from_file(cases: Sequence[M], path: Path, fold: int) -> dict[str, list[M]]:
    try:
        content = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"data.split.files: cannot read {path} ({reason}){_from_where(path)}") from None
    if isinstance(content, list) and content:
        if fold >= len(content):
            raise UserError(f"data.split.fold: {path} holds {len(content)} folds, 0 to {len(content) - 1}; got {fold}")
        content = content[fold]
    if not isinstance(content, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in content.values()
    ):
        raise UserError(
            f'data.split.files: {path} must hold {{"train": [...], "val": [...], "test": [...]}} of case names, '
            "or a list of those, one for each fold"
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
