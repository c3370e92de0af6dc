"""Which volumes `visattn predict` is given, and which files are the channels of one case.

An input is a NIfTI file, recognised by its content; a folder of DICOM files; or a folder that holds such files and
folders at any depth. Files belong together by nnU-Net's suffixes, CASE_0000 the first channel of the network, CASE_0001
the second; or as a table says. What is wrong with one case is its problem alone.

In a folder are left out: hidden files; folders of labels beside folders of images, as labelsTr/ beside imagesTr/ or
derivatives/ beside the subjects of BIDS; maps that belong to an image beside them, as CASE_mask beside CASE; and what
an earlier `visattn predict` wrote. They are taken when they are named outright.
"""

import csv
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from visattn.data import nifti
from visattn.data.volume_case import Problem, VolumeCase, check_header
from visattn.data.volume_names import is_dicom, is_volume_name, listed, split_suffix, stem_of
from visattn.data.volume_pairs import CHANNEL_AXIS, channels_of
from visattn.errors import UserError, nearest
from visattn.files import predicted_files, walk_files

_log = logging.getLogger(__name__)

_LABEL_FOLDERS = dict.fromkeys(("labels", "masks", "label", "mask", "labelstr", "labelsts"), "image")
_LABEL_FOLDERS["derivatives"] = "sub-"  # and how the folders of images beside them begin
_MAPS = ("_mask", "_seg", "_dseg", "_label", "_labels", "_prob", "_uncertainty", "_variance")
_BIDS_MAPS = ("_dseg", "_probseg", "_statmap", "_mask")
_OTHER_FORMATS = (".mha", ".mhd", ".nrrd", ".nhdr", ".mgz", ".mgh", ".hdr", ".img", ".mnc", ".npy")


@dataclass(frozen=True)
class _Entry:
    """A file or a folder of DICOM files: where it is, and its name below the input, without ending."""

    path: Path
    name: PurePosixPath
    given: str


def find_volume_cases(
    inputs: Sequence[Path],
    channels: Sequence[str],
    cases_csv: Path | None = None,
    skip: Path | None = None,
    budget: int = nifti.BUDGET,
) -> tuple[list[VolumeCase], list[Problem]]:
    """Find the cases that `inputs` name and check their headers.

    Args:
        inputs: Files and folders.
        channels: Names of the channels of the network, in their order.
        cases_csv: A table with the columns `case` and one for each channel; paths are relative to the table.
        skip: A folder that is not searched, as that of the output.
        budget: Bytes that a volume may take as float32.

    Returns:
        The cases in the order of the inputs, and the problems of those that cannot be read.

    Raises:
        UserError: An input does not exist or holds no volume, or the table cannot be used.
    """
    cases, problems = _of_table(Path(cases_csv), channels) if cases_csv is not None else ([], [])
    found, more = _grouped(_entries(inputs, skip), channels)
    checked: list[VolumeCase] = []
    problems += more
    for case in cases + found:
        try:
            checked.append(_checked(case, len(channels), budget))
        except UserError as error:
            problems.append(Problem(case.name, str(error), case.images[0]))
    return _without_doubles(checked, problems)


def _entries(inputs: Sequence[Path], skip: Path | None) -> list[_Entry]:
    found: dict[tuple[str, PurePosixPath], _Entry] = {}
    for given in inputs:
        entries = list(_entries_of(Path(given), skip))
        for entry in entries:
            # A file named twice, as `predict scans scans/a.nii`, is one case if it leads to one name.
            found.setdefault((os.path.realpath(entry.path), entry.name), entry)
    return list(found.values())


