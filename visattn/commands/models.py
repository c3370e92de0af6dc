"""`visattn models`."""

import argparse
from collections.abc import Sequence
from typing import Any

from visattn.commands._table import show_table
from visattn.errors import UserError


def add(commands: Any) -> None:
    """Register the command."""
    text = "list the networks"
    models = commands.add_parser("models", help=text, description=text)
    models.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="shell pattern of names (default: *)"
    )
    models.add_argument("--json", action="store_true", help="as JSON")
    models.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from fnmatch import fnmatch

    from visattn.networks import describe

    rows = [row for row in describe() if fnmatch(row["name"], options.pattern)]
    if not rows:
        raise UserError(f"no model matches '{options.pattern}'. See: visattn models")
    return show_table(rows, options.json)
