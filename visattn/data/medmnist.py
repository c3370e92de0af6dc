"""The data module for MedMNIST's .npz files, and any of their form."""

import hashlib
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from visattn.class_labels import ClassLabels
from visattn.data.cases import fingerprint_of
from visattn.data.class_cases import LabelledCase
from visattn.data.class_module import ClassDataModule, read_statistics
from visattn.data.class_phantom import PHANTOM_CLASSES, draw_phantom
from visattn.data.class_preprocessing import ClassPreprocessing, read_size, with_channels
from visattn.data.images import IMAGENET_MEAN, IMAGENET_STD
from visattn.data.medmnist_file import case_rank, case_shape, classes_of, count_classes, find_file, flag_of, read_arrays
from visattn.data.medmnist_flags import FLAGS, KINDS, MULTI_LABEL
from visattn.data.phantoms import PHANTOM
from visattn.data.splits import PARTS
from visattn.errors import UserError, unknown

_SIZES = (28, 64, 128, 224)


class MedMNIST(ClassDataModule):
    """MedMNIST: images or volumes of 28 to 224 with their classes, in one file with its division.

    Args:
        root: The .npz file, or the folder that holds `FLAG.npz` or `FLAG_SIZE.npz`, or the word phantom.
        flag: Which data set: breastmnist, adrenalmnist3d, ...; by default the name of the file.
        native: Which size of it: 28, 64, 128 or 224.
        labels: Names of the classes, in the order of their numbers; by default MedMNIST's.
        task: multi-class, binary-class, ordinal-regression or multi-label; by default MedMNIST's. Ordered classes are
            learned and scored as classes without order, as MedMNIST does.
        size: Side that images are resized to, or one for each axis; null: as they are.
        channels: 3 for colour, 1 for grey; null: 3 for images, as most networks want, and 1 for volumes.
        mean: Subtracted per channel after scaling to 0..1; by default ImageNet's for colour, 0.5 for volumes.
        std: Divided by per channel; likewise.
        split: null takes MedMNIST's own division. Shares or folds divide its training and validation cases anew; its
            test cases stay.
        augment: Names, or mappings with a name and its arguments.
        batch_size: Cases per device and step.
        num_workers: Processes that load data; by default one per free core, at most 8.
        seed: Of split, order and augmentation.
    """

    def __init__(
        self,
        root: str,
        flag: str | None = None,
        native: int = 28,
        labels: list[str] | None = None,
        task: Literal["multi-class", "binary-class", "ordinal-regression", "multi-label"] | None = None,
        size: int | list[int] | None = None,
        channels: Literal[1, 3] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        split: dict[str, Any] | None = None,
        augment: list[dict[str, Any] | str] | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        self.root = root
        if native not in _SIZES:
            raise UserError(f"data.native: MedMNIST has the sizes {', '.join(map(str, _SIZES))}, got {native}")
        self.path = None if root == PHANTOM else find_file(root, flag, native)
        self.flag = flag or (flag_of(self.path) if self.path else "breastmnist")
        if task is not None and task not in KINDS:
            raise unknown("task at data.task:", str(task), KINDS)
        if task is None and self.flag not in FLAGS:
            raise (
                unknown("flag of MedMNIST", self.flag, FLAGS)
                if flag or labels is None
                else UserError(f"data.task: {self.path} is none of MedMNIST's; say whether it is {', '.join(KINDS)}")
            )
        self.task: str = task or FLAGS[self.flag][0]
        self._names = labels
        shape = case_shape(self.path) if self.path else (32,) * (3 if self.flag.endswith("3d") else 2)
        rank = case_rank(shape)
        channels = channels or (1 if rank == 3 else 3)
        if rank == 3 and channels != 1:
            raise UserError("data.channels: volumes have one channel")
        default = (IMAGENET_MEAN, IMAGENET_STD) if rank == 2 else ((0.5,) * 3, (0.5,) * 3)
        super().__init__(
            preprocessing=ClassPreprocessing(
                shape[:rank] if size is None else read_size(size, rank),
                read_statistics("mean", mean, default[0], channels),
                read_statistics("std", std, default[1], channels),
            ),
            augment=augment,
            batch_size=batch_size,
            split=split,
            num_workers=num_workers,
            seed=seed,
        )
        self._images: dict[str, NDArray[np.uint8]] = {}

    @property
    def description(self) -> str:
        """What the data is, for report and checkpoint."""
        return f"{self.path}" if self.path else "phantom (embedded, synthetic)"

    def find(self) -> list[LabelledCase]:
        """All cases of the file.

        Raises:
            UserError: It is not of MedMNIST's form.
        """
        images, truths = read_arrays(self.path) if self.path else draw_phantom(self.preprocessing.rank, 32)
        self._images = images
        names = self._names
        if names is None and self.path is None:
            names = list(PHANTOM_CLASSES)
        elif names is None and self.flag in FLAGS:
            names = list(FLAGS[self.flag][1])
        elif names is None:
            names = [str(number) for number in range(count_classes(truths, self.task == MULTI_LABEL))]
        multi = self.path is not None and self.task == MULTI_LABEL
        self._labels = ClassLabels.from_config(names, multi)
        digest, cases = hashlib.sha256(), []
        for part in PARTS:
            digest.update(np.ascontiguousarray(images[part]).data)
            digest.update(np.ascontiguousarray(truths[part], np.int64).data)
            for index, classes in enumerate(classes_of(self.path, part, truths[part], self._labels)):
                name = f"{part}_{index:05d}"
                cases.append(LabelledCase(name, name, classes, self.root, None, part, index))
        self.fingerprint = fingerprint_of([(self.flag, digest.hexdigest())])
        return cases

    def read_case(self, case: LabelledCase) -> NDArray[np.uint8]:
        """A case as it is: (H, W, C) or (D, H, W, 1)."""
        preprocessing = self.preprocessing
        return with_channels(self._images[case.part][case.index], preprocessing.rank, preprocessing.in_channels)
