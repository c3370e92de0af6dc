"""The data section of a recipe, read as training reads it but without torch, and the parts that training would make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from visattn.data import DATA
from visattn.data.cases import Case, ImageFolder, scan_roots, with_groups
from visattn.data.phantoms import PHANTOM
from visattn.data.splits import PARTS, Split, find_groups, split_cases
from visattn.doctor.findings import Findings
from visattn.doctor.reading import Seen
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.recipe import check_keys
from visattn.survey import guess_group_by

KEYS: dict[str, Any] = {
    "root": None,
    "labels": None,
    "size": 352,
    "split": None,
    "augment": None,
    "batch_size": 16,
    "regions": None,
    "ignore": None,
    "channels": 3,
    "mean": None,
    "std": None,
    "num_workers": None,
    "cache": True,
    "scales": None,
    "seed": 0,
    "test_root": None,
    "slices": None,
}
"""The arguments of `ImageMaskFolder` and their defaults; a test compares the two."""

_FEW_VALIDATION = 5
_ENLARGED = 2.0
_DISTORTED = 2.0


@dataclass(frozen=True)
class DataSection:
    """What a recipe says about its data.

    Args:
        name: Name of the recipe.
        roots: Folders to train on, or the word phantom.
        test_roots: Folders to test on.
        labels: The label map.
        size: Height and width of training.
        split: How cases are divided.
        batch_size: Images per device and step.
        channels: 1 or 3.
        cache: Whether decoded images are kept.
        seed: Seed of the split.
    """

    name: str
    roots: list[str]
    test_roots: list[str]
    labels: Labels
    size: tuple[int, int]
    split: Split
    batch_size: int
    channels: int
    cache: bool
    seed: int

    def cases(self) -> tuple[list[Case], list[Case], list[ImageFolder]]:
        """Cases to train and validate on, cases to test on, and all their folders.

        Raises:
            UserError: A root does not exist or has no known layout.
        """
        cases, folders = scan_roots(self.roots)
        tests, test_folders = scan_roots(self.test_roots, sets=True) if self.test_roots else ([], [])
        return cases, tests, folders + test_folders


class Division(Protocol):
    """What dividing the cases needs of a recipe."""

    @property
    def split(self) -> Split:
        """How cases are divided."""

    @property
    def batch_size(self) -> int:
        """Cases per device and step."""

    @property
    def seed(self) -> int:
        """Seed of the split."""


def read_recipe(name: str, tree: Mapping[str, Any]) -> DataSection:
    """The data section of a resolved recipe with `ImageMaskFolder`.

    Raises:
        UserError: The recipe is no good.
    """
    if tree["data"]["class_path"] != DATA["ImageMaskFolder"]:
        kind = tree["data"]["class_path"].rpartition(".")[2]
        raise UserError(
            f"data.class_path: doctor does not know {kind}.\n"
            "It examines ImageMaskFolder, VolumeFolder, ImageFolder and MedMNIST."
        )
    given = tree["data"]["init_args"]
    check_keys("data", given, KEYS)
    values = {**KEYS, **given}
    for key in ("root", "labels"):
        if not values[key]:
            raise UserError(f"data.{key}: is missing in the recipe {name}")
    seed = values["seed"] if "seed" in given else tree.get("seed_everything", 0)
    return DataSection(
        name=name,
        roots=texts("root", values["root"]),
        test_roots=texts("test_root", values["test_root"] or []),
        labels=Labels.from_config(values["labels"], values["regions"], values["ignore"]),
        size=_size(values["size"]),
        split=Split.from_config(values["split"]),
        batch_size=whole("batch_size", values["batch_size"], 1),
        channels=whole("channels", values["channels"], 1),
        cache=bool(values["cache"]),
        seed=whole("seed", seed, 0),
    )


def grouped(section: DataSection, cases: Sequence[Case], findings: Findings) -> list[Case]:
    """The cases with their groups; none where `findings` had to be told why they could not be formed."""
    try:
        return with_groups(cases, find_groups(cases, section.split.group_by))
    except UserError as error:
        findings.whole("group-by-failed", _line(error))
        return []


def parts_of(
    section: Division, cases: Sequence[Case], held: Mapping[str, Sequence[int]], findings: Findings
) -> dict[str, str]:
    """train, val or test for each case's name, as training would divide them; empty where it could not.

    Args:
        section: The recipe.
        cases: The cases with their groups.
        held: For each readable mask, the labels besides the background that it holds, by index.
        findings: Where to note what is wrong.
    """
    try:
        divided = split_cases(cases, [held.get(case.name, ()) for case in cases], section.split, section.seed)
    except UserError as error:
        code = "split-failed"
        if section.split.files is not None:
            code = "group-across-parts" if "parts the group" in str(error) else "split-file"
        findings.whole(code, _line(error))
        return {}
    train, val = len(divided["train"]), len(divided["val"])
    groups = len({case.group for case in cases})
    told = ", ".join(f"{part} {len(divided[part])}" for part in PARTS)
    findings.whole("parts", told + (f"; {groups} groups" if section.split.group_by else ""))
    if train < section.batch_size:
        findings.whole("few-cases", f"{train} training cases, batch_size {section.batch_size}")
    if val < _FEW_VALIDATION:
        findings.whole("few-validation-cases", f"{val} validation {'case' if val == 1 else 'cases'}")
    return {case.name: part for part in PARTS for case in divided[part]}


def check_names(cases: Sequence[Case], parts: Mapping[str, str], findings: Findings) -> None:
    """Whether the names tell patients or videos that nothing keeps together.

    Args:
        cases: Cases that no group_by applies to.
        parts: train, val or test of each case's name; empty where nothing divides them yet.
        findings: Where to note what is found.
    """
    cases = [case for case in cases if case.root != PHANTOM]
    guess = guess_group_by([case.image.stem for case in cases]) if len(cases) > 1 else None
    if guess is None:
        return
    expression, why = guess
    if not parts:
        findings.whole("groups-unused", f"{why}; group_by: '{expression}'")
        return
    homes: dict[str, set[str]] = {}
    for case, group in zip(cases, find_groups(cases, expression), strict=True):
        if case.name in parts:
            homes.setdefault(group, set()).add(parts[case.name])
    torn = sorted(group for group, where in homes.items() if len(where) > 1)
    if torn:
        listed = ", ".join(torn[:4]) + (", ..." if len(torn) > 4 else "")
        findings.whole("groups-unused", f"{why}; {len(torn)} in two parts ({listed}); group_by: '{expression}'")


def check_sizes(section: DataSection, seen: Sequence[Seen], findings: Findings) -> None:
    """What resizing to data.size does to the images, and what reading them costs."""
    height, width = section.size
    pixels = []
    for one in seen:
        if one.image.error or one.image.size is None:
            continue
        high, wide = one.image.size
        pixels.append(high * wide)
        stretch = (height / high) / (width / wide)
        note = f"{wide} x {high} to {width} x {height}"
        if max(stretch, 1 / stretch) > _DISTORTED:
            findings.file("aspect-distorted", one.image.path, note)
        elif min(height / high, width / wide) > _ENLARGED:
            findings.file("image-enlarged", one.image.path, note)
    if pixels:
        mean = sum(pixels) / len(pixels)
        kept = len(pixels) * height * width * (section.channels + 1) / 1e6
        text = f"{mean / 1e6:.2f} megapixels a file, {height * width / 1e6:.2f} after resizing"
        text += f"; all of them decoded take {kept:.0f} MB of memory (data.cache: {str(section.cache).lower()})"
        findings.whole("loader-advice", text)


def check_parts(
    parts: Mapping[str, str], held: Mapping[str, Sequence[int]], labels: Labels, findings: Findings
) -> None:
    """Labels that training or validation never sees, though the data holds them.

    Args:
        parts: train, val or test of each case's name.
        held: For each readable mask, the labels besides the background that it holds, by index.
        labels: The label map.
        findings: Where to note what is found.
    """
    for index, name in enumerate(labels.names[1:], 1):
        if not any(index in has for has in held.values()):
            continue  # told already
        for part in ("train", "val"):
            if part in parts.values() and not any(
                index in has for case, has in held.items() if parts.get(case) == part
            ):
                findings.whole("label-missing-in-part", f"{name} in {part}")


def _line(error: UserError) -> str:
    return str(error).replace("\n", " ")


def texts(key: str, value: Any) -> list[str]:
    """One text or a list of them, as a list."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise UserError(f"data.{key}: needs a folder or a list of folders, got {value!r:.80}")
    return values


def _size(value: Any) -> tuple[int, int]:
    sides = [value, value] if isinstance(value, int) else value
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise UserError(f"data.size: needs one side or [height, width] in pixels, got {value!r:.80}")
    return sides[0], sides[1]


def whole(key: str, value: Any, low: int) -> int:
    """A whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"data.{key}: needs a whole number of at least {low}, got {value!r:.80}")
    return value
