"""Augmentation of an image and its mask: what a recipe may list under `augment`.

Every entry of the list draws from one generator, which the caller seeds by (seed, epoch, index), so that a sample is
the same on any number of workers and after resuming. All geometry (flips, affine, elastic) becomes one map and so
costs one interpolation; it comes first, the pixel transforms follow in the order of the list. Pixels that enter from
outside are black in the image and background in the mask, as the black frame of an endoscope is.

This is the only file that names albumentations (2.0.8, the last release under the MIT licence).
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visattn.data._augment_list import check, check_pair, read_entries, swap_table
from visattn.labels import Labels

Image = NDArray[np.uint8]
Matrix = NDArray[np.float64]

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as in Pillow's and OpenCV's grey


@dataclass(frozen=True)
class FlipHorizontal:
    """Mirror left and right.

    Args:
        swap_labels: Pairs of label names that change places in a mirrored image, [[left_lung, right_lung]] say.
        p: Probability.
    """

    swap_labels: Sequence[Sequence[str]] = ()
    p: float = 0.5

    def matrix(self, rng: np.random.Generator, size: tuple[int, int]) -> Matrix:
        """Map pixel (x, y, 1) of the input to the output."""
        return np.array([[-1.0, 0.0, size[1] - 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class FlipVertical:
    """Mirror top and bottom.

    Args:
        swap_labels: Pairs of label names that change places in a mirrored image.
        p: Probability.
    """

    swap_labels: Sequence[Sequence[str]] = ()
    p: float = 0.5

    def matrix(self, rng: np.random.Generator, size: tuple[int, int]) -> Matrix:
        """Map pixel (x, y, 1) of the input to the output."""
        return np.array([[1.0, 0.0, 0.0], [0.0, -1.0, size[0] - 1.0], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Affine:
    """Rotate and zoom about the centre, then shift.

    Args:
        rotate: Largest angle in degrees, either way.
        scale: Smallest and largest zoom; above 1 things get larger. Drawn evenly in the logarithm.
        shift: Largest shift, either way, as a share of height and width.
        p: Probability.
    """

    rotate: float = 30.0
    scale: Sequence[float] = (0.8, 1.25)
    shift: float = 0.1
    p: float = 0.5

    def __post_init__(self) -> None:
        check("affine", "rotate", self.rotate, 0, 180)
        check("affine", "shift", self.shift, 0, 1)
        check_pair("affine", "scale", self.scale, 0.1, 10)

    def matrix(self, rng: np.random.Generator, size: tuple[int, int]) -> Matrix:
        """Map pixel (x, y, 1) of the input to the output."""
        angle = math.radians(rng.uniform(-self.rotate, self.rotate))
        zoom = math.exp(rng.uniform(math.log(self.scale[0]), math.log(self.scale[1])))
        x, y = (size[1] - 1) / 2, (size[0] - 1) / 2
        right, down = rng.uniform(-self.shift, self.shift, 2) * (size[1], size[0])
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        return np.array(
            [[cos, sin, x + right - cos * x - sin * y], [-sin, cos, y + down + sin * x - cos * y], [0.0, 0.0, 1.0]]
        )


@dataclass(frozen=True)
class Elastic:
    """Bend the image smoothly: random displacements on a coarse grid, interpolated.

    Args:
        strength: Standard deviation of the displacement, as a share of the shorter side.
        cells: Grid cells along a side; more makes smaller bends.
        p: Probability.
    """

    strength: float = 0.03
    cells: int = 4
    p: float = 0.5

    def __post_init__(self) -> None:
        check("elastic", "strength", self.strength, 0, 0.2)
        check("elastic", "cells", self.cells, 1, 32, whole=True)

    def displacement(self, rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float32]:
        """Shifts in pixels along x and y, (H, W, 2)."""
        grid = rng.standard_normal((self.cells + 1, self.cells + 1, 2), np.float32) * (self.strength * min(size))
        return np.asarray(cv2.resize(grid, (size[1], size[0]), interpolation=cv2.INTER_CUBIC), np.float32)


@dataclass(frozen=True)
class Colour:
    """Change brightness, contrast, saturation and hue, all in one product of each pixel with a matrix.

    Args:
        brightness: Largest change of the factor, either way: 0.2 draws from 0.8..1.2.
        contrast: The same, about the mean grey of the image.
        saturation: The same, about each pixel's grey; without effect on grey images.
        hue: Largest turn of the colour wheel, either way, as a share of a full turn.
        p: Probability.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.02
    p: float = 0.5

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            check("colour", name, getattr(self, name), 0, 1)
        check("colour", "hue", self.hue, 0, 0.5)

    def __call__(self, image: Image, rng: np.random.Generator) -> Image:
        """Return the changed image (H, W, C)."""
        reach = np.array([self.brightness, self.contrast, self.saturation])
        brightness, contrast, saturation = 1 + rng.uniform(-reach, reach)
        turn = 2 * math.pi * rng.uniform(-self.hue, self.hue)
        mean = np.array(cv2.mean(image)[: image.shape[2]])
        if image.shape[2] == 1:
            gain = np.array([[brightness * contrast]])
            grey = mean[0]
        else:
            gain = brightness * contrast * _hue(turn) @ (saturation * np.eye(3) + (1 - saturation) * _LUMA)
            grey = float(mean @ _LUMA)
        offset = np.full((len(gain), 1), brightness * (1 - contrast) * grey)
        changed = cv2.transform(image, np.hstack([gain, offset]).astype(np.float32))
        return np.asarray(changed, np.uint8).reshape(image.shape)


