"""Images with classes on disk: class folders, or a table of files. Needs no torch."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from visattn.data.cases import raise_problems
from visattn.data.images import SUFFIXES
from visattn.data.phantoms import PHANTOM
from visattn.data.splits import PARTS
from visattn.data.volume_names import is_volume_name
from visattn.errors import UserError, nearest, unknown
from visattn.files import read_small, walk_files

_MASK = re.compile(r"_(?:mask|seg|segmentation|gt)(?:_\d+)?$", re.IGNORECASE)
_IMAGE = ("", "_img", "_image")

_COLUMNS = ("image", "label", "group", "part")

NO_VOLUMES = (
    "Classifiers of volumes train on .npz files of MedMNIST's form (uint8, all of one shape): bring yours to one "
    "spacing, orientation and range of values, and save them so."
)

Row = tuple[str, Path, tuple[str, ...], str, str]
"""Name, file, classes, group and part of an image."""


def list_folders(path: Path, root: str) -> list[Row]:
    """The images below class folders.

    Raises:
        UserError: There are none, or masks lie beside them.
    """
    if not path.is_dir():
        guess = (
            nearest(path.name, (p.name for p in path.parent.iterdir() if p.is_dir())) if path.parent.is_dir() else None
        )
        hint = f" Did you mean {path.parent / guess}?" if guess else ""
        raise UserError(f"data.root: there is no {root}.{hint}\nGive a folder of class folders, a .csv, or {PHANTOM}")
    inner = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    parts = [name for name in inner if name in PARTS] if "train" in inner and set(inner) <= set(PARTS) else [""]
    rows: list[Row] = []
    for part in parts:
        for folder in sorted(entry for entry in (path / part).iterdir() if entry.is_dir()):
            if folder.name.startswith("."):
                continue
            for _, files in walk_files(folder):
                for file in files:
                    if file.suffix.lower() in SUFFIXES:
                        name = file.relative_to(path).with_suffix("").as_posix()
                        rows.append((name, file, (folder.name,), name, part))
    if not rows:
        if any(is_volume_name(file) for _, files in walk_files(path) for file in files):
            raise UserError(f"data.root: {root} holds volumes. {NO_VOLUMES}")
        found = ", ".join(inner[:8]) or "no folder"
        raise UserError(f"data.root: {root} holds no folders of images, one for each class.\nFound there: {found}")
    _refuse_masks(rows, root)
    return sorted(rows)


def _refuse_masks(rows: Sequence[Row], root: str) -> None:
    """A mask shows where the lesion is and whether there is one: taken for an image it would be learned and scored."""
    names = {name for name, *_ in rows}
    bases = {name: _MASK.sub("", name) for name in sorted(names) if _MASK.search(name)}
    pairs = [(name, base + end) for name, base in bases.items() for end in _IMAGE if base + end in names]
    if pairs:
        raise UserError(
            f"data.root: {root}: {len(pairs)} of {len(rows)} images are named as masks of others, "
            f"as {pairs[0][0]} of {pairs[0][1]}.\n"
            "To classify, move the masks elsewhere, or give a .csv that names the images alone.\n"
            "To segment, bring images and masks into images/ and masks/, with one name for an image and its mask."
        )


def list_table(path: Path, multi_label: bool) -> tuple[list[Row], list[str]]:
    """The images that a table names, and what is wrong in lines that are left out, one text each.

    Raises:
        UserError: It is no table of images.
    """
    if path.suffix.lower() != ".csv":
        raise UserError(f"data.root: {path} is a file, but no .csv table of images")
    try:
        reader = csv.DictReader(io.StringIO(read_small(path).decode("utf-8-sig"), newline=""))
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        columns = [name for name in reader.fieldnames if name]
        table = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.root: cannot read {path}: {error}") from error
    if not columns:
        raise UserError(f"data.root: {path} is empty; its first line must name the columns image and label")
    for needed in _COLUMNS[:2]:
        if needed not in columns:
            other = next((mark for mark in (";", "\t") if mark in "".join(columns)), None)
            if other is not None:
                raise UserError(f"data.root: {path} separates its columns by {other!r}; save it with commas")
            raise unknown(f"column, which {path} needs:", needed, columns)
    rows: list[Row] = []
    problems = []
    lines: dict[Path, tuple[int, str]] = {}
    for line, row in enumerate(table, 2):
        file, text = (row["image"] or "").strip(), (row["label"] or "").strip()
        labels = tuple(part.strip() for part in text.split("|") if part.strip()) if multi_label else (text,)
        part = (row.get("part") or "").strip()
        if not file or (not text and not multi_label):
            problems.append(f"{path} line {line}: needs an image and a label")
            continue
        if part and part not in PARTS:
            problems.append(f"{path} line {line}: the part {part!r:.40} is none of {', '.join(PARTS)}")
            continue
        first, said = lines.setdefault(Path(file), (line, text))
        if first != line:
            what = "" if said == text else f" with the label {said!r:.60}, and here with {text!r:.60}"
            problems.append(f"{path} line {line}: {file} stands in line {first} already{what}")
            continue
        name = Path(file).with_suffix("").as_posix()
        rows.append((name, path.parent / file, labels, (row.get("group") or "").strip() or name, part))
    if not rows and not problems:
        raise UserError(f"data.root: {path} names no images")
    if rows and all(is_volume_name(row[1]) for row in rows):
        raise UserError(f"data.root: {path} names volumes. {NO_VOLUMES}")
    return sorted(rows), problems


def check_rows(rows: Sequence[Row], problems: Sequence[str]) -> None:
    """Refuse lines that are wrong, and names that stand twice.

    Raises:
        UserError: There are some; the first ones are listed and the rest counted.
    """
    raise_problems(list(problems), len(rows) + len(problems))
    raise_problems(twins(rows), len(rows))


def twins(rows: Sequence[Row]) -> list[str]:
    """Files whose names differ by the suffix alone, so that a case's name would not say which of them it is."""
    seen: dict[str, Path] = {}
    return [
        f"{file}: shares its name with {seen[name].name}; keep one of them"
        for name, file, *_ in rows
        if seen.setdefault(name, file) is not file
    ]
