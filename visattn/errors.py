"""How a user's mistake is reported: one short message that says what is wrong and what to do."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

MOST_LINES = 6  # of a message
_LONGEST_LINE = 1000  # characters of a line; a path may be long, a whole file quoted in an error may not
_LONGEST_NAME = 200  # characters of a name that is looked up
_MOST_GUESSES = 3


class UserError(Exception):
    """A mistake in a file, a key or a value that the user can correct.

    The message names the file or key, says what is wrong and what to do, in at most six lines. The command line prints
    it without a traceback and exits with code 2.
    """


def shown(text: object) -> str:
    """`text` on one line and harmless to a terminal: control and direction characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def readable(message: str) -> str:
    """`message` as the terminal gets it: at most six lines of bounded length, whatever a name in it holds."""
    lines = [shown(line) for line in message.split("\n")]
    if len(lines) > MOST_LINES:  # a name with line breaks: the end of a message says what to do
        lines = [*lines[: MOST_LINES - 2], "...", lines[-1]]
    return "\n".join(f"{line[:600]} ... {line[-300:]}" if len(line) > _LONGEST_LINE else line for line in lines)


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` most probably meant, or None when nothing is close."""
    return next(iter(_close(name, valid)), None)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A sentence with the valid names that `name` may have meant, led by a blank; empty when nothing is close."""
    guesses = [f"'{shown(guess)}'" for guess in _close(name, valid)]
    return f" Did you mean {' or '.join(guesses)}?" if guesses else ""


def unknown(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """The error for a `name` that is in no table: the nearest valid ones first, then those there are."""
    names = sorted(valid)
    listed = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    cut = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
    return UserError(f"unknown {kind} '{shown(cut)}'.{did_you_mean(name, names)}\nKnown: {listed}")


def chosen(kind: str, block: Mapping[str, Any], table: Iterable[str]) -> str:
    """The `name` in a block of a recipe, which must be one of `table`.

    Raises:
        UserError: It is not there, perhaps for a misspelt key, or is in no table.
    """
    if "name" not in block:
        slip = next((str(key) for key in block if nearest(str(key), ["name"])), None)
        hint = f" '{shown(slip)}' stands there. Did you mean 'name'?" if slip else ""
        raise UserError(f"{kind}: the key 'name' is missing.{hint}\nKnown names: {', '.join(sorted(table))}")
    name = block["name"]
    if not isinstance(name, str) or name not in set(table):
        raise unknown(kind, str(name), table)
    return name


def _close(name: str, valid: Iterable[str]) -> list[str]:
    """Valid names one slip of the finger away, likeliest first; without such, the one that is most alike."""
    lowered = name.lower()[:_LONGEST_NAME]
    by_lower = {candidate.lower(): candidate for candidate in sorted(valid)}
    if lowered in by_lower:
        return [by_lower[lowered]]
    slips = [candidate for candidate in by_lower if _one_slip(lowered, candidate)]
    # Where several names are one slip away, as with an end cut off, the one that has all that was typed comes first.
    slips.sort(key=lambda candidate: (-difflib.SequenceMatcher(None, lowered, candidate).ratio(), candidate))
    found = slips[:_MOST_GUESSES] or difflib.get_close_matches(lowered, by_lower, n=1, cutoff=0.6)
    return [by_lower[candidate] for candidate in found]


def _one_slip(one: str, other: str) -> bool:
    """Whether a letter too many, too few, wrong, or swapped with its neighbour tells two words apart."""
    if abs(len(one) - len(other)) > 1:
        return False
    start = _alike(one, other)
    one, other = one[start:], other[start:]
    end = _alike(one[::-1], other[::-1])
    one, other = one[: len(one) - end], other[: len(other) - end]
    return max(len(one), len(other)) <= 1 or (len(one) == 2 and one == other[::-1])


def _alike(one: str, other: str) -> int:
    """With how many equal letters two words begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
