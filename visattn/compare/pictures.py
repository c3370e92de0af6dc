"""Pictures of a comparison: paired scores of all cases, and the outlines of those that differ most, side by side."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visattn.compare.result import Change, Result
from visattn.compare.runs import Run, inputs_of
from visattn.compare.show import interval, number
from visattn.errors import UserError
from visattn.files import atomic_write
from visattn.metrics import METRICS
from visattn.metrics.classes import CLASS_METRICS
from visattn.metrics.paired import gains, pair_up
from visattn.report import picture_uri
from visattn.scored import Input, draw_case, load_case

# Okabe and Ito's palette, as in visattn.curves; shapes tell the same as colours
_BETTER, _WORSE, _GREY = "#0072B2", "#D55E00", "#777777"


@dataclass(frozen=True)
class Pair:
    """A case drawn as both runs see it.

    Attributes:
        case: Its name.
        group: Its group; empty where the case is its own.
        better: Whether the run is better in it than the baseline.
        gain: By how much, as text.
        pictures: Name of the run, its scores and a data URI; empty where `reason` says why.
        reason: Why there are no pictures.
    """

    case: str
    group: str
    better: bool
    gain: str
    pictures: list[tuple[str, str, str]]
    reason: str


def draw_pair(result: Result, change: Change) -> Pair:
    """Draw a case as the baseline and as the run segmented it; where files are gone, say so."""
    runs = (result.baseline, result.runs[change.run])
    row = result.baseline.table.cases.index(change.case)
    group, case = change.case
    gain = f"{METRICS[result.measure].title} {number(change.gain, result.measure, True)}"
    pictures, reason = [], ""
    try:
        entries = [_entry(run, change.case) for run in runs]
        # One of the two may know the image. The planes of a volume can differ, where they go through the predictions.
        known = next((entry.image for entry in entries if entry.image is not None), None)
        entries = [replace(entry, image=entry.image or known) for entry in entries]
        images = [_load(run, entry) for run, entry in zip(runs, entries, strict=True)]
        for run, entry, (image, truth, prediction) in zip(runs, entries, images, strict=True):
            if prediction.shape != images[0][1].shape:
                raise UserError("the true masks of the two runs differ in size.")
            picture = draw_case(entry, run.scored.labels, image, prediction, truth)
            uri = picture_uri(picture, photograph=True)
            assert uri is not None  # only a file can fail
            pictures.append((run.name, _scores(run, row), uri))
    except UserError as error:
        pictures, reason = [], str(error).splitlines()[0]
    return Pair(case, "" if group == case else group, change.gain > 0, gain, pictures, reason)


def write_plot(result: Result, path: Path) -> Path | None:
    """Draw the scores of all cases, baseline against run, and their sorted differences; a row for each run.

    Of classifiers, whose measures single cases do not have, the differences are drawn with their intervals.

    Returns:
        `path`; None if there is nothing to draw or matplotlib is not installed.
    """
    # The object interface, not pyplot: it needs no display, keeps no global state and is safe in a thread.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:  # the extra `report`; write_page says so
        return None
    if not result.measure:
        return None
    rows = len(result.runs)
    classes = result.task == "classification"
    figure = Figure(figsize=(9.6, (2.4 if classes else 3.9) * rows), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for index in range(rows):
        if classes:
            _draw_intervals(figure.add_subplot(rows, 1, index + 1), result, index)
            continue
        _draw_scatter(figure.add_subplot(rows, 2, 2 * index + 1), result, index)
        _draw_gains(figure.add_subplot(rows, 2, 2 * index + 2), result, index)
    with atomic_write(path) as temporary, warnings.catch_warnings():
        # A name in a script that matplotlib's font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # Without the entry that names the library's version, equal numbers give equal files.
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def _draw_intervals(axes: Any, result: Result, index: int) -> None:
    found = [e for e in result.differences[index] if e.name == result.overall and np.isfinite(e.difference)]
    for place, entry in enumerate(found):
        # Better is to the right, whatever the measure.
        sign = 1 if CLASS_METRICS[entry.metric].higher_is_better else -1
        clear = np.isfinite(entry.low) and (entry.low > 0 or entry.high < 0)
        colour = _GREY if not clear else _BETTER if sign * entry.difference > 0 else _WORSE
        axes.plot([sign * entry.low, sign * entry.high], [place, place], color=colour, linewidth=2.5)
        axes.plot(sign * entry.difference, place, "o", color=colour, markersize=7)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), [CLASS_METRICS[entry.metric].title for entry in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("gain over the baseline, with its 95 % interval; right is better")
    axes.set_title(_label(result.runs[index].name), fontsize=11, loc="left", fontweight="bold")
    _finish(axes)


def _draw_scatter(axes: Any, result: Result, index: int) -> None:
    first, second = pair_up(
        result.baseline.table.values[result.measure], result.runs[index].table.values[result.measure], result.measure
    )
    known = ~np.isnan(first).all(axis=1)
    first, second = np.nanmean(first[known], axis=1), np.nanmean(second[known], axis=1)
    gain = gains(result.baseline.table, result.runs[index].table, result.measure)[known]
    kinds = (
        (gain > 1e-9, "run better", "o", _BETTER),
        (gain < -1e-9, "baseline better", "v", _WORSE),
        (np.abs(gain) <= 1e-9, "equal", "s", _GREY),
    )
    top = 1.0 if METRICS[result.measure].unit == "" else float(max([1.0, *first, *second]))
    axes.plot([0, top], [0, top], color=_GREY, linewidth=0.9, linestyle=":")
    for chosen, label, marker, colour in kinds:
        if chosen.any():
            axes.scatter(first[chosen], second[chosen], 22, marker=marker, color=colour, alpha=0.7, linewidths=0,
                         label=f"{label}: {np.count_nonzero(chosen)}")  # fmt: skip
    margin = 0.03 * top
    axes.set(xlim=(-margin, top + margin), ylim=(-margin, top + margin), aspect="equal")
    title = METRICS[result.measure].title
    axes.set_xlabel(_label(f"{title}: {result.baseline.name}"))
    axes.set_ylabel(_label(f"{title}: {result.runs[index].name}"))
    axes.set_title("Each case", fontsize=11, loc="left", fontweight="bold")
    _finish(axes)


def _draw_gains(axes: Any, result: Result, index: int) -> None:
    from matplotlib.ticker import MaxNLocator

    gain = gains(result.baseline.table, result.runs[index].table, result.measure)
    gain = np.sort(gain[~np.isnan(gain)])[::-1]
    places = np.arange(1, len(gain) + 1)
    axes.bar(places, gain, 1.0 if len(gain) > 60 else 0.8, color=np.where(gain > 0, _BETTER, _WORSE))
    axes.axhline(0, color="black", linewidth=0.8)
    entry = result.entry(index, result.measure)
    if entry is not None and np.isfinite(entry.low):
        sign = 1 if METRICS[result.measure].higher_is_better else -1
        low, high = sorted((sign * entry.low, sign * entry.high))
        axes.axhspan(low, high, color=_GREY, alpha=0.3, linewidth=0, label=f"95 % of the mean: {interval(entry)}")
        axes.axhline(sign * entry.difference, color="black", linestyle="--", linewidth=1.3,
                     label=f"mean difference: {number(entry.difference, entry.metric, True)}")  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("cases, sorted")
    axes.set_ylabel(f"gain in {METRICS[result.measure].title}, run over baseline")
    axes.set_title("Difference by case", fontsize=11, loc="left", fontweight="bold")
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)


def _label(text: str) -> str:
    # A dollar sign would start a formula, which may not even parse.
    clean = "".join(letter if letter.isprintable() else "?" for letter in text).replace("$", r"\$")
    return clean if len(clean) <= 45 else f"{clean[:20]}…{clean[-24:]}"


def _entry(run: Run, case: tuple[str, str]) -> Input:
    entry = inputs_of(run).get(case)
    if entry is None:
        raise UserError(f"{run.name} does not say where the files of this case are.")
    return entry


def _load(run: Run, entry: Input) -> tuple[NDArray[np.uint8] | None, NDArray[np.uint8], NDArray[np.uint8]]:
    image, truth, prediction = load_case(entry, run.scored.labels)
    if prediction is None:
        if "prediction" not in run.scored.summary:
            raise UserError(f"{run.name} kept no predicted mask of this case.")
        prediction = np.zeros_like(truth)  # evaluate counted the missing mask as a miss
    return image, truth, prediction


def _scores(run: Run, row: int) -> str:
    """Dice and IoU, by class where there are several."""
    parts = []
    for column, name in enumerate(run.table.classes):
        values = {
            metric: run.table.values[metric][row, column] for metric in ("dice", "iou") if metric in run.table.values
        }
        text = ", ".join(f"{METRICS[metric].title} {number(value, metric)}" for metric, value in values.items())
        parts.append(f"{name}: {text}" if len(run.table.classes) > 1 else text)
    return "; ".join(parts)
