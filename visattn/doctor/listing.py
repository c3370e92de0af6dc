"""What the names in a folder tell, before any file is opened: partners, stems, links, names that cause trouble."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from visattn.data.cases import ImageFolder
from visattn.data.images import SUFFIXES
from visattn.doctor.findings import Findings

_LEFT_OUT = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "ehthumbs.db"}
_PICTURES = {".webp", ".gif", ".jp2", ".j2k", ".tga", ".ppm", ".pgm", ".pnm", ".heic", ".avif", ".jfif", ".svs", ".dcm"}
_LONGEST = 200  # bytes; file systems allow 255, and a prediction's name grows by a suffix


def check_folder(folder: ImageFolder, findings: Findings) -> None:
    """Examine the names in the folder of images and in that of masks."""
    for inside in (folder.images, folder.masks):
        check_names(inside, findings)
    for left_out, used in folder.same_stem:
        findings.file("duplicate-stem", used, f"and {left_out.name}")
    lost = [(path, "missing-mask", folder.masks) for path in folder.without_mask]
    lost += [(path, "missing-image", folder.images) for path in folder.without_image]
    for path, code, other in lost:
        findings.file(code, path, _near_miss(path, other))


def check_names(folder: Path, findings: Findings, below: bool = False) -> None:
    """Examine the names in one folder; `below` says that its subfolders are looked into too."""
    folded: dict[str, list[str]] = defaultdict(list)
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        path, suffix = folder / entry.name, Path(entry.name).suffix.lower()
        if entry.name.startswith(".") or entry.name.lower() in _LEFT_OUT:
            findings.file("hidden-files", path)
            continue
        if entry.is_dir():
            if suffix in SUFFIXES or not below:
                findings.file("folder-like-image" if suffix in SUFFIXES else "subfolders", path)
            continue
        if entry.is_symlink() and not path.exists():
            findings.file("broken-link", path, f"to {os.readlink(path)}")
        elif suffix in _PICTURES:
            findings.file("format-unread", path)
        elif suffix not in SUFFIXES:
            findings.file("other-files", path)
        else:
            folded[entry.name.casefold()].append(entry.name)
            _check_name(path, findings)
    for names in folded.values():
        for name in names[1:]:
            findings.file("name-case-twins", folder / names[0], f"and {name}")


def _check_name(path: Path, findings: Findings) -> None:
    try:
        length = len(path.name.encode())
    except UnicodeEncodeError:
        findings.file("name-not-utf8", path)
        return
    if any(unicodedata.category(character) in {"Cc", "Cf"} for character in path.name):
        findings.file("name-control-character", path)
    elif path.stem != path.stem.strip():
        findings.file("name-blank-edge", path)
    elif any(character.isspace() for character in path.name):
        findings.file("name-whitespace", path)
    if not path.name.isascii():
        findings.file("name-not-ascii", path)
    if length > _LONGEST:
        findings.file("name-too-long", path, f"{length} bytes")


def _near_miss(path: Path, other: Path) -> str:
    """The name in `other` that was perhaps meant: equal but for case, the form of accents, blanks, or - and _."""

    def plain(stem: str) -> str:
        folded = unicodedata.normalize("NFC", stem).casefold().strip()
        return folded.replace("-", "_").replace(" ", "_")

    wanted = plain(path.stem)
    for name in _names_of(other):
        if plain(Path(name).stem) == wanted:
            return f"there is {other.name}/{name}"
    return ""


def _names_of(folder: Path) -> Iterable[str]:
    """The names of image files in a folder."""
    return sorted(name for name in os.listdir(folder) if Path(name).suffix.lower() in SUFFIXES)
