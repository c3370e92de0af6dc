"""The scored folder: a table of cases, a summary and where each case's files are. This module alone knows its form.

`fit`, `validate`, `test` and `evaluate` write one, `compare` and the report read it:

* `cases.csv`: case, group, class, split and the measures; an undefined value is an empty cell;
* `summary.json`: means with intervals, labels, and what else is known; undefined values are null;
* `inputs.json`: for each case its image, true mask and predicted mask, relative to the folder when inside it.

What is read may come from anybody: it is parsed as text and JSON, checked, and nothing that it names is executed.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visattn.cells import cell, text_of
from visattn.data.images import read_image
from visattn.data.phantoms import IMAGE_KINDS, PHANTOM, VOLUME_KINDS, kind_of
from visattn.data.volume_names import is_volume_name
from visattn.errors import UserError
from visattn.files import read_small, write_bytes_atomic, write_text_atomic
from visattn.labels import Labels
from visattn.mask_files import read_any_mask, read_volumes
from visattn.metrics import DETAILS, METRICS
from visattn.overlay import draw_overlay, write_png
from visattn.overlay3d import ACROSS, montage

Row = dict[str, str]
"""A row of `cases.csv`: the measures as text, empty where undefined."""

CASES, SUMMARY, INPUTS = "cases.csv", "summary.json", "inputs.json"
PICTURES = 3  # overlays of each kind: the worst, the median and the best cases by Dice
AGAIN = "Make it again with visattn validate, test or evaluate."

_GROUND = (58, 63, 72)  # grey that both white and cyan lines stand out from
_TEXTS = ("case", "group", "class")
_COLUMNS = 1000  # of a table; ours have about twenty
_LONGEST = 120  # bytes of a name within a file name
_UNSAFE = frozenset('/\\:*?"<>|~%')  # some file system or program takes these amiss; ~ marks a changed name


@dataclass(frozen=True)
class Input:
    """Where the files of a case are.

    Attributes:
        case: Its name in `cases.csv`.
        group: Its group there.
        root: The data root that it came from as the user wrote it, or the word phantom.
        image: The image; None where none is known, and for the phantom, whose cases are drawn again by name.
        truth: The true mask; None for the phantom.
        prediction: The predicted mask; None where none was written, or where a missing one was counted as a miss.
    """

    case: str
    group: str
    root: str
    image: Path | None
    truth: Path | None
    prediction: Path | None


@dataclass(frozen=True)
class Scored:
    """A scored folder that was read.

    Attributes:
        folder: The folder.
        summary: Content of `summary.json`.
        rows: Those of `cases.csv`, in its order.
        inputs: By group and case; empty where the folder has no `inputs.json`.
    """

    folder: Path
    summary: dict[str, Any]
    rows: list[Row]
    inputs: dict[tuple[str, str], Input]

    @property
    def labels(self) -> Labels:
        """The label map that was scored with.

        Raises:
            UserError: The summary has none, or one that means nothing.
        """
        config = self.summary.get("labels")
        known = {"labels", "regions", "ignore"}
        if not isinstance(config, dict) or not set(config) <= known or "labels" not in config:
            raise UserError(f"{self.folder / SUMMARY}: names no labels.\n{AGAIN}")
        try:
            return Labels.from_config(**config)
        except UserError as error:
            raise UserError(f"{self.folder / SUMMARY}: {error}") from error


def write_cases(path: Path, rows: Sequence[Mapping[str, Any]], split: str) -> None:
    """Write the table of cases x classes; an undefined value is an empty cell."""
    text = io.StringIO()
    keys = rows[0] if rows else dict.fromkeys(METRICS)
    columns = ["case", "group", "class", "split", *(key for key in keys if key not in _TEXTS)]
    # Quoted whole: the csv module leaves a bare carriage return in a name unquoted, and then cannot read it.
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    careful = csv.DictWriter(text, columns, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    for row in rows:
        cells = {"split": split} | {
            key: "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
            for key, value in row.items()
        }
        for key in _TEXTS:
            cells[key] = cell(str(cells[key]))
        (careful if any("\r" in str(cells[key]) for key in _TEXTS) else writer).writerow(cells)
    # File names need not be UTF-8; they pass through as the bytes they are.
    write_bytes_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))


def read_cases(path: Path) -> list[Row]:
    """Read the table that `write_cases` wrote, or one like it; columns may be missing except case and class.

    Raises:
        UserError: There is no such file, or it is no table of cases.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_small(path).decode("utf-8", "surrogateescape"), newline=""))
        if len(reader.fieldnames or ()) > _COLUMNS:  # each row gets them all, however short it is
            raise ValueError(f"more than {_COLUMNS} columns")
        rows = [{key: text or "" for key, text in row.items() if key} for row in reader]
        for row in rows:
            for key in _TEXTS:
                row[key] = text_of(row.get(key, ""))
            for key in (*METRICS, *DETAILS):
                float(row.get(key) or "nan")
        if any(not row["case"] or not row["class"] for row in rows):
            raise ValueError("a row without case or class")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.\n{AGAIN}") from error
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}: not a table of cases: {error}.\n{AGAIN}") from error
    return rows


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`; NaN and infinity, which JSON does not know, become null."""
    write_text_atomic(folder / SUMMARY, json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n")


def read_summary(path: Path) -> dict[str, Any]:
    """Read a `summary.json`.

    Raises:
        UserError: There is no such file, or it is no JSON mapping.
    """
    content = _read_json(path, "the summary of a run")
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the summary of a run: no mapping.\n{AGAIN}")
    return content


def write_inputs(folder: Path, inputs: Sequence[Input]) -> None:
    """Write `inputs.json`."""
    base = Path(os.path.abspath(folder))

    def text(path: Path | None) -> str | None:
        if path is None:
            return None
        absolute = Path(os.path.abspath(path))
        return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else str(absolute)

    cases = [
        {
            "case": entry.case,
            "group": entry.group,
            "root": entry.root,
            "image": text(entry.image),
            "truth": text(entry.truth),
            "prediction": text(entry.prediction),
        }
        for entry in inputs
    ]
    write_text_atomic(folder / INPUTS, json.dumps({"cases": cases}, indent=1) + "\n")


def read_inputs(folder: Path) -> dict[tuple[str, str], Input]:
    """Read `inputs.json`; paths become absolute.

    Raises:
        UserError: There is no such file, or it has another form.
    """
    path = folder / INPUTS
    content = _read_json(path, "a list of inputs")
    base = Path(os.path.abspath(folder))
    found: dict[tuple[str, str], Input] = {}
    try:
        for entry in content["cases"]:
            case, group, root = (_text(entry[key]) for key in ("case", "group", "root"))
            files = [
                None if entry[key] is None else Path(os.path.abspath(base / _text(entry[key])))
                for key in ("image", "truth", "prediction")
            ]
            found[group, case] = Input(case, group, root, *files)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a list of inputs: {type(error).__name__}: {error}.\n{AGAIN}") from error
    return found


def read_scored(folder: Path | str) -> Scored:
    """Read a scored folder.

    Raises:
        UserError: It is no folder, has no scores, or a file in it has another form.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file' if folder.exists() else 'no such folder'}; name a folder with scores.")
    for name in (CASES, SUMMARY):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: holds no {name}, so there are no scores in it.\n{AGAIN}")
    rows = read_cases(folder / CASES)
    if not rows:
        raise UserError(f"{folder / CASES}: holds no case.\n{AGAIN}")
    inputs = read_inputs(folder) if (folder / INPUTS).is_file() else {}
    return Scored(folder, read_summary(folder / SUMMARY), rows, inputs)


def safe_name(case: str) -> str:
    """`case` as a file name without ending: itself where it will do, else changed and told apart by a hash.

    Different names give different results, up to a file system that does not tell upper from lower case.
    """
    text = unicodedata.normalize("NFC", case)
    text = "".join("_" if c in _UNSAFE or not c.isprintable() else c for c in text)
    text = text.encode()[:_LONGEST].decode("utf-8", "ignore").strip(". ")
    if text == case:
        return case
    return f"{text}~{hashlib.sha256(case.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def load_case(
    entry: Input, labels: Labels
) -> tuple[NDArray[np.uint8] | None, NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Read what there is of a case.

    Returns:
        The image (H, W, 3) or None; the truth and, or None, the prediction as class indices (H, W). Of a volume, its
        three planes through the largest lesion side by side (`visattn.overlay3d`).

    Raises:
        UserError: A file is gone or cannot be read, sizes differ, or there is no truth.
    """
    if is_volume(entry):
        drawn, planes, others = montage(*read_volumes(entry.image, entry.truth or entry.case, entry.prediction, labels))
        assert planes is not None
        return drawn, planes, others
    image = None
    if entry.root == PHANTOM and entry.truth is None:
        from visattn.data.cases import embedded  # draws 200 scenes

        drawn_cases = embedded(kind_of(entry.case)) if kind_of(entry.case) in IMAGE_KINDS else {}
        if entry.case not in drawn_cases:
            raise UserError(f"{entry.case}: the phantom of this version has no such case.\n{AGAIN}")
        image, values = drawn_cases[entry.case]
        truth = labels.encode(values, f"{entry.case} of the phantom")
    elif entry.truth is None:
        raise UserError(f"{entry.case}: {INPUTS} names no true mask for this case.\n{AGAIN}")
    else:
        image = None if entry.image is None else read_image(entry.image, 3)
        truth = read_any_mask(entry.truth, labels).indices
    prediction = None if entry.prediction is None else read_any_mask(entry.prediction, labels).indices
    for path, array in ((entry.image, image), (entry.prediction, prediction)):
        if array is not None and array.shape[:2] != truth.shape:
            raise UserError(
                f"{path}: {array.shape[1]} x {array.shape[0]} pixels, but the true mask of {entry.case} has "
                f"{truth.shape[1]} x {truth.shape[0]}."
            )
    return image, truth, prediction


def is_volume(entry: Input) -> bool:
    """Whether a case is a volume, which is shown by three planes."""
    if entry.truth is None:
        return entry.root == PHANTOM and kind_of(entry.case) in VOLUME_KINDS
    return is_volume_name(entry.truth)


def draw_case(
    entry: Input,
    labels: Labels,
    image: NDArray[np.uint8] | None,
    prediction: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    note: str = "",
) -> NDArray[np.uint8]:
    """Draw what `load_case` gave: outlines on the image or, without one, on a plain ground."""
    ground = np.full((*truth.shape, 3), _GROUND, np.uint8) if image is None else image
    return draw_overlay(ground, prediction, labels, truth, note, ACROSS if is_volume(entry) else 1)


def choose(rows: Sequence[Mapping[str, Any]], count: int = PICTURES) -> dict[str, tuple[tuple[str, str], float]]:
    """File prefix, as `worst-1`, to group and case and its Dice, for the cases worth looking at.

    A case is judged by the mean Dice over its classes that have one. No case is chosen twice.
    """
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["dice"] not in (None, ""):
            scores.setdefault((str(row["group"]), str(row["case"])), []).append(float(row["dice"]))
    order = sorted(
        ((sum(values) / len(values), key) for key, values in scores.items()), key=lambda entry: (entry[0], entry[1][1])
    )
    middle = max(0, (len(order) - count) // 2)
    kinds = {
        "worst": order[:count],
        "median": order[middle : middle + count],
        "best": list(reversed(order[-count:])),
    }
    chosen: dict[str, tuple[tuple[str, str], float]] = {}
    seen: set[tuple[str, str]] = set()
    for kind in ("worst", "best", "median"):
        for score, key in kinds[kind]:
            if key not in seen:
                seen.add(key)
                number = sum(prefix.startswith(kind) for prefix in chosen) + 1
                chosen[f"{kind}-{number}"] = (key, score)
    return chosen


def write_overlays(
    folder: Path, rows: Sequence[Mapping[str, Any]], inputs: Mapping[tuple[str, str], Input], labels: Labels
) -> None:
    """Draw the worst, median and best cases into `overlays/`, in the place of those of an earlier scoring.

    Without an image the outlines stand on a plain ground.

    Args:
        folder: The scored folder.
        rows: Its cases.
        inputs: By group and case; a case without predicted mask is drawn with an empty one.
        labels: What the masks mean.
    """
    for path in (folder / "overlays").glob("*.png"):
        if re.match(r"(worst|median|best)-\d+-", path.name):  # anything else there is not ours
            path.unlink()
    for prefix, (key, score) in choose(rows).items():
        image, truth, prediction = load_case(inputs[key], labels)
        note = f"Dice {score:.3f}"
        if prediction is None:
            prediction, note = np.zeros_like(truth), f"{note}, no prediction"
        picture = draw_case(inputs[key], labels, image, prediction, truth, note)
        write_png(folder / "overlays" / f"{prefix}-{safe_name(key[1])}.png", picture)


def _read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(read_small(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.\n{AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not {what}: {error}.\n{AGAIN}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
