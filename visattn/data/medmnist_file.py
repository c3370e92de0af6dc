"""MedMNIST's .npz files: found, checked before they are unpacked, and read. Needs no torch."""

import math
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visattn.class_labels import ClassLabels
from visattn.data.medmnist_flags import FLAGS
from visattn.data.phantoms import PHANTOM
from visattn.data.splits import PARTS
from visattn.errors import UserError, unknown

_LARGEST = 2**36  # bytes that the arrays of one file may take, whatever the memory

Headers = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Shape and type of arrays by name."""


def find_file(root: str, flag: str | None, native: int) -> Path:
    """The file that `root` and `flag` mean.

    Raises:
        UserError: There is none.
    """
    path = Path(root).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(
            f"data.root: there is no {root}.\nGive an .npz file of MedMNIST, its folder, or the word {PHANTOM}"
        )
    there = sorted(entry.name for entry in path.glob("*.npz"))
    if flag is None:
        raise UserError(f"data.flag: which of {root}: {', '.join(there[:12]) or 'it holds no .npz file'}?")
    if flag not in FLAGS:
        raise unknown("flag of MedMNIST", flag, FLAGS)
    name = f"{flag}.npz" if native == 28 else f"{flag}_{native}.npz"
    if not (path / name).is_file():
        raise UserError(f"data.root: {root} holds no {name}.\nFound there: {', '.join(there[:12]) or 'no .npz file'}")
    return path / name


def flag_of(path: Path) -> str:
    """The data set that a file's name means."""
    return re.sub(r"_(28|64|128|224)$", "", path.stem)


def case_shape(path: Path) -> tuple[int, ...]:
    """The shape of one case."""
    return read_headers(path)["train_images"][0][1:]


def case_rank(shape: Sequence[int]) -> int:
    """Spatial axes of a case of that shape: 3 of (D, H, W) or (D, H, W, 1); 2 of (H, W), (H, W, 1) or (H, W, 3)."""
    return 3 if len(shape) == 4 or (len(shape) == 3 and shape[-1] not in (1, 3)) else 2


def read_headers(path: Path) -> Headers:
    """Shape and type of the images and labels of every part, from the headers alone.

    Raises:
        UserError: An array is missing, or is larger than its file or the memory can hold.
    """
    found = array_headers(path, [f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")])
    check_image_shape(path, "train_images", found["train_images"][0])
    return found


def read_array(path: Path, name: str) -> NDArray[np.uint8]:
    """One array, whose header was checked.

    Raises:
        UserError: It is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            return np.asarray(content[name])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, MemoryError, EOFError) as error:
        raise UserError(f"{path}: {name} is damaged: {str(error)[:200]}") from error


def check_image_shape(path: Path, name: str, shape: tuple[int, ...]) -> None:
    """Refuse arrays that are no images or volumes.

    Raises:
        UserError: They are none.
    """
    if len(shape) not in (3, 4, 5) or 0 in shape or (len(shape) == 5 and shape[-1] != 1):
        raise UserError(f"{path}: {name} is {shape}; needs (N, H, W), (N, H, W, 3) or (N, D, H, W)")


def array_headers(path: Path, names: Sequence[str], optional: bool = False) -> Headers:
    """Shape and type of arrays in an .npz file.

    Args:
        path: The file.
        names: The arrays.
        optional: Whether those that are not there are left out.

    Raises:
        UserError: An array is missing, or is larger than its file or the memory can hold.
    """
    found: Headers = {}
    memory = min(_LARGEST, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    total = 0
    try:
        with zipfile.ZipFile(path) as archive:
            there = set(archive.namelist())
            for name in names:
                if optional and f"{name}.npy" not in there:
                    continue
                info = archive.getinfo(f"{name}.npy")
                with archive.open(info) as handle:
                    numpy_format: Any = np.lib.format
                    version = numpy_format.read_magic(handle)
                    first = version == (1, 0)
                    read = numpy_format.read_array_header_1_0 if first else numpy_format.read_array_header_2_0
                    shape, _, dtype = read(handle)
                size = math.prod(shape) * dtype.itemsize
                if dtype.hasobject:
                    raise UserError(f"{path}: {name} holds Python objects, which could execute code: refused")
                if size > info.file_size:
                    raise UserError(f"{path}: {name} claims {size} bytes and has {info.file_size}")
                total += size
                found[name] = (shape, dtype)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError, SyntaxError) as error:
        raise UserError(
            f"{path}: not of MedMNIST's form ({str(error)[:160]}).\n"
            "It needs train_images, train_labels, val_images, val_labels, test_images and test_labels."
        ) from error
    if total > memory * 3 // 4:
        raise UserError(f"{path}: its arrays take {total / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB")
    return found


def count_classes(truths: dict[str, NDArray[Any]], multi_label: bool) -> int:
    """How many classes the labels tell of."""
    if multi_label:
        return int(truths["train"].shape[-1])
    return max(2, 1 + max(int(truth.max(initial=0)) for truth in truths.values()))


def classes_of(path: Path | None, part: str, truth: NDArray[Any], labels: ClassLabels) -> list[tuple[int, ...]]:
    """The classes of each case of a part.

    Raises:
        UserError: The labels do not fit the classes.
    """
    most = labels.channels
    if labels.multi_label:
        if truth.ndim != 2 or truth.shape[1] != most or not np.isin(truth, (0, 1)).all():
            raise UserError(f"{path}: {part}_labels must be (N, {most}) of 0 and 1, not {truth.shape}")
        return [tuple(int(i) for i in np.flatnonzero(row)) for row in truth]
    flat = truth.reshape(len(truth), -1)
    if flat.shape[1] != 1:
        raise UserError(f"{path}: {part}_labels has {flat.shape[1]} columns; for these, set data.task multi-label")
    wrong = flat[(flat < 0) | (flat >= most)]
    if wrong.size:
        raise UserError(
            f"{path}: {part}_labels holds {int(wrong[0])}, but there are {most} classes: "
            f"{', '.join(labels.names[:6])}.\nName all of them in data.labels."
        )
    return [(int(value),) for value in flat[:, 0]]


def read_arrays(path: Path) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[Any]]]:
    """Images and labels of each part, checked before they are unpacked.

    Raises:
        UserError: The file is damaged, or of another form.
    """
    headers = read_headers(path)
    images, truths = {}, {}
    try:
        with np.load(path, allow_pickle=False) as content:
            for part in PARTS:
                images[part], truths[part] = content[f"{part}_images"], content[f"{part}_labels"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, MemoryError, EOFError) as error:
        raise UserError(f"{path}: damaged, or not of MedMNIST's form: {str(error)[:200]}") from error
    for part in PARTS:
        shape, kind = headers[f"{part}_images"]
        if kind != np.uint8 or shape[1:] != headers["train_images"][0][1:]:
            raise UserError(f"{path}: {part}_images holds {kind} {shape}, not uint8 of one size")
        if truths[part].dtype.kind not in "iu" or len(truths[part]) != len(images[part]):
            raise UserError(f"{path}: {part}_labels are not whole numbers, one for each of the images")
    return images, truths
