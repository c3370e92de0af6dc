"""`visattn evaluate` for classifiers: scores a table of probabilities, made by any tool, as `test` scores a network."""

import csv
import io
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from visattn import NOTICE
from visattn.cells import text_of
from visattn.class_labels import ClassLabels
from visattn.class_scored import TASK, case_rows
from visattn.data.class_files import check_rows, list_folders, list_table
from visattn.data.medmnist_file import flag_of, read_arrays
from visattn.data.medmnist_flags import FLAGS, MULTI_LABEL
from visattn.errors import UserError, unknown
from visattn.evaluate_output import evaluation_folder
from visattn.evaluate_show import print_class_table
from visattn.files import read_small
from visattn.metrics.classes import ClassTable
from visattn.predict_plan import shown
from visattn.report import write_report
from visattn.scored import CASES, Input, write_cases, write_inputs, write_summary
from visattn.versions import library_versions

_LIBRARIES = ("visattn", "numpy", "scipy")
_NAMED = 4

Truth = dict[str, tuple[tuple[str, ...], str, Path | None]]
"""Classes, group and image of each case."""


def evaluate_classes(
    prediction: Path | str, truth: Path | str, output: Path | str | None = None, multi_label: bool = False
) -> int:
    """Score a table of probabilities.

    Args:
        prediction: A .csv with the column case and a column p_NAME for each class, as `visattn predict` writes it.
        truth: Class folders, a table with image and label, or a file of MedMNIST's form.
        output: Folder for the results; default: evaluation/ beside the table.
        multi_label: Whether a case may have several classes; of MedMNIST's files this is known.

    Returns:
        0.

    Raises:
        UserError: The two do not fit each other, or a file cannot be read or written.
    """
    started = time.monotonic()
    prediction, truth = Path(prediction), Path(truth)
    output = Path(output) if output is not None else prediction.parent / "evaluation"
    names, probabilities = _read_prediction(prediction)
    if truth.suffix.lower() == ".npz" and truth.is_file():
        parts = {case.rpartition("_")[0] for case in probabilities}
        true, multi_label = _of_arrays(truth, names, parts, multi_label)
    else:
        true = _of_files(truth, multi_label)
        probabilities = _under_true_names(probabilities, true)
    labels = ClassLabels.from_config(names, multi_label)
    _check_pairs(prediction, truth, probabilities, true)
    index = {name: number for number, name in enumerate(names)}
    for case, (classes, _, _) in true.items():
        for name in classes:
            if name not in index:
                raise unknown(
                    f"class of '{shown(case)}' in {shown(truth)}, for which there is no column p_NAME:", name, names
                )
    cases = sorted(true)
    held = np.array([[name in true[case][0] for name in names] for case in cases])
    table = ClassTable(
        labels.names,
        np.array([probabilities[case] for case in cases]),
        held.astype(np.int64) if multi_label else held.argmax(axis=1),
        tuple(true[case][1] for case in cases),
    )
    keys = [(case, true[case][1]) for case in cases]
    with evaluation_folder(output) as folder:
        write_cases(folder / CASES, case_rows(keys, table), "")
        write_inputs(folder, [Input(case, group, str(truth), true[case][2], None, None) for case, group in keys])
        found = table.summarise()
        write_summary(
            folder,
            {
                "notice": NOTICE,
                "task": TASK,
                "prediction": str(prediction),
                "truth": str(truth),
                "cases": len(cases),
                "labels": labels.to_config(),
                "metrics": [asdict(entry) for entry in found],
                "means": table.means(),
                "confusion": table.confusion(),
                "calibration": table.calibration(),
                "seconds": round(time.monotonic() - started, 1),
                "versions": library_versions(_LIBRARIES),
            },
        )
        write_report(folder)
    groups = len(set(table.groups))
    print(f"{len(cases)} cases" + (f" in {groups} groups" if groups < len(cases) else ""))
    print_class_table(found)
    print(f"results: {shown(output)}")
    return 0


