"""BIDS data sets with label maps among their derivatives.

Images: sub-*/[ses-*/]anat/sub-*_..._SUFFIX.nii.gz, whose suffix (T1w, FLAIR, ...) is the channel. Labels: files
sub-*_..._dseg.nii.gz, or where there are none _mask.nii.gz, anywhere below derivatives/. A label belongs to the images
with the same sub and ses, and, where both name it, the same run and acq.

https://bids-specification.readthedocs.io/en/stable/derivatives/imaging.html
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visattn.data.volume_case import Problem, VolumeCase
from visattn.data.volume_names import is_volume_name, listed, stem_of
from visattn.data.volume_pairs import VolumeScan
from visattn.errors import UserError

_KEYS = ("sub", "ses", "acq", "run")
_COMPARED = ("acq", "run")  # of which a derivative may say nothing


@dataclass(frozen=True)
class _File:
    path: Path
    entities: dict[str, str]
    suffix: str


def is_bids(root: Path) -> bool:
    """Whether a folder holds subjects, and derivatives to take labels from."""
    return (root / "derivatives").is_dir() and any(path.is_dir() for path in root.glob("sub-*"))


def scan_bids(root: Path, name: str, channels: Sequence[str] | None) -> VolumeScan:
    """List the cases of a BIDS data set; each subject is a group.

    Raises:
        UserError: There is no image of a suffix that the recipe names, or no label.
    """
    images = [_file(path) for path in sorted((*root.glob("sub-*/anat/*"), *root.glob("sub-*/ses-*/anat/*")))]
    images = [image for image in images if image.suffix and is_volume_name(image.path)]
    derived = [_file(path) for path in sorted((root / "derivatives").rglob("sub-*")) if is_volume_name(path)]
    labels = [label for label in derived if label.suffix == "dseg"]
    labels = labels or [label for label in derived if label.suffix == "mask"]
    suffixes = sorted({image.suffix for image in images})
    if not labels or not images:
        raise UserError(
            f"data.root: {name}: expected sub-*/anat/*_T1w.nii.gz with derivatives/**/sub-*_dseg.nii.gz; "
            f"found {len(images)} images ({listed(suffixes)}) and {len(labels)} labels"
        )
    wanted, names = _suffixes(suffixes, channels, name)
    found: defaultdict[tuple[str, ...], dict[str, list[_File]]] = defaultdict(lambda: defaultdict(list))
    for image in images:
        found[_key(image)][image.suffix].append(image)
    cases, problems = [], []
    for key, have in sorted(found.items()):
        case = "_".join(f"{entity}-{value}" for entity, value in zip(_KEYS, key, strict=True) if value)
        fitting = [label for label in labels if _belongs(label, key)]
        missing = [suffix for suffix in wanted if suffix not in have]
        if len(missing) == len(wanted) and not fitting:
            continue  # another scan of the session, which nobody asked for
        doubled = [file.path.name for suffix in wanted for file in have.get(suffix, []) if len(have[suffix]) > 1]
        if missing:
            problems.append(Problem(case, f"{root / case}: no {listed(missing)} beside {listed(sorted(have))}", root))
        elif doubled:
            problems.append(Problem(case, f"{root / case}: {listed(doubled)} could all be meant; keep one", root))
        elif len(fitting) != 1:
            texts = listed(label.path.relative_to(root) for label in fitting)
            problems.append(Problem(case, f"{root / case}: needs one label among derivatives, found {texts}", root))
        else:
            files = tuple(have[suffix][0].path for suffix in wanted)
            cases.append(VolumeCase(case, files, fitting[0].path, f"sub-{key[0]}", name))
    return VolumeScan("bids", tuple(cases), tuple(problems), names)


def _file(path: Path) -> _File:
    *parts, suffix = stem_of(path).split("_")
    return _File(path, dict(part.split("-", 1) for part in parts if "-" in part), suffix)


def _key(file: _File) -> tuple[str, ...]:
    return tuple(file.entities.get(entity, "") for entity in _KEYS)


def _belongs(label: _File, key: tuple[str, ...]) -> bool:
    for entity, value in zip(_KEYS, key, strict=True):
        own = label.entities.get(entity, "")
        if own != value and (entity not in _COMPARED or own):
            return False
    return True


def _suffixes(
    there: Sequence[str], channels: Sequence[str] | None, name: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The suffixes that the recipe's channels mean, and the channels' names."""
    if channels is None:
        chosen = tuple(there) if len(there) == 1 else tuple(suffix for suffix in there if suffix == "T1w")
        if chosen:
            return chosen, chosen
    elif len(channels) == 1 and len(there) == 1:
        return tuple(there), tuple(channels)
    known = {suffix.casefold(): suffix for suffix in there}
    known |= {suffix.casefold().removesuffix("w"): suffix for suffix in there if suffix.endswith("w")}  # T1 for T1w
    if channels and all(channel.casefold() in known for channel in channels):
        return tuple(known[channel.casefold()] for channel in channels), tuple(channels)
    raise UserError(
        f"data.channels: the images of {name} are {listed(there)}, the recipe names {listed(channels or ['none'])}.\n"
        "Name the suffixes to be used, as in [T1w, FLAIR]."
    )
