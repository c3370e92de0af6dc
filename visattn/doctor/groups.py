"""Which images belong together, as a table that data.split.group_by reads."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from visattn.data.cases import Case
from visattn.data.splits import find_groups
from visattn.doctor.twins import gather
from visattn.errors import UserError
from visattn.files import write_text_atomic
from visattn.survey import guess_group_by


def write_groups(path: Path, cases: Sequence[Case], ties: Sequence[tuple[int, int]]) -> int:
    """Write the table `file,group`: one line for each image, named after the first image of its group.

    Args:
        path: The file to write.
        cases: All cases.
        ties: Pairs of indices of `cases` that belong together.

    Returns:
        The number of groups.

    Raises:
        UserError: Two images of one name lie in different groups, which a table by name cannot tell apart.
    """
    stems = [case.image.stem for case in cases]
    guess = guess_group_by(stems) if len(stems) > 1 else None
    tied = list(ties)
    if guess is not None:
        firsts: dict[str, int] = {}
        for index, group in enumerate(find_groups(cases, guess[0])):
            tied.append((firsts.setdefault(group, index), index))
    homes = list(range(len(cases)))
    for members in gather((a, b) for a, b in tied if a != b):
        for index in members:
            homes[index] = members[0]
    names: dict[str, str] = {}
    for stem, home in zip(stems, homes, strict=True):
        if names.setdefault(stem, stems[home]) != stems[home]:
            raise UserError(
                f"--groups: images called '{stem}' lie in several folders and belong to different groups, which a "
                "table of names cannot tell apart; rename them"
            )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "group"])
    writer.writerows([stem, names[stem]] for stem in stems)
    write_text_atomic(path, text.getvalue())
    return len(set(homes))
