"""The report of a comparison: one HTML file that needs no network."""

import sys
from pathlib import Path

from visattn import NOTICE, __version__
from visattn.compare.classes import answers
from visattn.compare.pictures import draw_pair, write_plot
from visattn.compare.result import FAMILY, RESAMPLES, Result
from visattn.compare.show import interval, number, p_value
from visattn.files import write_bytes_atomic
from visattn.metrics import metrics_of
from visattn.metrics.classes import CLASS_METRICS
from visattn.report import page_environment, picture_uri
from visattn.report.content import SPLITS


def write_page(result: Result, output: Path) -> Path | None:
    """Write `report.html` and `plot.png` into `output`.

    Returns:
        The page; None, after a line on stderr, where the extra `report` is not installed.
    """
    environment = page_environment()
    path = output / "report.html"
    if environment is None:
        print(f"no {path}: needs pip install 'visattn[report]'", file=sys.stderr)
        return None
    plot = write_plot(result, output / "plot.png")
    environment.filters |= {"number": number, "difference": interval, "p": p_value}
    classes = result.task == "classification"
    splits = sorted(set(result.baseline.splits.values()))
    content = environment.get_template("compare.html").render(
        notice=NOTICE,
        version=__version__,
        kind="comparison",
        title=(result.runs[0].name if len(result.runs) == 1 else f"{len(result.runs)} runs")
        + f" against {result.baseline.name}",
        result=result,
        metrics=CLASS_METRICS if classes else metrics_of(result.baseline.table.values),
        cases=len(result.baseline.table.cases),
        splits=", ".join(SPLITS.get(split, split) for split in splits if split),
        several=any(entry.family > 1 for found in result.differences for entry in found),
        plot=picture_uri(plot, photograph=False) if plot else None,
        pairs=[] if classes else [[draw_pair(result, change) for change in changes] for changes in result.changes],
        answers=[[answers(result, change) for change in changes] for changes in result.changes] if classes else [],
        phantom=any("phantom" in run.data.lower() for run in (result.baseline, *result.runs)),
        family=FAMILY,
        resamples=RESAMPLES,
    )
    write_bytes_atomic(path, content.encode("utf-8", "backslashreplace"))
    return path
