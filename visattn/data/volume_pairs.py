"""Pairing files of images with files of labels, and choosing the channels that a recipe asks for."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from visattn.data import nifti
from visattn.data.volume_case import Problem, VolumeCase
from visattn.data.volume_names import listed, split_suffix, stem_of, volumes_in
from visattn.errors import UserError

_LABEL_ENDINGS = ("_seg", "_dseg", "_mask", "_label", "_labels", "_segmentation")
CHANNEL_AXIS = 3
"""Where files with channels hold them: the fourth axis, as in the Decathlon."""


@dataclass(frozen=True)
class VolumeScan:
    """What was found below a root.

    Args:
        layout: Name of the layout.
        cases: Those that can be used, sorted by name.
        problems: What is wrong with the others.
        channels: Names of the channels of each case, in their order.
        labels: What dataset.json says of the labels, as `Labels.from_config` takes it; None where it says nothing.
        splits: nnU-Net's splits_final.json that belongs to the data, as `data.split.files` reads it.
    """

    layout: str
    cases: tuple[VolumeCase, ...]
    problems: tuple[Problem, ...]
    channels: tuple[str, ...]
    labels: Mapping[str, Any] | None = None
    splits: Path | None = None


def choose_channels(
    channels: Sequence[str] | None, there: Sequence[str] | None, count: int, where: str
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Which of the channels of a data set a recipe means, and what they are called.

    By name where the data set names its channels, else one after the other.

    Args:
        channels: What the recipe says; None: all.
        there: The names in the data set, where it has any.
        count: How many channels the data set has.
        where: The data set, for errors.

    Raises:
        UserError: The recipe means channels that are not there, or does not say which.
    """
    if channels is None:
        names = there or (["image"] if count == 1 else [f"channel_{index}" for index in range(count)])
        return tuple(range(count)), tuple(names)
    wanted = [name.casefold() for name in channels]
    known = [name.casefold() for name in there or ()]
    if all(known.count(name) == 1 for name in wanted):
        return tuple(known.index(name) for name in wanted), tuple(channels)
    # A name that the data set gives to another channel means a mistake, not another way of counting.
    moved = [name for place, name in enumerate(wanted) if name in known and known.index(name) != place]
    if len(channels) == count and not moved:
        return tuple(range(count)), tuple(channels)
    has = f"{count} channel{'s' if count > 1 else ''}{f' ({listed(there)})' if there else ''}"
    do = "Name those to be used, as they are called there" if there else "Name one for each, in their order"
    raise UserError(f"data.channels: {where} has {has}, the recipe names {len(channels)} ({listed(channels)}).\n{do}.")


def channels_of(path: Path) -> int:
    """Length of the fourth axis of a file; 1 where it has none, and for a file that tells nothing."""
    try:
        with nifti.collect_warnings():
            return nifti.read_header(path, CHANNEL_AXIS).channels
    except UserError:
        return 1  # no such axis, or a damaged file: told when it is read


def case_of(name: str, image: Path, label: Path | None, root: str, picks: tuple[int, ...], count: int) -> VolumeCase:
    """A case of one file, which holds `count` channels."""
    if count == 1:
        return VolumeCase(name, (image,), label, name, root)
    return VolumeCase(name, (image,), label, name, root, CHANNEL_AXIS, picks)


def pair_folders(
    images: Path, labels: Path, root: str, channels: Sequence[str] | None, there: Sequence[str] | None = None
) -> VolumeScan:
    """Pair the files of two folders by name, with or without channel suffixes.

    Args:
        images: Folder of images.
        labels: Folder of labels.
        root: As the user wrote it.
        channels: The recipe's channels.
        there: Names of the channels in the data set, where they are known.
    """
    found, masks = volumes_in(images), {stem_of(path): path for path in volumes_in(labels)}
    for ending in _LABEL_ENDINGS:
        if masks and all(stem.endswith(ending) for stem in masks):
            masks = {stem.removesuffix(ending): path for stem, path in masks.items()}
    plain = {stem_of(path) for path in found}
    bases = {split_suffix(stem)[0] for stem in plain if split_suffix(stem)[1] is not None}
    problems = [
        Problem(stem_of(second), f"{second}: shares its stem with {first.name}; keep one of them", second)
        for folder in (found, volumes_in(labels))
        for first, second in pairwise(folder)
        if stem_of(first) == stem_of(second)
    ]
    # Numbered cases, case_0001 with a label of that name, have no suffix; the labels tell.
    if len(bases & masks.keys()) > len(plain & masks.keys()):
        scan = _suffixed(found, masks, images, root, channels, there)
    else:
        scan = _single(found, masks, images, root, channels, there)
    used = {case.name for case in scan.cases} | {problem.name for problem in scan.problems}
    missing = [masks[stem] for stem in sorted(masks) if stem not in used]
    problems += [Problem(stem_of(path), f"{path}: no image of that name in {images.name}/", path) for path in missing]
    return VolumeScan(scan.layout, scan.cases, (*scan.problems, *problems), scan.channels)


def _single(
    found: Sequence[Path],
    masks: Mapping[str, Path],
    images: Path,
    root: str,
    channels: Sequence[str] | None,
    there: Sequence[str] | None,
) -> VolumeScan:
    counts = {path: channels_of(path) for path in found}
    count = max(set(counts.values()), key=list(counts.values()).count, default=1)
    picks, names = choose_channels(channels, there if there and len(there) == count else None, count, str(images))
    cases, problems = [], []
    for stem, path in {stem_of(path): path for path in found}.items():
        if counts[path] != count:
            text = f"{path}: holds {counts[path]} channels along its fourth axis, others {count}"
            problems.append(Problem(stem, text, path))
        elif stem not in masks:
            problems.append(Problem(stem, f"{path}: no label of that name", path))
        else:
            cases.append(case_of(stem, path, masks[stem], root, picks, count))
    return VolumeScan("decathlon", tuple(cases), tuple(problems), names)


def _suffixed(
    found: Sequence[Path],
    masks: Mapping[str, Path],
    images: Path,
    root: str,
    channels: Sequence[str] | None,
    there: Sequence[str] | None,
) -> VolumeScan:
    files: defaultdict[str, dict[int, Path]] = defaultdict(dict)
    problems = []
    for path in found:
        stem, index = split_suffix(stem_of(path))
        if index is None:
            problems.append(Problem(stem, f"{path}: has no channel suffix as {stem}_0000; the other files have", path))
        else:
            files[stem][index] = path
    count = len(there) if there else max((index + 1 for case in files.values() for index in case), default=1)
    picks, names = choose_channels(channels, there, count, str(images))
    cases = []
    for stem, have in sorted(files.items()):
        missing = [
            f"{stem}_{index:04d} ({name})" for index, name in zip(picks, names, strict=True) if index not in have
        ]
        surplus = [path.name for index, path in sorted(have.items()) if index >= count]
        if stem not in masks:
            first = min(have.values())
            problems.append(Problem(stem, f"{first}: no label {stem} beside it", first))
        elif missing:
            problems.append(Problem(stem, f"{images / stem}: channels are missing: {listed(missing)}", images))
        elif surplus:
            text = f"{images / stem}: {listed(surplus)} are more than the {count} channels that dataset.json names"
            problems.append(Problem(stem, text, images))
        else:
            cases.append(VolumeCase(stem, tuple(have[index] for index in picks), masks[stem], stem, root))
    return VolumeScan("nnunet", tuple(cases), tuple(problems), names)
