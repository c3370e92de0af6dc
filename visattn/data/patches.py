"""Patches of volumes for training, whole volumes for validation and test, and which patch stands in which batch."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from visattn.data.augment3d import Augmenter3d, Size3
from visattn.data.volume_cache import Entry, Facts
from visattn.data.volumes import VolumeCase


class PatchKey(NamedTuple):
    """What the training set is asked for: a case, and which patch of the epoch this is."""

    item: int
    epoch: int = 0
    position: int = 0


class PatchSampler(Sampler[list[PatchKey]]):
    """Yields the training batches of one epoch as lists of keys; use it as a `batch_sampler`.

    An epoch is a number of steps. Its cases are one permutation after the other, drawn from (seed, epoch), so that all
    come equally often. Each run of `batch_size` x `world` patches is one step of all devices.

    Args:
        length: Number of cases.
        batch_size: Patches per device and step.
        iterations: Steps of an epoch; None: as many as it takes to see each case once, at least 1.
        seed: Seed of the run.
        rank: This process among `world`.
        world: Number of processes that share the data.
    """

    def __init__(
        self, length: int, batch_size: int, iterations: int | None, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.iterations = iterations or max(1, length // (batch_size * world))
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        self._done = (0, 0)

    def resume(self, epoch: int, batches: int) -> None:
        """Start with `epoch`, and leave out its first `batches`, which were trained on before a stop."""
        self.epoch = epoch
        self._done = (epoch, batches)

    @property
    def sampler(self) -> "PatchSampler":
        """Itself: Lightning looks for `set_epoch` on a batch sampler's `sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.iterations

    def __iter__(self) -> Iterator[list[PatchKey]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        step = self.batch_size * self.world
        rounds = -(-self.iterations * step // self.length)
        order = np.concatenate([rng.permutation(self.length) for _ in range(rounds)])
        for index in range(self._done[1] if self.epoch == self._done[0] else 0, self.iterations):
            first = index * step + self.rank * self.batch_size
            yield [PatchKey(int(order[at]), self.epoch, at) for at in range(first, first + self.batch_size)]


class PatchSet(Dataset[dict[str, Any]]):
    """Samples {image (C, *q) float32, target (*q) uint8, case, spacing in mm, draw: what augmentation is seeded by}.

    A sample depends on (seed, epoch, position) alone. `q` is larger than the patch where augmentation looks around it.

    Args:
        cases: The cases.
        entries: Their preprocessed volumes.
        patch: (d, h, w) that the network sees.
        cut: q, at least the patch, each side longer by an even number.
        oversample: Share of the patches whose middle is a voxel of the foreground, of a class drawn evenly from those
            in the case; the others lie anywhere.
        seed: Seed of the run.
    """

    def __init__(
        self,
        cases: Sequence[VolumeCase],
        entries: Sequence[Entry],
        patch: Size3,
        cut: Size3,
        oversample: float,
        seed: int,
    ) -> None:
        self.cases, self.entries = cases, entries
        self.patch, self.cut, self.oversample, self.seed = patch, cut, oversample, seed

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: PatchKey | int) -> dict[str, Any]:
        index, epoch, position = key if isinstance(key, PatchKey) else PatchKey(key)
        entry = self.entries[index]
        start = self._place(entry, np.random.default_rng((self.seed, epoch, position, 1)))
        begin = [low - (q - p) // 2 for low, q, p in zip(start, self.cut, self.patch, strict=True)]
        image, target = entry.array("image"), entry.array("target")
        return {
            "image": _cut(image, begin, self.cut),
            "target": _cut(target[None], begin, self.cut)[0],
            "case": self.cases[index].name,
            "spacing": entry.plan.spacing,
            "draw": (self.seed, epoch, position, 2),
        }

    def _place(self, entry: Entry, rng: np.random.Generator) -> list[int]:
        """First voxel of a patch; where the volume is smaller, it lies in the middle, as it does in prediction."""
        room = [size - p for size, p in zip(entry.plan.size, self.patch, strict=True)]
        where = None
        if entry.counts and rng.random() < self.oversample:
            classes = list(entry.counts)
            chosen = int(rng.integers(len(classes)))
            first = sum(entry.counts[c] for c in classes[:chosen])
            where = entry.array("points")[first + int(rng.integers(entry.counts[classes[chosen]]))]
        start = []
        for axis, free in enumerate(room):
            if free <= 0:
                start.append(-(-free // 2))
            elif where is None:
                start.append(int(rng.integers(free + 1)))
            else:
                start.append(int(np.clip(where[axis] - self.patch[axis] // 2, 0, free)))
        return start


class VolumeSet(Dataset[dict[str, Any]]):
    """Whole volumes for validation and test.

    A sample is {case, group, image (C, D, H, W) mapped from disk, target (D, H, W) on the network's grid, truth
    (I, J, K) on the file's, plan, geometry}; targets are class indices, uint8.
    """

    def __init__(self, cases: Sequence[VolumeCase], entries: Sequence[Entry], facts: Sequence[Facts]) -> None:
        self.cases, self.entries, self.facts = cases, entries, facts

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        case, entry = self.cases[index], self.entries[index]
        return {
            "case": case.name,
            "group": case.group,
            "image": entry.array("image"),
            "target": entry.array("target"),
            "truth": entry.array("truth"),
            "plan": entry.plan,
            "geometry": self.facts[index].geometry,
        }


class PatchBatch:
    """Stacks samples of a `PatchSet` to {image (B, C, *S), target (B, *S), case}.

    Args:
        augmenter: Applied here, in the loading process; None leaves it to the device, and what it needs goes along.
        patch: The size that augmentation keeps.
    """

    def __init__(self, augmenter: Augmenter3d | None, patch: Size3) -> None:
        self.augmenter, self.patch = augmenter, patch

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Stack `samples`."""
        batch: dict[str, Any] = {key: torch.stack([sample[key] for sample in samples]) for key in ("image", "target")}
        # Plain numbers, since reading one from a GPU would wait for all that it is still to do.
        batch |= {key: [sample[key] for sample in samples] for key in ("case", "spacing", "draw")}
        return batch if self.augmenter is None else augment(batch, self.augmenter, self.patch)


def augment(batch: dict[str, Any], augmenter: Augmenter3d, patch: Size3) -> dict[str, Any]:
    """Augment a batch of `PatchBatch`, on its device."""
    image, target = augmenter(batch["image"], batch["target"], batch["spacing"], patch, batch["draw"])
    return {"image": image, "target": target, "case": batch["case"]}


def collate_volumes(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """List what differs in size."""
    return {key: [sample[key] for sample in samples] for key in samples[0]}


def _cut(volume: np.ndarray[Any, Any], begin: Sequence[int], size: Size3) -> torch.Tensor:
    """(C, *size) of (C, D, H, W) from voxel `begin` on, which may lie outside, where all is 0."""
    result = np.zeros((len(volume), *size), volume.dtype)
    into, out_of = [slice(None)], [slice(None)]
    for start, length, there in zip(begin, size, volume.shape[1:], strict=True):
        low, high = max(start, 0), min(start + length, there)
        into.append(slice(low - start, max(low, high) - start))
        out_of.append(slice(low, max(low, high)))
    result[tuple(into)] = volume[tuple(out_of)]
    return torch.from_numpy(result)
