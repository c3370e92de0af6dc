"""Samples a second that one core loads, augments, normalises and batches, with decoded images kept in memory.

Ours and a plain albumentations pipeline with the same augmentation (flips, affine, colour) run in turns on the same
cached images, in one thread; the figure is the median over the rounds of CPU time, so that a busy machine changes it
little. Other rows show what single parts cost.

    python benchmarks/data_loading.py [--size 352] [--rounds 30] [--root FOLDER]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2

from visattn.data.dataset import TrainingBatch, TrainingSet
from visattn.data.image_mask_folder import ImageMaskFolder
from visattn.data.images import IMAGENET_MEAN, IMAGENET_STD
from visattn.data.sampler import Key

LABELS: dict[str, int | list[int]] = {"background": 0, "polyp": 255}
RECIPE = [
    "flip_horizontal",
    "flip_vertical",
    {"name": "affine", "rotate": 90, "scale": [0.8, 1.25], "shift": 0.1, "p": 0.7},
    {"name": "colour", "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.03, "p": 0.7},
]
EXTRAS = ["elastic", "blur", "noise", "cutout"]


def plain_albumentations(data: TrainingSet) -> Callable[[list[Key]], object]:
    """The same augmentation as `RECIPE`, written the way albumentations' documentation does."""
    compose = albumentations.Compose(
        [
            albumentations.HorizontalFlip(p=0.5),
            albumentations.VerticalFlip(p=0.5),
            albumentations.Affine(rotate=(-90, 90), scale=(0.8, 1.25), translate_percent=(-0.1, 0.1), p=0.7),
            albumentations.ColorJitter(
                brightness=(0.7, 1.3), contrast=(0.7, 1.3), saturation=(0.7, 1.3), hue=(-0.03, 0.03), p=0.7
            ),
            albumentations.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ToTensorV2(),
        ],
        seed=0,
    )

    def load(keys: list[Key]) -> object:
        assert data.cached is not None
        samples = [compose(image=data.cached[key.item][0], mask=data.cached[key.item][1]) for key in keys]
        return torch.utils.data.default_collate(samples)

    return load


def ours(data: TrainingSet) -> Callable[[list[Key]], object]:
    """What a worker of the data module does for one batch."""
    stack = TrainingBatch(data.preprocessing)
    return lambda keys: stack([data[key] for key in keys])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=352)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--root", default="phantom")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    def loader(augment: list[dict[str, object] | str]) -> TrainingSet:
        module = ImageMaskFolder(root=options.root, labels=LABELS, size=options.size, augment=augment)
        module.setup("fit")
        data = module.train_dataloader().dataset
        assert isinstance(data, TrainingSet)
        return data

    recipe = loader(list(RECIPE))
    runs = {
        "visattn, flips + affine + colour": ours(recipe),
        "albumentations, the same": plain_albumentations(recipe),
        "visattn, no augmentation": ours(loader([])),
    }
    runs |= {f"visattn, {name} alone, always": ours(loader([{"name": name, "p": 1.0}])) for name in EXTRAS}
    times: dict[str, list[float]] = {name: [] for name in runs}
    rng = np.random.default_rng(0)
    for number in range(options.rounds + 1):
        keys = [Key(int(item), number) for item in rng.permutation(len(recipe))[:16]]
        for name, run in runs.items():
            start = time.thread_time()
            run(keys)
            if number:  # the first round warms up
                times[name].append((time.thread_time() - start) / len(keys))
    print(f"{options.size} x {options.size}, batches of 16, one thread, median of {options.rounds} interleaved rounds")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:36s} {1 / middle:8.0f} samples/s {1e3 * middle:8.2f} ms")


if __name__ == "__main__":
    main()