def _read_prediction(path: Path) -> tuple[tuple[str, ...], dict[str, list[float]]]:
    """Names of the classes, and the probabilities of each case."""
    try:
        reader = csv.DictReader(io.StringIO(read_small(path).decode("utf-8-sig"), newline=""))
        columns = [name for name in reader.fieldnames or () if name]
        rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{shown(path)}: cannot be read: {error}") from error
    names = tuple(column[2:] for column in columns if column.startswith("p_"))
    if "case" not in columns or not names:
        raise UserError(f"{shown(path)}: needs the column case, and a column p_NAME for each class NAME")
    found: dict[str, list[float]] = {}
    for line, row in enumerate(rows, 2):
        case = text_of(row["case"] or "")
        try:
            values = [float(row[f"p_{name}"]) for name in names]
        except (TypeError, ValueError):
            values = [math.nan]
        if not case or not all(0 <= value <= 1 + 1e-6 for value in values):
            raise UserError(f"{shown(path)} line {line}: needs a case, and probabilities of 0 to 1")
        if case in found:
            raise UserError(f"{shown(path)} line {line}: the case '{shown(case)}' stands twice")
        found[case] = values
    if not found:
        raise UserError(f"{shown(path)}: holds no case")
    return names, found


def _of_files(path: Path, multi_label: bool) -> Truth:
    root = path.expanduser()
    rows, problems = list_table(root, multi_label) if root.is_file() else (list_folders(root, str(path)), [])
    check_rows(rows, problems)
    return {name: (labels, group, file.absolute()) for name, file, labels, group, _ in rows}


def _of_arrays(path: Path, names: Sequence[str], parts: set[str], multi_label: bool) -> tuple[Truth, bool]:
    """The classes of the parts that were predicted, and whether a case may have several."""
    _, truths = read_arrays(path)
    known = FLAGS.get(flag_of(path))
    several = known[0] == MULTI_LABEL if known else multi_label
    numbered = known[1] if known else tuple(names)  # a file without names: columns in the order of the numbers
    found: Truth = {}
    for part, values in truths.items():
        if part not in parts:
            continue
        for index, row in enumerate(values.reshape(len(values), -1)):
            numbers = row.nonzero()[0].tolist() if several else row.tolist()
            if not all(0 <= number < len(numbered) for number in numbers) or (not several and len(numbers) != 1):
                raise UserError(f"{shown(path)}: {part}_labels {values.shape} do not fit {len(numbered)} classes")
            name = f"{part}_{index:05d}"
            found[name] = (tuple(numbered[number] for number in numbers), name, None)
    return found, several


def _under_true_names(predicted: dict[str, list[float]], true: Truth) -> dict[str, list[float]]:
    """Predictions by the names of the true cases: as they are; or by file stem in whatever folder, as masks pair.

    The second if it pairs more and no stem stands twice: images to predict lie in one folder, true ones by class.
    """
    stems = {_stem(case): case for case in true}
    renamed = {stems.get(_stem(case), case): values for case, values in predicted.items()}
    unique = len(stems) == len(true) and len(renamed) == len(predicted)
    return renamed if unique and len(renamed.keys() & true.keys()) > len(predicted.keys() & true.keys()) else predicted


def _stem(case: str) -> str:
    return case.rpartition("/")[2]


def _check_pairs(prediction: Path, truth: Path, predicted: dict[str, list[float]], true: Truth) -> None:
    lines = []
    for missing, where in (
        (sorted(set(predicted) - set(true)), f"not in {shown(truth)}"),
        (sorted(set(true) - set(predicted)), f"not in {shown(prediction)}"),
    ):
        if missing:
            named = ", ".join(shown(case) for case in missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
            lines.append(f"{len(missing)} cases {where}: {named}")
    if lines:
        raise UserError("\n".join(["evaluate: the tables hold different cases.", *lines]))