def _entries_of(given: Path, skip: Path | None) -> Iterator[_Entry]:
    if given.is_file():
        if is_dicom(given):
            raise UserError(f"{given}: is one file of a DICOM series.\nGive its folder, {given.parent}.")
        yield _Entry(given, PurePosixPath(stem_of(given)), str(given))
        return
    if not given.is_dir():
        there = [path.name for path in given.parent.iterdir()] if given.parent.is_dir() else []
        guess = nearest(given.name, there)
        hint = f"\nDid you mean {given.parent / guess}?" if guess else ""
        raise UserError(f"{given}: no such file or folder.{hint}")
    if skip is not None and given.resolve() == skip.resolve():
        raise UserError(f"--output {skip}: is an input folder too.\nName another folder for the masks.")
    empty, formats, predicted = True, Counter[str](), set[str]()
    for folder, files in walk_files(given, skip):
        predicted |= predicted_files(folder)
        written = [path for path in files if is_volume_name(path) and os.path.realpath(path) in predicted]
        if written:
            text = "%s: left out %s, written by an earlier visattn predict"
            _log.warning(text, folder, listed(path.name for path in written))
            files = [path for path in files if path not in written]
        formats.update(suffix for path in files if (suffix := path.suffix.lower()) in _OTHER_FORMATS)
        if folder != given and _holds_labels(folder, given):
            _log.warning("%s: left out, as it lies beside folders of images and is named as one of labels", folder)
            continue
        for entry in _entries_in(folder, files, given):
            empty = False
            yield entry
    if empty:
        other = f" It holds {listed(f'{n} {suffix}' for suffix, n in formats.items())} files: convert them."
        raise UserError(
            f"{given}: no volume in this folder.{other if formats else ''}\n"
            "Volumes are NIfTI files (.nii, .nii.gz) and folders of DICOM files."
        )


def _entries_in(folder: Path, files: Sequence[Path], given: Path) -> Iterator[_Entry]:
    """The volumes of one folder, without its subfolders."""
    relative = PurePosixPath(folder.relative_to(given).as_posix())
    files = [
        path for path in files if path.is_file() or not path.exists()
    ]  # a pipe would be waited for; a dead link named
    volumes = [path for path in files if is_volume_name(path) or nifti.is_nifti(path)]
    if any(is_dicom(path) for path in files if path not in volumes):
        name = relative if relative.name else PurePosixPath(folder.resolve().name)
        yield _Entry(folder, name, str(given))
    stems = {stem_of(path) for path in volumes}
    maps = [path for path in volumes if _is_map(stem_of(path), stems)]
    if maps:
        _log.warning("%s: left out %s, named as maps of the images beside them", folder, listed(p.name for p in maps))
    for path in volumes:
        if path not in maps:
            yield _Entry(path, relative / stem_of(path), str(given))


def _holds_labels(folder: Path, given: Path) -> bool:
    """Whether `folder`, or one between it and the input, is one of labels beside one of images."""
    for inner in (folder, *folder.parents):
        if inner == given:
            return False
        beside = _LABEL_FOLDERS.get(inner.name.lower())
        if beside and any(path.name.lower().startswith(beside) and path.is_dir() for path in inner.parent.iterdir()):
            return True
    return False


def _is_map(stem: str, stems: set[str]) -> bool:
    for ending in _MAPS:
        base = stem.removesuffix(ending)
        if stem.endswith(ending) and any(other == base or other.startswith(f"{base}_") for other in stems - {stem}):
            return True
    base, derived, _ = stem.partition("_desc-")  # a BIDS derivative beside what it was derived from
    return bool(derived) and stem.endswith(_BIDS_MAPS) and any(other.startswith(f"{base}_") for other in stems - {stem})


def _grouped(entries: Sequence[_Entry], channels: Sequence[str]) -> tuple[list[VolumeCase], list[Problem]]:
    """Put the channels of each case together."""
    parts: defaultdict[tuple[Path, PurePosixPath], dict[int, _Entry]] = defaultdict(dict)
    for entry in entries:
        base, index = split_suffix(entry.name.name)
        if index is not None:
            parts[entry.path.parent, entry.name.with_name(base)].setdefault(index, entry)
    cases: list[VolumeCase] = []
    problems: list[Problem] = []
    done: set[tuple[Path, PurePosixPath]] = set()
    for entry in entries:
        base, index = split_suffix(entry.name.name)
        key = entry.path.parent, entry.name.with_name(base)
        have = parts.get(key, {}) if index is not None else {}
        alone = not have or (len(channels) == 1 and 0 not in have) or channels_of(entry.path) > 1
        if alone:  # without a suffix, or numbered: case_0001 where there is no case_0000
            cases.append(VolumeCase(str(entry.name), (entry.path,), None, str(entry.name), entry.given))
        elif key not in done:
            done.add(key)
            case = _of_suffixes(str(key[1]), have, channels)
            (problems if isinstance(case, Problem) else cases).append(case)  # type: ignore[arg-type]
    return cases, problems


