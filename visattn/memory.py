"""What this process has taken of the memory, and what the machine can still give."""

import os
import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The process's largest memory until now.

    Of Linux's two counters the one of `getrusage` is of no use: a process starts with what its parent held, so a small
    one that a large one started would count its parent's memory as its own.
    """
    own = _kilobytes("/proc/self/status", "VmHWM:")
    if own is not None:
        return own * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes() -> int:
    """Memory that is free, or can be freed without harm."""
    free = _kilobytes("/proc/meminfo", "MemAvailable:")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if free is None else free * 1024


def _kilobytes(file: str, key: str) -> int | None:
    """An entry of a file of Linux, None elsewhere."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:  # no Linux
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), None)
