"""Which cases `visattn predict` classifies: images, folders of them, and MedMNIST's .npz files."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visattn.data.class_preprocessing import fits
from visattn.data.medmnist_file import array_headers, check_image_shape, read_array
from visattn.data.splits import PARTS
from visattn.errors import UserError
from visattn.predict_plan import find_images, shown

_KEPT = 2  # arrays in memory: cases of two follow each other where one ends and the next begins


@dataclass(frozen=True)
class ClassCase:
    """One image or volume to classify; nothing is written for it but its row.

    Args:
        name: What it is called.
        image: The file that it is read from.
        part: train, val or test: the array in an .npz file; empty for an image file.
        index: Its place in that array.
        error: Why it cannot be read, where that is known already.
    """

    name: str
    image: Path
    part: str = ""
    index: int = 0
    error: str = ""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that it is read from."""
        return (self.image,)

    @property
    def mask(self) -> str:
        """Its key in the manifest."""
        return self.name

    @property
    def files(self) -> tuple[str, ...]:
        """None: there are only table and manifest."""
        return ()


def plan_classes(inputs: Sequence[Path], output: Path, rank: int, split: str | None) -> list[ClassCase]:
    """The cases that `inputs` name.

    Args:
        inputs: Images, folders of images, .npz files of MedMNIST's form.
        output: Where the table goes.
        rank: 2 for a classifier of images, 3 for one of volumes.
        split: Of .npz files take the images of this part alone.

    Raises:
        UserError: An input is not there or of another kind, or two cases would have one name.
    """
    arrays = [path for path in inputs if path.suffix.lower() == ".npz" and path.is_file()]
    others = [path for path in inputs if path not in arrays]
    if rank == 3 and others:
        raise UserError(
            f"{shown(others[0])}: this classifier takes volumes as it was trained on them, from .npz files of "
            "MedMNIST's form (8 bits).\nOther volumes have no agreed scale from their values to 0..255."
        )
    if split is not None and not arrays:
        raise UserError("--split: names a part of an .npz file, and no input is one.")
    cases = [case for path in arrays for case in _of_arrays(path, rank, split)]
    if others:
        cases += [ClassCase(str(name.with_suffix("")), path) for path, name in find_images(others, output)]
    seen: dict[str, ClassCase] = {}
    for case in cases:
        other = seen.setdefault(case.name, case)
        if other is not case:
            raise UserError(
                f"two inputs would both be the case '{shown(case.name)}':\n  {shown(other.image)}\n"
                f"  {shown(case.image)}\nRename one, or predict each into an --output of its own."
            )
    return cases


def _of_arrays(path: Path, rank: int, split: str | None) -> list[ClassCase]:
    """The cases of an .npz file, named as training names them; a file that cannot be read is one that fails."""
    try:
        headers = array_headers(path, [f"{part}_images" for part in PARTS], optional=True)
        if not headers:
            raise UserError(f"{path}: holds none of train_images, val_images and test_images")
        parts = {part: headers[f"{part}_images"] for part in PARTS if f"{part}_images" in headers}
        for part, (shape, dtype) in parts.items():
            check_image_shape(path, f"{part}_images", shape)
            if dtype != np.uint8 or not fits(shape[1:], rank):
                kind = "images" if rank == 2 else "volumes"
                raise UserError(f"{path}: {part}_images are {dtype} {shape}, not {kind} of uint8")
    except UserError as error:
        return [ClassCase(path.stem, path, error=str(error))]
    if split is not None and split not in parts:
        return [ClassCase(path.stem, path, error=f"{path}: holds no {split}_images")]
    return [
        ClassCase(f"{part}_{index:05d}", path, part, index)
        for part, (shape, _) in parts.items()
        if split in (None, part)
        for index in range(shape[0])
    ]


class Arrays:
    """Arrays of .npz files, of which the last ones stay in memory; for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[tuple[Path, str], NDArray[np.uint8] | UserError] = {}

    def read(self, case: ClassCase) -> NDArray[np.uint8]:
        """A case as it lies in its array.

        Raises:
            UserError: The array is damaged.
        """
        key = (case.image, case.part)
        with self._lock:
            if key not in self._kept:
                while len(self._kept) >= _KEPT:
                    del self._kept[next(iter(self._kept))]
                try:
                    self._kept[key] = read_array(case.image, f"{case.part}_images")
                except UserError as error:  # kept too: each of its cases fails by it
                    self._kept[key] = error
            found = self._kept[key]
        if isinstance(found, UserError):
            raise found
        return np.asarray(found[case.index])
