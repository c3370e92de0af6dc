"""What the data modules of classification share: cases with a label, their loaders, their division."""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate

from visattn.class_labels import ClassLabels
from visattn.data.class_augment import ClassAugmenter, VolumeAugmenter, build_class_augmenter
from visattn.data.class_cases import LabelledCase, divide, divide_folds
from visattn.data.class_preprocessing import ClassPreprocessing
from visattn.data.loading import free_cores, make_loader, progress
from visattn.data.loading import rank as _rank
from visattn.data.sampler import EpochSampler, Key, ShardSampler
from visattn.data.splits import Split, write_splits
from visattn.errors import UserError

_log = logging.getLogger(__name__)
_MOST_WORKERS = 256


class ClassDataModule(LightningDataModule):
    """Cases with classes. A training batch is {image float32 (B, C, *S), target, case, group, seed}.

    `target` are class indices (B,), or which classes a case has (B, K) as float32 where it may have several. A
    subclass sets `labels`, `roots` and `preprocessing`, and finds and reads cases.

    Args:
        augment: As in a recipe.
        batch_size: Cases per device and step.
        split: As in a recipe; None where the data are divided already.
        num_workers: Processes that load data; by default one per free core, at most 8.
        seed: Of split, order and augmentation.
        preprocessing: Size and normalisation.
        repeats: Copies of each training case in an epoch, which then sees so many times fewer cases.
    """

    def __init__(
        self,
        *,
        preprocessing: ClassPreprocessing,
        augment: list[dict[str, Any] | str] | None,
        batch_size: int,
        split: dict[str, Any] | None,
        num_workers: int | None,
        seed: int,
        repeats: int = 1,
    ) -> None:
        super().__init__()
        for key, value, low in (
            *(("batch_size", batch_size, 1), ("num_workers", num_workers or 0, 0), ("seed", seed, 0)),
            ("repeats", repeats, 1),
        ):
            if value < low:
                raise UserError(f"data.{key}: needs a whole number of at least {low}, got {value}")
        if (num_workers or 0) > _MOST_WORKERS:
            raise UserError(f"data.num_workers: at most {_MOST_WORKERS} processes, got {num_workers}")
        self.preprocessing = preprocessing
        self.augmenter = build_class_augmenter(augment, preprocessing)
        self.batch_size = batch_size
        self.split = None if split is None else Split.from_config(split)
        self.num_workers = num_workers
        self.seed = seed
        self.repeats = repeats
        self.cases: dict[str, list[LabelledCase]] = {}
        self.fingerprint = ""
        self._resumed = (0, 0)
        self._labels: ClassLabels | None = None

    @property
    def labels(self) -> ClassLabels:
        """The classes; the data may have to be read to know them."""
        if self._labels is None:
            self.setup()
        assert self._labels is not None
        return self._labels

    @property
    @abstractmethod
    def description(self) -> str:
        """What the data is, for report and checkpoint."""

    @abstractmethod
    def find(self) -> list[LabelledCase]:
        """All cases; sets `labels` and `fingerprint`.

        Raises:
            UserError: Something is wrong with the data.
        """

    @abstractmethod
    def read_case(self, case: LabelledCase) -> NDArray[np.uint8]:
        """A case as it is: (H, W, C) or (D, H, W, C)."""

    def setup(self, stage: str | None = None) -> None:
        """Find, check and divide the cases, once."""
        if self.cases:
            return
        cases = divide(self.find(), self.split, self.seed, self.description)
        self._check_classes(cases["train"])
        self.cases = cases

    def find_folds(self) -> list[dict[str, list[LabelledCase]]]:
        """Train, val and test cases of each fold of `split.folds`; a test set that the data name stays one."""
        assert self.split is not None
        return divide_folds(self.find(), self.split, self.seed)

    def _check_classes(self, train: Sequence[LabelledCase]) -> None:
        present = {index for case in train for index in case.classes}
        missing = [name for index, name in enumerate(self.labels.names) if index not in present]
        if not self.labels.multi_label and len(present) < 2:
            raise UserError("data: all training cases have one class, so there is nothing to learn")
        if missing:
            _log.warning("data: no training case has the class %s", ", ".join(missing[:5]))

    def write_splits(self, path: Path | str) -> None:
        """Write the names of the cases of each part as JSON, which `split.files` reads."""
        write_splits(path, self.cases)

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the number of its batches after which training goes on, for the checkpoint."""
        return progress(self.trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written. Lightning's own counters come too late for loading processes."""
        self._resumed = (int(state_dict["epoch"]), int(state_dict["batches"]))

    def target(self, case: LabelledCase) -> Any:
        """The class index of a case, or which classes it has (K,)."""
        if not self.labels.multi_label:
            return case.classes[0]
        target = torch.zeros(self.labels.channels)
        target[list(case.classes)] = 1.0
        return target

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of augmented cases, in an order drawn from seed and epoch."""
        rank, world = _rank()
        cases = self.cases["train"]
        sampler = EpochSampler(len(cases), self.batch_size, self.seed, (1.0,), rank, world, self.repeats)
        sampler.resume(*self._resumed)
        return make_loader(_Samples(self, cases, True), sampler, default_collate, self._workers(), self.seed)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation cases."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test cases."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, part: str) -> DataLoader[Any]:
        rank, world = _rank()
        cases = self.cases[part]
        if len(cases) < world:
            raise UserError(f"data: {len(cases)} {part} cases for {world} devices; give each at least one")
        sampler = ShardSampler(len(cases), self.batch_size, rank, world)
        return make_loader(_Samples(self, cases, False), sampler, default_collate, self._workers(), self.seed)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment volumes, on the device."""
        if isinstance(batch, dict) and "seed" in batch and isinstance(self.augmenter, VolumeAugmenter):
            batch = {**batch, "image": self.augmenter(batch["image"], batch["seed"].tolist())}
        return batch

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        small = (
            all(case.image is None for case in self.cases["train"][:1]) and np.prod(self.preprocessing.size) <= 160**2
        )
        return 0 if small else max(0, min(8, free_cores() - 1))


