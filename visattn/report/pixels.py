"""Confusion and calibration out of a `summary.json`, as tables and points that a template can draw.

The numbers come from a file, so they are checked before they are drawn.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_CLASSES = 12  # of a confusion matrix that is shown whole, and of calibration plots
MOST_PAIRS = 20  # largest confusions listed where there are more classes
SIDE, LEFT, BOTTOM = 240, 46, 40  # of a calibration plot, and the room for its labels, in units of its picture


@dataclass(frozen=True)
class Cell:
    """Pixels of one true class with one predicted class.

    Attributes:
        count: How many.
        share: Of the pixels of that true class; None if there is none.
        right: Whether truth and prediction agree.
    """

    count: int
    share: float | None
    right: bool


@dataclass(frozen=True)
class Table:
    """A confusion matrix.

    Attributes:
        title: The region's name; empty for classes.
        columns: Names of what was predicted.
        rows: For each true class its name, its number of pixels and its cells.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, int, list[Cell]]]


@dataclass(frozen=True)
class Confusion:
    """The confusion of a scored folder.

    Attributes:
        tables: One, or one for each region; empty where there are too many classes to show.
        pairs: Where there are too many classes: the largest confusions as truth, prediction, pixels and share of truth.
        classes: How many classes there are.
        pixels: How many pixels were counted.
    """

    tables: list[Table]
    pairs: list[tuple[str, str, int, float]]
    classes: int
    pixels: int


@dataclass(frozen=True)
class Point:
    """A bin of a calibration plot: where it is drawn, how large, and what it says."""

    x: float
    y: float
    radius: float
    confidence: float
    frequency: float
    count: int


@dataclass(frozen=True)
class Plot:
    """The calibration of one class."""

    name: str
    ece: float | None
    points: list[Point]
    pixels: int


@dataclass(frozen=True)
class Calibration:
    """The calibration of a scored folder.

    Attributes:
        plots: Of the classes, or of those with the largest error if there are too many.
        errors: Class name and error of all classes, where there are too many to plot.
    """

    plots: list[Plot]
    errors: list[tuple[str, float | None]]


def read_confusion(content: Mapping[str, Any], sides: tuple[str, str] = ("outside", "inside")) -> Confusion:
    """The entry `confusion` of a summary.

    Args:
        content: The entry.
        sides: What the two lines of each class are called where classes are independent of each other.

    Raises:
        ValueError: It has another form.
    """
    if "regions" in content:
        regions = _mapping(content["regions"])
        tables = [_table(name, list(sides), counts) for name, counts in list(regions.items())[:MOST_CLASSES]]
        return Confusion(tables, [], len(regions), sum(total for _, total, _ in tables[0].rows) if tables else 0)
    names = _list(content.get("names"))
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a class without name")
    table = _table("", names, content.get("counts"))
    pixels = sum(total for _, total, _ in table.rows)
    if len(names) <= MOST_CLASSES:
        return Confusion([table], [], len(names), pixels)
    pairs = [
        (name, names[index], cell.count, cell.share or 0.0)
        for name, _, cells in table.rows
        for index, cell in enumerate(cells)
        if not cell.right and cell.count
    ]
    pairs.sort(key=lambda pair: -pair[2])
    return Confusion([], pairs[:MOST_PAIRS], len(names), pixels)


def read_calibration(content: Mapping[str, Any]) -> Calibration:
    """The entry `calibration` of a summary.

    Raises:
        ValueError: It has another form.
    """
    plots = [_plot(name, _mapping(entry)) for name, entry in content.items()]
    if len(plots) <= MOST_CLASSES:
        return Calibration(plots, [])
    worst = sorted(plots, key=lambda plot: -1.0 if plot.ece is None else plot.ece, reverse=True)
    return Calibration(worst[:MOST_CLASSES], [(plot.name, plot.ece) for plot in plots])


def _table(title: str, names: list[str], counts: object) -> Table:
    rows = []
    lines = _list(counts)
    if len(lines) != len(names):
        raise ValueError(f"{len(lines)} rows for {len(names)} classes")
    for index, (name, line) in enumerate(zip(names, lines, strict=True)):
        numbers = [_whole(number) for number in _list(line)]
        if len(numbers) != len(names):
            raise ValueError(f"{len(numbers)} columns for {len(names)} classes")
        total = sum(numbers)
        cells = [Cell(n, n / total if total else None, column == index) for column, n in enumerate(numbers)]
        rows.append((name, total, cells))
    return Table(title, names, rows)


def _plot(name: str, entry: Mapping[str, Any]) -> Plot:
    confidence, frequency, count = (_list(entry.get(key)) for key in ("confidence", "frequency", "count"))
    if not len(confidence) == len(frequency) == len(count):
        raise ValueError("bins of different number")
    numbers = [_whole(number) for number in count]
    most = max(numbers, default=0)
    points = []
    for p, q, n in zip(confidence, frequency, numbers, strict=True):
        if n:
            p, q = _share(p), _share(q)
            # By the logarithm: bins differ by factors of a thousand, and a small one may be the telling one.
            radius = 2.5 + 4.5 * math.log(n + 1) / math.log(most + 1)
            points.append(Point(round(LEFT + p * SIDE, 1), round((1 - q) * SIDE + 10, 1), round(radius, 1), p, q, n))
    ece = entry.get("ece")
    return Plot(name, None if ece is None else _share(ece), points, sum(numbers))


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.40} is no mapping")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.40} is no list")
    return value


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is no number of pixels")
    return value


def _share(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1.000001:
        raise ValueError(f"{value!r:.40} is no share")
    return min(float(value), 1.0)
