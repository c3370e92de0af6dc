"""The report of a run: one HTML file that needs no network, made from the run folder alone.

It reads `summary.json`, `cases.csv`, `metrics.csv`, `config.yaml`, `overlays/` and `curves.png`, each of them optional,
and imports no model. Whatever comes from files (case names, class names, the recipe) is escaped by the template engine,
and a content policy in the page forbids scripts and outside addresses even if something slipped through.
"""

import base64
import io
import math
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visattn import NOTICE, __version__
from visattn.curves import read_metrics, write_curves
from visattn.errors import UserError
from visattn.files import write_bytes_atomic
from visattn.metrics import METRICS, Summary, summarise
from visattn.scored import AGAIN, CASES, SUMMARY, Row, read_cases, read_summary, safe_name

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["page_environment", "picture_uri", "write_curves", "write_report"]

KINDS = {"worst": "Worst", "median": "Median", "best": "Best"}
WIDEST = 1100  # pixels; wider pictures are made smaller, so that a report stays a few megabytes
BINS = 20
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
        classes: Where there are several: name, Dice and IoU of each.
        histogram: Cases for each of `BINS` intervals of Dice from 0 to 1.
    """

    split: str
    tables: dict[str, list[Summary]]
    headline: list[Summary]
    cases: int
    groups: int
    classes: list[tuple[str, Summary, Summary]]
    histogram: list[int]


def write_report(run_dir: Path | str) -> Path | None:
    """Write `report.html` into a run folder.

    Args:
        run_dir: A run folder, or the folder of one evaluation in it.

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
    about = summary.get("data")
    data = {"description": "", "fingerprint": "", "counts": {}} | (about if isinstance(about, dict) else {})
    config = run_dir / "config.yaml"
    curves = run_dir / "curves.png"
    epochs = read_metrics(run_dir / "metrics.csv").get("epoch", {})
    content = environment.get_template("report.html").render(
        notice=NOTICE,
        version=__version__,
        kind="report",
        title=str(summary.get("recipe") or run_dir.resolve().name),
        folder=run_dir.resolve().name,
        summary=summary,
        sections=[_section(split, of_split) for split, of_split in _by_split(rows).items()],
        metrics=METRICS,
        bins=BINS,
        facts=_facts(summary, epochs),
        data=data,
        phantom="phantom" in str(data["description"]).lower(),
        versions=summary.get("versions") if isinstance(summary.get("versions"), dict) else {},
        curves=picture_uri(curves, photograph=False) if curves.is_file() else None,
        overlays=_overlays(run_dir / "overlays", rows),
        recipe=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
    )  # fmt: skip
    path = run_dir / "report.html"
    write_bytes_atomic(path, content.encode("utf-8", "backslashreplace"))
    return path


def page_environment() -> "Environment | None":
    """Templates of pages, everything escaped; None where the extra `report` is not installed.

    Pages extend `_base.html`, which needs `title`, `kind` (report, comparison), `version` and `notice`, and take pieces
    from `_macros.html`. Filters: `score(unit)` for a number, `interval` for a `Summary`.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        return None
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
    )
    environment.filters["score"] = _score
    environment.filters["interval"] = _interval
    return environment


def _score(value: float | None, unit: str = "") -> str:
    if value is None or not math.isfinite(value):
        return "\u2013"
    return f"{value:.1f}\u00a0{unit}" if unit else f"{value:.3f}"


def _interval(entry: Summary) -> str:
    digits = 1 if METRICS[entry.metric].unit else 3
    if not (math.isfinite(entry.low) and math.isfinite(entry.high)):
        return "\u2013"
    return f"{entry.low:.{digits}f}\u2009\u2013\u2009{entry.high:.{digits}f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _by_split(rows: Sequence[Row]) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {}
    for row in rows:
        splits.setdefault(row.get("split", ""), []).append(row)
    return splits


def _section(split: str, rows: Sequence[Row]) -> Section:
    try:
        entries = summarise(rows)
    except ValueError as error:
        raise UserError(f"{CASES}: {error}.\n{AGAIN}") from error
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
    return Section(name, tables, headline, len(cases), len(groups), overview, histogram.tolist())


def _facts(summary: Mapping[str, Any], epochs: Mapping[int, float]) -> dict[str, str]:
    facts: dict[str, str] = {}
    if summary.get("checkpoint"):
        facts["Checkpoint"] = str(summary["checkpoint"])
    best = summary.get("best_epoch")
    if isinstance(best, int):
        facts["Its epoch"] = f"{best + 1} of {max(len(epochs), best + 1)}" if epochs else str(best + 1)
    if isinstance(summary.get("seconds"), int | float):
        facts["Duration"] = _duration(summary["seconds"])
    if summary.get("hardware"):
        facts["Hardware"] = str(summary["hardware"])
    return facts


def picture_uri(source: Path | NDArray[np.uint8], photograph: bool) -> str | None:
    """A picture for a page as a data URI, the only address that its policy allows.

    Args:
        source: A PNG file, or RGB pixels (H, W, 3).
        photograph: Whether it may become a JPEG of at most `WIDEST` pixels, as overlays should; drawings stay sharp.

    Returns:
        The URI; None if the file cannot be read.
    """
    try:
        if isinstance(source, Path):
            with Image.open(source, formats=["PNG"]) as image:
                picture = image.convert("RGB")
        else:
            picture = Image.fromarray(source)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    data, kind = io.BytesIO(), "png"
    if photograph:  # without colour subsampling, which smears thin outlines
        if picture.width > WIDEST:
            picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
        kind = "jpeg"
        picture.save(data, "JPEG", quality=88, subsampling=0)  # optimize=True fails on noisy pictures
    else:
        picture.save(data, "PNG", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"


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
        scores = "; ".join(
            (f"{row['class']}: " if len(of_case) > 1 else "")
            + ", ".join(f"{METRICS[key].title} {_score(float(row[key]))}" for key in ("dice", "iou") if row.get(key))
            for row in of_case
        )
        found[kind].append((int(number or 0), Overlay(kind, of_case[0]["case"] if of_case else name, scores, uri)))
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
