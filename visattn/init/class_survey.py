"""What data to classify hold: classes, counts, sizes, colour; every image is decoded once, as training decodes it."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from visattn.data.class_files import Row, list_folders, list_table, twins
from visattn.data.medmnist_file import case_rank, count_classes, flag_of, read_arrays
from visattn.data.medmnist_flags import FLAGS, MULTI_LABEL
from visattn.errors import UserError
from visattn.progress import Bar
from visattn.survey import Facts, look_at_image


@dataclass(frozen=True)
class ClassSurvey:
    """What was found.

    Args:
        root: The folder, table or file, as the user named it.
        flag: MedMNIST's name of the data set; empty for a file of its form with another name; None for images.
        names: The classes.
        multi_label: Whether a case may have several.
        counts: How many cases have each class.
        cases: How many there are in each part that the data name; under an empty name where they name none.
        rank: 2 for images, 3 for volumes.
        sizes: Height and width of the images, or the three sides of the volumes; each once with its number.
        grey: Whether no image has colour.
        stems: Names of the image files, without suffix; empty for a file of MedMNIST's form.
        grouped: Whether a table says which images belong together.
        problems: What has to be put right before training starts.
    """

    root: Path
    flag: str | None
    names: tuple[str, ...]
    multi_label: bool
    counts: Counter[str]
    cases: dict[str, int]
    rank: int
    sizes: Counter[tuple[int, ...]]
    grey: bool
    stems: tuple[str, ...]
    grouped: bool
    problems: tuple[str, ...]

    @property
    def total(self) -> int:
        """How many cases there are."""
        return sum(self.cases.values())


def survey_classes(path: Path) -> ClassSurvey:
    """Look at class folders, a table, or a file of MedMNIST's form.

    Raises:
        UserError: There is nothing to learn from.
    """
    root = path.expanduser()
    found = _arrays(path, root) if root.suffix.lower() == ".npz" and root.is_file() else _files(path, root)
    if len([name for name in found.names if found.counts[name]]) < (1 if found.multi_label else 2):
        raise UserError(f"{path}: fewer than two classes have images.\nSee what is wrong: visattn doctor {path}")
    return found


def _arrays(path: Path, root: Path) -> ClassSurvey:
    images, truths = read_arrays(root)
    flag = flag_of(root)
    known = FLAGS.get(flag)
    truth = truths["train"]
    several = known[0] == MULTI_LABEL if known else truth.ndim == 2 and truth.shape[1] > 1
    names = known[1] if known else tuple(map(str, range(count_classes(truths, several))))
    counts: Counter[str] = Counter()
    problems = []
    for part, values in truths.items():
        if several:
            columns = values.reshape(len(values), -1)
            counts.update({name: int(columns[:, k].sum()) for k, name in enumerate(names) if k < columns.shape[1]})
            continue
        for value, count in Counter(values.ravel().tolist()).items():
            if 0 <= value < len(names):
                counts[names[value]] += count
            else:
                problems.append(f"{path}: {part}_labels holds {value} {count} times; there are {len(names)} classes")
    shape = images["train"].shape[1:]
    rank = case_rank(shape)
    colour = rank == 2 and len(shape) == 3 and shape[-1] == 3
    return ClassSurvey(
        path, flag if known else "", names, several, counts, {part: len(values) for part, values in images.items()},
        rank, Counter({tuple(shape[:rank]): sum(map(len, images.values()))}), not colour, (), False, tuple(problems),
    )  # fmt: skip


def _files(path: Path, root: Path) -> ClassSurvey:
    rows: list[Row]
    problems: list[str] = []
    several = False
    if root.is_file():
        rows, problems = list_table(root, False)
        several = any("|" in label for row in rows for label in row[2])
        if several:
            rows, problems = list_table(root, True)
    else:
        rows = list_folders(root, str(path))
    with Bar("looking at images", len(rows)) as bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def look(row: Row) -> Facts:
            return look_at_image(row[1])[0]

        facts = []
        for one in pool.map(look, rows):
            facts.append(one)
            bar.advance()
    problems += [*twins(rows), *(one.error for one in facts if one.error)]
    usable = [row for row, one in zip(rows, facts, strict=True) if not one.error]
    counts = Counter(label for row in usable for label in row[2])
    return ClassSurvey(
        path, None, tuple(sorted(counts)), several, counts, dict(Counter(row[4] for row in usable)), 2,
        Counter(one.size for one in facts if one.size and not one.error),
        all(one.grey for one in facts if not one.error), tuple(row[1].stem for row in usable),
        any(row[3] != row[0] for row in usable), tuple(problems),
    )  # fmt: skip
