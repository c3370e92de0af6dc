"""How a user's mistake is reported: one short message that says what is wrong and what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a file, a key or a value that the user can correct.

    The message names the file or key, says what is wrong and what to do, in at most six lines. The command line prints
    it without a traceback and exits with code 2.
    """


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` most probably meant, or None when nothing is close."""
    candidates = sorted(valid)
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def unknown(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """The error for a `name` that is in no table: the nearest valid one first, then those there are."""
    names = sorted(valid)
    guess = nearest(name, names)
    hint = f" Did you mean '{guess}'?" if guess else ""
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return UserError(f"unknown {kind} '{name}'.{hint}\nKnown: {shown}")