@dataclass(frozen=True)
class Blur:
    """Blur as a lens out of focus does.

    Args:
        sigma: Smallest and largest standard deviation of the Gaussian in pixels.
        p: Probability.
    """

    sigma: Sequence[float] = (0.5, 1.5)
    p: float = 0.5

    def __post_init__(self) -> None:
        check_pair("blur", "sigma", self.sigma, 0, 20)

    def __call__(self, image: Image, rng: np.random.Generator) -> Image:
        """Return the changed image (H, W, C)."""
        return _albumentations(image, rng, "GaussianBlur", sigma_limit=tuple(self.sigma), blur_limit=0)


@dataclass(frozen=True)
class Noise:
    """Add Gaussian noise, drawn for each pixel and channel.

    Args:
        std: Smallest and largest standard deviation, as a share of white.
        p: Probability.
    """

    std: Sequence[float] = (0.01, 0.05)
    p: float = 0.5

    def __post_init__(self) -> None:
        check_pair("noise", "std", self.std, 0, 1)

    def __call__(self, image: Image, rng: np.random.Generator) -> Image:
        """Return the changed image (H, W, C)."""
        return _albumentations(image, rng, "GaussNoise", std_range=tuple(self.std))


@dataclass(frozen=True)
class Cutout:
    """Black out rectangles of the image; the mask stays, so that the network learns to go by the surroundings.

    Args:
        holes: The most rectangles; at least one is cut.
        size: Smallest and largest side of a rectangle, as a share of the image's.
        p: Probability.
    """

    holes: int = 3
    size: Sequence[float] = (0.05, 0.2)
    p: float = 0.5

    def __post_init__(self) -> None:
        check("cutout", "holes", self.holes, 1, 100, whole=True)
        check_pair("cutout", "size", self.size, 0.01, 1)

    def __call__(self, image: Image, rng: np.random.Generator) -> Image:
        """Return the changed image (H, W, C)."""
        side = tuple(self.size)
        return _albumentations(
            image,
            rng,
            "CoarseDropout",
            num_holes_range=(1, self.holes),
            hole_height_range=side,
            hole_width_range=side,
            fill=0,
        )


Geometric = FlipHorizontal | FlipVertical | Affine
Pixelwise = Colour | Blur | Noise | Cutout
Augmentation = Geometric | Elastic | Pixelwise

AUGMENT: dict[str, type[Augmentation]] = {
    "flip_horizontal": FlipHorizontal,
    "flip_vertical": FlipVertical,
    "affine": Affine,
    "elastic": Elastic,
    "colour": Colour,
    "blur": Blur,
    "noise": Noise,
    "cutout": Cutout,
}
"""What an entry of `augment` may be called."""


