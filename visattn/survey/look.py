"""What lies in a data set's folder: pairs, sizes, kinds of image, mask values.

Every file is decoded once, by the same functions that training reads with, so a file that is readable here is readable
there.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visattn.data.cases import ImageFolder, has_layout, name_prefixes, scan_folder
from visattn.data.images import image_size, read_image, read_mask
from visattn.errors import UserError, nearest

PARTS = {
    "train": ("train", "training", "traindataset"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing", "testdataset"),
}
"""Names, in lower case, of sub-folders that hold a part of the data set."""

_ORIENTATION = 0x0112  # the EXIF tag
_LOSSY = ("JPEG", "MPO")
_GREY_NOISE = {True: 24, False: 8}  # lossy or not: largest difference between channels of a grey image kept in colour


@dataclass(frozen=True)
class Facts:
    """What one look at a file tells.

    Args:
        path: The file.
        size: Height and width as it is read (upright), or None where not even the header could be read.
        mode: Pillow's name of the kind of pixels in the file (L, RGB, RGBA, P, CMYK, I;16, 1, ...), or empty.
        format: PNG, JPEG, MPO, BMP or TIFF, or empty.
        orientation: The EXIF orientation, 1 where there is none.
        error: Why the file cannot be used, as training would say it, or None.
        colour: Of an image, the largest difference between its three channels; 0 of a mask or an unreadable file.
        mean: Of an image, the mean grey, 0 to 255.
        std: Of an image, the standard deviation of its grey.
        high: Of an image, the largest grey.
        values: Of a mask, how many pixels have each value; empty for an image or an unreadable file.
    """

    path: Path
    size: tuple[int, int] | None
    mode: str = ""
    format: str = ""
    orientation: int = 1
    error: str | None = None
    colour: int = 0
    mean: float = 0.0
    std: float = 0.0
    high: int = 0
    values: tuple[tuple[int, int], ...] = ()

    @property
    def grey(self) -> bool:
        """Whether an image has no colour, or only what compression puts into a grey one."""
        return self.colour <= _GREY_NOISE[self.format in _LOSSY]


@dataclass(frozen=True)
class Pair:
    """An image and its mask.

    Args:
        name: The name that the case has in training.
        stem: The file's name without suffix.
        image: What is known of the image.
        mask: What is known of the mask.
        part: train, val or test: how the folders divide the data; train where they do not.
        kept: What `survey` was asked to keep of the image, or None.
    """

    name: str
    stem: str
    image: Facts
    mask: Facts
    part: str
    kept: Any = field(default=None, repr=False, compare=False)

    @property
    def usable(self) -> bool:
        """Whether both files can be read and have one size."""
        return not (self.image.error or self.mask.error) and self.image.size == self.mask.size


@dataclass(frozen=True)
class Survey:
    """What `survey` found.

    Args:
        root: The folder that was looked at.
        parts: The folders with images and masks, by part: train, and where the folders say so val and test.
        pairs: All pairs, sorted by part and name.
    """

    root: Path
    parts: dict[str, tuple[ImageFolder, ...]]
    pairs: tuple[Pair, ...]

    @property
    def folders(self) -> tuple[ImageFolder, ...]:
        """All folders with images and masks, those for training first."""
        return tuple(folder for folders in self.parts.values() for folder in folders)

    @property
    def unpaired(self) -> list[str]:
        """Files that lack their partner or share a stem, a line each, as training would refuse them."""
        return [problem for folder in self.folders for problem in folder.problems]

    @cached_property
    def unreadable(self) -> list[str]:
        """Why files cannot be used, a line each."""
        return [facts.error for pair in self.pairs for facts in (pair.image, pair.mask) if facts.error]

    @cached_property
    def unequal(self) -> list[Pair]:
        """Pairs whose image and mask differ in size."""
        return [pair for pair in self.pairs if not pair.usable and not (pair.image.error or pair.mask.error)]

    @cached_property
    def usable(self) -> list[Pair]:
        """Pairs that training can read."""
        return [pair for pair in self.pairs if pair.usable]

    def of(self, part: str) -> list[Pair]:
        """The usable pairs of a part."""
        return [pair for pair in self.usable if pair.part == part]

    @cached_property
    def sizes(self) -> Counter[tuple[int, int]]:
        """How many images have each height and width."""
        return Counter(pair.image.size for pair in self.usable if pair.image.size)

    @cached_property
    def modes(self) -> Counter[str]:
        """How many images are of each kind (Pillow's name: RGB, L, I;16, ...)."""
        return Counter(pair.image.mode for pair in self.usable)

    @cached_property
    def grey(self) -> bool:
        """Whether no image has colour."""
        return all(pair.image.grey for pair in self.usable)

    @cached_property
    def brightness(self) -> tuple[float, float]:
        """Mean and standard deviation of the grey of all images, each image counting once, on a scale of 0 to 1."""
        means = np.array([pair.image.mean for pair in self.usable]) / 255
        squares = (np.array([pair.image.std for pair in self.usable]) / 255) ** 2 + means**2
        mean = float(means.mean())
        return mean, float(np.sqrt(max(squares.mean() - mean**2, 0.0)))

    @cached_property
    def values(self) -> dict[int, int]:
        """How many pixels of all masks have each value, in the order of the values."""
        total: Counter[int] = Counter()
        for pair in self.usable:
            total.update(dict(pair.mask.values))
        return dict(sorted(total.items()))


def survey(
    folder: Path | str,
    advance: Callable[[int], None] | None = None,
    keep: Callable[[NDArray[np.uint8]], Any] | None = None,
) -> Survey:
    """Look at every image and mask below `folder`.

    Args:
        folder: A folder with images/ and masks/ (or another of `LAYOUTS`), or one of several such folders; sub-folders
            called train, val and test are taken as that, TrainDataset and TestDataset too.
        advance: Called after each pair with their number, for a progress bar.
        keep: Makes of an image (H, W, 3) what is to be kept of it.

    Raises:
        UserError: There is no such folder, or no images with masks in it.
    """
    root = Path(folder)
    parts = find_parts(root)
    todo: list[tuple[str, str, str, Path, Path]] = []
    for part, folders in parts.items():
        several = len([*parts["train"], *parts.get("val", ())]) > 1 if part != "test" else len(folders) > 1
        together = [*parts["train"], *parts.get("val", ())] if part != "test" else list(folders)
        prefixes = dict(zip((one.path for one in together), name_prefixes([one.path for one in together]), strict=True))
        for one in folders:
            prefix = f"{prefixes[one.path]}/" if several else ""
            todo += [(part, prefix + stem, stem, image, mask) for stem, image, mask in one.pairs]

    def look(entry: tuple[str, str, str, Path, Path]) -> Pair:
        part, name, stem, image, mask = entry
        facts, pixels = look_at_image(image)
        kept = None if keep is None or pixels is None else keep(pixels)
        return Pair(name, stem, facts, mask_facts(mask), part, kept)

    pairs = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter's lock
        for pair in pool.map(look, todo):
            pairs.append(pair)
            if advance is not None:
                advance(len(todo))
    return Survey(root, parts, tuple(pairs))


def find_parts(root: Path) -> dict[str, tuple[ImageFolder, ...]]:
    """The folders with images and masks at or directly below `root`, by part; `train` is always there.

    Raises:
        UserError: There is no such folder, or no images with masks in it.
    """
    base = root.expanduser()
    if not base.is_dir():
        raise UserError(_no_folder(root, base))
    if has_layout(base):
        return {"train": (scan_folder(base),)}
    below = sorted(path for path in base.iterdir() if path.is_dir() and not path.name.startswith("."))
    parts: dict[str, list[Path]] = {part: [] for part in PARTS}
    for path in below:
        for part, names in PARTS.items():
            if path.name.lower() in names:
                parts[part] += _sets(path)
    if not parts["train"]:  # no parts, or something to test with alone: whatever there is
        parts = {"train": sorted(one for path in below for one in _sets(path))}
    if not parts["train"]:
        raise UserError(_no_layout(root, base, below))
    return {part: tuple(scan_folder(path) for path in paths) for part, paths in parts.items() if paths}


def image_facts(path: Path) -> Facts:
    """Decode an image and note what kind it is."""
    return look_at_image(path)[0]


def mask_facts(path: Path) -> Facts:
    """Decode a mask and count its values."""
    return look_at_mask(path)[0]


def look_at_image(path: Path) -> tuple[Facts, NDArray[np.uint8] | None]:
    """What `image_facts` tells, and the pixels (H, W, 3), or None where it cannot be read."""
    facts = _header(path)
    if facts.error:
        return facts, None
    try:
        image = read_image(path, 3)
    except UserError as error:
        return _spoilt(facts, str(error)), None
    except MemoryError:
        return _spoilt(facts, f"{path}: not enough memory to decode it"), None
    red, green, blue = cv2.split(image)
    spread = cv2.max(cv2.max(cv2.absdiff(red, green), cv2.absdiff(green, blue)), cv2.absdiff(red, blue))
    grey = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)
    mean, std = cv2.meanStdDev(grey)
    facts = replace(facts, mean=float(mean[0, 0]), std=float(std[0, 0]), high=int(grey.max(initial=0)))
    return replace(facts, colour=int(spread.max(initial=0))), image


