"""The data module for folders of images with masks."""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from visattn.data.augment import build_augmenter
from visattn.data.cases import (
    Case,
    CaseReader,
    Checked,
    Pair,
    check_cases,
    find_cases,
    fingerprint,
    raise_problems,
    with_groups,
)
from visattn.data.dataset import EvaluationSet, TrainingBatch, TrainingSet, collate_evaluation
from visattn.data.images import IMAGENET_MEAN, IMAGENET_STD, MAX_PIXELS, Preprocessing
from visattn.data.loading import free_cores, make_loader, progress
from visattn.data.loading import rank as _rank
from visattn.data.phantoms import IMAGE_KINDS, described
from visattn.data.sampler import EpochSampler, ShardSampler
from visattn.data.slices import Slices
from visattn.data.splits import Split, find_groups, fold_cases, split_cases, write_splits
from visattn.errors import UserError
from visattn.labels import Labels

MOST_WORKERS = 256
_log = logging.getLogger(__name__)


class ImageMaskFolder(LightningDataModule):
    """Images and masks in folders: Kvasir-SEG, CVC-ClinicDB, PraNet's layouts and any other like them.

    A training batch is {image float32 (B, C, h, w), target uint8 class indices (B, h, w), case}; a validation or test
    batch {image (B, C, h, w), target: list of uint8 (H, W) at the native sizes, case, group, path}. Everything is
    read and checked before training starts.

    Args:
        root: A folder with images/ and masks/ (or image/ and mask/), several such folders, or the word phantom: an
            embedded set of synthetic images.
        labels: Names and their values in the mask files, the background first: {background: 0, polyp: 255}. A list of
            values merges them.
        size: Side of the square, or height and width, in pixels that images are resized to.
        split: Shares and groups: val, test, group_by, folds, fold, files.
        augment: Names, or mappings with a name and its arguments: {name: affine, rotate: 90, p: 0.7}.
        batch_size: Images per device and step.
        regions: Overlapping regions, outermost first: {whole: [rim, core], core: [core]}.
        ignore: Value or values in the mask files that count neither in loss nor in metrics.
        channels: 3 for colour, 1 for grey.
        mean: Subtracted per channel after scaling to 0..1; by default ImageNet's.
        std: Divided by per channel; by default ImageNet's.
        num_workers: Processes that load data; by default one per free core, at most 8.
        cache: Keep the decoded training and validation images in memory.
        scales: Each training batch is seen once at each of these multiples of size.
        seed: Of split, order and augmentation.
        test_root: Like root, for testing only; PraNet's TestDataset with its sets is understood.
        slices: Where the images are slices of volumes, which ones: axial, coronal or sagittal, or {axis: axial,
            window: [-20, 120]}; the checkpoint then predicts volumes slice by slice.
    """

    def __init__(
        self,
        root: str | list[str],
        labels: dict[str, int | list[int]],
        size: int | list[int] = 352,
        split: dict[str, Any] | None = None,
        augment: list[dict[str, Any] | str] | None = None,
        batch_size: int = 16,
        regions: dict[str, list[str]] | None = None,
        ignore: int | list[int] | None = None,
        channels: Literal[1, 3] = 3,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        num_workers: int | None = None,
        cache: bool = True,
        scales: list[float] | None = None,
        seed: int = 0,
        test_root: str | list[str] | None = None,
        slices: str | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.roots = [root] if isinstance(root, str) else list(root)
        self.test_roots = [test_root] if isinstance(test_root, str) else list(test_root or [])
        self.labels = Labels.from_config(labels, regions, ignore)
        self.preprocessing = Preprocessing(
            _size(size),
            _per_channel("mean", mean, IMAGENET_MEAN, channels),
            _per_channel("std", std, IMAGENET_STD, channels),
            channels,
            Slices.from_config(slices),
        )
        self.split = Split.from_config(split)
        self.augmenter = build_augmenter(augment, self.labels)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.cache = cache
        self.scales = list(scales or [1.0])
        self.seed = seed
        self.cases: dict[str, list[Case]] = {}
        self.fingerprint = ""
        self._resumed = (0, 0)
        self._reader = CaseReader(self.labels, channels)
        self._sets: dict[str, TrainingSet | EvaluationSet] = {}
        self._check_arguments()

    @property
    def description(self) -> str:
        """What the data is, for report and checkpoint."""
        return ", ".join(described(root, IMAGE_KINDS) for root in self.roots)

    def setup(self, stage: str | None = None) -> None:
        """Find, check and divide the cases, once.

        Raises:
            UserError: Something is wrong with the data; the first problems are listed and the rest counted.
        """
        if stage == "test" and self.test_roots:
            if "test" not in self._sets:
                self._setup_test()
        elif "train" not in self._sets:
            self._setup_fit()

    def read_case(self, case: Case) -> Pair:
        """A case at its native size: image (H, W, C) and class indices (H, W)."""
        return self._reader(case)

    def write_splits(self, path: Path | str) -> None:
        """Write the names of the cases of each part as JSON, which `split.files` reads."""
        write_splits(path, self.cases)

    def find_folds(self) -> list[dict[str, list[Case]]]:
        """Train, val and test cases of each fold of `split.folds`; reads and checks the data, and keeps no image.

        Raises:
            UserError: As `setup`.
        """
        cases, checked = self._find_and_check(keep=False)
        return fold_cases(cases, [check.classes for check in checked], self.split, self.seed)

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the number of its batches after which training goes on, for the checkpoint."""
        return progress(self.trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written. Lightning's own counters come too late for loading processes."""
        self._resumed = (int(state_dict["epoch"]), int(state_dict["batches"]))

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of augmented images, in an order drawn from seed and epoch."""
        rank, world = _rank()
        data = self._sets["train"]
        sampler = EpochSampler(len(data), self.batch_size, self.seed, self.scales, rank, world)
        sampler.resume(*self._resumed)
        return self._loader(data, sampler, TrainingBatch(self.preprocessing), self._workers())

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation cases."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test cases: those of `test_root`, or those that the split set aside."""
        return self._evaluation_loader("test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Resize a training batch to its scale, on the device, as PraNet's training does.

        Images, and in a binary task the targets too, are interpolated bilinearly with aligned corners, the sides
        rounded to multiples of 32; such targets are soft, float (B, 1, h, w). Other targets take nearest neighbours.
        """
        if not isinstance(batch, dict) or "scale" not in batch:
            return batch
        scale, image, target = batch.pop("scale"), batch["image"], batch["target"]
        if self.scales == [1.0]:
            return batch
        soft = self.labels.binary and not self.labels.ignore
        target = target[:, None].to(image.dtype) if soft else target
        if scale != 1.0:
            size = [max(32, round(side * scale / 32) * 32) for side in image.shape[-2:]]
            image = F.interpolate(image, size, mode="bilinear", align_corners=True)
            if soft:
                target = F.interpolate(target, size, mode="bilinear", align_corners=True)
            else:
                target = F.interpolate(target[:, None], size, mode="nearest-exact")[:, 0]
        return {**batch, "image": image, "target": target}

    def _find_and_check(self, keep: bool) -> tuple[list[Case], list[Checked]]:
        """The cases with their groups, and what reading them showed, with resized images if wanted and affordable."""
        cases = find_cases(self.roots)
        cases = with_groups(cases, find_groups(cases, self.split.group_by))
        _log.info("data: reading and checking %d images and masks", len(cases))
        size = self.preprocessing.size if keep and self._affordable(len(cases)) else None
        checked, problems = check_cases(cases, self._reader, size)
        raise_problems(problems, len(cases))
        if not any(check.classes for check in checked):
            raise UserError(
                f"data: none of the {len(cases)} masks holds anything but '{self.labels.names[0]}'; "
                f"check labels ({self.labels.to_config()['labels']}) and masks"
            )
        self.fingerprint = fingerprint(cases, checked)
        return cases, checked

    def _setup_fit(self) -> None:
        cases, checked = self._find_and_check(keep=True)
        keep = checked[0].kept is not None
        self.cases = split_cases(cases, [check.classes for check in checked], self.split, self.seed)
        kept = {case.name: check.kept for case, check in zip(cases, checked, strict=True) if check.kept is not None}
        cached = [kept[case.name] for case in self.cases["train"]] if keep else None
        self._sets["train"] = TrainingSet(
            self.cases["train"], cached, self._reader, self.augmenter, self.preprocessing, self.seed
        )
        self._sets["val"] = EvaluationSet(self.cases["val"], self._reader, self.preprocessing, keep)
        if self.cases["test"] and not self.test_roots:
            self._sets["test"] = EvaluationSet(self.cases["test"], self._reader, self.preprocessing, cache=False)

    def _setup_test(self) -> None:
        cases = find_cases(self.test_roots, sets=True)
        checked, problems = check_cases(cases, self._reader, None)
        raise_problems(problems, len(cases))
        self.fingerprint = self.fingerprint or fingerprint(cases, checked)
        self.cases["test"] = cases
        self._sets["test"] = EvaluationSet(cases, self._reader, self.preprocessing, cache=False)

    def _affordable(self, count: int) -> bool:
        """Whether to keep the decoded images: as asked, unless they would fill half of the memory."""
        height, width = self.preprocessing.size
        needed = count * height * width * (self.preprocessing.channels + 1)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if not self.cache:
            return False
        if needed > memory // 2:
            _log.warning("data.cache: %d images need %.1f GB, too much to keep; reading files", count, needed / 1e9)
            return False
        _log.info("data.cache: keeping %d decoded images in memory (%.0f MB)", count, needed / 1e6)
        return True

    def _evaluation_loader(self, part: str) -> DataLoader[Any]:
        rank, world = _rank()
        if part not in self._sets or not len(self._sets[part]):
            raise UserError("data: there are no test cases; give data.test_root or data.split.test")
        data = self._sets[part]
        if len(data) < world:
            raise UserError(f"data: {len(data)} {part} cases for {world} devices; give each at least one")
        sampler = ShardSampler(len(data), self.batch_size, rank, world)
        # Cached cases only need normalising; a second crew of workers would cost more than it saves.
        kept = isinstance(data, EvaluationSet) and data.cached is not None
        return self._loader(data, sampler, collate_evaluation, 0 if kept else self._workers())

    def _loader(self, data: Any, sampler: Any, collate: Any, workers: int) -> DataLoader[Any]:
        return make_loader(data, sampler, collate, workers, self.seed)

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        small = self.preprocessing.size[0] * self.preprocessing.size[1] <= 160 * 160
        return 0 if self.cache and small else max(0, min(8, free_cores() - 1))

    def _check_arguments(self) -> None:
        if not self.roots:
            raise UserError("data.root: give a folder, several folders, or the word phantom")
        for key, value, low in (
            ("batch_size", self.batch_size, 1),
            ("num_workers", self.num_workers or 0, 0),
            ("seed", self.seed, 0),
        ):
            if value < low:
                raise UserError(f"data.{key}: needs a whole number of at least {low}, got {value}")
        if (self.num_workers or 0) > MOST_WORKERS:
            raise UserError(f"data.num_workers: at most {MOST_WORKERS} processes, got {self.num_workers}")
        if not all(0 < scale <= 4 for scale in self.scales):
            raise UserError(f"data.scales: needs factors above 0 and up to 4, got {self.scales}")


def _size(size: int | Sequence[int]) -> tuple[int, int]:
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise UserError(f"data.size: needs one side or [height, width] in pixels, got {size!r}")
    if sides[0] * sides[1] > MAX_PIXELS:
        raise UserError(f"data.size: {sides[0]} x {sides[1]} pixels are more than the limit of {MAX_PIXELS}")
    return sides[0], sides[1]


def _per_channel(
    key: str, values: Sequence[float] | None, default: Sequence[float], channels: Literal[1, 3]
) -> tuple[float, ...]:
    if values is None:
        return tuple(default) if channels == 3 else (round(sum(default) / len(default), 3),)
    if (
        len(values) != channels
        or (key == "std" and not all(value > 0 for value in values))
        or not all(map(math.isfinite, values))
    ):
        raise UserError(f"data.{key}: needs {channels} numbers{' above 0' if key == 'std' else ''}, got {values!r}")
    return tuple(float(value) for value in values)
