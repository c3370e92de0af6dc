"""What tells data to classify from data to segment: class folders, a table, a file of MedMNIST's form."""

import re
from pathlib import Path
from typing import Literal

from visattn.data.cases import has_layout
from visattn.data.images import SUFFIXES
from visattn.data.medmnist_file import flag_of
from visattn.data.medmnist_flags import FLAGS
from visattn.data.splits import PARTS
from visattn.errors import UserError
from visattn.files import walk_files

Source = Literal["folders", "table", "arrays"]

_FEWEST = 2  # folders with images, or anything with one folder of pictures would pass
# Folders that hold a half of a segmentation set, or a part of it, and no class.
_NO_CLASS = re.compile(
    r"(images?|imgs?|pictures|photos|masks?|labels?|gts?|ground[ _-]?truths?|original|annotations?|segmentations?|"
    r"train\w*|val\w*|test\w*|data)",
    re.IGNORECASE,
)


def class_source(path: Path) -> Source | None:
    """What kind of data to classify lies at `path`; None where it is none.

    Raises:
        UserError: It is a folder of MedMNIST's files, one of which has to be named.
    """
    if path.is_file():
        return {".csv": "table", ".npz": "arrays"}.get(path.suffix.lower())  # type: ignore[return-value]
    if not path.is_dir() or has_layout(path):
        return None
    known = sorted(entry.name for entry in path.glob("*.npz") if flag_of(entry) in FLAGS)
    if known:
        listed = ", ".join(known[:6]) + (", ..." if len(known) > 6 else "")
        raise UserError(
            f"{path}: holds MedMNIST's files; name one of them, as {path / known[0]}\nFound there: {listed}"
        )
    inner = _folders(path)
    if "train" in {folder.name for folder in inner} and {folder.name for folder in inner} <= set(PARTS):
        inner = [below for folder in inner for below in _folders(folder)]
    if any(_NO_CLASS.fullmatch(folder.name) for folder in inner):
        return None
    return "folders" if len({folder.name for folder in inner if _has_images(folder)}) >= _FEWEST else None


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _has_images(path: Path) -> bool:
    """Whether images lie in a folder or below, and neither images with masks nor volumes."""
    if has_layout(path):
        return False
    return any(file.suffix.lower() in SUFFIXES for _, files in walk_files(path) for file in files)