def look_at_mask(path: Path) -> tuple[Facts, NDArray[np.int32] | None]:
    """What `mask_facts` tells, and the values (H, W), or None where it cannot be read."""
    facts = _header(path)
    if facts.error:
        return facts, None
    try:
        mask = read_mask(path)
    except UserError as error:
        return _spoilt(facts, str(error)), None
    except MemoryError:
        return _spoilt(facts, f"{path}: not enough memory to decode it"), None
    return replace(facts, values=_count(mask)), mask


def _header(path: Path) -> Facts:
    try:
        size = image_size(path)
        with path.open("rb") as handle, Image.open(handle) as image:
            turned = int(image.getexif().get(_ORIENTATION, 1))
            return Facts(path, size, image.mode, image.format or "", turned)
    except UserError as error:
        return Facts(path, None, error=str(error))


def _spoilt(facts: Facts, error: str) -> Facts:
    return replace(facts, error=error.replace("\n", " "))


def _count(mask: NDArray[np.int32]) -> tuple[tuple[int, int], ...]:
    if mask.size and mask.min() >= 0 and mask.max() < 2**16:
        counts = np.bincount(mask.ravel())
        values = np.flatnonzero(counts)
        return tuple(zip(values.tolist(), counts[values].tolist(), strict=True))
    values, counts = np.unique(mask, return_counts=True)
    return tuple(zip(values.tolist(), counts.tolist(), strict=True))


