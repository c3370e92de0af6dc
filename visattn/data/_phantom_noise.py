"""Smooth random fields on pictures, for what draws phantoms."""

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]


class Noise:
    """Smooth random fields of unit variance, with about `cells` grains to the image height."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self._rng, self._height, self._width = rng, height, width

    def __call__(self, cells: int) -> Field:
        """A field (H, W)."""
        grid = self._rng.standard_normal((cells + 2, round(cells * self._width / self._height) + 2), np.float32)
        field = cv2.resize(grid, (self._width, self._height), interpolation=cv2.INTER_CUBIC)
        return np.asarray(field, np.float32) * 1.4  # interpolation takes some of the variance
