"""Cases of a classification and how they are divided. Needs no torch: doctor and init divide as training does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visattn.data.splits import PARTS, Split, fold_cases, split_cases
from visattn.errors import UserError


@dataclass(frozen=True)
class LabelledCase:
    """One image or volume and its class.

    Args:
        name: Unique name.
        group: What must not be parted by a split; the name itself where nothing was said.
        classes: Index of its class; where a case may have several, of all that it has.
        root: The root as the user wrote it.
        image: The image file; None where cases lie together in one file or are drawn.
        part: train, val or test where the data say so, else empty.
        index: Place within its file.
    """

    name: str
    group: str
    classes: tuple[int, ...]
    root: str
    image: Path | None = None
    part: str = ""
    index: int = 0


def divide(cases: Sequence[LabelledCase], split: Split | None, seed: int, what: str) -> dict[str, list[LabelledCase]]:
    """Train, val and test cases: as the data say, where they do and the recipe has no `split`; else divided anew.

    Test cases that the data set aside stay test cases.

    Args:
        cases: All cases.
        split: The recipe's; None where there is none.
        seed: Of the division.
        what: The data in words, for the message.

    Raises:
        UserError: The cases cannot be divided so.
    """
    rest, test = _divisible(cases)
    if split is None and any(case.part == "val" for case in cases):
        parts = {part: [case for case in cases if case.part == part] for part in PARTS}
        if not parts["train"]:
            raise UserError(f"data: there are no training cases in {what}; set data.split")
        return parts
    parts = split_cases(rest, [_kinds(case) for case in rest], split or Split.from_config(None), seed)
    return {**parts, "test": parts["test"] or test}


def divide_folds(cases: Sequence[LabelledCase], split: Split, seed: int) -> list[dict[str, list[LabelledCase]]]:
    """Train, val and test cases of each fold; a test set that the data name stays one."""
    rest, test = _divisible(cases)
    folds = fold_cases(rest, [_kinds(case) for case in rest], split, seed)
    return [{**fold, "test": fold["test"] or test} for fold in folds]


def _divisible(cases: Sequence[LabelledCase]) -> tuple[list[LabelledCase], list[LabelledCase]]:
    """The cases that a split divides, and those that the data set aside for testing."""
    test = [case for case in cases if case.part == "test"]
    return [case for case in cases if case.part != "test"], test


def _kinds(case: LabelledCase) -> tuple[int, ...]:
    """What a case is shared out by; 0 stands for none of the classes."""
    return tuple(index + 1 for index in case.classes)
