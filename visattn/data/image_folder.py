"""The data module for images with classes: a folder for each class, or a table of files."""

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from visattn.class_labels import ClassLabels
from visattn.data.cases import fingerprint_of, raise_problems
from visattn.data.class_cases import LabelledCase
from visattn.data.class_files import Row, check_rows, list_folders, list_table
from visattn.data.class_module import ClassDataModule, read_statistics
from visattn.data.class_phantom import PHANTOM_CLASSES, draw_phantom
from visattn.data.class_preprocessing import ClassPreprocessing, read_size
from visattn.data.images import IMAGENET_MEAN, IMAGENET_STD, image_size, read_image
from visattn.data.phantoms import PHANTOM
from visattn.data.splits import PARTS, find_groups
from visattn.errors import UserError, unknown

MOST_DECODED = 20_000
"""Up to so many images are decoded before training starts; of more only the headers are read, which the log says."""

_PHANTOM_SIDE = 96
_log = logging.getLogger(__name__)


class ImageFolder(ClassDataModule):
    """Images with classes: `root/CLASS/...`, or `root/train/CLASS/...` with `val/` and `test/`, or a table.

    Args:
        root: A folder; or a .csv file with the columns image (relative to the table) and label, and if wanted group
            (patient) and part (train, val, test); or the word phantom.
        labels: Names of the classes in the order of the outputs; by default all that there are, sorted.
        multi_label: Whether an image may have several classes: then label holds them with | between, or nothing.
        size: Side of the square, or height and width, in pixels that images are resized to.
        crop: Share of the largest centred rectangle that validation keeps, as 0.875; null: the whole image.
        split: Shares and groups: val, test, group_by, folds, fold, files. null: as folders or table say; where they
            name no validation cases, a tenth of the training groups.
        augment: Names, or mappings with a name and its arguments.
        batch_size: Images per device and step.
        channels: 3 for colour, 1 for grey.
        mean: Subtracted per channel after scaling to 0..1; by default ImageNet's.
        std: Divided by per channel; by default ImageNet's.
        num_workers: Processes that load data; by default one per free core, at most 8.
        repeats: Repeated augmentation: each training image stands so many times in an epoch, augmented differently each
            time, and the epoch sees so many times fewer of them. 3 is what DeiT and its successors use.
        seed: Of split, order and augmentation.
    """

    def __init__(
        self,
        root: str,
        labels: list[str] | None = None,
        multi_label: bool = False,
        size: int | list[int] = 224,
        crop: float | None = None,
        split: dict[str, Any] | None = None,
        augment: list[dict[str, Any] | str] | None = None,
        batch_size: int = 32,
        channels: Literal[1, 3] = 3,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        num_workers: int | None = None,
        repeats: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            preprocessing=ClassPreprocessing(
                read_size(size, 2),
                read_statistics("mean", mean, IMAGENET_MEAN, channels),
                read_statistics("std", std, IMAGENET_STD, channels),
                crop,
            ),
            augment=augment,
            batch_size=batch_size,
            split=split,
            num_workers=num_workers,
            repeats=repeats,
            seed=seed,
        )
        self.root = root
        self.channels: Literal[1, 3] = channels
        self.multi_label = multi_label
        self._names = labels
        self._drawn: dict[str, NDArray[np.uint8]] = {}

    @property
    def description(self) -> str:
        """What the data is, for report and checkpoint."""
        return "phantom (embedded, synthetic)" if self.root == PHANTOM else self.root

    def find(self) -> list[LabelledCase]:
        """All images, read and checked.

        Raises:
            UserError: Something is wrong with them; the first problems are listed and the rest counted.
        """
        if self.root == PHANTOM:
            return self._find_phantom()
        path = Path(self.root).expanduser()
        if path.is_dir() and self.multi_label:
            raise UserError("data.multi_label: a folder is one class; images with several need a table (.csv) as root")
        rows, problems = list_table(path, self.multi_label) if path.is_file() else (list_folders(path, self.root), [])
        if not self.multi_label:
            _refuse_several(rows, self.root)
        check_rows(rows, problems)
        present = sorted({name for _, _, names, _, _ in rows for name in names})
        if len(present) < 2 and not self.multi_label:
            raise UserError(f"data.root: all images of {self.root} have the class '{present[0]}'; needs two at least")
        self._labels = ClassLabels.from_config(self._names or present, self.multi_label)
        index = {name: number for number, name in enumerate(self._labels.names)}
        for name in present:
            if name not in index:
                raise unknown("class in the data, which data.labels does not name:", name, self._labels.names)
        cases = [
            LabelledCase(name, group, tuple(sorted(index[label] for label in labels)), self.root, file, part)
            for name, file, labels, group, part in rows
        ]
        if self.split is not None and self.split.group_by is not None:
            groups = find_groups(cases, self.split.group_by)
            cases = [replace(case, group=group) for case, group in zip(cases, groups, strict=True)]
        _refuse_parted(cases)
        self.fingerprint = self._check(cases)
        return cases

    def read_case(self, case: LabelledCase) -> NDArray[np.uint8]:
        """An image as it is, (H, W, C)."""
        if case.image is None:
            return np.repeat(self._drawn[case.part][case.index][..., None], self.channels, axis=-1)
        return read_image(case.image, self.channels)

    def _find_phantom(self) -> list[LabelledCase]:
        self._drawn, truths = draw_phantom(2, _PHANTOM_SIDE)
        self._labels = ClassLabels.from_config(PHANTOM_CLASSES, False)
        self.fingerprint = fingerprint_of(
            (part, hashlib.sha256(images.tobytes()).hexdigest()) for part, images in self._drawn.items()
        )
        return [
            LabelledCase(f"{part}_{number:04d}", f"{part}_{number:04d}", (int(kind),), PHANTOM, None, part, number)
            for part in PARTS
            for number, kind in enumerate(truths[part])
        ]

    def _check(self, cases: Sequence[LabelledCase]) -> str:
        """Read every image once; the fingerprint of all."""
        whole = len(cases) <= MOST_DECODED
        what = "reading and checking" if whole else "reading the headers of"
        _log.info("data: %s %d images", what, len(cases))

        def check(case: LabelledCase) -> tuple[str, str]:
            """A digest, and a problem if there is one."""
            assert case.image is not None
            try:
                if not whole:
                    height, width = image_size(case.image)
                    return f"{case.image.stat().st_size} {height} {width}", ""
                read_image(case.image, self.channels)
                return hashlib.sha256(case.image.read_bytes()).hexdigest(), ""
            except UserError as error:
                return "", str(error).replace("\n", " ")
            except MemoryError:
                return "", f"{case.image}: not enough memory to decode it"

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter's lock
            results = list(pool.map(check, cases))
        raise_problems([problem for _, problem in results if problem], len(cases))
        return fingerprint_of((case.name, digest) for case, (digest, _) in zip(cases, results, strict=True))


def _refuse_several(rows: Sequence[Row], root: str) -> None:
    """Labels of a table for images with several classes would silently become classes of their own."""
    several = next((label for row in rows for label in row[2] if "|" in label), None)
    if several is not None and Path(root).suffix.lower() == ".csv":
        raise UserError(
            f"data.multi_label: {root} has labels of several classes, as {several!r:.80}.\n"
            "Set multi_label: true (then an image may also have none), or take another sign than |."
        )


def _refuse_parted(cases: Sequence[LabelledCase]) -> None:
    """A patient in two parts would turn validation into memory."""
    homes: dict[str, str] = {}
    for case in cases:
        if case.part and homes.setdefault(case.group, case.part) != case.part:
            raise UserError(f"data: the group '{case.group}' is parted into {homes[case.group]} and {case.part}")
