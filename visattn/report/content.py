"""The content of a report: what a scored folder holds, turned into what the template shows."""

import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visattn.errors import UserError
from visattn.files import write_bytes_atomic
from visattn.folds_file import has_folds, read_folds
from visattn.labels import Labels
from visattn.metrics import METRICS, Detection, Summary, detections, metrics_of, summarise
from visattn.metrics.lesions import PATIENT_DICE, RULE
from visattn.overlay import CLASSES
from visattn.report.classes import class_context
from visattn.report.page import page_environment, picture_uri, score
from visattn.report.shared import CAPTION, shared_context
from visattn.scored import AGAIN, CASES, SUMMARY, Row, read_cases, read_summary, safe_name

KINDS = {"worst": "Lowest Dice", "median": "In the middle", "best": "Highest Dice"}
BINS = 20
LOW = 0.5  # a Dice below it is called out
SPLITS = {"val": "validation", "test": "test", "train": "training"}


@dataclass(frozen=True)
class Overlay:
    """A picture with what stands below it."""

    kind: str
    case: str
    scores: str
    uri: str


@dataclass(frozen=True)
class Section:
    """The measures over the cases of one split.

    Attributes:
        split: Its name in words.
        tables: Class name to its rows; the mean of several classes first, under the name "mean".
        headline: The rows of the large figures.
        cases: How many cases.
        groups: How many groups they come from.
        low: How many cases have a mean Dice below `LOW`, of how many that have one.
        classes: Where there are several: name, Dice and IoU of each.
        histogram: Cases for each of `BINS` intervals of Dice from 0 to 1.
        detections: Of volumes: class name to what was found of lesions and patients, over all cases.
    """

    split: str
    tables: dict[str, list[Summary]]
    headline: list[Summary]
    cases: int
    groups: int
    low: tuple[int, int]
    classes: list[tuple[str, Summary, Summary]]
    histogram: list[int]
    detections: dict[str, dict[str, Detection]]


@dataclass(frozen=True)
class Fold:
    """One fold of a run with folds.

    Attributes:
        name: Its folder.
        dice: Its Dice on its own validation cases, the mean of the classes where there are several; None before that.
        cases: How many these are.
        report: Whether it has a report of its own.
    """

    name: str
    dice: Summary | None
    cases: int
    report: bool


def write_report(run_dir: Path | str) -> Path | None:
    """Write `report.html` into a scored folder.

    Args:
        run_dir: A run folder, the folder of one evaluation in it, the output of `visattn evaluate`, a run with folds.

    Returns:
        The file written; None, after a line on stderr, where the extra `report` is not installed.

    Raises:
        UserError: The folder does not exist, or a table in it cannot be read.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder.")
    environment = page_environment()
    if environment is None:
        print(f"no {run_dir / 'report.html'}: needs pip install 'visattn[report]'", file=sys.stderr)
        return None
    summary = read_summary(run_dir / SUMMARY) if (run_dir / SUMMARY).is_file() else {}
    rows = read_cases(run_dir / CASES) if (run_dir / CASES).is_file() else []
    if summary.get("task") == "classification":
        name, context = "classification.html", class_context(summary, rows)
    else:
        name, context = "report.html", _context(run_dir, summary, rows)
    content = environment.get_template(name).render(**shared_context(run_dir, summary), **context)
    path = run_dir / "report.html"
    write_bytes_atomic(path, content.encode("utf-8", "backslashreplace"))
    return path


def _context(run_dir: Path, summary: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What the page of a segmentation shows besides what every page does."""
    labels, rules = _labels(summary), _rules(summary)
    volumes = bool(rows) and "volume_error" in rows[0]
    return {
        "sections": [_section(split, of_split, rules) for split, of_split in _by_split(rows).items()],
        "metrics": metrics_of(rows[0] if rows else ()),
        "rules": rules,
        "volumes": volumes,
        "thing": "volume" if volumes else "area",
        "bins": BINS,
        "threshold": LOW,
        "counted": "pixels",
        "folds": _folds(run_dir),
        "labels": labels,
        "colours": _colours(labels),
        "overlays": _overlays(run_dir / "overlays", rows),
        "kinds": KINDS,
    }


def _labels(summary: Mapping[str, Any]) -> Labels | None:
    config = summary.get("labels")
    if config is None:
        return None
    try:
        return Labels.from_config(**config)
    except (TypeError, UserError) as error:
        raise UserError(f"{SUMMARY}: its labels mean nothing: {str(error).splitlines()[0]}\n{AGAIN}") from error


def _rules(summary: Mapping[str, Any]) -> dict[str, float]:
    """From where on a patient counts as found, and a lesion as large: as the evaluation had it."""
    rules = summary.get("rules")
    found = {"dice": PATIENT_DICE, "large_ml": RULE.large_ml}
    if isinstance(rules, dict):
        lesions = rules.get("lesions")
        given = {"dice": rules.get("patient_dice"), "large_ml": dict(lesions or {}).get("large_ml")}
        found |= {key: float(value) for key, value in given.items() if isinstance(value, int | float)}
    return found


