"""Augmentation of images for classification: that of segmentation without the mask, and what timm has for images.

Every entry draws from one generator, seeded by (seed, epoch, index). timm's own draw from the global generators of
Python, NumPy and torch, which are seeded from it for the call and put back after it.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch import Tensor

from visattn.data._augment_list import check, check_pair, read_entries
from visattn.data.augment import AUGMENT, Augmenter
from visattn.data.augment3d import Augmenter3d, build_augmenter3d
from visattn.data.class_preprocessing import ClassPreprocessing
from visattn.errors import UserError
from visattn.labels import Labels

Image = NDArray[np.uint8]

_WHOLE = Labels(("outside", "inside"), ((0,), (1,)))  # augmentation is shared with masks, which are blank here


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut out a rectangle of random size and shape, and bring it to the size of the network.

    Args:
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width over height.
        p: Probability; else the image is prepared as for validation.
    """

    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (0.75, 1.3333)
    p: float = 1.0

    def __post_init__(self) -> None:
        check_pair("random_resized_crop", "scale", self.scale, 0.001, 1)
        check_pair("random_resized_crop", "ratio", self.ratio, 0.1, 10)

    def __call__(self, image: Image, rng: np.random.Generator) -> Image:
        """Return a part of an image (H, W, C)."""
        height, width = image.shape[:2]
        for _ in range(10):
            area = height * width * rng.uniform(self.scale[0], self.scale[1])
            ratio = np.exp(rng.uniform(*np.log(self.ratio)))
            w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
            if 0 < w <= width and 0 < h <= height:
                break
        else:  # a very long image: the largest part whose shape is allowed
            ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
            w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        return image[top : top + h, left : left + w]


@dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment or AutoAugment.

    Args:
        config: What timm calls it: rand-m9-mstd0.5-inc1, or original, v0. A magnitude above 10 needs mmax as well,
            rand-m15-mmax15, and a change is made with probability 0.5, unless p says otherwise.
        p: Probability.
    """

    config: str = "rand-m9-mstd0.5-inc1"
    p: float = 1.0

    def __post_init__(self) -> None:
        _check_policy("randaugment", self.config)

    def __call__(self, image: Image, fill: tuple[int, ...]) -> Image:
        """Return the changed image (H, W, C)."""
        return _with_pillow(image, _policy(self.config, fill, min(image.shape[:2])))


@dataclass(frozen=True)
class AugMix:
    """timm's AugMix: several chains of small changes, mixed with the image.

    Args:
        severity: Strength of the changes, 1 to 10.
        width: Number of chains.
        alpha: Of the distributions that the shares are drawn from.
        p: Probability.
    """

    severity: int = 3
    width: int = 3
    alpha: float = 1.0
    p: float = 1.0

    def __post_init__(self) -> None:
        check("augmix", "severity", self.severity, 1, 10, whole=True)
        check("augmix", "width", self.width, 1, 10, whole=True)
        check("augmix", "alpha", self.alpha, 0.01, 100)

    def __call__(self, image: Image, fill: tuple[int, ...]) -> Image:
        """Return the changed image (H, W, C)."""
        config = f"augmix-m{self.severity}-w{self.width}-a{self.alpha}"
        return _with_pillow(image, _policy(config, fill, min(image.shape[:2])))


@dataclass(frozen=True)
class Erasing:
    """timm's random erasing: rectangles of the normalised image are overwritten.

    Args:
        mode: With 0 (const), with one random colour (rand), or with noise (pixel).
        area: Smallest and largest share of the image.
        count: The most rectangles.
        p: Probability.
    """

    mode: Literal["const", "rand", "pixel"] = "const"
    area: Sequence[float] = (0.02, 0.3333)
    count: int = 1
    p: float = 0.25

    def __post_init__(self) -> None:
        check_pair("erasing", "area", self.area, 0.001, 1)
        check("erasing", "count", self.count, 1, 100, whole=True)
        if self.mode not in ("const", "rand", "pixel"):
            raise UserError(f"augment: erasing.mode must be const, rand or pixel, got {self.mode!r:.60}")

    def __call__(self, image: Tensor) -> Tensor:
        """Overwrite parts of (C, H, W)."""
        import timm.data.random_erasing as timm_erasing

        low, high = self.area
        make: Any = timm_erasing.RandomErasing
        erase = make(1.0, low, high, mode=self.mode, max_count=self.count, device="cpu")
        return torch.as_tensor(erase(image))


CLASS_AUGMENT: dict[str, type[Any]] = {
    "random_resized_crop": RandomResizedCrop,
    **AUGMENT,
    "randaugment": RandAugment,
    "augmix": AugMix,
    "erasing": Erasing,
}
"""What an entry of `augment` may be called where images are classified."""


class ClassAugmenter:
    """From an image as it was read to the network's input, augmented.

    Cropping and resizing come first, then the entries shared with segmentation (their geometry before the rest), then
    RandAugment and AugMix, normalising, and erasing.

    Args:
        entries: The augmentations.
        preprocessing: Size and normalisation.
    """

    def __init__(self, entries: Sequence[Any], preprocessing: ClassPreprocessing) -> None:
        self.preprocessing = preprocessing
        own = (RandomResizedCrop, RandAugment, AugMix, Erasing)
        self._crops = [entry for entry in entries if isinstance(entry, RandomResizedCrop)]
        self._shared = Augmenter([entry for entry in entries if not isinstance(entry, own)], _WHOLE)
        self._policies = [entry for entry in entries if isinstance(entry, RandAugment | AugMix)]
        self._erasings = [entry for entry in entries if isinstance(entry, Erasing)]
        self._fill = tuple(round(255 * mean) for mean in preprocessing.mean)
        if len(self._crops) > 1:
            raise UserError("augment: random_resized_crop may stand there once")

    def __call__(self, image: Image, rng: np.random.Generator) -> Tensor:
        """An image (H, W, C) to (C, h, w)."""
        if self._crops and rng.random() < self._crops[0].p:
            image = self._crops[0](image, rng)
            image = ClassPreprocessing(self.preprocessing.size, (0.0,), (1.0,)).resize(image)
        else:
            image = self.preprocessing.resize(image)
        if self._shared.entries:
            image, _ = self._shared(image, np.zeros(image.shape[:2], np.uint8), rng)
        for entry in self._policies:
            if rng.random() < entry.p:
                with _global_generators(rng):
                    image = entry(image, self._fill)
        tensor = self.preprocessing.normalise(image)
        for erasing in self._erasings:
            if rng.random() < erasing.p:
                with _global_generators(rng):
                    tensor = erasing(tensor)
        return tensor


class VolumeAugmenter:
    """Augments a batch of volumes for classification, on the device where it is.

    Args:
        augmenter: That of segmentation, whose masks are blank here.
    """

    def __init__(self, augmenter: Augmenter3d) -> None:
        self.augmenter = augmenter

    def __call__(self, images: Tensor, seeds: Sequence[Sequence[int]]) -> Tensor:
        """Augment (B, C, D, H, W); `seeds` are the numbers that each one's generator is seeded by."""
        if not self.augmenter.entries:
            return images
        blank = torch.zeros(len(images), *images.shape[2:], dtype=torch.uint8, device=images.device)
        d, h, w = images.shape[2:]
        return self.augmenter(images, blank, [(1.0, 1.0, 1.0)] * len(images), (d, h, w), seeds)[0]


