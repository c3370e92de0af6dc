"""A comparison on the terminal."""

import math
from typing import Any

from visattn.compare.result import Result
from visattn.compare.runs import printable
from visattn.metrics import METRICS, digits, metrics_of
from visattn.metrics.classes import CLASS_METRICS
from visattn.metrics.paired import Difference

_KNOWN = METRICS | CLASS_METRICS
HEADLINE = ("dice", "iou", "hd95", "nsd", "volume_error", "lesion_f1", "fpr_empty", *CLASS_METRICS)
"""Measures on the terminal; files hold all."""
_WIDTH = 126  # columns that the widest table needs


def show(result: Result) -> None:
    """Print a table of differences for each run, and what has to be known about them."""
    from rich.console import Console

    # A narrow terminal breaks lines rather than loses digits.
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, _WIDTH)
    cases, groups = len(result.baseline.table.cases), result.groups
    about = f"{groups} groups" if groups != cases else "each its own group"
    console.print(f"baseline: {printable(result.baseline.name)}   ({cases} cases, {about})", soft_wrap=True)
    for index, run in enumerate(result.runs):
        console.print(f"run:      {printable(run.name)}", soft_wrap=True)
        console.print(_table(result, index))
    for note in result.notes:
        console.print(f"- {printable(note, 400)}", soft_wrap=True)
    console.print(
        "Difference: run - baseline, 95 % interval by bootstrap over groups. "
        + f"p: {result.test.removeprefix('two-sided ')}"
        + (", Holm: corrected within each measure. " if _several(result) else ". ")
        + "Name the measure you judge by before you look.",
        soft_wrap=True,
    )


def number(value: float, metric: str, signed: bool = False) -> str:
    """A value of a measure: four digits, for pixels and mm one, for ml two."""
    if not math.isfinite(value):
        return "\u2013"
    text = f"{value:{'+' if signed else ''}.{digits(_KNOWN[metric].unit)}f}"
    return text.replace("-", "\u2212") if float(text) else text.lstrip("+-")


def interval(entry: Difference) -> str:
    """The interval of a difference."""
    if not (math.isfinite(entry.low) and math.isfinite(entry.high)):
        return "\u2013"
    return f"{number(entry.low, entry.metric, True)} to {number(entry.high, entry.metric, True)}"


def p_value(p: float) -> str:
    """A p value: four digits."""
    if not math.isfinite(p):
        return "\u2013"
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def arrow(metric: str) -> str:
    """Where better values are."""
    return "\u2191" if _KNOWN[metric].higher_is_better else "\u2193"


def _several(result: Result) -> bool:
    return any(entry.family > 1 for found in result.differences for entry in found)


def _table(result: Result, run: int) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    classes = len(result.classes) > 1
    by_class = "dice" if result.task == "segmentation" else "recall"
    several = _several(result)
    metrics = metrics_of(result.baseline.table.values) | CLASS_METRICS
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    if classes:
        table.add_column("class", overflow="fold")
    for name in ("baseline", "run", "difference", "95 % interval", "p", *(["Holm"] if several else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("win/tie/loss", justify="right", no_wrap=True)
    for entry in result.differences[run]:
        # Of several classes one measure is shown one by one: the table stays short enough to be read.
        if (
            entry.metric not in HEADLINE
            or not entry.pairs
            or (entry.name != result.overall and entry.metric != by_class)
        ):
            continue
        unit = f" ({metrics[entry.metric].unit})" if metrics[entry.metric].unit in ("mm", "ml") else ""
        cells = [f"{entry.metric}{unit} {arrow(entry.metric)}"]
        if classes:
            cells.append(printable(entry.name))
        cells += [
            number(entry.baseline_mean, entry.metric),
            number(entry.run_mean, entry.metric),
            number(entry.difference, entry.metric, True),
            interval(entry),
            p_value(entry.p),
        ]
        cells += [p_value(entry.p_holm)] if several else []
        cells.append(f"{entry.wins}/{entry.ties}/{entry.losses}" if entry.counted else "\u2013")
        table.add_row(*(Text(cell) for cell in cells))
    return table
