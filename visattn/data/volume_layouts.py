"""Finding the cases of a data set of volumes as its owners published it.

| layout | images | labels |
|---|---|---|
| `decathlon` | what dataset.json lists under training, else imagesTr/; channels along the 4th axis | labelsTr/ |
| `nnunet` | imagesTr/CASE_0000, CASE_0001, ...; dataset.json names the channels | labelsTr/CASE |
| `folders` | images/, a file for each case, or for each channel with the suffix of nnU-Net | labels/ or masks/ |
| `bids` | sub-*/[ses-*/]anat/*_T1w, the suffix being the channel | derivatives/**/sub-*_dseg |
| patterns | for each channel a pattern, as `{case}/*_t1c.nii.gz` | the pattern `label` |
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from visattn.data.cases import name_prefixes, raise_problems
from visattn.data.dataset_json import NAME as DATASET_JSON
from visattn.data.dataset_json import DatasetJson, find_splits, read_dataset_json
from visattn.data.phantoms import VOLUME_KINDS, phantom_kind
from visattn.data.volume_bids import is_bids, scan_bids
from visattn.data.volume_case import Problem, VolumeCase, phantom_cases
from visattn.data.volume_names import listed, stem_of
from visattn.data.volume_pairs import VolumeScan, case_of, channels_of, choose_channels, pair_folders
from visattn.data.volume_patterns import scan_patterns
from visattn.errors import UserError, nearest, unknown

Layout = str | Mapping[str, str]
"""`auto`, the name of a layout, or a pattern for each channel and one for `label`."""

_PHANTOM_CHANNELS = {"head": ("t1c",), "hippocampus": ("t1",)}
_TRAINING = (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"))
FOLDERS = tuple((images, labels) for images in ("images", "image") for labels in ("labels", "masks", "label", "mask"))


def find_training_cases(
    roots: str | Path | Sequence[str | Path], layout: Layout = "auto", channels: Sequence[str] | None = None
) -> list[VolumeCase]:
    """List the cases with labels below `roots`, sorted by name; the voxels are not read.

    Args:
        roots: A folder or several, or `phantom`, also `phantom:KIND`.
        layout: `auto` looks which layout is there.
        channels: Names of the channels of the network; None: all that the data set has.

    Raises:
        UserError: A root does not exist or has no known layout, files lack a partner, or a case has two.
    """
    scans = scan_volumes(roots, layout, channels)
    cases = [case for scan in scans for case in scan.cases]
    raise_problems([str(problem) for scan in scans for problem in scan.problems], len(cases))
    return sorted(cases, key=lambda case: case.name)


def scan_volumes(
    roots: str | Path | Sequence[str | Path], layout: Layout = "auto", channels: Sequence[str] | None = None
) -> list[VolumeScan]:
    """As `find_training_cases`, one scan for each root; what is wrong with files is told in `problems`, not raised.

    Raises:
        UserError: A root does not exist, has no known layout or holds no case, or lacks channels.
    """
    names = [str(root) for root in ([roots] if isinstance(roots, str | Path) else roots)]
    kinds = [phantom_kind(name, VOLUME_KINDS) for name in names]
    scans = [
        _scan(name, layout, channels) if kind is None else _phantom(name, kind, channels)
        for name, kind in zip(names, kinds, strict=True)
    ]
    if len(scans) > 1:
        if len({str(Path(name).resolve()) for name in names}) < len(names):
            raise UserError(f"data.root: the same data is named twice among {listed(names)}")
        for i, prefix in enumerate(name_prefixes([Path(name) for name in names])):
            scans[i] = replace(
                scans[i],
                cases=tuple(
                    replace(case, name=f"{prefix}/{case.name}", group=f"{prefix}/{case.group}")
                    for case in scans[i].cases
                ),
            )
    return scans


def _scan(name: str, layout: Layout, channels: Sequence[str] | None) -> VolumeScan:
    root = Path(name).expanduser()
    if not root.is_dir():
        raise UserError(_missing(name, root))
    if isinstance(layout, str):
        found = _auto(root, name) if layout == "auto" else layout
        if found not in LAYOUTS:
            raise unknown("data.layout", found, ["auto", *LAYOUTS])
        scan = LAYOUTS[found](root, name, channels)
    else:
        scan = scan_patterns(root, name, layout, channels)
    if not scan.cases and not scan.problems:
        raise UserError(
            f"data.root: {name}: no volume with a label in the layout '{scan.layout}'\nFound: {_found(root)}"
        )
    return replace(scan, cases=tuple(sorted(scan.cases, key=lambda case: case.name)), splits=find_splits(root))


def _auto(root: Path, name: str) -> str:
    """Which layout a folder has."""
    described = read_dataset_json(root)
    if described is not None:
        return described.version
    if _pair(root, _TRAINING):
        return "decathlon"
    if _pair(root, FOLDERS):
        return "folders"
    if is_bids(root):
        return "bids"
    inner = [path for path in sorted(root.iterdir()) if path.is_dir() and _has_layout(path)]
    hint = f"\nIts folders {listed(path.name for path in inner)} do: name one or several of them." if inner else ""
    raise UserError(
        f"data.root: {name} has no known layout: dataset.json or imagesTr/ with labelsTr/ (Decathlon, nnU-Net), "
        f"images/ with labels/, sub-*/ with derivatives/ (BIDS).{hint}\nFound: {_found(root)}\n"
        "For another layout give patterns, data.layout: {t1c: '{case}/*_t1c.nii.gz', label: '{case}/*_seg.nii.gz'}"
    )


def _has_layout(folder: Path) -> bool:
    return (folder / DATASET_JSON).is_file() or bool(_pair(folder, (*_TRAINING, *FOLDERS))) or is_bids(folder)


def _training(root: Path, name: str, channels: Sequence[str] | None) -> VolumeScan:
    """Decathlon and nnU-Net, which differ in how files are named; what is there counts, not what it is called."""
    described, pair = read_dataset_json(root), _pair(root, _TRAINING)
    there = described.channels if described is not None else None
    if described is not None and described.training and not _suffixed(root, described):
        scan = _listed(root, name, described, channels)
    elif pair is None:
        raise UserError(f"data.root: {name}: needs imagesTr/ and labelsTr/\nFound: {_found(root)}")
    else:
        scan = pair_folders(*pair, name, channels, there)
    return replace(scan, labels=described.labels if described is not None else None)


def _suffixed(root: Path, described: DatasetJson) -> bool:
    """Whether the listed images are there with channel suffixes only, as in version 1 of nnU-Net."""
    images = [root / image[0] for image, _ in described.training if len(image) == 1]
    first = [path.with_name(f"{stem_of(path)}_0000{path.name[len(stem_of(path)) :]}") for path in images]
    return any(path.is_file() for path in first) and not any(path.is_file() for path in images)


def _listed(root: Path, name: str, described: DatasetJson, channels: Sequence[str] | None) -> VolumeScan:
    """The cases that dataset.json lists."""
    problems, files = [], []
    for images, label in described.training:
        stem = stem_of(Path(label))
        absent = [entry for entry in (*images, label) if not (root / entry).is_file()]
        if absent:
            problems.append(
                Problem(stem, f"{described.path}: lists {listed(absent)}, which is not there", described.path)
            )
        else:
            files.append((stem, tuple(root / entry for entry in images), root / label))
    twice = [stem for stem, count in Counter(stem for stem, *_ in files).items() if count > 1]
    if twice:
        raise UserError(f"{described.path}: lists {listed(twice)} twice")
    counts = {stem: channels_of(paths[0]) if len(paths) == 1 else len(paths) for stem, paths, _ in files}
    count = max(counts.values(), default=1)
    there = described.channels if described.channels and len(described.channels) == count else None
    picks, names = choose_channels(channels, there, count, name)
    cases = []
    for stem, paths, label_path in files:
        if counts[stem] != count:
            text = f"{paths[0]}: has {counts[stem]} channels, other cases {count}"
            problems.append(Problem(stem, text, paths[0]))
        elif len(paths) == 1:
            cases.append(case_of(stem, paths[0], label_path, name, picks, count))
        else:
            cases.append(VolumeCase(stem, tuple(paths[index] for index in picks), label_path, stem, name))
    return VolumeScan(described.version, tuple(cases), tuple(problems), names)


def _folders(root: Path, name: str, channels: Sequence[str] | None) -> VolumeScan:
    pair = _pair(root, FOLDERS)
    if pair is None:
        raise UserError(f"data.root: {name}: needs images/ and labels/ (or masks/)\nFound: {_found(root)}")
    return replace(pair_folders(*pair, name, channels), layout="folders")


def _pair(root: Path, names: Sequence[tuple[str, str]]) -> tuple[Path, Path] | None:
    return next(((root / a, root / b) for a, b in names if (root / a).is_dir() and (root / b).is_dir()), None)


LAYOUTS: dict[str, Callable[[Path, str, Sequence[str] | None], VolumeScan]] = {
    "decathlon": _training,
    "nnunet": _training,
    "folders": _folders,
    "bids": scan_bids,
}


def _phantom(root: str, kind: str, channels: Sequence[str] | None) -> VolumeScan:
    _, names = choose_channels(channels, _PHANTOM_CHANNELS[kind], 1, "the phantom")
    return VolumeScan(root, tuple(phantom_cases(kind)), (), names)


def _found(root: Path) -> str:
    return listed(sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir()))


def _missing(name: str, root: Path) -> str:
    """The message for a root that is no folder, with the nearest name that exists."""
    if root.exists():
        return f"data.root: {name} is a file; give the folder of the data set"
    base, parent = root, root.parent
    while not parent.is_dir():
        base, parent = parent, parent.parent
    guess = nearest(base.name, (path.name for path in parent.iterdir() if path.is_dir()))
    hint = f" Did you mean {parent / guess}?" if guess else f" ({parent} exists, '{base.name}' in it does not)"
    return f"data.root: there is no folder {name}.{hint}"
