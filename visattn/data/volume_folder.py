"""The data module for folders of volumes with label volumes."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from visattn.data.augment3d import Size3, build_augmenter3d
from visattn.data.cases import fingerprint_of, raise_problems
from visattn.data.intensity import Normalise
from visattn.data.loading import free_cores, make_loader, progress, rank
from visattn.data.patches import PatchBatch, PatchSampler, PatchSet, VolumeSet, augment, collate_volumes
from visattn.data.phantoms import VOLUME_KINDS, described, phantom_kind
from visattn.data.sampler import ShardSampler
from visattn.data.spacing import median_spacing
from visattn.data.splits import Split, find_groups, fold_cases, split_cases, write_splits
from visattn.data.volume_cache import Entry, Facts, VolumeCache
from visattn.data.volume_preprocessing import VolumePreprocessing
from visattn.data.volume_statistics import foreground_statistics, turned_spacing
from visattn.data.volumes import VolumeCase, read_case, read_case_label, scan_volumes
from visattn.errors import UserError
from visattn.labels import Labels

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_R = TypeVar("_R")


class VolumeFolder(LightningDataModule):
    """Volumes (NIfTI) with label volumes, in the layouts in which data sets are published.

    A training batch is {image float32 (B, C, d, h, w), target uint8 class indices (B, d, h, w), case}. Validation and
    test batches are dictionaries of lists, an entry for each case, as `VolumeSet` describes. Everything is read and
    checked before training starts; preprocessed volumes are kept on disk (`visattn.data.volume_cache`).

    Args:
        root: A folder, several folders, or the word phantom: an embedded set of synthetic heads; `phantom:hippocampus`.
        labels: Names and their values in the label files, the background first: {background: 0, tumour: [1, 4]}.
        channels: Names of the channels, in the order of the network's input; null: all that the data set has.
        layout: auto, decathlon, nnunet, folders or bids; or patterns: {t1c: "{case}/*_t1c.nii.gz", label: ...}.
        orientation: Directions that the axes are turned to, as RAS; null: as in the file.
        spacing: Voxel size in mm that volumes are resampled to, three numbers along the turned axes; median: that of
            the training cases; null: each its own.
        size: Voxels that whole volumes are resized to, in place of spacing and patch.
        patch: Voxels of the window that the network sees.
        crop_foreground: Cut away a margin of constant background.
        normalise: zscore, zscore_masked, percentile, ct or none, or a mapping with name and arguments; a list of them
            gives each channel its own.
        split: Shares and groups: val, test, group_by, folds, fold, files.
        augment: Names, or mappings with a name and its arguments: {name: affine, rotate: 15, p: 0.5}.
        batch_size: Patches per device and step, and windows per call in validation.
        iterations_per_epoch: Steps of an epoch; null: as many as see each case once.
        oversample: Share of the patches whose middle lies on foreground, of a class drawn evenly.
        cache_dir: Folder of the preprocessed volumes; null: visattn/volumes in the user's cache folder.
        regions: Overlapping regions, outermost first: {whole: [rim, core], core: [core]}.
        ignore: Value or values in the label files that count neither in loss nor in metrics.
        num_workers: Processes that load data; by default one per free core, at most 8.
        seed: Of split, order, patches and augmentation.
        test_root: Like root, for testing only.
    """

    def __init__(
        self,
        root: str | list[str],
        labels: dict[str, int | list[int]],
        channels: list[str] | None = None,
        layout: str | dict[str, str] = "auto",
        orientation: str | None = "RAS",
        spacing: Literal["median"] | list[float] | None = None,
        size: list[int] | None = None,
        patch: list[int] | None = None,
        crop_foreground: bool = False,
        normalise: str | dict[str, Any] | list[Any] = "zscore",
        split: dict[str, Any] | None = None,
        augment: list[dict[str, Any] | str] | None = None,
        batch_size: int = 2,
        iterations_per_epoch: int | None = None,
        oversample: float = 0.33,
        cache_dir: str | None = None,
        regions: dict[str, list[str]] | None = None,
        ignore: int | list[int] | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        test_root: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        self.roots = [root] if isinstance(root, str) else list(root)
        self.test_roots = [test_root] if isinstance(test_root, str) else list(test_root or [])
        self.labels = Labels.from_config(labels, regions, ignore)
        self.layout = layout
        self.channels = channels
        self.spacing = spacing
        self.split = Split.from_config(split)
        self._own_split = set(split or {}) - {"fold", "folds"}  # says more than which of the given folds
        self.augmenter = build_augmenter3d(augment, self.labels)
        self.batch_size = batch_size
        self.iterations = iterations_per_epoch
        self.oversample = oversample
        self.num_workers = num_workers
        self.seed = seed
        self.cases: dict[str, list[VolumeCase]] = {}
        self.fingerprint = ""
        self.cache = VolumeCache(Path(cache_dir).expanduser() if cache_dir else None, self.labels)
        self.cut: Size3 | None = None
        self._normalise = normalise
        self._resumed = (0, 0)
        self._adopted: VolumePreprocessing | None = None
        self._sets: dict[str, PatchSet | VolumeSet] = {}
        self._check_arguments()
        names = tuple(channels) if channels else ("image",)
        # Complete after setup, when channels, spacing and statistics are known.
        self.preprocessing = VolumePreprocessing(
            channels=names,
            normalise=self._methods(names),
            orientation=orientation,
            spacing=None if spacing is None or isinstance(spacing, str) else tuple(spacing),  # type: ignore[arg-type]
            size=None if size is None else tuple(size),  # type: ignore[arg-type]
            patch=None if patch is None else tuple(patch),  # type: ignore[arg-type]
            crop_foreground=crop_foreground,
        )

    @property
    def description(self) -> str:
        """What the data is, for report and checkpoint."""
        return ", ".join(described(root, VOLUME_KINDS) for root in self.roots)

    @property
    def window(self) -> Size3 | None:
        """Size of what the network sees: the patch, or the size of whole volumes."""
        return self.preprocessing.patch or self.preprocessing.size

    def adopt(self, config: dict[str, Any], source: str) -> None:
        """Take the preprocessing of the checkpoint `source` that is scored or continued, before `setup`.

        Spacing and statistics found in the training cases are the checkpoint's from now on.

        Raises:
            UserError: The recipe states something else.
        """
        if config.get("rank") != VolumePreprocessing.rank:
            raise UserError(f"{source}: was trained on images, this recipe's data are volumes")
        theirs, own = VolumePreprocessing.from_config(config), self.preprocessing
        known = replace(own, channels=theirs.channels, normalise=self._methods(theirs.channels))
        if self.channels is not None:
            known = replace(known, channels=tuple(self.channels))
        if self.spacing == "median":
            known = replace(known, spacing=theirs.spacing)
        filled = [given if a.name == given.name and not a.complete else a for a, given in
                  zip(known.normalise, theirs.normalise, strict=True)]  # fmt: skip
        known = replace(known, normalise=tuple(filled))
        for key, value in known.to_config().items():
            if value != theirs.to_config()[key]:
                raise UserError(
                    f"data.{key}: the recipe says {value}, {source} was trained with {theirs.to_config()[key]}.\n"
                    "Give the recipe and keys that it was trained with; they stand in config.yaml of its run folder."
                )
        self._adopted = self.preprocessing = theirs

    def setup(self, stage: str | None = None) -> None:
        """Find, check, divide and prepare the cases, once.

        Raises:
            UserError: Something is wrong with the data; the first problems are listed and the rest counted.
        """
        if stage == "test" and self.test_roots:
            if "test" not in self._sets:
                self._setup_test()
        elif "train" not in self._sets:
            self._setup_fit()

    def read_case(self, case: VolumeCase) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """A case on its own grid: image (C, I, J, K) and class indices (I, J, K)."""
        array, geometry, _ = read_case(case)
        return array, read_case_label(case, self.labels, geometry)

    def write_splits(self, path: Path | str) -> None:
        """Write the names of the cases of each part as JSON, which `split.files` reads."""
        write_splits(path, self.cases)

    def find_folds(self) -> list[dict[str, list[VolumeCase]]]:
        """Train, val and test cases of each fold of `split.folds`; reads and checks the data.

        Raises:
            UserError: As `setup`.
        """
        cases, facts, split = self._find_and_check()
        if split.files is not None and split.folds is not None:
            return [self._divide(cases, facts, replace(split, fold=fold)) for fold in range(split.folds)]
        return fold_cases(cases, [entry.classes for entry in facts], split, self.seed)

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the number of its batches after which training goes on, for the checkpoint."""
        return progress(self.trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written. Lightning's own counters come too late for loading processes."""
        self._resumed = (int(state_dict["epoch"]), int(state_dict["batches"]))

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of patches, in an order drawn from seed and epoch."""
        own, world = rank()
        data = self._sets["train"]
        assert isinstance(data, PatchSet)
        sampler = PatchSampler(len(data), self.batch_size, self.iterations, self.seed, own, world)
        sampler.resume(*self._resumed)
        collate = PatchBatch(None if self._on_device() else self.augmenter, data.patch)
        return make_loader(data, sampler, collate, self._workers(), self.seed)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation cases."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test cases: those of `test_root`, or those that the split set aside."""
        return self._evaluation_loader("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a training batch; whole volumes stay, as their windows are moved one by one."""
        return batch if "plan" in batch else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment a training batch on the GPU, if it was not done while loading."""
        if "draw" not in batch:
            return batch
        assert self.window is not None
        return augment(batch, self.augmenter, self.window)

    def _find_and_check(self) -> tuple[list[VolumeCase], list[Facts], Split]:
        """The cases with their groups, what reading them showed, and how to divide them."""
        scans = scan_volumes(self.roots, self.layout, self.channels)
        cases, facts = self._check([case for scan in scans for case in scan.cases], scans)
        if not any(entry.classes for entry in facts):
            raise UserError(
                f"data: none of the {len(cases)} labels holds anything but '{self.labels.names[0]}'; "
                f"check labels ({self.labels.to_config()['labels']}) and files"
            )
        groups = find_groups(cases, self.split.group_by) if self.split.group_by else [case.group for case in cases]
        cases = [replace(case, group=group) for case, group in zip(cases, groups, strict=True)]
        return cases, facts, self._chosen_split(scans)

    def _check(self, cases: list[VolumeCase], scans: Sequence[Any]) -> tuple[list[VolumeCase], list[Facts]]:
        """Read every case once; what is wrong with them is collected, not raised at the first."""
        problems = [str(problem) for scan in scans for problem in scan.problems]
        cases = sorted(cases, key=lambda case: case.name)
        names = {scan.channels for scan in scans}
        if len(names) > 1:
            raise UserError(
                f"data.channels: the roots differ in channels: {sorted(map(list, names))}; name those to use"
            )
        channels = names.pop()
        if self._adopted is None:
            self.preprocessing = replace(self.preprocessing, channels=channels, normalise=self._methods(channels))
        self._keep_out_of_data()
        _log.info("data: reading and checking %d cases", len(cases))

        def look(case: VolumeCase) -> Facts | str:
            try:
                return self.cache.facts(case)
            except UserError as error:
                return str(error).replace("\n", " ")
            except MemoryError:
                return f"{case.name}: not enough memory to read it"

        found = _each(look, cases)
        raise_problems([*problems, *(entry for entry in found if isinstance(entry, str))], len(cases))
        facts = [entry for entry in found if isinstance(entry, Facts)]
        for note in [note for entry in facts for note in entry.notes][:8]:
            _log.warning("%s", note)
        self.fingerprint = self.fingerprint or fingerprint_of(
            (c.name, f.digest) for c, f in zip(cases, facts, strict=True)
        )
        return cases, facts

    def _chosen_split(self, scans: Sequence[Any]) -> Split:
        """The recipe's, or nnU-Net's splits_final.json where that lies beside the data and the recipe has none."""
        files = [scan.splits for scan in scans if scan.splits is not None]
        if self._own_split or len(files) != 1 or len(scans) > 1:
            return self.split
        _log.info("data.split: taken from %s", files[0])
        return replace(self.split, files=str(files[0]))

    def _divide(self, cases: list[VolumeCase], facts: list[Facts], split: Split) -> dict[str, list[VolumeCase]]:
        return split_cases(cases, [entry.classes for entry in facts], split, self.seed)

    def _setup_fit(self) -> None:
        cases, facts, split = self._find_and_check()
        known = {case.name: entry for case, entry in zip(cases, facts, strict=True)}
        self.cases = self._divide(cases, facts, split)
        if self._adopted is None:
            self._learn([known[case.name] for case in self.cases["train"]])
        entries = self._entries(self.cases["train"], known)
        window = self.window
        if window is None:
            raise UserError(
                "data.patch: volumes differ in size; give patch (a window), or size (whole volumes resized)"
            )
        largest = np.max([entry.plan.size for entry in entries], axis=0)
        middle = np.median([entry.plan.spacing for entry in entries], axis=0)
        self.cut = _bounded(self.augmenter.reach(window, middle.tolist()), window, largest.tolist())
        self._sets["train"] = PatchSet(self.cases["train"], entries, window, self.cut, self.oversample, self.seed)
        for part in ("val", *(["test"] if self.cases["test"] and not self.test_roots else [])):
            self._sets[part] = self._volumes(part, known)
        if rank()[0] == 0:  # now that all that this training needs has been taken up
            count, size = self.cache.tidy()
            if count:
                _log.info("data: deleted %d cached volumes unused for long, %.1f GB", count, size / 1e9)

    def _setup_test(self) -> None:
        if self._adopted is None:
            raise UserError("data.test_root: a checkpoint has to say how its volumes are prepared")
        scans = scan_volumes(self.test_roots, self.layout, self.channels or list(self.preprocessing.channels))
        cases, facts = self._check([case for scan in scans for case in scan.cases], scans)
        self.cases["test"] = cases
        self._sets["test"] = self._volumes("test", {c.name: entry for c, entry in zip(cases, facts, strict=True)})

    def _learn(self, facts: Sequence[Facts]) -> None:
        """Fill in what preprocessing takes from the training cases."""
        if self.spacing == "median":
            own = [turned_spacing(entry.geometry, self.preprocessing.orientation) for entry in facts]
            self.preprocessing = replace(self.preprocessing, spacing=median_spacing(own))
        if not all(method.complete for method in self.preprocessing.normalise):
            methods = foreground_statistics(self.cases["train"], self.labels, self.preprocessing.normalise)
            self.preprocessing = replace(self.preprocessing, normalise=methods)

    def _volumes(self, part: str, known: dict[str, Facts]) -> VolumeSet:
        cases = self.cases[part]
        return VolumeSet(cases, self._entries(cases, known), [known[case.name] for case in cases])

    def _entries(self, cases: Sequence[VolumeCase], known: dict[str, Facts]) -> list[Entry]:
        return _each(lambda case: self.cache.entry(case, known[case.name], self.preprocessing), cases)

    def _evaluation_loader(self, part: str) -> DataLoader[Any]:
        own, world = rank()
        if part not in self._sets or not len(self._sets[part]):
            raise UserError("data: there are no test cases; give data.test_root or data.split.test")
        data = self._sets[part]
        if len(data) < world:
            raise UserError(f"data: {len(data)} {part} cases for {world} devices; give each at least one")
        # Mapped from disk, so that a process beside this one would have nothing to do.
        return make_loader(data, ShardSampler(len(data), 1, own, world), collate_volumes, 0, self.seed, pin=False)

    def _on_device(self) -> bool:
        """Whether augmentation waits for the device."""
        return self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"

    def _workers(self) -> int:
        return max(0, min(8, free_cores() - 1)) if self.num_workers is None else self.num_workers

    def _methods(self, channels: Sequence[str]) -> tuple[Normalise, ...]:
        given = self._normalise
        listed = list(given) if isinstance(given, list) else [given] * len(channels)
        return tuple(Normalise.from_config(method) for method in listed)

    def _keep_out_of_data(self) -> None:
        place = self.cache.folder.resolve()
        for root in (*self.roots, *self.test_roots):
            if phantom_kind(root, VOLUME_KINDS) is None and place.is_relative_to(Path(root).expanduser().resolve()):
                raise UserError(
                    f"data.cache_dir: {self.cache.folder} lies within the data set {root}; name another folder"
                )

    def _check_arguments(self) -> None:
        if not self.roots:
            raise UserError("data.root: give a folder, several folders, or the word phantom")
        for key, value, low in (
            ("batch_size", self.batch_size, 1),
            ("num_workers", self.num_workers or 0, 0),
            ("seed", self.seed, 0),
            ("iterations_per_epoch", 1 if self.iterations is None else self.iterations, 1),
        ):
            if value < low:
                raise UserError(f"data.{key}: needs a whole number of at least {low}, got {value}")
        if not 0 <= self.oversample <= 1:
            raise UserError(f"data.oversample: needs a share of 0 to 1, got {self.oversample}")


def _each(action: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """`action` of each item, in their order; unpacking and resampling release the interpreter's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(action, items))


def _bounded(reach: Size3, window: Size3, largest: Sequence[int]) -> Size3:
    """`reach`, but no more than holds the largest volume; an even number of voxels more than the window."""
    sides = []
    for side, own, most in zip(reach, window, largest, strict=True):
        more = max(0, min(side, most) - own)
        sides.append(own + more + more % 2)
    d, h, w = sides
    return d, h, w
