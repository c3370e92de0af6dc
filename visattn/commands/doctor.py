"""`visattn doctor`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Register the command."""
    text = "find what is wrong with a data set before training on it"
    parser = commands.add_parser("doctor", help=text, description=text)
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="data set: a folder with images and masks")
    parser.add_argument("--config", "-c", action="append", metavar="RECIPE", help="examine the data of a recipe")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.doctor import run_doctor

    return run_doctor(options.folder, options.config, rest, as_json=options.json)
