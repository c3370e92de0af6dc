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
        UserError: The file cannot be written.
    """
    stems = [case.image.stem for case in cases]
    keys = [stems]  # a table of names cannot tell two images of one name apart
    guess = guess_group_by(stems) if len(stems) > 1 else None
    if guess is not None:
        keys.append([f"group {group}" for group in find_groups(cases, guess[0])])
    tied = list(ties)
    for names in keys:
        firsts: dict[str, int] = {}
        tied += [(firsts.setdefault(name, index), index) for index, name in enumerate(names)]
    homes = list(range(len(cases)))
    for members in gather((a, b) for a, b in tied if a != b):
        for index in members:
            homes[index] = members[0]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "group"])
    writer.writerows({stem: stems[home] for stem, home in zip(stems, homes, strict=True)}.items())
    try:
        write_text_atomic(path, text.getvalue())
    except OSError as error:
        raise UserError(f"--groups {path}: cannot be written ({error.strerror or error})") from None
    return len(set(homes))