def _of_suffixes(name: str, have: dict[int, _Entry], channels: Sequence[str]) -> VolumeCase | Problem:
    first = have[min(have)]
    place = first.path.parent / PurePosixPath(name).name
    surplus = [have[index].path.name for index in sorted(have) if index >= len(channels)]
    missing = [f"_{index:04d} ({channel})" for index, channel in enumerate(channels) if index not in have]
    takes = f"the network takes {len(channels)} channel{'s' if len(channels) > 1 else ''} ({listed(channels)})"
    if missing:
        count = "a channel is" if len(missing) == 1 else f"{len(missing)} channels are"
        text = f"{place}: {count} missing, {listed(missing)}; {takes}"
        return Problem(name, text, first.path)
    if surplus:
        text = (
            f"{place}: {takes}, but there is {listed(surplus)}.\nIf these are cases of their own, list them in --cases."
        )
        return Problem(name, text, first.path)
    return VolumeCase(name, tuple(have[i].path for i in range(len(channels))), None, name, first.given)


def _of_table(path: Path, channels: Sequence[str]) -> tuple[list[VolumeCase], list[Problem]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            rows, columns = list(reader), [name for name in reader.fieldnames or [] if name]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--cases: cannot read {path} ({error})") from None
    for column in ("case", *channels):
        if column not in columns:
            raise UserError(
                f"--cases: {path} has no column '{column}'; its columns are {listed(columns)}.\n"
                f"Needed: {', '.join(['case', *channels])}"
            )
    if not rows:
        raise UserError(f"--cases: {path} lists no case")
    ignored = [name for name in columns if name not in ("case", *channels)]
    if ignored:
        _log.warning("%s: the columns %s are no channels of the network and are not read", path, listed(ignored))
    cases: list[VolumeCase] = []
    problems: list[Problem] = []
    for number, row in enumerate(rows, 2):
        name = (row["case"] or "").strip()
        cells = {channel: (row[channel] or "").strip() for channel in channels}
        images = {channel: path.parent / Path(cell).expanduser() for channel, cell in cells.items()}
        empty = [channel for channel, cell in cells.items() if not cell]
        absent = [str(image) for channel, image in images.items() if cells[channel] and not image.exists()]
        if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name.isprintable():
            problems.append(Problem(f"line {number}", f"{path}, line {number}: {name!r} is no name for a case", path))
        elif empty or absent:
            what = f"no {listed(empty)} is given" if empty else f"no such file: {listed(absent)}"
            problems.append(Problem(name, f"{path}, line {number}, case {name}: {what}", path))
        else:
            cases.append(VolumeCase(name, tuple(images.values()), None, name, str(path)))
    return cases, problems


def _checked(case: VolumeCase, count: int, budget: int) -> VolumeCase:
    """The case, once its headers can be read and hold as many channels as the network takes."""
    if len(case.images) == 1 and not case.images[0].is_dir():
        path = case.images[0]
        there = _fourth_axis(path)
        if there != count:
            has = f"holds {there} volumes along its fourth axis" if there > 1 else "is one channel"
            do = (
                "Extract those" if there > 1 else "Name its channels CASE_0000, CASE_0001, ..., or list them in --cases"
            )
            raise UserError(f"{path}: {has}, but the network takes {count} channel{'s' if count > 1 else ''}.\n{do}.")
        if there > 1:
            case = replace(case, channel_axis=CHANNEL_AXIS)
    elif len(case.images) != count:
        raise UserError(f"{case.images[0]}: is one channel, but the network takes {count}.\nList them in --cases.")
    with nifti.collect_warnings():  # they are told when the case is read
        for path in case.images:
            check_header(path, case.channel_axis, budget)
    return case


def _fourth_axis(path: Path) -> int:
    """Length of a file's fourth axis; 1 where it has none.

    Raises:
        UserError: The header cannot be read.
    """
    if path.is_dir():
        return 1
    with nifti.collect_warnings():
        stored = nifti.read_header(path, 0, 2**62).stored
    return stored[CHANNEL_AXIS] if len(stored) > CHANNEL_AXIS else 1


def _without_doubles(cases: Sequence[VolumeCase], problems: list[Problem]) -> tuple[list[VolumeCase], list[Problem]]:
    """Cases that share a name would overwrite each other's masks: none of them is taken."""
    named: defaultdict[str, list[VolumeCase]] = defaultdict(list)
    for case in cases:
        named[case.name].append(case)
    for name, same in named.items():
        if len(same) > 1:
            paths = listed(case.images[0] for case in same)
            text = (
                f"{paths}: {len(same)} cases have the name {name}; rename them, or give the folder above as the input"
            )
            problems.append(Problem(name, text, same[0].images[0]))
    return [case for case in cases if len(named[case.name]) == 1], problems
