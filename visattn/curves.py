"""The curves of a training, read from `metrics.csv`: loss, Dice and IoU for each epoch."""

import csv
import math
from pathlib import Path

from visattn.files import atomic_write

# Okabe and Ito's palette, told apart in every type of colour vision; dashes and markers tell lines apart without colour
_BLUE, _VERMILION, _PURPLE, _GREY = "#0072B2", "#D55E00", "#CC79A7", "#666666"

Series = dict[int, float]


def read_metrics(path: Path) -> dict[str, Series]:
    """Column to epoch to value; of several rows of an epoch the last one that has a value counts.

    A table that was cut off, or that holds nan, gives what can be read.
    """
    series: dict[str, Series] = {}
    if not path.is_file():
        return series
    with path.open(newline="", encoding="utf-8", errors="replace") as handle:
        for row in csv.DictReader(handle):
            epoch = _number(row.get("epoch"))
            if epoch is None:
                continue
            for key, text in row.items():
                value = _number(text)
                if key and value is not None:
                    series.setdefault(key, {})[int(epoch)] = value
    return series


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def write_curves(run_dir: Path | str) -> Path | None:
    """Draw `curves.png` from `metrics.csv` in a run folder.

    Returns:
        The picture, or None if there is nothing to draw or matplotlib is not installed.
    """
    # The object interface, not pyplot: it needs no display, keeps no global state and is safe in a thread.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:  # the extra `report`; write_report says so
        return None

    run_dir = Path(run_dir)
    series = read_metrics(run_dir / "metrics.csv")
    losses = _present(series, [("train/loss", "training", _BLUE, "-"), ("val/loss", "validation", _VERMILION, "--")])
    known = [("val/dice", "Dice", _VERMILION, "-"), ("val/iou", "IoU", _PURPLE, "--")]
    known += [("val/auc", "AUC", _VERMILION, "-"), ("val/acc", "accuracy", _PURPLE, "--")]
    scores = _present(series, known)
    panels = [(title, lines) for title, lines in (("Loss", losses), ("Validation score", scores)) if lines]
    if not panels:
        return None
    figure = Figure(figsize=(4.8 * len(panels), 3.5), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for index, (title, lines) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for values, name, colour, style in lines:
            epochs = sorted(values)
            marker = ("o" if style == "-" else "s") if len(epochs) <= 30 else None
            best = _best(values) if name in ("Dice", "AUC") else None
            label = name if best is None else f"{name}: best {values[best]:.3f}, epoch {best + 1}"
            axes.plot([epoch + 1 for epoch in epochs], [values[epoch] for epoch in epochs], style, color=colour,
                      label=label, marker=marker, markersize=3.5, linewidth=1.8)  # fmt: skip
            if best is not None:
                axes.axvline(best + 1, color=_GREY, linewidth=0.9, linestyle=":")
                axes.plot([best + 1], [values[best]], "o", color=colour, markersize=7, markerfacecolor="white",
                          markeredgewidth=1.8)  # fmt: skip
        if lines is scores:
            axes.set_ylim(-0.02, 1.02)
        # Above the axes, whatever the lines do: no corner is free in every training.
        axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(-0.02, 0.985), ncols=2, borderpad=0.2)
        axes.set_title(title, fontsize=11, loc="left", fontweight="bold", pad=24)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # one epoch gets one tick, no fractions
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    path = run_dir / "curves.png"
    with atomic_write(path) as temporary:
        # Without the entry that names the library's version, equal numbers give equal files.
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def _present(series: dict[str, Series], wanted: list[tuple[str, str, str, str]]) -> list[tuple[Series, str, str, str]]:
    return [(series[key], *rest) for key, *rest in wanted if series.get(key)]  # type: ignore[misc]


def _best(values: Series) -> int:
    return max(values, key=lambda epoch: (values[epoch], -epoch))
