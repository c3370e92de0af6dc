"""What `visattn evaluate`, `validate` and `test` say on the terminal."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visattn.errors import shown
from visattn.evaluate_output import OVERLAYS, REPORT
from visattn.evaluate_plan import Plan, few
from visattn.metrics import Detection, Summary, metrics_of
from visattn.metrics.classes import ALL, CLASS_METRICS
from visattn.scored import CASES, INPUTS, SUMMARY, read_summary


def print_table(entries: Sequence[Summary]) -> None:
    """Print means and intervals, a block for each class and, of several, one for their mean."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("measure")
    for column in ("mean", "95 % interval", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    metrics = metrics_of({entry.metric for entry in entries})
    names = list(dict.fromkeys(entry.name for entry in entries))
    for name in names:
        if len(names) > 1:
            table.add_row(Text(shown(name) if name != names[-1] else "mean of the classes", style="bold"))
        for entry in (entry for entry in entries if entry.name == name):
            info = metrics[entry.metric]
            interval = f"{entry.low:.4f} \u2013 {entry.high:.4f}" if math.isfinite(entry.low) else "\u2013"
            table.add_row(
                Text(info.title + (f" ({info.unit})" if info.unit else "")),
                f"{entry.mean:.4f}" if entry.cases else "\u2013",
                interval,
                str(entry.cases),
            )
        table.add_section()
    Console().print(table)


def print_class_table(entries: Sequence[Summary]) -> None:
    """Print the measures of a classifier over all classes with their intervals."""
    for entry in entries:
        if entry.name == ALL:
            values = [
                f"{value:.4f}" if math.isfinite(value) else "\u2013" for value in (entry.mean, entry.low, entry.high)
            ]
            print(f"{CLASS_METRICS[entry.metric].title:24} {values[0]}   95 %: {values[1]} to {values[2]}")


def entries_in(folder: Path) -> list[Summary]:
    """The measures in the `summary.json` of a folder; what was undefined there is NaN."""
    found = []
    for entry in read_summary(folder / SUMMARY)["metrics"]:
        fields: dict[str, Any] = {key: math.nan if value is None else value for key, value in entry.items()}
        found.append(Summary(**fields))
    return found


def print_detections(found: Mapping[str, Mapping[str, Detection]], large_ml: float) -> None:
    """Print how many lesions and patients were found, over all cases."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("over all cases")
    for column in ("true", "found", "false", "precision", "recall", "F1"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, entries in found.items():
        if len(found) > 1:
            table.add_row(Text(shown(name), style="bold"))
        for kind, entry in entries.items():
            what, _, size = kind.partition("_")
            sign = {"small": "<", "large": "\u2265"}.get(size)
            shares = (f"{share:.4f}" if math.isfinite(share) else "\u2013" for share in
                      (entry.precision, entry.recall, entry.f1))  # fmt: skip
            table.add_row(
                f"  {sign} {large_ml:g} ml" if sign else what,
                *map(str, (entry.true, entry.found, entry.false)),
                *shares,
            )
        table.add_section()
    Console().print(table)


def tell(plan: Plan, groups: Sequence[str], target: Path, rounded: int, doubtful: int, report: bool) -> None:
    """Say on stderr what a reader of the tables has to know, and where the results are.

    Args:
        plan: What was scored.
        groups: Of each case.
        target: The folder of the results.
        rounded: How many predictions hold values that the labels do not name.
        doubtful: How many cases have a volume whose header says two things.
        report: Whether a report was written.
    """
    number = len(set(groups))
    drawn = f"{number} groups" if number < len(groups) else "cases"
    lines = [f"{len(groups)} cases; 95 % intervals by bootstrap over {drawn}"]
    if plan.missing:
        lines.append(f"without prediction, counted as misses: {len(plan.missing)}: {few(plan.missing)}")
    if plan.extra:
        names = few([path.name for path in plan.extra])
        lines.append(f"predictions without a true mask, left out: {len(plan.extra)}: {names}")
    without = sum(pair.image is None for pair in plan.pairs)
    if 0 < without < len(plan.pairs):
        lines.append(f"cases without image, shown on a plain ground: {without}")
    if rounded:
        lines.append(
            f"predictions with values that the labels do not name (soft edges, JPEG, probabilities): {rounded}; "
            f"each {'voxel' if plan.volumes else 'pixel'} took the nearest label"
        )
    if plan.left_out:
        lines.append(f"true masks that --cases does not name, left out: {plan.left_out}")
    if doubtful:
        lines.append(f"cases with a file whose sform and qform differ: {doubtful}; the sform was used")
    files = [CASES, SUMMARY, INPUTS, f"{OVERLAYS}/", *([REPORT] if report else [])]
    lines.append(f"results: {shown(target)} ({', '.join(files)})")
    print("\n".join(lines), file=sys.stderr)