def build_class_augmenter(
    config: Sequence[str | Mapping[str, Any]] | None, preprocessing: ClassPreprocessing
) -> ClassAugmenter | VolumeAugmenter:
    """Read a recipe's `augment` list for images or volumes that are classified.

    Raises:
        UserError: An entry has an unknown name or key, or a value out of its range.
    """
    for item in config or ():
        if isinstance(item, Mapping) and "swap_labels" in item:
            raise UserError("augment: swap_labels is for masks; a class has no side to change")
    if preprocessing.rank == 3:
        return VolumeAugmenter(build_augmenter3d(config, _WHOLE))
    return ClassAugmenter(read_entries(config, CLASS_AUGMENT, "augmentation"), preprocessing)


@contextmanager
def _global_generators(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global generators for a call of timm, and put them back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(rng.integers(2**31))
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # the CPU's alone
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _check_policy(name: str, config: Any) -> None:
    where = f"augment: {name}.config:"
    try:
        policy = _policy(str(config), (128, 128, 128), 224)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{where} timm knows no {config!r:.80} ({error})") from error
    if not str(config).startswith("rand"):
        return
    # timm passes over sections without a number, and takes large magnitudes for smaller ones.
    strange = [
        part for part in str(config).split("-")[1:] if not re.fullmatch(r"(m|n|p|mstd|mmax|inc)\d[\d.]*|t\w+", part)
    ]
    if strange:
        raise UserError(f"{where} timm knows no section {strange[0]!r:.40}; write it as rand-m9-n2-mstd0.5-inc1")
    most = max(change.magnitude - (change.magnitude_max or 10) for change in policy.ops)
    if most > 0:
        magnitude = policy.ops[0].magnitude
        raise UserError(
            f"{where} timm takes magnitude {magnitude} as {magnitude - most}; add mmax{magnitude}, or lower it"
        )


@lru_cache(maxsize=64)
def _policy(config: str, fill: tuple[int, ...], side: int) -> Any:
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    colour = fill if len(fill) == 3 else fill * 3
    options = {"translate_const": int(side * 0.45), "img_mean": colour}  # as timm's own training sets them
    if config.startswith("rand"):
        return rand_augment_transform(config, options)
    if config.startswith("augmix"):
        return augment_and_mix_transform(config, {**options, "translate_pct": 0.3})
    return auto_augment_transform(config, options)


def _with_pillow(image: Image, transform: Any) -> Image:
    grey = image.shape[2] == 1
    changed = np.asarray(transform(Pillow.fromarray(np.repeat(image, 3, axis=2) if grey else image)), np.uint8)
    return changed[..., :1] if grey else changed
