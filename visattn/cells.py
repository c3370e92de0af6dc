"""Cells of CSV files, whose texts a spreadsheet will not run as formulas."""

import re

# A spreadsheet runs a text that begins so. Apostrophes in front belong to it, so that `'=1` and a guarded `=1` differ.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def cell(value: object) -> object:
    """A value for a cell: empty for None; a text that is like a formula gets an apostrophe in front."""
    if isinstance(value, str) and _FORMULA.match(value):
        return f"'{value}"
    return "" if value is None else value


def text_of(cell: str) -> str:
    """The text that a cell was made from."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
