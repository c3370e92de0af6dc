"""What a finished run leaves for people: the table of cases, the summary, overlays, curves and the report."""

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from visattn import NOTICE
from visattn.checkpoint import library_versions
from visattn.data.images import prepare
from visattn.inference import predict_probabilities
from visattn.metrics import summarise
from visattn.overlay import draw_overlay, write_png
from visattn.report import write_curves, write_report
from visattn.runs import is_first_process
from visattn.scored import choose, safe_name, write_cases, write_summary
from visattn.task import THRESHOLD, SegmentationTask


def write_results(
    folder: Path,
    task: SegmentationTask,
    data: Any,
    split: str,
    checkpoint: Path,
    seconds: float,
    epoch: int,
) -> Path | None:
    """Write `cases.csv`, `summary.json`, `overlays/`, `curves.png` and `report.html` into `folder`.

    Every process of a distributed run calls this, since the cases are gathered; the first one writes.

    Args:
        folder: The run folder, or the folder of one evaluation.
        task: Has just validated or tested with the suite `full`.
        data: The data module.
        split: `val` or `test`.
        checkpoint: The weights that were scored.
        seconds: How long the training or evaluation took.
        epoch: Epoch of the checkpoint, counted from 0.

    Returns:
        The report, or None where this process writes nothing or the extra `report` is not installed.
    """
    assert task.validation_metrics is not None
    rows = task.validation_metrics.rows()
    means = task.validation_metrics.compute()
    if not is_first_process():
        return None
    write_cases(folder / "cases.csv", rows, split)
    summary = {
        "notice": NOTICE,
        "recipe": task.recipe_name,
        "split": split,
        "cases": len(data.cases[split]),
        "checkpoint": os.path.relpath(checkpoint, folder),
        "best_epoch": epoch,
        "metrics": [asdict(entry) for entry in summarise(rows)],
        "means": means,
        "data": {
            "description": data.description,
            "fingerprint": data.fingerprint,
            "counts": {name: len(cases) for name, cases in data.cases.items()},
        },
        "hardware": hardware(task.device),
        "seconds": round(seconds, 1),
        "versions": library_versions(),
        "labels": task.labels.to_config(),
    }
    write_summary(folder, summary)
    _write_overlays(folder / "overlays", task, data, data.cases[split], rows)
    if (folder / "metrics.csv").is_file():
        write_curves(folder)
    return write_report(folder)


def hardware(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device.type}, {platform.machine()}, {os.cpu_count()} cores, {threads} torch threads"


def _write_overlays(
    folder: Path, task: SegmentationTask, data: Any, cases: Sequence[Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    by_name = {case.name: case for case in cases}
    assert task.network is not None
    task.network.eval()
    for prefix, ((_, name), score) in choose(rows).items():
        image, truth = data.read_case(by_name[name])
        batch = prepare(image, data.preprocessing)[None].to(task.device)
        (probability,) = predict_probabilities(task.network, batch, [truth.shape], task.labels.activation)
        predicted = task.labels.from_probabilities(probability, THRESHOLD)
        picture = draw_overlay(image, predicted, task.labels, truth, note=f"Dice {score:.3f}")
        write_png(folder / f"{prefix}-{safe_name(name)}.png", picture)
