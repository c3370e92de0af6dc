"""Which predicted mask belongs to which true one, and what the values in them mean: settled before anything is scored.

Masks are paired by their path below the two folders, or by file stem alone where that pairs more and no stem stands
twice. Names that differ as file systems and tools make them differ still pair: by suffix, by an ending that all masks
of a folder share (`_mask`), by how an accent is composed.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from visattn.data.cases import LAYOUTS
from visattn.data.volume_layouts import FOLDERS
from visattn.data.volume_names import is_volume_name, split_suffix, stem_of
from visattn.errors import UserError, unknown
from visattn.files import read_small, walk_files
from visattn.labels import Labels
from visattn.predict_plan import find_images, shown
from visattn.predict_record import MANIFEST
from visattn.recipe import MAX_BYTES, read_yaml
from visattn.scored import CASES, SUMMARY, read_cases

ENDINGS = ("_segmentation", "_mask", "_seg", "_pred", "_trans")
"""Endings that masks carry in addition to the case's name: ISIC's, a common habit, and MONAI's `SaveImage`."""

_VOLUME_ENDINGS = ("_segmentation", "_mask", "_dseg", "_seg", "_pred", "_trans", "_labels", "_label")
_VOLUME_LAYOUTS = (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"), *FOLDERS)
_MAPS = ("_prob", "_uncertainty", "_variance")  # that visattn predict writes beside masks
_BLOCKS = ("labels", "regions", "ignore")


@dataclass(frozen=True)
class Pair:
    """The files of one case.

    Attributes:
        name: The case's name: its stem, or its path below the folder where stems alone do not tell cases apart.
        truth: The true mask.
        prediction: The predicted mask; None where there is none.
        image: The image; None where it is not known.
    """

    name: str
    truth: Path
    prediction: Path | None
    image: Path | None


@dataclass(frozen=True)
class Plan:
    """What is to be scored, and what is wrong with the folders as such.

    Attributes:
        pairs: One for each true mask, by name.
        extra: Predictions without a true mask.
        problems: A line for each.
        volumes: Whether the masks are volumes.
        left_out: How many true masks were not chosen.
    """

    pairs: tuple[Pair, ...]
    extra: tuple[Path, ...]
    problems: tuple[str, ...]
    volumes: bool = False
    left_out: int = 0

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the cases without prediction."""
        return tuple(pair.name for pair in self.pairs if pair.prediction is None)


def read_labels(path: Path) -> Labels:
    """Read the recipe's labels block from a file: `background: 0` and so on, or {labels, regions, ignore}.

    Raises:
        UserError: There is no such file, it is no YAML mapping, or the labels are no good.
    """
    try:
        tree = read_yaml(read_small(path, MAX_BYTES).decode(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise UserError(f"--labels {shown(path)}: cannot be read: {reason}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--labels {shown(path)}: needs names with their values, as in background: 0 and polyp: 255")
    if "class_path" in tree or "init_args" in tree or isinstance(tree.get("data"), dict):
        raise UserError(
            f"--labels {shown(path)}: is a recipe; copy the labels (and regions, ignore) of its data block to a file"
        )
    blocks = tree if isinstance(tree.get("labels"), dict) else {"labels": tree}
    for key in blocks:
        if key not in _BLOCKS:
            raise unknown(f"key in {shown(path)}", str(key), _BLOCKS)
    for key in ("regions", "ignore"):
        if key in blocks["labels"]:
            raise UserError(
                f"--labels {shown(path)}: '{key}' stands among the names; with it, write\n"
                "labels: {background: 0, polyp: 255}\n" + ("ignore: 128" if key == "ignore" else "regions: {...}")
            )
    try:
        labels = Labels.from_config(**blocks)
    except UserError as error:
        raise UserError(f"--labels {shown(path)}: {error}") from None
    if "mean" in labels.foreground:
        raise UserError(f"--labels {shown(path)}: no class can be called 'mean', the name of the mean over classes")
    return labels


def plan_pairs(prediction: Path, truth: Path, images: Path | None, output: Path) -> Plan:
    """Pair the masks below two folders.

    Args:
        prediction: Folder of predicted masks. Results of `evaluate` in it are left out, and so are the probabilities
            and overlays of `visattn predict`.
        truth: Folder of true masks, or one that holds images/ and masks/ (for volumes imagesTr/ and labelsTr/ too),
            itself or in its folders. Where volumes lie in it, they are the masks.
        images: Folder of images; default: those beside the true masks.
        output: Where results go; left out when it lies inside.

    Raises:
        UserError: A folder does not exist or holds no mask, nothing pairs, or `prediction` is a run folder.
    """
    for folder in filter(None, (prediction, truth, images)):
        if folder.is_file():
            raise UserError(f"{shown(folder)}: is a file; name the folder that it lies in")
    if (prediction / SUMMARY).is_file() and (prediction / "masks").is_dir():
        raise UserError(f"{shown(prediction)}: is a run folder.\nName its masks: {shown(prediction / 'masks')}")
    problems: list[str] = []
    kind = _kind(truth, output)
    true = _keys(truth, output, "masks", problems, kind)
    predicted = _keys(prediction, output, "masks", problems, kind)
    pictures: dict[str, _File] = {}
    if images is not None:
        pictures = _keys(images, output, "images", problems, kind)
    elif any(truth in file.path.parents[1:] and _layout(file.path.parents[1], kind) for file in true.values()):
        pictures = _keys(truth, output, "images", [], kind)
    stems = [_by_stem(keys) for keys in (true, predicted)]
    clash = next((pair for _, pair in stems if pair), None)
    if clash is None and len(stems[0][0].keys() & stems[1][0].keys()) > len(true.keys() & predicted.keys()):
        true, predicted = stems[0][0], stems[1][0]
        pictures = _by_stem(pictures)[0]
    if not true.keys() & predicted.keys():
        raise UserError(_nothing_pairs(prediction, truth, predicted, true, clash))
    if images is not None and not true.keys() & pictures.keys():
        raise UserError(f"--images {shown(images)}: holds no image of the name of a true mask in {shown(truth)}")
    pairs = tuple(
        Pair(file.name, file.path, *(files[key].path if key in files else None for files in (predicted, pictures)))
        for key, file in sorted(true.items())
    )
    extra = tuple(predicted[key].path for key in sorted(predicted.keys() - true.keys()))
    return Plan(pairs, extra, tuple(problems), kind.volumes)


def choose_cases(plan: Plan, path: Path) -> Plan:
    """The plan with those cases alone that a file names, in the plan's order.

    Args:
        plan: All cases.
        path: A table with a column `case`, as the `cases.csv` of a run, or a text file with a name on each line. A name
            is that of the case, or the last part of it where only one case ends so.

    Raises:
        UserError: The file cannot be read, names nothing, or names a case that has no true mask.
    """
    chosen: set[str] = set()
    unknown_names: list[str] = []
    names = {unicodedata.normalize("NFC", pair.name): pair.name for pair in plan.pairs}
    ends: dict[str, list[str]] = defaultdict(list)
    for key, name in names.items():
        ends[PurePosixPath(key).name].append(name)
    for text in _named_cases(path):
        key = unicodedata.normalize("NFC", text)
        found = [names[key]] if key in names else ends.get(PurePosixPath(key).name, [])
        if len(found) > 1:
            raise UserError(f"--cases {shown(path)}: '{shown(text)}' may be {few(found)}.\nName the whole path.")
        chosen.update(found)
        unknown_names += [] if found else [text]
    if unknown_names:
        raise UserError(
            f"--cases {shown(path)}: {len(unknown_names)} of its cases have no true mask: {few(unknown_names)}\n"
            f"True masks: {few(plan_names(plan))}"
        )
    pairs = tuple(pair for pair in plan.pairs if pair.name in chosen)
    return replace(plan, pairs=pairs, left_out=len(plan.pairs) - len(pairs))


def plan_names(plan: Plan) -> list[str]:
    """The names of the cases."""
    return [pair.name for pair in plan.pairs]


def _named_cases(path: Path) -> list[str]:
    try:
        text = read_small(path, MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise UserError(f"--cases {shown(path)}: cannot be read: {reason}") from None
    first = text.partition("\n")[0].strip().lstrip("\ufeff")
    if "case" in (cell.strip().strip('"') for cell in first.split(",")):
        names = [row["case"] for row in read_cases(path)]
    else:
        names = [line.strip() for line in text.lstrip("\ufeff").splitlines() if line.strip()]
    if not names:
        raise UserError(f"--cases {shown(path)}: names no case; write a name on each line, or give a run's cases.csv")
    return list(dict.fromkeys(names))


class _File(NamedTuple):
    """A file, and the name of its case as its folder spells it; pairs are made by the NFC form of that."""

    name: str
    path: Path


class _Kind(NamedTuple):
    """What differs between folders of images and of volumes."""

    volumes: bool
    layouts: tuple[tuple[str, str], ...]
    endings: tuple[str, ...]


_IMAGES = _Kind(False, LAYOUTS, ENDINGS)
_NIFTI = _Kind(True, _VOLUME_LAYOUTS, _VOLUME_ENDINGS)


def _kind(truth: Path, output: Path) -> _Kind:
    """Whether the true masks are images or volumes; other files that lie with volumes are no masks."""
    return _NIFTI if truth.is_dir() and _volumes(truth, output) else _IMAGES


def _volumes(folder: Path, output: Path) -> list[tuple[Path, PurePosixPath]]:
    return [
        (path, PurePosixPath(path.relative_to(folder).as_posix()))
        for _, files in walk_files(folder, output)
        for path in files
        if is_volume_name(path) and path.is_file()
    ]


def _find(folder: Path, output: Path, kind: _Kind) -> list[tuple[Path, PurePosixPath]]:
    if not kind.volumes:
        try:
            return find_images([folder], output, predicted=True)
        except UserError:
            if folder.is_dir() and _volumes(folder, output):
                raise UserError(f"{shown(folder)}: holds volumes, but the true masks are images.") from None
            raise
    if not folder.is_dir():
        raise UserError(f"{shown(folder)}: no such folder.")
    found = _volumes(folder, output)
    if not found:
        raise UserError(f"{shown(folder)}: no volume in this folder, but the true masks are volumes (.nii, .nii.gz).")
    return found


def _stem(path: PurePosixPath) -> str:
    """The path without the ending of an image or a volume."""
    return str(path.with_name(stem_of(Path(path.name)) if is_volume_name(Path(path.name)) else path.stem))


def _keys(folder: Path, output: Path, part: str, problems: list[str], kind: _Kind) -> dict[str, _File]:
    """The files below `folder` by their path in it, without suffix, common ending and the name of a mask folder."""
    found = _find(folder, output, kind)
    written = (folder / MANIFEST).is_file()  # by visattn predict
    names: dict[Path, str] = {}
    for path, relative in found:
        if written and (relative.parts[0] in {"probabilities", "overlays"} or stem_of(path).endswith(_MAPS)):
            continue
        key = _without_layout(folder, relative, part, kind)
        if key is not None:
            names[path] = _stem(key)
    if not names:
        raise UserError(f"{shown(folder)}: no {part[:-1]} in this folder.")
    if kind.volumes and part == "images":
        names = _first_channels(names)
    for ending in kind.endings if part == "masks" else ():
        if all(name.endswith(ending) and PurePosixPath(name).name != ending for name in names.values()):
            names = {path: name.removesuffix(ending) for path, name in names.items()}
            break
    keys: dict[str, _File] = {}
    for path, name in names.items():
        file = keys.setdefault(unicodedata.normalize("NFC", name), _File(name, path))
        if file.path is not path:
            problems.append(f"{shown(file.path)} and {shown(path)} have the same stem; keep one of them")
    return keys


def _first_channels(names: Mapping[Path, str]) -> dict[Path, str]:
    """Without the suffix of nnU-Net's channels, of which the first is drawn on: `case_0000`, not `case_0001`.

    A set whose own names end so has no file for channel 0 of each; its names stay.
    """
    split = {path: split_suffix(name) for path, name in names.items()}
    if {base for base, _ in split.values()} != {base for base, channel in split.values() if channel == 0}:
        return dict(names)
    return {path: base for path, (base, channel) in split.items() if channel == 0}


def _without_layout(folder: Path, relative: PurePosixPath, part: str, kind: _Kind) -> PurePosixPath | None:
    """`relative` without the names of mask (or image) folders; None for files that are not meant."""
    kept: list[str] = []
    place = folder
    for name in relative.parts[:-1]:
        layout = _layout(place, kind)
        place = place / name
        if (place / CASES).is_file() and (place / SUMMARY).is_file():
            return None  # the results of an evaluation, whose overlays are no masks
        if layout is None:
            kept.append(name)
        elif name != layout[part]:
            return None
    if _layout(place, kind):
        return None  # a file beside images/ and masks/
    return PurePosixPath(*kept, relative.name)


def _layout(folder: Path, kind: _Kind) -> dict[str, str] | None:
    for images, masks in kind.layouts:
        if (folder / images).is_dir() and (folder / masks).is_dir():
            return {"images": images, "masks": masks}
    return None


def _by_stem(keys: Mapping[str, _File]) -> tuple[dict[str, _File], tuple[Path, Path] | None]:
    """The files by stem alone, and two that share one."""
    found: dict[str, _File] = {}
    clash = None
    for key, file in keys.items():
        other = found.setdefault(PurePosixPath(key).name, _File(PurePosixPath(file.name).name, file.path))
        if other.path is not file.path:
            clash = clash or (other.path, file.path)
    return found, clash


def _nothing_pairs(
    prediction: Path, truth: Path, predicted: Iterable[str], true: Iterable[str], clash: tuple[Path, Path] | None
) -> str:
    lines = [
        f"{shown(prediction)}: no file there has the name of a true mask in {shown(truth)}.",
        f"Predicted: {few(sorted(predicted))}",
        f"True: {few(sorted(true))}",
    ]
    if clash is not None:
        lines.append(
            f"Stems alone cannot pair them: {shown(clash[0])} and {shown(clash[1])} share one. "
            "Give both folders the same subfolders."
        )
    return "\n".join(lines)


def few(names: Sequence[str], count: int = 4) -> str:
    """The first names, on one line."""
    return ", ".join(shown(name)[:80] for name in names[:count]) + (", ..." if len(names) > count else "")
