"""Data sets of volumes as a whole: a folder, or the data of a recipe with `VolumeFolder`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visattn.data.cases import has_layout
from visattn.data.images import SUFFIXES
from visattn.data.splits import Split, find_groups
from visattn.data.volumes import Layout, VolumeCase, VolumeScan, scan_volumes
from visattn.doctor import recipe as recipes
from visattn.doctor.findings import Findings, printable
from visattn.doctor.show import Report
from visattn.doctor.volume_copies import check_repeats
from visattn.doctor.volume_reading import SeenVolume, read_volumes
from visattn.doctor.volumes import as_cases, check_labels, check_problems, check_volumes
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.recipe import check_keys
from visattn.survey import guess_label_map

KEYS: dict[str, Any] = {
    "root": None,
    "labels": None,
    "channels": None,
    "layout": "auto",
    "orientation": "RAS",
    "spacing": None,
    "size": None,
    "patch": None,
    "crop_foreground": False,
    "normalise": "zscore",
    "split": None,
    "augment": None,
    "batch_size": 2,
    "iterations_per_epoch": None,
    "oversample": 0.33,
    "cache_dir": None,
    "regions": None,
    "ignore": None,
    "num_workers": None,
    "seed": 0,
    "test_root": None,
}
"""The arguments of `VolumeFolder` and their defaults; a test compares the two."""

_NIFTI = (".nii", ".nii.gz")
_OTHERS = (".mha", ".mhd", ".nrrd", ".npz", ".dcm")
_LABEL_NAME = re.compile(r"seg|label|lesion|tumou?r|multiclass|(^|_)(gt|ot|mask)(_|\.|$)", re.IGNORECASE)
_DEPTH = 4


@dataclass(frozen=True)
class VolumeSection:
    """What a recipe says about its volumes: what dividing the cases needs."""

    split: Split
    batch_size: int
    seed: int


def holds_volumes(root: Path) -> bool:
    """Whether a folder is a data set of volumes, and not one of images.

    Raises:
        UserError: It holds volumes in formats that are not read.
    """
    if not root.is_dir() or (has_layout(root) and not _volumes(root, 2)):
        return False
    if _volumes(root, _DEPTH):
        return True
    other = next((path for path in _below(root, 2) if path.name.lower().endswith(_OTHERS)), None)
    if other is not None:
        raise UserError(
            f"{root}: holds volumes in a format that doctor does not read ({printable(str(other.relative_to(root)))}); "
            "convert them to NIfTI"
        )
    return False


def examine_volumes(folder: Path | str) -> Report:
    """Examine the volumes in `folder`; what the labels mean is taken from dataset.json or guessed from them.

    Raises:
        UserError: There is no layout with images and labels in it.
    """
    root = Path(folder).expanduser()
    findings = Findings(root.absolute())
    patterns: Mapping[str, str] | None = None
    try:
        scan = scan_volumes(str(root.absolute()))[0]
    except UserError as error:
        patterns = guess_patterns(root)
        if patterns is None or "no known layout" not in str(error):
            raise
        scan = scan_volumes(str(root.absolute()), patterns)[0]
    told = f"data.layout: {dict(patterns)}" if patterns is not None else scan.layout
    findings.whole("layout", f"{told}; channels {', '.join(scan.channels)}")
    seen = _look([scan], scan.channels, findings)
    labels = _known(scan, seen, root.resolve().name)
    if labels is not None:
        check_labels(seen, labels, findings)
    else:
        values = {int(value) for one in seen if one.label is not None for value in one.label.values[:2]}
        if len(values) == 1:
            findings.whole("all-masks-empty", f"every voxel of all labels is {values.pop()}")
    cases = as_cases([one.case for one in seen])
    groups = _own_groups([one.case for one in seen])
    ties = check_repeats(seen, {}, groups, findings)
    if not groups:
        recipes.check_names(cases, {}, findings)
    shown = None if labels is None else labels.to_config()["labels"]
    guessed = scan.labels is None
    return Report([printable(str(folder))], cases, shown, guessed, findings.sorted(), ties)


def examine_volume_recipe(name: str, tree: Mapping[str, Any]) -> Report:
    """Examine the data of a recipe with `VolumeFolder`, divided as training would divide it.

    Args:
        name: Of the recipe.
        tree: The resolved recipe.

    Raises:
        UserError: The recipe is no good, or a folder that it names is not there.
    """
    given = tree["data"]["init_args"]
    check_keys("data", given, KEYS)
    values = {**KEYS, **given}
    for key in ("root", "labels"):
        if not values[key]:
            raise UserError(f"data.{key}: is missing in the recipe {name}")
    labels = Labels.from_config(values["labels"], values["regions"], values["ignore"])
    roots, test_roots = recipes.texts("root", values["root"]), recipes.texts("test_root", values["test_root"] or [])
    layout: Layout = values["layout"]
    scans = scan_volumes(roots, layout, values["channels"])
    tests = scan_volumes(test_roots, layout, values["channels"] or scans[0].channels) if test_roots else []
    findings = Findings(Path(roots[0]).expanduser() if len(roots) == 1 else None)
    tests = [
        replace(scan, cases=tuple(replace(case, name=f"test/{case.name}") for case in scan.cases)) for scan in tests
    ]
    seen = _look([*scans, *tests], scans[0].channels, findings)
    held = check_labels(seen, labels, findings)
    section = _section(values, given, tree, scans)
    own = [case for scan in scans for case in scan.cases]
    parts: dict[str, str] = {}
    groups = _own_groups(own)
    together = as_cases(own)
    if section.split.group_by is not None:
        try:
            found = find_groups(own, section.split.group_by)
            groups = {case.name: group for case, group in zip(own, found, strict=True)}
            together = [replace(case, group=groups[case.name]) for case in together]
        except UserError as error:
            findings.whole("group-by-failed", str(error).replace("\n", " "))
            together = []
    if together:
        parts = recipes.parts_of(section, together, held, findings)
        recipes.check_parts(parts, held, labels, findings)
    if section.split.group_by is None and not groups:
        recipes.check_names(together, parts, findings)
    parts |= {case.name: "test" for scan in tests for case in scan.cases}
    ties = check_repeats(seen, parts, groups, findings)
    return Report(
        [printable(root) for root in roots + test_roots],
        as_cases([one.case for one in seen]),
        labels.to_config()["labels"],
        False,
        findings.sorted(),
        ties,
    )


def _look(scans: Sequence[VolumeScan], channels: Sequence[str], findings: Findings) -> list[SeenVolume]:
    check_problems(scans, findings)
    cases = [case for scan in scans for case in scan.cases]
    if not cases:
        findings.whole("no-cases", "every case lacks a file")
    seen = read_volumes(cases)
    check_volumes(seen, channels, findings)
    return seen


def _section(
    values: Mapping[str, Any], given: Mapping[str, Any], tree: Mapping[str, Any], scans: Sequence[VolumeScan]
) -> VolumeSection:
    split = Split.from_config(values["split"])
    files = [scan.splits for scan in scans if scan.splits is not None]
    if not set(values["split"] or {}) - {"fold", "folds"} and len(files) == 1 == len(scans):
        split = replace(split, files=str(files[0]))  # as VolumeFolder does
    seed = values["seed"] if "seed" in given else tree.get("seed_everything", 0)
    return VolumeSection(split, recipes.whole("batch_size", values["batch_size"], 1), recipes.whole("seed", seed, 0))


def _own_groups(cases: Sequence[VolumeCase]) -> dict[str, str]:
    """The groups that the layout tells, as the subjects of BIDS; empty where each case is its own."""
    if all(case.group == case.name for case in cases):
        return {}
    return {case.name: case.group for case in cases}


def _known(scan: VolumeScan, seen: Sequence[SeenVolume], name: str) -> Labels | None:
    """The label map of dataset.json, or the one that the values suggest; None where they are no labels."""
    try:
        if scan.labels is not None:
            return Labels.from_config(**scan.labels)
        masks = [
            dict(zip(one.label.values.tolist(), one.label.counts.tolist(), strict=True))
            for one in seen
            if one.label is not None
        ]
        guess = guess_label_map(masks, name)
    except UserError:
        return None
    return Labels.from_config(guess.labels, ignore=guess.ignore)


def guess_patterns(root: Path) -> dict[str, str] | None:
    """Patterns for a folder of case folders that hold files of equal names, or names that end alike."""
    homes = {
        path: [f for f in sorted(path.iterdir()) if _is_nifti(f)] for path in sorted(root.iterdir()) if path.is_dir()
    }
    homes = {path: files for path, files in homes.items() if files}
    if not homes:
        return None
    endings = [{_ending(file, path): file for file in files} for path, files in homes.items()]
    common = set(endings[0]).intersection(*endings[1:])
    labels = sorted((name for name in common if _LABEL_NAME.search(name)), key=lambda name: "mask" in name.lower())
    images = sorted(name for name in common if name not in labels and "mask" not in name.lower())
    if not labels or not images:
        return None
    return {_plain(name): f"{{case}}/{name}" for name in images} | {"label": f"{{case}}/{labels[0]}"}


def _ending(file: Path, home: Path) -> str:
    return f"{{case}}{file.name[len(home.name) :]}" if file.name.startswith(home.name) else file.name


def _plain(name: str) -> str:
    """A channel's name from the pattern of its files."""
    return name.removeprefix("{case}").split(".")[0].strip("_-").lower() or name


def _is_nifti(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.name.lower().endswith(_NIFTI)


def _volumes(root: Path, depth: int) -> bool:
    """Whether there are NIfTI files; where a folder of images and masks has them, no picture lies beside them."""
    names = [path for path in _below(root, depth) if path.name.lower().endswith((*_NIFTI, *SUFFIXES))]
    return any(path.name.lower().endswith(_NIFTI) for path in names) and (
        not has_layout(root) or not any(path.suffix.lower() in SUFFIXES for path in names)
    )


def _below(root: Path, depth: int) -> list[Path]:
    """Files down to `depth` folders, the first ones of each pattern."""
    return [path for level in range(1, depth + 1) for path in sorted(root.glob("/".join(["*"] * level)))]
