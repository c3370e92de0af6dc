"""What is wrong with a data set of volumes: files, grids, headers, labels, copies, intensities."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visattn.data.cases import Case
from visattn.data.geometry import Geometry
from visattn.data.volumes import VolumeCase, VolumeScan
from visattn.doctor.findings import Findings
from visattn.doctor.masks import listed_values
from visattn.doctor.volume_reading import SeenVolume
from visattn.errors import UserError
from visattn.labels import IGNORE, Labels

_SAID = (
    ("no such file", "volume-incomplete"),
    ("the file is empty", "empty-file"),
    ("permission denied", "no-permission"),
    ("is a folder", "not-a-volume"),
    ("truncated", "truncated-file"),
    ("more than the file holds", "truncated-file"),
    ("bytes follow the voxels", "volume-damaged"),
    ("compressed file is damaged", "volume-damaged"),
    ("not a NIfTI", "not-a-volume"),
    (".hdr/.img pair", "not-a-volume"),
    ("more than the limit", "volume-too-large"),
    ("not enough memory", "volume-too-large"),
    ("axes; say which", "volume-axes"),
    ("has more axes", "volume-axes"),
    ("has no axis", "volume-axes"),
    ("affine", "affine-broken"),
    ("qform is no rotation", "affine-broken"),
    ("its voxels are", "voxels-unsupported"),
    ("covers", "channel-elsewhere"),
    ("values that are no labels", "label-not-whole"),
    ("labels are NaN", "label-not-whole"),
    ("label values run", "values-outside-labels"),
)
"""What the strict readers of visattn/data say, and what it is called here."""

_FAR = 6.0  # median absolute deviations
_SLACK = 0.2  # standard deviations: among few cases the usual spread is underestimated
_ENOUGH = 8  # volumes among which one can stand out
TINY = 10  # voxels
_SPACINGS = 2.0
_FINEST, _COARSEST = 0.05, 12.0
_THIN = 8
_OBLIQUE = np.cos(np.radians(5))
_SHOWN = 6


def check_problems(scans: Sequence[VolumeScan], findings: Findings) -> None:
    """What was wrong before any voxel was read: files that lack a partner."""
    for scan in scans:
        for problem in scan.problems:
            where = problem.path if problem.path is not None else Path(problem.name)
            findings.file("volume-incomplete", where, _after(problem.message, where))


def check_volumes(seen: Sequence[SeenVolume], channels: Sequence[str], findings: Findings) -> None:
    """Each file by itself, label against image, and what all volumes have in common."""
    for one in seen:
        for path, text in one.errors:
            code = next((code for said, code in _SAID if said in text), "volume-damaged")
            findings.file(code, path, _after(text, path))
        for note in one.notes:
            _check_note(one, note, findings)
        _check_channels(one, channels, findings)
        if one.geometry is not None:
            _check_header(one, one.geometry, findings)
            if one.label_geometry is not None:
                _check_grid(one, one.geometry, one.label_geometry, findings)
    _check_mix([one.geometry for one in seen if one.geometry is not None], findings)
    _check_outliers(seen, channels, findings)


def check_labels(seen: Sequence[SeenVolume], labels: Labels, findings: Findings) -> dict[str, list[int]]:
    """Read the values of the labels through the label map; the classes of each readable one, by its case's name."""
    named = {value for values in labels.values for value in values} | set(labels.ignore)
    held: dict[str, list[int]] = {}
    total = np.zeros(len(labels.names), np.int64)
    ml = np.zeros(len(labels.names))
    cases = np.zeros(len(labels.names), np.int64)
    for one in seen:
        if one.label is None:
            continue
        path = path_of(one.case)
        if one.label.stored_float:
            findings.file("label-float", path)
        stray = [i for i, value in enumerate(one.label.values.tolist()) if value not in named]
        try:
            indices = labels.encode(one.label.values, "")
        except UserError:
            count = int(one.label.counts[stray].sum()) if stray else int(one.label.counts.sum())
            listed = listed_values(one.label.values[stray] if stray else one.label.values)
            findings.file("values-outside-labels", path, f"{count} voxels of values {listed}")
            continue
        counts = np.bincount(indices, one.label.counts, minlength=IGNORE + 1)[: len(labels.names)].astype(np.int64)
        held[one.case.name] = [index for index in range(1, len(counts)) if counts[index]]
        total, cases = total + counts, cases + (counts > 0)
        ml += counts * (one.label_geometry.voxel_ml if one.label_geometry else 0)
        _check_amount(one, int(counts[1:].sum()), int(counts.sum()), findings)
    if held:
        _check_balance(held, labels, total, ml, cases, findings)
    return held


