"""The pooled out-of-fold scores of a cross-validation: each case scored by the network that did not train on it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from visattn import NOTICE
from visattn.class_pool import fold_means, is_classification, pooled_row, pooled_scores, tell
from visattn.errors import UserError
from visattn.folds_file import Folds
from visattn.metrics import DETAILS, METRICS, Summary, summarise
from visattn.metrics.calibration import BINS, describe_calibration
from visattn.report import write_report
from visattn.scored import (
    CASES,
    SUMMARY,
    Row,
    Scored,
    read_scored,
    write_cases,
    write_inputs,
    write_overlays,
    write_summary,
)

SPLIT = "val"


def write_pooled(folds: Folds, splits: Sequence[Mapping[str, Sequence[str]]]) -> Path | None:
    """Make the folder of a run with folds a scored folder, from the scored folders of its folds.

    The cases of all folds stand in one table, and the intervals are drawn over all their groups. `summary.json` holds
    further, under `folds`, the means of each fold.

    Args:
        folds: The run; every fold was trained and scored.
        splits: Train, val and test cases of each fold.

    Returns:
        The report; None where the extra `report` is not installed.

    Raises:
        UserError: A fold's scores cannot be read, are of other cases than its split says, or of other labels.
    """
    parts = [read_scored(folds.run(number)) for number in range(folds.count)]
    for part, split in zip(parts, splits, strict=True):
        scored = {row["case"] for row in part.rows if row.get("split", SPLIT) == SPLIT}
        if scored != set(split["val"]):
            raise UserError(
                f"{part.folder / CASES}: holds other cases than the fold was to validate on.\n"
                "Do not change or replace the scores of a fold; remove its folder and continue to train it anew."
            )
        if part.summary.get("labels") != parts[0].summary.get("labels"):
            raise UserError(f"{part.folder}: was scored with other labels than {parts[0].folder}.\nTrain it anew.")
    rows = [row for part in parts for row in part.rows]
    inputs = {key: entry for part in parts for key, entry in part.inputs.items()}
    classes = is_classification(parts[0])
    scores = pooled_scores(parts) if classes else _pooled_masks(parts, rows)
    write_cases(folds.folder / CASES, [pooled_row(row) if classes else _without_split(row) for row in rows], SPLIT)
    write_inputs(folds.folder, list(inputs.values()))
    about = parts[0].summary
    write_summary(
        folds.folder,
        {
            "notice": NOTICE,
            "recipe": folds.recipe,
            "split": SPLIT,
            "cases": len({(row["group"], row["case"]) for row in rows}),
            "folds": [_of_fold(folds, number, part) for number, part in enumerate(parts)],
            "data": {
                "description": about.get("data", {}).get("description", ""),
                "fingerprint": folds.fingerprint,
                "counts": _counts(splits),
            },
            "hardware": about.get("hardware"),
            "seconds": round(sum(float(part.summary.get("seconds") or 0) for part in parts), 1),
            "versions": about.get("versions", {}),
            **scores,
        },
    )
    if inputs and not classes:
        write_overlays(folds.folder, rows, inputs, parts[0].labels)
    return write_report(folds.folder)


def tell_folds(folds: Folds) -> str:
    """The pooled and the folds' own mean Dice, for the terminal."""
    scored = read_scored(folds.folder)
    summary = scored.summary
    if is_classification(scored):
        return tell(summary)
    lines = [f"{entry['run']:>10}: Dice {_shown(entry['means'].get('mean/dice'))}, {entry['cases']} cases"
             for entry in summary["folds"]]  # fmt: skip
    names = [entry for entry in summary["metrics"] if entry["metric"] == "dice"]
    pooled = next((entry for entry in names if entry["name"] == "mean"), names[0])
    low, high = (_shown(pooled[key]) for key in ("low", "high"))
    return "\n".join([*lines, f"    pooled: Dice {_shown(pooled['mean'])} [{low}, {high}], {summary['cases']} cases"])


def _shown(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.4f}"


def _of_fold(folds: Folds, number: int, part: Scored) -> dict[str, Any]:
    means = fold_means(part) if is_classification(part) else _means(_with_mean(summarise(part.rows, n=1)))
    return {
        "run": folds.names[number],
        "cases": len({(row["group"], row["case"]) for row in part.rows}),
        "best_epoch": part.summary.get("best_epoch"),
        "seconds": part.summary.get("seconds"),
        "means": means,
    }


def _pooled_masks(parts: Sequence[Scored], rows: Sequence[Row]) -> dict[str, Any]:
    """What `summary.json` says of the masks of all folds together."""
    table = summarise(rows)
    return {
        "metrics": [asdict(entry) for entry in table],
        "means": _means(_with_mean(table)),
        "labels": parts[0].labels.to_config(),
        **_pixels(parts),
    }


def _means(table: Sequence[Summary]) -> dict[str, float]:
    return {f"{entry.name}/{entry.metric}": entry.mean for entry in table}


def _with_mean(table: Sequence[Summary]) -> list[Summary]:
    """The table with the mean over classes for a single class too, whose own mean it is."""
    names = {entry.name for entry in table}
    return [*table, *(Summary(**{**asdict(entry), "name": "mean"}) for entry in table if len(names) == 1)]


def _without_split(row: Row) -> dict[str, str]:
    return {key: text for key, text in row.items() if key != "split" and key in {*METRICS, *DETAILS, *_KEYS}}


_KEYS = ("case", "group", "class")


def _counts(splits: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, int]:
    """All cases in `val`, since each validates once; how many a fold trained on is the rest, so no single number."""
    return {SPLIT: sum(len(split["val"]) for split in splits), "test": len(splits[0].get("test", ()))}


def _pixels(parts: Sequence[Scored]) -> dict[str, Any]:
    """Confusion and calibration over the pixels of all folds, where every fold has them."""
    try:
        return _added_pixels(parts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{parts[0].folder.parent}: confusion or calibration in the folds' {SUMMARY} do not fit together "
            f"({type(error).__name__}: {error}).\nDo not edit them; remove the fold's folder and continue."
        ) from error


def _added_pixels(parts: Sequence[Scored]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    confusions = [part.summary.get("confusion") for part in parts]
    if all(confusions):
        found["confusion"] = _added(confusions)
    calibrations: list[Any] = [part.summary.get("calibration") for part in parts]
    if all(calibrations):
        labels = parts[0].labels
        sums = np.zeros((len(labels.foreground), BINS, 3))
        for calibration in calibrations:
            for index, name in enumerate(labels.foreground):
                of_class = calibration[name]
                count = np.asarray(of_class["count"], np.float64)
                for column, key in ((1, "confidence"), (2, "frequency")):
                    # An empty bin has null there, and counts nothing.
                    sums[index, :, column] += count * np.array([value or 0.0 for value in of_class[key]])
                sums[index, :, 0] += count
        found["calibration"] = describe_calibration(sums, labels)
    return found


def _added(values: Sequence[Any]) -> Any:
    """Equal trees of numbers, added leaf by leaf; names stay."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _added([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_added(entries) for entries in zip(*values, strict=True)]
    return first if isinstance(first, str) else sum(values)