class _Samples(Dataset[dict[str, Any]]):
    """Cases as samples; one for training depends on (seed, epoch, index) alone."""

    def __init__(self, data: ClassDataModule, cases: Sequence[LabelledCase], training: bool) -> None:
        self.read, self.target_of = data.read_case, data.target
        self.preprocessing, self.seed = data.preprocessing, data.seed
        self.augmenter = data.augmenter if training else None
        self.cases = cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: Key | int) -> Mapping[str, Any]:  # type: ignore[override]
        index, epoch, _, copy = key if isinstance(key, Key) else Key(key)
        case = self.cases[index]
        image = self.read(case)
        sample = {"target": self.target_of(case), "case": case.name, "group": case.group}
        if self.augmenter is None:
            return {**sample, "image": self.preprocessing.prepare(image)}
        if isinstance(self.augmenter, ClassAugmenter):
            # Seeding by a tuple hashes it, so neighbouring samples and epochs draw unrelated streams.
            rng = np.random.default_rng((self.seed, epoch, index, copy) if copy else (self.seed, epoch, index))
            return {**sample, "image": self.augmenter(image, rng)}
        return {**sample, "image": self.preprocessing.prepare(image), "seed": torch.tensor([self.seed, epoch, index])}


def read_statistics(
    key: str, values: Sequence[float] | None, default: Sequence[float], channels: int
) -> tuple[float, ...]:
    """`mean` or `std` of a recipe; the default for colour, its mean for grey.

    Raises:
        UserError: There are not as many numbers as channels.
    """
    if values is None:
        return tuple(default) if channels == 3 else (round(sum(default) / len(default), 3),)
    if len(values) != channels:
        raise UserError(f"data.{key}: needs {channels} numbers, got {values!r:.80}")
    return tuple(float(value) for value in values)
