"""Finding the cases of a data set of volumes as its owners published it.

| layout | images | labels |
|---|---|---|
| `decathlon` | what dataset.json lists under training, else imagesTr/; channels along the 4th axis | labelsTr/ |
| `nnunet` | imagesTr/CASE_0000, CASE_0001, ...; dataset.json names the channels | labelsTr/CASE |
| `folders` | images/, a file for each case, or for each channel with the suffix of nnU-Net | labels/ or masks/ |
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from visattn.data.cases import name_prefixes, raise_problems
from visattn.data.volume_case import PHANTOM, VolumeCase
from visattn.data.volume_names import listed
from visattn.data.volume_pairs import VolumeScan, pair_folders
from visattn.errors import UserError, nearest, unknown

Layout = str | Mapping[str, str]
"""`auto`, the name of a layout, or a pattern for each channel and one for `label`."""

PHANTOM_COUNT = 120
"""Heads of the word phantom."""

FOLDERS = tuple((images, labels) for images in ("images", "image") for labels in ("labels", "masks", "label", "mask"))


def find_training_cases(
    roots: str | Path | Sequence[str | Path], layout: Layout = "auto", channels: Sequence[str] | None = None
) -> list[VolumeCase]:
    """List the cases with labels below `roots`, sorted by name; the voxels are not read.

    Args:
        roots: A folder or several, or the word phantom.
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
    scans = [_phantom() if name == PHANTOM else _scan(name, layout, channels) for name in names]
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
    found = _auto(root) if layout == "auto" else layout
    assert isinstance(found, str)
    if found not in LAYOUTS:
        raise unknown("data.layout", found, ["auto", *LAYOUTS])
    scan = LAYOUTS[found](root, name, channels)
    if not scan.cases and not scan.problems:
        raise UserError(f"data.root: {name}: no volume with a label in the layout '{found}'\nFound: {_found(root)}")
    counts = Counter(case.name for case in scan.cases)
    assert max(counts.values(), default=1) == 1
    return replace(scan, cases=tuple(sorted(scan.cases, key=lambda case: case.name)))


def _auto(root: Path) -> str:
    if _pair(root, (("imagesTr", "labelsTr"),)):
        return "decathlon"
    if _pair(root, FOLDERS):
        return "folders"
    raise UserError(
        f"data.root: {root} has no layout that is known: imagesTr/ with labelsTr/ (Decathlon, nnU-Net), images/ with "
        f"labels/.\nFound: {_found(root)}"
    )


def _decathlon(root: Path, name: str, channels: Sequence[str] | None) -> VolumeScan:
    pair = _pair(root, (("imagesTr", "labelsTr"),))
    if pair is None:
        raise UserError(f"data.root: {name}: needs imagesTr/ and labelsTr/\nFound: {_found(root)}")
    return pair_folders(*pair, name, channels)


def _folders(root: Path, name: str, channels: Sequence[str] | None) -> VolumeScan:
    pair = _pair(root, FOLDERS)
    if pair is None:
        raise UserError(f"data.root: {name}: needs images/ and labels/ (or masks/)\nFound: {_found(root)}")
    return replace(pair_folders(*pair, name, channels), layout="folders")


def _pair(root: Path, names: Sequence[tuple[str, str]]) -> tuple[Path, Path] | None:
    return next(((root / a, root / b) for a, b in names if (root / a).is_dir() and (root / b).is_dir()), None)


LAYOUTS: dict[str, Callable[[Path, str, Sequence[str] | None], VolumeScan]] = {
    "decathlon": _decathlon,
    "folders": _folders,
}


def _phantom() -> VolumeScan:
    names = [f"head_{index:04d}" for index in range(PHANTOM_COUNT)]
    return VolumeScan(PHANTOM, tuple(VolumeCase(name, (), None, name, PHANTOM) for name in names), (), ("t1c",))


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
