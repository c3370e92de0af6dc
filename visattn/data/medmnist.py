"""The data module for MedMNIST's .npz files, and any of their form."""

import hashlib
import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from visattn.class_labels import ClassLabels
from visattn.data.cases import fingerprint_of
from visattn.data.class_module import ClassDataModule, LabelledCase, read_statistics
from visattn.data.class_phantom import PHANTOM_CLASSES, draw_phantom
from visattn.data.class_preprocessing import ClassPreprocessing, read_size
from visattn.data.images import IMAGENET_MEAN, IMAGENET_STD
from visattn.data.medmnist_flags import FLAGS, KINDS, MULTI_LABEL
from visattn.data.phantoms import PHANTOM
from visattn.data.splits import PARTS
from visattn.errors import UserError, unknown

_SIZES = (28, 64, 128, 224)
_LARGEST = 2**36  # bytes that the arrays of one file may take, whatever the memory


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
        self.path = None if root == PHANTOM else _find(root, flag, native)
        self.flag = flag or (_flag_of(self.path) if self.path else "breastmnist")
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
        shape = _shape(self.path) if self.path else (32,) * (3 if self.flag.endswith("3d") else 2)
        rank = 3 if len(shape) == 3 and shape[-1] != 3 else 2
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
        images, truths = self._read() if self.path else draw_phantom(self.preprocessing.rank, 32)
        self._images = images
        names = self._names
        if names is None and self.path is None:
            names = list(PHANTOM_CLASSES)
        elif names is None and self.flag in FLAGS:
            names = list(FLAGS[self.flag][1])
        elif names is None:
            names = [str(number) for number in range(_count(truths, self.task == MULTI_LABEL))]
        multi = self.path is not None and self.task == MULTI_LABEL
        self._labels = ClassLabels.from_config(names, multi)
        digest, cases = hashlib.sha256(), []
        for part in PARTS:
            digest.update(np.ascontiguousarray(images[part]).data)
            digest.update(np.ascontiguousarray(truths[part], np.int64).data)
            for index, classes in enumerate(self._classes(part, truths[part])):
                name = f"{part}_{index:05d}"
                cases.append(LabelledCase(name, name, classes, self.root, None, part, index))
        self.fingerprint = fingerprint_of([(self.flag, digest.hexdigest())])
        return cases

    def read_case(self, case: LabelledCase) -> NDArray[np.uint8]:
        """A case as it is: (H, W, C) or (D, H, W, 1)."""
        image = self._images[case.part][case.index]
        if image.ndim == self.preprocessing.rank:
            image = image[..., None]
        channels = self.preprocessing.in_channels
        if image.shape[-1] == channels:
            return np.asarray(image, np.uint8)
        if channels == 3:
            return np.repeat(image, 3, axis=-1)
        grey = image @ np.array([0.299, 0.587, 0.114])  # ITU-R 601, as everywhere
        return np.asarray(np.rint(grey), np.uint8)[..., None]

    def _classes(self, part: str, truth: NDArray[Any]) -> list[tuple[int, ...]]:
        """The classes of each case of a part."""
        most = self.labels.channels
        if self.labels.multi_label:
            if truth.ndim != 2 or truth.shape[1] != most or not np.isin(truth, (0, 1)).all():
                raise UserError(f"{self.path}: {part}_labels must be (N, {most}) of 0 and 1, not {truth.shape}")
            return [tuple(int(i) for i in np.flatnonzero(row)) for row in truth]
        flat = truth.reshape(len(truth), -1)
        if flat.shape[1] != 1:
            raise UserError(
                f"{self.path}: {part}_labels has {flat.shape[1]} columns; for these, set data.task multi-label"
            )
        wrong = flat[(flat < 0) | (flat >= most)]
        if wrong.size:
            raise UserError(
                f"{self.path}: {part}_labels holds {int(wrong[0])}, but there are {most} classes: "
                f"{', '.join(self.labels.names[:6])}.\nName all of them in data.labels."
            )
        return [(int(value),) for value in flat[:, 0]]

    def _read(self) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[Any]]]:
        """Images and labels of each part, checked before they are unpacked."""
        assert self.path is not None
        headers = _headers(self.path)
        images, truths = {}, {}
        try:
            with np.load(self.path, allow_pickle=False) as content:
                for part in PARTS:
                    images[part], truths[part] = content[f"{part}_images"], content[f"{part}_labels"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, MemoryError, EOFError) as error:
            raise UserError(f"{self.path}: damaged, or not of MedMNIST's form: {str(error)[:200]}") from error
        for part in PARTS:
            shape, kind = headers[f"{part}_images"]
            if kind != np.uint8 or shape[1:] != headers["train_images"][0][1:]:
                raise UserError(f"{self.path}: {part}_images holds {kind} {shape}, not uint8 of one size")
            if truths[part].dtype.kind not in "iu" or len(truths[part]) != len(images[part]):
                raise UserError(f"{self.path}: {part}_labels are not whole numbers, one for each of the images")
        return images, truths


def _find(root: str, flag: str | None, native: int) -> Path:
    """The file that `root` and `flag` mean."""
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


def _flag_of(path: Path) -> str:
    return re.sub(r"_(28|64|128|224)$", "", path.stem)


def _shape(path: Path) -> tuple[int, ...]:
    """The shape of one case."""
    return _headers(path)["train_images"][0][1:]


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of every array, from the headers alone.

    Raises:
        UserError: An array is missing, or is larger than its file or the memory can hold.
    """
    found: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    memory = min(_LARGEST, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    total = 0
    try:
        with zipfile.ZipFile(path) as archive:
            for part in PARTS:
                for kind in ("images", "labels"):
                    info = archive.getinfo(f"{part}_{kind}.npy")
                    with archive.open(info) as handle:
                        numpy_format: Any = np.lib.format
                        version = numpy_format.read_magic(handle)
                        first = version == (1, 0)
                        read = numpy_format.read_array_header_1_0 if first else numpy_format.read_array_header_2_0
                        shape, _, dtype = read(handle)
                    size = math.prod(shape) * dtype.itemsize
                    if dtype.hasobject:
                        raise UserError(
                            f"{path}: {part}_{kind} holds Python objects, which could execute code: refused"
                        )
                    if size > info.file_size:
                        raise UserError(f"{path}: {part}_{kind} claims {size} bytes and has {info.file_size}")
                    total += size
                    found[f"{part}_{kind}"] = (shape, dtype)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError, SyntaxError) as error:
        raise UserError(
            f"{path}: not of MedMNIST's form ({str(error)[:160]}).\n"
            "It needs train_images, train_labels, val_images, val_labels, test_images and test_labels."
        ) from error
    if total > memory * 3 // 4:
        raise UserError(f"{path}: its arrays take {total / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB")
    images = found["train_images"][0]
    if len(images) not in (3, 4, 5) or 0 in images or (len(images) == 5 and images[-1] != 1):
        raise UserError(f"{path}: train_images is {images}; needs (N, H, W), (N, H, W, 3) or (N, D, H, W)")
    return found


def _count(truths: dict[str, NDArray[Any]], multi_label: bool) -> int:
    if multi_label:
        return int(truths["train"].shape[-1])
    return max(2, 1 + max(int(truth.max(initial=0)) for truth in truths.values()))
