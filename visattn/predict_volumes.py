"""`visattn predict` for volumes: a mask in the grid of every scan.

While the network works on one case, threads read the next and write the last one, as far as memory allows. Where
memory is bounded and a case is too large for it, its large arrays lie in files instead. A bad case fails alone; the
batch goes on and the exit code tells.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visattn.checkpoint import Checkpoint
from visattn.data.volumes import find_volume_cases
from visattn.files import write_text_atomic
from visattn.inference3d import ViewsOf3d
from visattn.members import read_members
from visattn.predict_common import about, explained_end, tell_end, tell_folds, weights_of
from visattn.predict_plan import output_folder
from visattn.predict_record import MANIFEST, Entry, Record, Table
from visattn.predict_volumes_measure import COLUMNS
from visattn.predict_volumes_plan import Wanted, check_disk, plan_volumes
from visattn.predict_volumes_report import REPORT, write_report
from visattn.predict_volumes_run import Run, grids_of
from visattn.versions import library_versions
from visattn.volume_predictor import Precision, VolumePredictor

RULES = 1  # raise it when the same weights and settings begin to give other files


def _of_volume(entry: Entry) -> dict[str, Any]:
    return {
        "case": entry.case,
        "image": entry.image,
        "mask": entry.mask,
        "seconds": round(entry.seconds, 3),
        "size": " x ".join(map(str, entry.size)),
    }


VOLUMES = Table("volumes.csv", ("case", *COLUMNS, "seconds", "size", "image", "mask"), 3, _of_volume)


def predict_volumes(
    inputs: Sequence[Path | str],
    checkpoint: Path | str,
    output: Path | str,
    *,
    cases_csv: Path | str | None = None,
    probabilities: bool = False,
    uncertainty: bool = False,
    overlays: bool = False,
    bids: bool = False,
    overlap: float = 0.5,
    tta: ViewsOf3d = "none",
    precision: Precision = "auto",
    memory: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    members: Sequence[Checkpoint] | None = None,
) -> int:
    """Predict masks for `inputs` into the folder `output`.

    Args:
        inputs: NIfTI files, folders of DICOM files, and folders that are searched with their subfolders.
        checkpoint: What `visattn.load` takes, of a network for volumes; or for images, if its recipe names the slices.
        output: Gets `<case>_mask.nii.gz` with the recipe's label values on the voxels of the first channel's file;
            `volumes.csv`, `report.html` and `manifest.json` lie beside them.
        cases_csv: A table with the columns `case` and one for each channel.
        probabilities: Also write `<case>_prob.nii.gz`, float32, a fourth axis for several channels.
        uncertainty: Also write `<case>_uncertainty.nii.gz`, the entropy from 0 to 1; with `tta` or folds also
            `<case>_variance.nii.gz`.
        overlays: Also draw the three planes through the largest lesion.
        bids: Name the files as BIDS derivatives.
        overlap: Share by which neighbouring windows overlap.
        tta: `flips` averages over eight mirror images.
        precision: `auto`, `float32` or `bfloat16`; see `VolumePredictor`.
        memory: Bytes that the process may take; None: most of what is free.
        device: `auto` (cuda, else mps, else cpu), `cpu`, `cuda` or `mps`.
        overwrite: Do finished cases again, and replace files that visattn did not write.
        members: The checkpoints, if they were read before.

    Returns:
        0 if every case has its mask, 1 if some failed.

    Raises:
        UserError: Nothing could be started, or the disk is full. What was finished is kept and recorded.
    """
    output = Path(output)
    with output_folder(output) as case_sensitive:
        members = tuple(members or read_members(checkpoint))
        predictor = VolumePredictor(members, device, overlap, tta, precision)
        channels = predictor.preprocessing.channels
        table = None if cases_csv is None else Path(cases_csv)
        found, problems = find_volume_cases([Path(given) for given in inputs], channels, table, skip=output)
        wanted = Wanted(probabilities, uncertainty, uncertainty and predictor.engine.members > 1, overlays, bids)
        planned = plan_volumes(found, problems, output, wanted, case_sensitive)
        record = Record(output, _settings(predictor), about(members, checkpoint, predictor.device), overwrite, VOLUMES)
        todo = record.unfinished(planned, overwrite)
        todo.sort(key=lambda entry: entry.case is not None)  # what is known to fail is told before the network runs
        grids = grids_of(todo)
        check_disk(todo, grids, output, predictor.labels)
        tell_folds(members, checkpoint)
        failed = 0
        started = time.monotonic()
        with explained_end(output):
            record.start(todo)
            if todo:
                failed = Run(predictor, record, output, memory).run(todo, grids)
            _finish(output, record, predictor, bids)
        done = f"{len(todo) - failed} predicted in {time.monotonic() - started:.0f} s"
        tell_end(output, record, done, len(planned) - len(todo), failed, (VOLUMES.file, REPORT, MANIFEST))
    return 1 if failed else 0


def _settings(predictor: VolumePredictor) -> dict[str, Any]:
    """What decides a mask besides the scan. Memory bound and device do not."""
    engine = predictor.engine
    return {
        "weights": weights_of(predictor.checkpoints),
        "overlap": engine.overlap,
        "tta": engine.tta,
        "precision": "float32" if engine.autocast is None else "bfloat16",
        "rules": RULES,
    }


def _finish(output: Path, record: Record, predictor: VolumePredictor, bids: bool) -> None:
    """Write what tells of all cases together."""
    write_report(output, record, predictor)
    if bids:
        write_text_atomic(output / "dataset_description.json", _description(predictor))
        values = zip(predictor.labels.names, predictor.labels.values, strict=True)
        lines = ["index\tname", *(f"{value[0]}\t{' '.join(name.split())}" for name, value in values)]
        write_text_atomic(output / "desc-visattn_dseg.tsv", "\n".join(lines) + "\n")


def _description(predictor: VolumePredictor) -> str:
    versions = library_versions(["visattn"])
    content = {
        "Name": "visattn segmentations",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "visattn", "Version": versions["visattn"]}],
        "Weights": hashlib.sha256("".join(m.sha256 for m in predictor.checkpoints).encode()).hexdigest(),
    }
    return json.dumps(content, indent=2) + "\n"
