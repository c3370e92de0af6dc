"""Tables on the terminal, or the same as JSON."""

import json
from collections.abc import Sequence
from typing import Any


def show_table(rows: Sequence[dict[str, Any]], as_json: bool, columns: Sequence[str] = ()) -> int:
    """Print `rows` as a table of `columns` (default: all), or as JSON; returns the exit code 0."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    columns = columns or list(rows[0])
    for column in columns:
        long = column == "about"
        table.add_column(column, no_wrap=column == "name", min_width=26 if long else None, overflow="fold")
    for row in rows:
        values = (row[column] for column in columns)
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in values))
    Console().print(table)
    return 0
