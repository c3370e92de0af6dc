"""`visattn compare`: read, compare, print, write."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from visattn.compare.classes import compare_classes
from visattn.compare.page import write_page
from visattn.compare.result import Result, compare
from visattn.compare.runs import printable, read_runs
from visattn.compare.show import show
from visattn.errors import UserError
from visattn.files import write_bytes_atomic, write_text_atomic
from visattn.scored import CASES, SUMMARY


def compare_runs(folders: Sequence[Path], output: Path | None = None, as_json: bool = False) -> int:
    """Compare runs with the first of them, case by case, and print the table.

    Args:
        folders: Scored folders: run folders, evaluations in them, outputs of `visattn evaluate`, runs with folds.
        output: Where to write `compare.json`, `compare.csv` and `report.html` with plot and overlays; default: nowhere.
        as_json: Print the content of `compare.json` instead of the table.

    Returns:
        The exit code 0.

    Raises:
        UserError: The runs cannot be compared, or `output` cannot be written.
    """
    runs = read_runs(folders)
    if output is not None:
        _make(output)  # before the work, as it may fail; after what is refused, so that no empty folder is left
    result = compare(runs) if runs[0].answers is None else compare_classes(runs)
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        show(result)
    if output is not None:
        _write(result, output)
        print(f"written: {printable(str(output), 300)}", file=sys.stderr if as_json else sys.stdout)
    return 0


def _make(output: Path) -> None:
    if (output / CASES).exists() or (output / SUMMARY).exists() or (output / "config.yaml").exists():
        raise UserError(f"--output {output}: holds a run or its scores, whose report would be replaced. Name another.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be created: {error.strerror}.") from error


def _write(result: Result, output: Path) -> None:
    try:
        write_text_atomic(output / "compare.json", json.dumps(result.to_json(), indent=2) + "\n")
        # A folder's name need not be UTF-8; it passes through as the bytes it is.
        write_bytes_atomic(output / "compare.csv", result.to_csv().encode("utf-8", "surrogateescape"))
        write_page(result, output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror}.") from error
