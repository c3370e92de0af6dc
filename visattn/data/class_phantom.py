"""Small synthetic images and volumes to classify, for demonstrations and tests. No patient is in them.

A bright body lies in a noisy ground. Its surface is smooth (round), wavy (lobed), or it is hollow (ring). Size, place,
brightness and direction of light vary, so that no single pixel tells the class.
"""

import math

import numpy as np
from numpy.typing import NDArray

PHANTOM_CLASSES = ("round", "lobed", "hollow")
PHANTOM_COUNTS = {"train": 120, "val": 48, "test": 48}
_SEED = 20250  # independent of the recipe's seed, so that every run sees the same embedded set


def phantom_classes(rank: int, classes: NDArray[np.int64], side: int, seed: int) -> NDArray[np.uint8]:
    """Draw cases of the given classes.

    Args:
        rank: 2 for images, 3 for volumes.
        classes: Index of the class of each case (N,).
        side: Pixels or voxels along each axis.
        seed: Case i depends on it, i, its class and `side` alone.

    Returns:
        Grey values (N, side, ...).
    """
    drawn = [_draw(np.random.default_rng((seed, index)), int(kind), rank, side) for index, kind in enumerate(classes)]
    return np.stack(drawn) if drawn else np.zeros((0, *[side] * rank), np.uint8)


def draw_phantom(rank: int, side: int) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.int64]]]:
    """The embedded set: images or volumes and their classes, of each part."""
    images, truths = {}, {}
    for number, (part, count) in enumerate(PHANTOM_COUNTS.items()):
        truths[part] = np.arange(count) % len(PHANTOM_CLASSES)
        images[part] = phantom_classes(rank, truths[part], side, _SEED + number)
    return images, truths


def _draw(rng: np.random.Generator, kind: int, rank: int, side: int) -> NDArray[np.uint8]:
    axes = np.meshgrid(*[np.linspace(-1, 1, side)] * rank, indexing="ij")
    centre, size = rng.uniform(-0.2, 0.2, rank), rng.uniform(0.4, 0.65)
    away = [axis - middle for axis, middle in zip(axes, centre, strict=True)]
    radius = np.sqrt(sum(distance**2 for distance in away)) + 1e-6
    angle = np.arctan2(away[-2], away[-1])
    edge = size * np.ones_like(radius)
    if kind == 1:
        edge *= 1 + rng.uniform(0.22, 0.3) * np.cos(int(rng.integers(4, 7)) * angle + rng.uniform(0, math.tau))
    body = 1 / (1 + np.exp((radius / edge - 1) * 14))
    if kind == 2:
        body *= 1 / (1 + np.exp((rng.uniform(0.45, 0.6) - radius / edge) * 14))
    light = 1 + 0.3 * (away[0] * rng.uniform(-1, 1) + away[-1] * rng.uniform(-1, 1))
    values = 50 + rng.uniform(60, 140) * body * light + rng.normal(0, 10, radius.shape)
    return np.asarray(np.clip(values, 0, 255), np.uint8)
