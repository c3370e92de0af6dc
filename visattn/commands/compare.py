"""`visattn compare`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Register the command."""
    text = "compare runs, case by case, on the same cases"
    parser = commands.add_parser("compare", help=text, description=text)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folder, its test/ or validate/, or output of evaluate; the first is the baseline",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for tables, plot and report (default: print only)"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.compare import compare_runs

    return compare_runs(options.runs, output=options.output, as_json=options.json)