def _sets(path: Path) -> list[Path]:
    """The folder itself where it holds images and masks, else those of its sub-folders that do."""
    if has_layout(path):
        return [path]
    return sorted(below for below in path.iterdir() if below.is_dir() and has_layout(below))


def _no_folder(root: Path, base: Path) -> str:
    if base.exists():
        return f"{root}: is a file; give the folder that holds images/ and masks/"
    around = base.parent
    guess = nearest(base.name, _names(path for path in around.iterdir() if path.is_dir())) if around.is_dir() else None
    return f"{root}: there is no such folder.{f' Did you mean {around / guess}?' if guess else ''}"


def _no_layout(root: Path, base: Path, below: Iterable[Path]) -> str:
    if has_layout(base.absolute().parent):
        return f"{root}: holds one half of the data; give the folder above, {base.absolute().parent.name}"
    found = ", ".join(_names(base.iterdir())[:8]) or "nothing"
    text = f"{root}: holds no images/ with masks/ (nor image/ with mask/), nor folders that do\nFound there: {found}"
    endings = ("_mask", "_masks", "_seg", "_segmentation", "_gt", "_label")
    mixed = [path.name for path in sorted(base.iterdir()) if path.stem.lower().endswith(endings)]
    if mixed:
        return (
            f"{text}\nImages and masks seem to lie together ({mixed[0]}): move the masks to masks/, the rest to images/"
        )
    return f"{text}\nRename or link the two folders: images/ and masks/, with one name for an image and its mask"


def _names(paths: Iterable[Path]) -> list[str]:
    return sorted(path.name for path in paths)