def _colours(labels: Labels | None) -> list[tuple[str, str]]:
    """Where outlines have the colours of several classes: name and colour of each."""
    if labels is None or len(labels.foreground) < 2:
        return []
    return [
        (name, "#{:02x}{:02x}{:02x}".format(*CLASSES[number % len(CLASSES)]))
        for number, name in enumerate(labels.foreground)
    ]


def _folds(run_dir: Path) -> list[Fold]:
    if not has_folds(run_dir):
        return []
    folds = read_folds(run_dir)
    found = []
    for number, name in enumerate(folds.names):
        run = folds.run(number)
        rows = read_cases(run / CASES) if (run / CASES).is_file() else []
        entries = [entry for entry in _summarised(rows) if entry.metric == "dice"]
        dice = entries[-1] if entries else None  # the mean of several classes comes last
        found.append(
            Fold(name, dice, len({(row["group"], row["case"]) for row in rows}), (run / "report.html").is_file())
        )
    return found


def _summarised(rows: Sequence[Row]) -> list[Summary]:
    try:
        return summarise(rows)
    except ValueError as error:
        raise UserError(f"{CASES}: {error}.\n{AGAIN}") from error


def _by_split(rows: Sequence[Row]) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {}
    for row in rows:
        splits.setdefault(row.get("split", ""), []).append(row)
    return splits


def _section(split: str, rows: Sequence[Row], rules: Mapping[str, float]) -> Section:
    entries = _summarised(rows)
    classes = list(dict.fromkeys(entry.name for entry in entries))
    several = len({row["class"] for row in rows}) > 1
    if several:  # summarise puts the mean last
        classes = [classes[-1], *classes[:-1]]
    tables = {name: [entry for entry in entries if entry.name == name] for name in classes}
    by_metric = {name: {entry.metric: entry for entry in table} for name, table in tables.items()}
    overview = [(n, of["dice"], of["iou"]) for n, of in by_metric.items() if "dice" in of and "iou" in of][1:]
    shown = ("dice", "iou", "hd95", "fpr_empty")
    headline = [e for e in tables[classes[0]] if e.metric in shown and (e.cases or e.metric == "dice")]
    dice = np.array([float(row["dice"]) for row in rows if row.get("dice")])
    histogram, _ = np.histogram(dice[np.isfinite(dice)], bins=BINS, range=(0, 1))
    groups = {row["group"] or row["case"] for row in rows}
    cases = {(row["group"], row["case"]) for row in rows}
    name = SPLITS.get(split, split)
    return Section(
        name,
        tables,
        headline,
        len(cases),
        len(groups),
        _low(rows),
        overview,
        histogram.tolist(),
        detections(rows, **rules),
    )


def _low(rows: Sequence[Row]) -> tuple[int, int]:
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        dice = float(row.get("dice") or "nan")
        if np.isfinite(dice):
            scores.setdefault((row["group"], row["case"]), []).append(dice)
    return sum(float(np.mean(values)) < LOW for values in scores.values()), len(scores)


def _overlays(folder: Path, rows: Sequence[Row]) -> dict[str, list[Overlay]]:
    """The pictures of each kind: `worst-1-NAME.png` and so on, in the order of their numbers."""
    found: dict[str, list[tuple[int, Overlay]]] = {kind: [] for kind in KINDS}
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else []:
        parts = re.fullmatch(r"(worst|median|best)-(?:(\d+)-)?(.*)", path.stem, re.DOTALL)
        uri = picture_uri(path, photograph=True) if parts else None
        if parts is None or uri is None:
            continue
        kind, number, name = parts.groups()
        of_case = _rows_of(name, rows)
        scores = [
            (f"{row['class']}: " if len(of_case) > 1 else "")
            + ", ".join(f"{METRICS[key].title} {score(float(row[key]))}" for key in ("dice", "iou") if row.get(key))
            for row in of_case
            if row.get("dice")
        ]
        more = len(scores) - CAPTION
        below = "; ".join([*scores[:CAPTION], *([f"and {more} classes more"] if more > 0 else [])])
        found[kind].append((int(number or 0), Overlay(kind, of_case[0]["case"] if of_case else name, below, uri)))
    return {
        kind: [overlay for _, overlay in sorted(entries, key=lambda entry: entry[0])]
        for kind, entries in found.items()
        if entries
    }


def _rows_of(name: str, rows: Sequence[Row]) -> list[Row]:
    """The rows of the case whose name, or what `safe_name` made of it, is `name`."""
    for row in rows:
        if name in (row["case"], safe_name(row["case"])) or unicodedata.normalize("NFC", row["case"]) == name:
            return [other for other in rows if (other["case"], other["group"]) == (row["case"], row["group"])]
    return []
