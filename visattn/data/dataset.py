"""The cases as torch data sets: augmented and resized for training, at their native size for validation and test."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from visattn.data.augment import Augmenter
from visattn.data.cases import Case, Pair
from visattn.data.images import Preprocessing, normalise, prepare, resize_image, resize_mask
from visattn.data.sampler import Key


class TrainingSet(Dataset[dict[str, Any]]):
    """Samples {image (h, w, C) uint8, target (h, w) uint8 class indices, case, scale}, for `TrainingBatch` to stack.

    A sample depends on (seed, epoch, index) alone.

    Args:
        cases: The cases.
        cached: For each case its image (h, w, C) and class indices (h, w) at the training size; None reads the files.
        read: Reads a case at its native size.
        augmenter: Changes image and mask.
        preprocessing: Size and normalisation.
        seed: Seed of the run.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        cached: Sequence[Pair] | None,
        read: Callable[[Case], Pair],
        augmenter: Augmenter,
        preprocessing: Preprocessing,
        seed: int,
    ) -> None:
        self.cases = cases
        self.cached = cached
        self.read = read
        self.augmenter = augmenter
        self.preprocessing = preprocessing
        self.seed = seed

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: Key | int) -> dict[str, Any]:
        index, epoch, scale, _ = key if isinstance(key, Key) else Key(key)
        if self.cached is not None:
            image, mask = self.cached[index]
        else:
            image, mask = self.read(self.cases[index])
            size = self.preprocessing.size
            image, mask = resize_image(image, size), resize_mask(mask, size)
        # Seeding by a tuple hashes it, so neighbouring samples and epochs draw unrelated streams.
        image, mask = self.augmenter(image, mask, np.random.default_rng((self.seed, epoch, index)))
        return {
            "image": image,
            "target": torch.tensor(mask),
            "case": self.cases[index].name,
            "scale": scale,
        }


class EvaluationSet(Dataset[dict[str, Any]]):
    """Samples {image (C, h, w) float32, target (H, W) uint8 at native size, case, group, path}.

    Args:
        cases: The cases.
        read: Reads a case at its native size.
        preprocessing: Size and normalisation.
        cache: Keep each sample after its first use.
    """

    def __init__(
        self, cases: Sequence[Case], read: Callable[[Case], Pair], preprocessing: Preprocessing, cache: bool
    ) -> None:
        self.cases = cases
        self.read = read
        self.preprocessing = preprocessing
        self.cached = [self._load(case) for case in cases] if cache else None

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        case = self.cases[index]
        image, mask = self._load(case) if self.cached is None else self.cached[index]
        return {
            "image": prepare(image, self.preprocessing),
            "target": torch.tensor(mask),
            "case": case.name,
            "group": case.group,
            "path": str(case.image),
        }

    def _load(self, case: Case) -> Pair:
        image, mask = self.read(case)
        return resize_image(image, self.preprocessing.size), mask


class TrainingBatch:
    """Stacks training samples, which share their scale, to {image float32 (B, C, h, w), target, case, scale}.

    Each image is normalised into its place in the batch: apart, these two steps take more than twice the time.

    Args:
        preprocessing: Says mean and std.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Stack `samples`."""
        height, width, channels = samples[0]["image"].shape
        images = torch.empty(len(samples), channels, height, width)
        for image, sample in zip(images, samples, strict=True):
            normalise(sample["image"], self.preprocessing, out=image)
        return {
            "image": images,
            "target": torch.stack([sample["target"] for sample in samples]),
            "case": [sample["case"] for sample in samples],
            "scale": samples[0]["scale"],
        }


def collate_evaluation(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the images, and list the targets, which differ in size."""
    lists = {key: [sample[key] for sample in samples] for key in ("target", "case", "group", "path")}
    return {"image": default_collate([sample["image"] for sample in samples]), **lists}
