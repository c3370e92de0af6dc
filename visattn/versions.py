"""Versions of what made a result."""

import platform
from collections.abc import Sequence
from importlib import metadata


def library_versions(names: Sequence[str]) -> dict[str, str]:
    """The version of Python and of the installed packages `names`; "unknown" for one that was never installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found
