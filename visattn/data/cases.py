"""Finding the cases of a data set on disk, and checking every one of them before training starts."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from visattn.data.images import SUFFIXES, read_image, read_mask, resize_image, resize_mask
from visattn.data.phantom import phantom_images
from visattn.data.phantoms import IMAGE_KINDS, PHANTOM, PHANTOM_SEED, drawn_name, kind_of, phantom_kind
from visattn.errors import UserError, nearest
from visattn.labels import IGNORE, Labels

PHANTOM_COUNT = 200

LAYOUTS = (("images", "masks"), ("image", "mask"), ("Original", "Ground Truth"))
"""Folder names of images and masks: Kvasir-SEG and PraNet's test sets, PraNet's training set, CVC-ClinicDB.

Only pairs of names that mean label maps beyond doubt: images/ beside mask/ is DRIVE, whose mask/ is the field of view.
"""

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""An image (H, W, C) and its class indices (H, W)."""

_MASK_ENDINGS = ("_segmentation", "_mask")  # ISIC, and a common habit
_SHOWN_PROBLEMS = 4


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images with their masks, and what in it belongs together.

    Args:
        path: The folder that holds the two below.
        images: The folder of images.
        masks: The folder of masks.
        pairs: Name, image and mask of each case, sorted by name.
        without_mask: Images that have no mask.
        without_image: Masks that have no image.
        same_stem: Two files of one folder whose names differ by the suffix alone: the one left out, the one used.
    """

    path: Path
    images: Path
    masks: Path
    pairs: tuple[tuple[str, Path, Path], ...]
    without_mask: tuple[Path, ...]
    without_image: tuple[Path, ...]
    same_stem: tuple[tuple[Path, Path], ...]

    @property
    def problems(self) -> list[str]:
        """What keeps a training from starting, a line for each file."""
        lines = [f"{used}: shares its stem with {other.name}; keep one of them" for other, used in self.same_stem]
        lines += [f"{path}: no mask of that name in {self.masks.name}/" for path in self.without_mask]
        return lines + [f"{path}: no image of that name in {self.images.name}/" for path in self.without_image]


@dataclass(frozen=True)
class Case:
    """One image and its mask.

    Args:
        name: Unique name; the file's stem, led by its folder's name where there are several roots.
        image: The image file; for the phantom a path that does not exist.
        mask: The mask file.
        group: What must not be parted by a split, a patient or a video; the name itself where nothing was said.
        root: The root as the user wrote it; the word phantom for drawn cases of any kind.
    """

    name: str
    image: Path
    mask: Path
    group: str
    root: str


@dataclass(frozen=True)
class Checked:
    """What was learned about a case by reading it once.

    Args:
        digest: SHA-256 of the bytes of both files.
        classes: Indices of the classes in the mask, besides the background.
        kept: Image (h, w, C) and class indices (h, w) at the training size, or None where they are not kept.
    """

    digest: str
    classes: tuple[int, ...]
    kept: Pair | None


class CaseReader:
    """Reads a case at its native size: image (H, W, C) and class indices (H, W).

    Args:
        labels: The meaning of the values in the masks.
        channels: 1 or 3 channels of the image.
    """

    def __init__(self, labels: Labels, channels: Literal[1, 3]) -> None:
        self.labels = labels
        self.channels = channels

    def __call__(self, case: Case) -> Pair:
        """Read `case`.

        Raises:
            UserError: A file cannot be read, the mask has another size, or it holds values that no label names.
        """
        if case.root == PHANTOM:
            image, grey = self._phantom_case(case.name)
            return image, self.labels.encode(grey, f"{case.name} of the phantom")
        image, values = read_image(case.image, self.channels), read_mask(case.mask)
        if image.shape[:2] != values.shape:
            turned = " (one of the two carries an EXIF orientation)" if image.shape[:2] == values.shape[::-1] else ""
            raise UserError(
                f"{case.mask}: the mask is {values.shape[1]} x {values.shape[0]} pixels, "
                f"its image {case.image.name} {image.shape[1]} x {image.shape[0]}{turned}"
            )
        return image, self.labels.encode(values, str(case.mask))

    def _phantom_case(self, name: str) -> Pair:
        image, mask = embedded(kind_of(name))[name]
        if self.channels == 1:
            image = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)[..., None]
        return image, mask


@lru_cache(maxsize=2)
def embedded(kind: str = IMAGE_KINDS[0]) -> dict[str, Pair]:
    """The images and masks of a phantom, by name; made once in a process, in some two seconds."""
    drawn = phantom_images(PHANTOM_COUNT, PHANTOM_SEED, kind=kind)
    return {name: (image, mask) for image, mask, name in drawn}


def find_cases(roots: Sequence[str], sets: bool = False) -> list[Case]:
    """List the cases below `roots`, sorted by name; groups are not known yet.

    Args:
        roots: Folders, or `phantom`, also `phantom:KIND`.
        sets: Whether a root may hold several sets, as PraNet's TestDataset does; each set becomes a group.

    Raises:
        UserError: A root does not exist or has no known layout, files lack a partner, or two share a stem.
    """
    cases, folders = scan_roots(roots, sets)
    raise_problems([problem for folder in folders for problem in folder.problems], len(cases))
    if not cases:
        raise UserError(f"data.root: no image with a mask in {', '.join(str(folder.path) for folder in folders)}")
    return cases


def scan_roots(roots: Sequence[str], sets: bool = False) -> tuple[list[Case], list[ImageFolder]]:
    """As `find_cases`, and the folders; what is wrong with their files is told in `problems` and not raised.

    Raises:
        UserError: A root does not exist or has no known layout.
    """
    folders: list[tuple[str, Path]] = []
    cases: list[Case] = []
    for root in roots:
        kind = phantom_kind(root, IMAGE_KINDS)
        if kind is not None:
            names = [drawn_name(kind, index) for index in range(PHANTOM_COUNT)]
            cases += [Case(name, Path(PHANTOM, name), Path(PHANTOM, name), name, PHANTOM) for name in names]
        else:
            folders += [(root, folder) for folder in _folders(root, sets)]
    places = [folder.resolve() for _, folder in folders]
    if len(set(places)) < len(places) or len({case.name for case in cases}) < len(cases):
        raise UserError(f"data.root: the same data is named twice among {', '.join(roots[:6])}")
    several = len(folders) > 1 or bool(cases)
    scans: list[ImageFolder] = []
    for (root, folder), prefix in zip(folders, name_prefixes([folder for _, folder in folders]), strict=True):
        scanned = scan_folder(folder)
        scans.append(scanned)
        for stem, image, mask in scanned.pairs:
            name = f"{prefix}/{stem}" if several else stem
            cases.append(Case(name, image, mask, prefix if sets else name, root))
    return sorted(cases, key=lambda case: case.name), scans


def scan_folder(folder: Path) -> ImageFolder:
    """Pair the files of a folder that `has_layout` accepts; nothing is opened."""
    layout = _layout(folder)
    assert layout is not None
    (images, same_images), (masks, same_masks) = (_by_stem(path) for path in layout)
    for ending in _MASK_ENDINGS:
        if masks and all(stem.endswith(ending) for stem in masks):
            masks = {stem.removesuffix(ending): path for stem, path in masks.items()}
    return ImageFolder(
        folder,
        *layout,
        tuple((stem, images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys())),
        tuple(images[stem] for stem in sorted(images.keys() - masks)),
        tuple(masks[stem] for stem in sorted(masks.keys() - images)),
        (*same_images, *same_masks),
    )


def has_layout(folder: Path) -> bool:
    """Whether `folder` directly holds a folder of images and one of masks."""
    return _layout(folder) is not None


def check_cases(
    cases: Sequence[Case], reader: CaseReader, size: tuple[int, int] | None
) -> tuple[list[Checked], list[str]]:
    """Read every case once: what is wrong with them is collected, not raised at the first.

    Args:
        cases: The cases.
        reader: Reads and checks one.
        size: Height and width to keep resized arrays of; None keeps none.

    Returns:
        One entry per readable case, and the problems of the others.
    """

    def check(case: Case) -> Checked | str:
        try:
            image, mask = reader(case)
            digest = hashlib.sha256()
            for path in () if case.root == PHANTOM else (case.image, case.mask):
                digest.update(path.read_bytes())
            if case.root == PHANTOM:
                digest.update(image.tobytes() + mask.tobytes())
        except UserError as error:
            return str(error).replace("\n", " ")
        except MemoryError:
            return f"{case.image}: not enough memory to decode it"
        kept = None if size is None else (resize_image(image, size), resize_mask(mask, size))
        found = np.flatnonzero(np.bincount(mask.ravel())).tolist()
        return Checked(digest.hexdigest(), tuple(c for c in found if c not in (0, IGNORE)), kept)

    for kind in sorted({kind_of(case.name) for case in cases if case.root == PHANTOM}):
        embedded(kind)  # once, before the threads ask for it
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter's lock
        results = list(pool.map(check, cases))
    return [r for r in results if isinstance(r, Checked)], [r for r in results if isinstance(r, str)]


def raise_problems(problems: Sequence[str], count: int) -> None:
    """Raise one error that shows the first problems and says how many more there are; nothing if there are none."""
    if not problems:
        return
    more = len(problems) - _SHOWN_PROBLEMS
    head = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the data ({count} cases)"
    shown = [f"- {problem[:300]}" for problem in problems[:_SHOWN_PROBLEMS]]
    raise UserError("\n".join([f"{head}:", *shown, *([f"... and {more} more"] if more > 0 else [])]))


def fingerprint(cases: Iterable[Case], checked: Iterable[Checked]) -> str:
    """SHA-256 over the names and bytes of all files, the same on every machine and in any order."""
    return fingerprint_of((case.name, check.digest) for case, check in zip(cases, checked, strict=True))


def fingerprint_of(digests: Iterable[tuple[str, str]]) -> str:
    """As `fingerprint`, of names and digests."""
    total = hashlib.sha256()
    for name, digest in sorted(digests):
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()


def with_groups(cases: Iterable[Case], groups: Iterable[str]) -> list[Case]:
    """The cases with their groups filled in."""
    return [replace(case, group=group) for case, group in zip(cases, groups, strict=True)]


def _folders(root: str, sets: bool) -> list[Path]:
    """The folders below `root` that hold an image folder and a mask folder."""
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(_missing(root, base))
    if _layout(base):
        return [base]
    inner = base / "TestDataset" if sets and (base / "TestDataset").is_dir() else base
    candidates = sorted(path for path in inner.iterdir() if path.is_dir() and _layout(path))
    if sets and candidates:
        return candidates
    if (base / "TrainDataset").is_dir() and _layout(base / "TrainDataset"):
        return [base / "TrainDataset"]
    found = ", ".join(sorted(path.name for path in base.iterdir())[:8]) or "nothing"
    hint = f"; its folders {', '.join(path.name for path in candidates[:5])} do: name one or several of them"
    raise UserError(
        f"data.root: {root} holds no images/ with masks/ (nor image/ with mask/){hint if candidates else ''}\n"
        f"Found there: {found}"
    )


def _layout(folder: Path) -> tuple[Path, Path] | None:
    for images, masks in LAYOUTS:
        if (folder / images).is_dir() and (folder / masks).is_dir():
            return folder / images, folder / masks
    return None


def _missing(root: str, base: Path) -> str:
    """The message for a root that is no folder, with the nearest name that exists."""
    if base.exists():
        return f"data.root: {root} is a file; give the folder that holds images/ and masks/"
    parent = base.parent
    while not parent.is_dir():
        base, parent = parent, parent.parent
    guess = nearest(base.name, (path.name for path in parent.iterdir() if path.is_dir()))
    hint = f" Did you mean {parent / guess}?" if guess else f" ({parent} exists, '{base.name}' in it does not)"
    return f"data.root: there is no folder {root}.{hint}\nGive a folder with images/ and masks/, or the word {PHANTOM}"


def name_prefixes(folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart, the folder's own name if that is enough."""
    parts = [Path(os.path.normpath(folder.absolute())).parts for folder in folders]
    for depth in range(1, max((len(part) for part in parts), default=0) + 1):
        names = ["_".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part) for part in parts]


def _by_stem(folder: Path) -> tuple[dict[str, Path], list[tuple[Path, Path]]]:
    """The image files of a folder by stem, and those that share one."""
    files: dict[str, Path] = {}
    same: list[tuple[Path, Path]] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        if path.stem in files:
            same.append((files[path.stem], path))
        files[path.stem] = path
    return files, same
