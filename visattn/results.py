"""What a finished run leaves for people: masks, the table of cases, the summary, overlays, curves and the report."""

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from visattn import NOTICE
from visattn.base_task import TrainingTask
from visattn.checkpoint import LIBRARIES
from visattn.data.phantoms import PHANTOM
from visattn.data.volumes import VolumeCase
from visattn.errors import UserError
from visattn.evaluate_show import entries_in, print_table
from visattn.metrics import summarise
from visattn.report import write_curves, write_report
from visattn.runs import is_first_process
from visattn.scored import (
    CASES,
    INPUTS,
    Input,
    read_inputs,
    write_cases,
    write_inputs,
    write_overlays,
    write_summary,
)
from visattn.scoring import mask_name
from visattn.task import SegmentationTask
from visattn.versions import library_versions

MASKS = "masks"
_PART = ".masks.part"  # where masks are written until all cases are scored


def start_scoring(folder: Path, task: SegmentationTask) -> None:
    """Make the next validation or test a full scoring, whose masks `write_results` puts into `folder`.

    Every process calls this, and Lightning lets none begin before all have. Until `write_results`, what an earlier
    scoring left in `folder` stays as it is.

    Raises:
        UserError: `folder/masks` holds files that are not of an earlier scoring.
    """
    if is_first_process():
        earlier_masks(folder)
        shutil.rmtree(folder / _PART, ignore_errors=True)  # of a scoring that was killed
        (folder / _PART).mkdir(parents=True)
    task.suite = "full"
    task.masks = folder / _PART


def check_folder(folder: Path) -> None:
    """Refuse a run folder with somebody's own masks in it, before the training and not after it.

    Raises:
        UserError: `folder/masks` holds files that are not of an earlier scoring.
    """
    earlier_masks(folder)


def earlier_masks(folder: Path) -> list[Path]:
    """The masks that an earlier scoring left in a run folder: those that its `inputs.json` names.

    Raises:
        UserError: There are other files among them. A folder with somebody's images and masks may have been named as
            the run folder, and its masks must not be taken for ours and replaced.
    """
    masks = Path(os.path.abspath(folder / MASKS))
    if not os.path.lexists(masks):
        return []
    if masks.is_symlink() or not masks.is_dir():
        raise UserError(
            f"{masks}: the masks of this run belong there, but it is no folder.\nMove it, or name another --run"
        )
    present = sorted(masks / name for name in os.listdir(masks))
    known: set[Path | None] = set()
    if present and (folder / INPUTS).is_file():
        known = {entry.prediction for entry in read_inputs(folder).values()}
    foreign = [path.name for path in present if path not in known]
    if foreign:
        raise UserError(
            f"{masks}: holds {len(foreign)} files that {INPUTS} beside it does not name, as {foreign[0]!r:.80}.\n"
            "The masks of this run belong there. Move or remove those files, or name another --run."
        )
    return present


def write_results(
    folder: Path,
    task: SegmentationTask,
    data: Any,
    split: str,
    checkpoint: Path,
    seconds: float,
    epoch: int,
) -> Path | None:
    """Write `masks/`, `cases.csv`, `summary.json`, `inputs.json`, `overlays/`, `curves.png` and `report.html`.

    Every process of a distributed run calls this, since the cases are gathered; the first one writes.

    Args:
        folder: The run folder, or the folder of one evaluation.
        task: Has just validated or tested after `start_scoring`.
        data: The data module.
        split: `val` or `test`.
        checkpoint: The weights that were scored.
        seconds: How long the training or evaluation took.
        epoch: Epoch of the checkpoint, counted from 0.

    Returns:
        The report, or None where this process writes nothing or the extra `report` is not installed.
    """
    metrics = task.validation_metrics
    assert metrics is not None
    rows, means = metrics.rows(), metrics.compute()
    confusion, calibration = metrics.confusion(), metrics.calibration()
    if not is_first_process():
        return None
    inputs = _put_masks(folder, data.cases[split])
    write_cases(folder / CASES, rows, split)
    summary = {
        **describe_run(folder, task, data, split, checkpoint, seconds, epoch),
        "metrics": [asdict(entry) for entry in summarise(rows)],
        "means": means,
        "confusion": confusion,
        "calibration": calibration,
    }
    write_summary(folder, summary)
    write_overlays(folder, rows, {(entry.group, entry.case): entry for entry in inputs}, task.labels)
    if (folder / "metrics.csv").is_file():
        write_curves(folder)
    return write_report(folder)


def show_results(folder: Path) -> None:
    """Print the measures that `write_results` put into `folder`."""
    print_table(entries_in(folder))


def describe_run(
    folder: Path, task: TrainingTask, data: Any, split: str, checkpoint: Path, seconds: float, epoch: int
) -> dict[str, Any]:
    """What every `summary.json` of a run says besides the scores; arguments as for `write_results`."""
    return {
        "notice": NOTICE,
        "recipe": task.recipe_name,
        "split": split,
        "cases": len(data.cases[split]),
        "checkpoint": os.path.relpath(checkpoint, folder),
        "best_epoch": epoch,
        "data": {
            "description": data.description,
            "fingerprint": data.fingerprint,
            "counts": {name: len(cases) for name, cases in data.cases.items()},
        },
        "hardware": hardware(task.trainer.strategy.root_device),  # the task itself is back on the CPU by now
        "seconds": round(seconds, 1),
        "versions": library_versions(LIBRARIES),
        "labels": task.labels.to_config(),
    }


def _put_masks(folder: Path, cases: Sequence[Any]) -> list[Input]:
    """Put the new masks in the place of the old ones, and write `inputs.json`.

    The list is renewed between the two, so that whenever this is killed, `inputs.json` names every mask that is there.
    """
    part, masks = folder / _PART, folder / MASKS
    for path in earlier_masks(folder):
        path.unlink()
    inputs = []
    for case in cases:
        volume = isinstance(case, VolumeCase)
        mask = mask_name(case.name, 3 if volume else 2)
        drawn = case.root == PHANTOM  # by name, again and again
        inputs.append(
            Input(
                case=case.name,
                group=case.group,
                root=case.root,
                image=None if drawn else case.images[0] if volume else case.image,
                truth=None if drawn else case.label if volume else case.mask,
                prediction=masks / mask if (part / mask).is_file() else None,
            )
        )
    write_inputs(folder, inputs)
    part.replace(masks)  # an empty folder may be replaced
    return inputs


def hardware(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device.type}, {platform.machine()}, {os.cpu_count()} cores, {threads} torch threads"
