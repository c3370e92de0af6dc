"""Names of volume files: their endings, the channel suffix of nnU-Net, and which files of a folder count."""

import re
from collections.abc import Iterable
from pathlib import Path

ENDINGS = (".nii.gz", ".nii")

_SUFFIX = re.compile(r"(.+)_(\d{4})")


def stem_of(path: Path) -> str:
    """The file's name without `.nii` or `.nii.gz`; the whole name where it has another ending."""
    for ending in ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.name


def split_suffix(stem: str) -> tuple[str, int | None]:
    """`case_0002` to `case` and 2; a stem without such a suffix to itself and None."""
    match = _SUFFIX.fullmatch(stem)
    return (match[1], int(match[2])) if match else (stem, None)


def is_volume_name(path: Path) -> bool:
    """Whether the name is that of a NIfTI file; hidden ones, as macOS leaves beside others, are not."""
    return not path.name.startswith(".") and path.name.lower().endswith(ENDINGS)


def is_dicom(path: Path) -> bool:
    """Whether a file begins like a DICOM file."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def volumes_in(folder: Path) -> list[Path]:
    """The files of a folder with the name of a NIfTI file, sorted."""
    return sorted(path for path in folder.iterdir() if is_volume_name(path))


def listed(names: Iterable[object], most: int = 6) -> str:
    """The first of `names`, and how many more there are."""
    shown = [str(name) for name in names]
    more = f", ... ({len(shown)} in all)" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more if shown else "nothing"
