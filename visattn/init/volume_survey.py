"""What a data set of volumes holds, for `visattn init`: grids, labels, margins, intensities. torch is not needed."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visattn.data import nifti
from visattn.data.geometry import Geometry
from visattn.data.spacing import median_spacing
from visattn.data.volumes import VolumeCase, VolumeScan, image_geometry, read_case, scan_volumes
from visattn.doctor.volume_sets import guess_patterns
from visattn.errors import UserError
from visattn.progress import Bar
from visattn.survey import LabelGuess, guess_label_map

Triple = tuple[float, float, float]

_SAMPLE = 16  # cases whose voxels are looked at, besides their labels
_AIR = -500.0  # HU; no other modality has values this far below 0 by habit
_MARGIN = 0.25  # share of a volume from which cutting its margin is worth the time


@dataclass(frozen=True)
class Seen:
    """A case that can be read.

    Args:
        case: The case.
        geometry: Of its first channel.
        values: How many voxels of the label have each value.
        kept: For a case that was looked at more closely, the share of R, A and S that is not margin; else None.
        lowest: For such a case, the lowest value of each channel.
    """

    case: VolumeCase
    geometry: Geometry
    values: Mapping[int, int]
    kept: Triple | None = None
    lowest: tuple[float, ...] = ()


@dataclass(frozen=True)
class VolumeSurvey:
    """A data set of volumes.

    Args:
        root: As the user wrote it.
        scan: What was found, before any voxel was read.
        layout: auto, or patterns.
        seen: The cases that can be read.
        guess: Labels, and what they were guessed from.
        regions: From dataset.json.
        problems: What training would refuse.
    """

    root: Path
    scan: VolumeScan
    layout: str | dict[str, str]
    seen: tuple[Seen, ...]
    guess: LabelGuess
    regions: Mapping[str, list[str]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def spacing(self) -> Triple:
        """Voxel size in mm along R, A, S that suits all."""
        x, y, z = (
            float(f"{mm:.4g}") for mm in median_spacing([_ras(one.geometry, one.geometry.zooms) for one in self.seen])
        )
        return x, y, z

    @property
    def margin(self) -> float:
        """Share of the volume that is a margin of constant background, in the median of the sample."""
        return 1 - math.prod(self._kept())

    @property
    def crop(self) -> bool:
        """Whether cutting the margin is worth the time."""
        return self.margin > _MARGIN

    def sizes(self) -> NDArray[np.float64]:
        """Voxels along R, A, S of each case at `spacing`, cut if that is worth it, (cases, 3)."""
        kept = np.array(self._kept() if self.crop else (1.0, 1.0, 1.0))
        grids = [one.geometry for one in self.seen]
        lengths = np.array([_ras(grid, grid.shape) for grid in grids]) * [_ras(grid, grid.zooms) for grid in grids]
        return np.asarray(np.maximum(1, np.round(lengths * kept / np.array(self.spacing))), np.float64)

    def ct(self, channel: int) -> bool:
        """Whether a channel is CT: it is called so, or none is and it reaches far below 0."""
        named = [name.casefold() == "ct" for name in self.scan.channels]
        lowest = [one.lowest[channel] for one in self.seen if one.lowest]
        return named[channel] or (not any(named) and bool(lowest) and float(np.median(lowest)) <= _AIR)

    @property
    def foreground(self) -> dict[int, int]:
        """Voxels of each label value of all cases."""
        total: Counter[int] = Counter()
        for one in self.seen:
            total.update(one.values)
        return dict(total)

    def _kept(self) -> Triple:
        x, y, z = np.median([one.kept for one in self.seen if one.kept] or [(1.0, 1.0, 1.0)], axis=0).tolist()
        return x, y, z


def survey_volumes(folder: Path) -> VolumeSurvey:
    """Look at a data set of volumes: every header and label, and the voxels of some cases.

    Raises:
        UserError: There is no layout that training reads, or no labels that it could learn.
    """
    layout: str | dict[str, str] = "auto"
    try:
        (scan,) = scan_volumes(str(folder))
    except UserError as error:
        patterns = guess_patterns(folder.expanduser()) if "no known layout" in str(error) else None
        if patterns is None:
            raise
        layout = patterns
        (scan,) = scan_volumes(str(folder), patterns)
    chosen = set(np.linspace(0, len(scan.cases) - 1, min(_SAMPLE, len(scan.cases))).round().astype(int).tolist())
    problems = [str(problem) for problem in scan.problems]
    with Bar("looking at volumes", len(scan.cases)) as bar, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:

        def look(numbered: tuple[int, VolumeCase]) -> Seen | str:
            try:
                return _look(numbered[1], numbered[0] in chosen)
            except UserError as error:
                return str(error).splitlines()[0]
            finally:
                bar.advance()

        found = list(pool.map(look, enumerate(scan.cases)))
    seen = tuple(one for one in found if isinstance(one, Seen))
    problems += [one for one in found if isinstance(one, str)]
    if len(seen) < 2:
        more = f" (first: {problems[0]})" if problems else ""
        raise UserError(
            f"{folder}: {len(seen)} volume{'s' if len(seen) != 1 else ''} with a readable label; "
            f"training and validation need at least one each{more}.\nSee what is wrong: visattn doctor DIR"
        )
    guess, regions = _labels(scan, seen, folder.expanduser().resolve().name)
    return VolumeSurvey(folder, scan, layout, seen, guess, regions, tuple(problems))


def _look(case: VolumeCase, closely: bool) -> Seen:
    with nifti.collect_warnings():
        geometry = image_geometry(case)
        assert case.label is not None
        labels, own = nifti.read_labels(case.label)
    if not geometry.same_grid(own):
        raise UserError(f"{case.label}: the label lies on another grid than its image {case.images[0].name}")
    values, counts = np.unique(labels, return_counts=True)
    known = dict(zip(values.tolist(), counts.tolist(), strict=True))
    if not closely:
        return Seen(case, geometry, known)
    array, geometry, _ = read_case(case)
    finite = [channel[np.isfinite(channel)] for channel in array]
    if not all(len(channel) for channel in finite):
        raise UserError(f"{case.images[0]}: a channel holds no finite voxel")
    lowest = tuple(float(np.percentile(channel, 0.5)) for channel in finite)
    return Seen(case, geometry, known, _ras(geometry, _kept(array)), lowest)


def _kept(array: NDArray[np.float32]) -> Triple:
    """The share of each axis that is left when a margin of constant background is cut, as preprocessing cuts it."""
    keep = np.zeros(array.shape[1:], np.bool_)
    for channel in array:
        corners, counts = np.unique(channel[np.ix_(*([0, n - 1] for n in channel.shape))], return_counts=True)
        keep |= (channel != corners[counts.argmax()]) & np.isfinite(channel)
    shares = []
    for axis in range(3):
        line = np.flatnonzero(keep.any(axis=tuple(other for other in range(3) if other != axis)))
        shares.append((line[-1] + 1 - line[0]) / keep.shape[axis] if len(line) else 1.0)
    i, j, k = shares
    return i, j, k


def _ras(geometry: Geometry, values: Sequence[float]) -> Triple:
    """A number for each of a file's axes in the order R, A, S."""
    letters = geometry.orientation
    r, a, s = (float(values[next(i for i, c in enumerate(letters) if c in pair)]) for pair in ("LR", "PA", "IS"))
    return r, a, s


def _labels(scan: VolumeScan, seen: Sequence[Seen], name: str) -> tuple[LabelGuess, Mapping[str, list[str]]]:
    """The labels of dataset.json, else those that the values suggest."""
    if scan.labels is None:
        return guess_label_map([one.values for one in seen], name), {}
    config: Mapping[str, Any] = scan.labels
    ignore = config.get("ignore")
    single = ignore[0] if isinstance(ignore, list) else ignore
    return LabelGuess(dict(config["labels"]), single, "as dataset.json says"), dict(config.get("regions") or {})