def as_cases(cases: Sequence[VolumeCase]) -> list[Case]:
    """Cases as those of images, for splits, groups and the report; no file of theirs is opened."""
    return [
        Case(case.name, Path(f"{case.name}.nii"), Path(f"{case.name}.nii"), case.group, case.root) for case in cases
    ]


def path_of(case: VolumeCase) -> Path:
    """The label file of a case, or what stands for it."""
    return case.label or (case.images[0] if case.images else Path(case.name))


def _after(text: str, path: Path) -> str:
    """What a message says of `path`, in one line."""
    return text.removeprefix(f"{path}: ").replace("\n", " ")[:300]


def _check_note(one: SeenVolume, note: str, findings: Findings) -> None:
    path = next((path for path in one.case.files if note.startswith(f"{path}:")), path_of(one.case))
    text = _after(note, path)
    if "qform" in note:
        findings.file("header-contradiction", path, text)
    elif "NaN or infinite" in note:
        pass  # told by channel
    else:
        findings.file("channel-resampled", path, text)


def _check_channels(one: SeenVolume, channels: Sequence[str], findings: Findings) -> None:
    several = len(one.channels) > 1
    for index, channel in enumerate(one.channels):
        images = one.case.images
        path = images[min(index, len(images) - 1)] if images else Path(one.case.name)
        name = f"channel {channels[index]}" if several and index < len(channels) and len(images) == 1 else ""
        if channel.odd and not channel.spread.any() and channel.constant is None:
            findings.file("volume-not-finite", path, name)
        elif channel.odd:
            findings.file("volume-nan", path, f"{channel.odd} voxels {name}".strip())
        if channel.constant is not None:
            findings.file("volume-constant", path, f"{channel.constant:g} {name}".strip())
    if one.label is None:
        return
    if one.label.on_background > 0.5:
        findings.file("label-on-background", path_of(one.case), f"{one.label.on_background:.0%} of it")
    if one.label.specks:
        findings.file("label-specks", path_of(one.case), f"{one.label.specks} of them")


def _check_header(one: SeenVolume, geometry: Geometry, findings: Findings) -> None:
    path = one.case.images[0] if one.case.images else Path(one.case.name)
    zooms = " x ".join(f"{size:.3g}" for size in geometry.zooms)
    if geometry.header is not None and not _placed(geometry.header):
        findings.file("header-no-position", path)
    if geometry.shear > 1e-3:
        findings.file("affine-shear", path, f"{np.degrees(np.arcsin(min(1.0, geometry.shear))):.2f} degrees")
    if min(geometry.zooms) < _FINEST or max(geometry.zooms) > _COARSEST:
        findings.file("spacing-odd", path, f"{zooms} mm")
    if min(geometry.shape) < _THIN:
        findings.file("volume-thin", path, " x ".join(map(str, geometry.shape)))
    unit = np.abs(geometry.affine[:3, :3] / np.asarray(geometry.zooms))
    if unit.max(axis=0).min() < _OBLIQUE:
        findings.file("oblique", path)


def _placed(header: bytes) -> bool:
    """Whether the code of qform or sform in a NIfTI header is above 0."""
    order = "<" if int.from_bytes(header[:4], "little") in (348, 540) else ">"
    kind, start = (f"{order}i2", 252) if len(header) == 348 else (f"{order}i4", 344)
    return bool((np.frombuffer(header, kind, 2, start) > 0).any())


