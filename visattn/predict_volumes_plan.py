"""Which files `visattn predict` writes for volumes, settled and checked before anything is written."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from visattn.data.geometry import Geometry
from visattn.data.volumes import Problem, VolumeCase
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.overlay import safe_name
from visattn.predict_plan import check_collisions, check_inside, fitted_name, shown


@dataclass(frozen=True)
class Wanted:
    """What is written beside the masks.

    Args:
        probabilities: One volume for each channel.
        uncertainty: Entropy.
        variance: Variance over views and networks.
        overlays: Pictures.
        bids: Names as BIDS derivatives have them.
    """

    probabilities: bool = False
    uncertainty: bool = False
    variance: bool = False
    overlays: bool = False
    bids: bool = False


@dataclass(frozen=True)
class VolumeOutput:
    """One case and the files that its prediction consists of, relative to the output folder.

    Args:
        name: The case's name.
        case: What is read; None where that is known to fail.
        error: Why it fails.
        image: The first channel's file, as it was named.
        mask: The mask.
        probabilities: Further files, None if they are not wanted.
        uncertainty: As `probabilities`.
        variance: As `probabilities`.
        overlay: As `probabilities`.
    """

    name: str
    case: VolumeCase | None
    error: str
    image: Path
    mask: str
    probabilities: str | None = None
    uncertainty: str | None = None
    variance: str | None = None
    overlay: str | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that it is read from."""
        return self.case.files if self.case is not None else (self.image,)

    @property
    def files(self) -> tuple[str, ...]:
        """All files, the mask last: where it is there, the others are."""
        beside = (self.probabilities, self.uncertainty, self.variance, self.overlay)
        return (*(file for file in beside if file is not None), self.mask)


def plan_volumes(
    cases: Sequence[VolumeCase], problems: Sequence[Problem], output: Path, wanted: Wanted, case_sensitive: bool = True
) -> list[VolumeOutput]:
    """The files of each case.

    Raises:
        UserError: Two inputs would write one file, or an input would be overwritten.
    """
    planned = [_output(case.name, case, "", case.images[0], wanted) for case in cases]
    taken = {entry.mask for entry in planned}
    for problem in problems:
        entry = _output(problem.name, None, problem.message, problem.path or Path(problem.name), wanted)
        if entry.mask not in taken:  # else the name's only mask is that of another case, which can be read
            planned.append(entry)
            taken.add(entry.mask)
    check_collisions(planned, output, case_sensitive)
    check_inside(planned, output)
    return planned


def _output(name: str, case: VolumeCase | None, error: str, image: Path, wanted: Wanted) -> VolumeOutput:
    relative = PurePosixPath(name)
    if wanted.bids:
        stem, kinds = _bids(relative), ("dseg", "probseg", "stat-entropy_statmap", "stat-variance_statmap")
        endings = [f"_desc-visattn_{kind}.nii.gz" for kind in kinds]
        picture = str(PurePosixPath("figures") / fitted_name(stem.name, "_desc-visattn_dseg.png"))
    else:
        stem = relative
        endings = [f"_{kind}.nii.gz" for kind in ("mask", "prob", "uncertainty", "variance")]
        picture = str("overlays" / relative.parent / fitted_name(relative.name, ".png"))
    mask, probabilities, uncertainty, variance = (
        str(stem.parent / fitted_name(stem.name, ending)) for ending in endings
    )
    return VolumeOutput(
        name,
        case,
        error,
        image,
        mask,
        probabilities if wanted.probabilities else None,
        uncertainty if wanted.uncertainty else None,
        variance if wanted.variance else None,
        picture if wanted.overlays else None,
    )


def _bids(name: PurePosixPath) -> PurePosixPath:
    """The entities of a BIDS name without its suffix, `sub-01_ses-1` of `sub-01_ses-1_T1w`; others become a subject."""
    parts = name.name.split("_")
    entities = [part for part in parts if "-" in part]
    if not entities or not entities[0].startswith("sub-"):
        label = "".join(c for c in safe_name(str(name), 60) if c.isalnum())
        return PurePosixPath(f"sub-{label}") / "anat" / f"sub-{label}"
    return name.with_name("_".join(entities))


def check_disk(outputs: Sequence[VolumeOutput], grids: Sequence[Geometry], output: Path, labels: Labels) -> None:
    """Compare an estimate of what will be written with the free space.

    Raises:
        UserError: The space does not suffice.
    """
    need = 0.0
    for entry, grid in zip(outputs, grids, strict=True):
        # Bytes a voxel: masks compress well, float32 hardly.
        i, j, k = grid.shape
        maps = 3.7 * (labels.channels if entry.probabilities else 0)
        maps += 3.7 * ((entry.uncertainty is not None) + (entry.variance is not None))
        need += i * j * k * (0.05 + maps)
    free = shutil.disk_usage(output).free
    if need > free:
        raise UserError(
            f"--output {shown(output)}: needs about {need / 1e6:,.0f} MB, but {free / 1e6:,.0f} MB are free.\n"
            "Free some space, or leave out --probabilities or --uncertainty."
        )
