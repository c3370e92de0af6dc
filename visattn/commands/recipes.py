"""`visattn recipes`."""

import argparse
from collections.abc import Sequence
from typing import Any

from visattn.commands._table import show_table


def add(commands: Any) -> None:
    """Register the command."""
    text = "list the packaged recipes"
    listing = commands.add_parser("recipes", help=text, description=text)
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.networks import describe
    from visattn.recipe import describe_recipes

    about = {row["name"]: row for row in describe()}
    rows = []
    for row in describe_recipes():
        network = about.get(row["network"].split(" + ")[0], {})
        rows.append(row | {key: network.get(key, "") for key in ("parameters", "paper", "licence")})
    return show_table(rows, options.json, ("name", "network", "about"))