def _check_grid(one: SeenVolume, image: Geometry, label: Geometry, findings: Findings) -> None:
    if image.same_grid(label):
        return
    if image.shape != label.shape:
        sizes = [" x ".join(map(str, shape)) for shape in (label.shape, image.shape)]
        note = f"{sizes[0]} voxels, its image {sizes[1]}"
    else:
        note = f"up to {image.distance(label):.3g} mm away (axes {label.orientation} and {image.orientation})"
    findings.file("grid-mismatch", path_of(one.case), note)


def _check_mix(geometries: Sequence[Geometry], findings: Findings) -> None:
    if not geometries:
        return
    shapes = np.array([geometry.shape for geometry in geometries])
    zooms = np.array([sorted(geometry.zooms) for geometry in geometries])
    between = [
        f"{low} to {high}" if low != high else f"{low}" for low, high in zip(shapes.min(0), shapes.max(0), strict=True)
    ]
    sizes = [
        f"{low:.3g} to {high:.3g}" if high > low * 1.01 else f"{low:.3g}"
        for low, high in zip(zooms.min(0), zooms.max(0), strict=True)
    ]
    findings.whole("volumes", f"{' x '.join(between)} voxels; voxels of {' x '.join(sizes)} mm, the finest axis first")
    if (zooms.max(0) > _SPACINGS * zooms.min(0)).any():
        findings.whole("spacing-mixed", f"{' x '.join(sizes)} mm, the finest axis first")
    ways: dict[str, int] = defaultdict(int)
    for geometry in geometries:
        ways[geometry.orientation] += 1
    if len(ways) > 1:
        most = sorted(ways.items(), key=lambda item: -item[1])
        findings.whole("orientation-mixed", ", ".join(f"{way} {count}" for way, count in most[:_SHOWN]))


def _check_outliers(seen: Sequence[SeenVolume], channels: Sequence[str], findings: Findings) -> None:
    """Volumes whose percentiles, in standard deviations, lie far from the others'."""
    for index in range(max((len(one.channels) for one in seen), default=0)):
        these = [
            one for one in seen if len(one.channels) > index and one.channels[index].constant is None
            and one.channels[index].spread.any()
        ]  # fmt: skip
        if len(these) < _ENOUGH:
            continue
        spread = np.array([one.channels[index].spread for one in these])
        distance = np.abs(spread - np.median(spread, axis=0)).mean(axis=1)
        usual = float(np.median(distance))
        limit = usual + _FAR * 1.4826 * float(np.median(np.abs(distance - usual))) + _SLACK
        for one, far in zip(these, distance, strict=True):
            if far > limit:
                images = one.case.images
                path = images[min(index, len(images) - 1)] if images else Path(one.case.name)
                note = (
                    f"{far:.2f} standard deviations from the middle of all, percentile by percentile; usual {usual:.2f}"
                )
                findings.file("volume-outlier", path, note)


def _check_amount(one: SeenVolume, foreground: int, total: int, findings: Findings) -> None:
    path = path_of(one.case)
    if not foreground:
        findings.file("mask-empty", path)
    elif foreground == total:
        findings.file("mask-full", path)
    elif foreground <= TINY:
        findings.file("label-tiny", path, f"{foreground} voxels")


def _check_balance(
    held: Mapping[str, Sequence[int]],
    labels: Labels,
    total: NDArray[np.int64],
    ml: NDArray[np.float64],
    cases: NDArray[np.int64],
    findings: Findings,
) -> None:
    empty = sum(not has for has in held.values())
    if empty == len(held):
        findings.whole("all-masks-empty", f"all {len(held)} are {labels.names[0]} alone")
        return
    if empty > len(held) / 2:
        findings.whole("masks-mostly-empty", f"{empty} of {len(held)}")
    for index, name in enumerate(labels.names):
        if not total[index]:
            findings.whole("label-never-present", f"{name} ({listed_values(np.array(labels.values[index]))})")
        each = f", {ml[index] / cases[index]:.3g} ml in each" if index and cases[index] else ""
        share = total[index] / total.sum()
        findings.whole(
            "class-balance", f"{name} {share:.2%} of the voxels, in {cases[index]} of {len(held)} labels{each}"
        )