class Augmenter:
    """Applies the entries of a recipe's `augment` list. Build it with `build_augmenter`.

    Args:
        entries: The augmentations.
        labels: The label map, to find the names in `swap_labels`.
    """

    def __init__(self, entries: Sequence[Augmentation], labels: Labels) -> None:
        self.entries = tuple(entries)
        self._swaps = [_swap_table(entry, labels) for entry in self.entries]

    def __call__(
        self, image: Image, mask: NDArray[np.uint8], rng: np.random.Generator
    ) -> tuple[Image, NDArray[np.uint8]]:
        """Augment an image (H, W, C) and its class indices (H, W); the inputs stay as they are."""
        size = mask.shape[0], mask.shape[1]
        matrix, bend = np.eye(3), None
        pixelwise: list[Pixelwise] = []
        for entry, swap in zip(self.entries, self._swaps, strict=True):
            if rng.random() >= entry.p:
                continue
            if isinstance(entry, Geometric):
                matrix = entry.matrix(rng, size) @ matrix
                mask = mask if swap is None else swap[mask]
            elif isinstance(entry, Elastic):
                shift = entry.displacement(rng, size)
                bend = shift if bend is None else bend + shift
            else:
                pixelwise.append(entry)
        image, mask = _warp(image, mask, matrix, bend)
        for entry in pixelwise:
            image = entry(image, rng)
        return image, mask


def build_augmenter(config: Sequence[str | Mapping[str, Any]] | None, labels: Labels) -> Augmenter:
    """Read a recipe's `augment` list: names, or mappings with a `name` and the arguments of that augmentation.

    Raises:
        UserError: An entry has an unknown name or key, or a value out of its range.
    """
    return Augmenter(read_entries(config, AUGMENT, "augmentation"), labels)


def _warp(
    image: Image, mask: NDArray[np.uint8], matrix: Matrix, bend: NDArray[np.float32] | None
) -> tuple[Image, NDArray[np.uint8]]:
    height, width = mask.shape
    if bend is not None:
        # Where each output pixel comes from: displaced, then through the inverse of the affine map.
        back = np.linalg.inv(matrix)[:2]
        place = bend + np.dstack(np.meshgrid(np.arange(width), np.arange(height))).astype(np.float32)
        across, down = cv2.split(cv2.transform(place, back.astype(np.float32)))
        warped = cv2.remap(image, across, down, cv2.INTER_LINEAR)
        moved = cv2.remap(mask, across, down, cv2.INTER_NEAREST)
    elif np.array_equal(np.abs(matrix[:2, :2]), np.eye(2)) and _is_flip(matrix, height, width):
        step = (-1 if matrix[1, 1] < 0 else 1), (-1 if matrix[0, 0] < 0 else 1)
        return np.ascontiguousarray(image[:: step[0], :: step[1]]), np.ascontiguousarray(mask[:: step[0], :: step[1]])
    else:
        warped = cv2.warpAffine(image, matrix[:2], (width, height), flags=cv2.INTER_LINEAR)
        moved = cv2.warpAffine(mask, matrix[:2], (width, height), flags=cv2.INTER_NEAREST)
    return np.asarray(warped, np.uint8).reshape(image.shape), np.asarray(moved, np.uint8)


def _is_flip(matrix: Matrix, height: int, width: int) -> bool:
    """Whether the matrix only mirrors about the centre, or does nothing."""
    expected = [width - 1.0 if matrix[0, 0] < 0 else 0.0, height - 1.0 if matrix[1, 1] < 0 else 0.0]
    return bool(np.array_equal(matrix[:2, 2], expected))


def _swap_table(entry: Augmentation, labels: Labels) -> NDArray[np.uint8] | None:
    return swap_table(entry.swap_labels, labels) if isinstance(entry, FlipHorizontal | FlipVertical) else None


def _hue(turn: float) -> Matrix:
    """Turn the colours about the grey axis of RGB by `turn` radians (Rodrigues' rotation formula)."""
    cos, sin = math.cos(turn), math.sin(turn) / math.sqrt(3)
    cross = np.array([[0.0, -sin, sin], [sin, 0.0, -sin], [-sin, sin, 0.0]])
    turned: Matrix = cos * np.eye(3) + (1 - cos) / 3 * np.ones((3, 3)) + cross
    return turned


def _albumentations(image: Image, rng: np.random.Generator, name: str, **arguments: Any) -> Image:
    transform = _transform(name, **arguments)
    transform.set_random_seed(int(rng.integers(2**31)))
    return np.asarray(transform(image=image)["image"], np.uint8).reshape(image.shape)


@lru_cache(maxsize=64)
def _transform(name: str, **arguments: Any) -> Any:
    """A transform of albumentations, made once and at first use: importing the package takes seconds."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    return getattr(albumentations, name)(p=1.0, **arguments)
