"""A recipe as text: every value with the reason for it, and nothing that a file's name could smuggle in."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visattn.recipe import read_yaml

_WIDTH = 118


@dataclass(frozen=True)
class Line:
    """One line of a recipe.

    Args:
        depth: Levels of indentation.
        key: The key, or `-` for an entry of a list.
        value: Plain Python, written on the line; None is null.
        why: The comment.
        opens: Whether the lines below belong to this one, which then has no value of its own.
    """

    depth: int
    key: str
    value: Any = None
    why: str = ""
    opens: bool = False


def render(head: Iterable[str], lines: Iterable[Line]) -> str:
    """The YAML text of a recipe."""
    text = [f"# {one_line(line)}".rstrip() for line in head]
    for line in lines:
        indent = "  " * line.depth
        start = f"{indent}{line.key}{'' if line.key == '-' else ':'}{'' if line.opens else ' ' + scalar(line.value)}"
        comment = one_line(line.why)
        if not comment:
            text.append(start)
        elif len(start) + len(comment) + 3 <= _WIDTH:
            text.append(f"{start} # {comment}")
        else:  # too long to stand beside the value
            text += [f"{indent}# {part}" for part in _wrapped(comment, _WIDTH - len(indent) - 2)] + [start]
    return "\n".join(text) + "\n"


def scalar(value: Any) -> str:
    """A value in YAML's flow style, on one line, that `visattn.recipe` reads back as the same."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(str(key))}: {scalar(below)}" for key, below in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(scalar(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if re.fullmatch(r"[A-Za-z./][\w./-]*", text) and read_yaml(text, "name") == text:
        return text
    if text.isprintable() and "'" not in text:
        return f"'{text}'"  # as it is: a backslash, of which regular expressions are full, means nothing in these
    return '"' + "".join(_escaped(letter) for letter in text) + '"'


def one_line(text: str) -> str:
    """Text for a comment: one line, and nothing in it that a terminal or YAML would act on."""
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()


def command(*words: str) -> str:
    """A command as one types it."""
    return one_line(shlex.join(words))


def _number(value: float) -> str:
    if 0 < abs(value) < 0.01:
        digits, _, power = f"{value:.6e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:g}"


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    return letter if letter.isprintable() else f"\\U{ord(letter):08x}"


def _wrapped(text: str, width: int) -> Sequence[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return lines
