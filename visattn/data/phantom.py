"""Small synthetic images that look like colonoscopy, for demonstrations and tests."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from visattn.files import write_bytes_atomic


def phantom_images(
    count: int, seed: int, size: tuple[int, int] = (128, 160)
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8], str]]:
    """Yield `count` images (H, W, 3), masks (H, W) of 0 and 255, and names."""
    height, width = size
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        noise = cv2.resize(
            rng.normal(0, 12, (6, 8, 3)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
        )
        image = np.array([190, 105, 90], np.float32) + noise
        mask = np.zeros(size, np.uint8)
        for _ in range(rng.choice([0, 1, 2, 3], p=[0.1, 0.6, 0.2, 0.1])):
            y, x = rng.uniform(0.2, 0.8, 2) * size
            a, b = rng.uniform(0.08, 0.22, 2) * height
            inside = ((rows - y) / a) ** 2 + ((columns - x) / b) ** 2
            image += (np.clip(1 - inside, 0, 1) * 45)[..., None]
            mask[inside < 1] = 255
        image += rng.normal(0, 4, (*size, 1))
        yield np.clip(image, 0, 255).astype(np.uint8), mask, f"phantom_{index:04d}"


def write_phantom(folder: Path | str, count: int, seed: int, size: tuple[int, int] = (128, 160)) -> None:
    """Write `images/` and `masks/` as PNG below `folder`, ready to be a `root`."""
    for image, mask, name in phantom_images(count, seed, size):
        for part, array in (("images", image[..., ::-1]), ("masks", mask)):
            write_bytes_atomic(Path(folder, part, f"{name}.png"), cv2.imencode(".png", array)[1].tobytes())
