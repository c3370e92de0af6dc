"""Which entries of the cache of volumes go, so that it does not grow for ever.

An entry's file of description is touched whenever a training takes it up. When a training has prepared its cases,

- entries that no training took up for 30 days are deleted;
- where the rest still takes more than the disk has free, the longest unused go too, until it does not; but none that
  was taken up in the last 7 days, as it may be in use.
"""

import os
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

KINDS = {"facts": "facts.json", "volume": "entry.json"}
"""Folders of the cache, and the file that makes an entry of each whole."""

UNUSED_DAYS = 30
SAFE_DAYS = 7
_DAY = 24 * 3600.0


@dataclass(frozen=True)
class _Found:
    folder: Path
    mark: Path
    used: float
    size: int


def touch(mark: Path) -> None:
    """Note that an entry is in use; a cache that may only be read stays as it is."""
    with suppress(OSError):
        os.utime(mark)


def drop_stale(cache: Path, now: float | None = None) -> tuple[int, int]:
    """Delete what the rule says and return how many entries and bytes that was.

    Args:
        cache: The cache's folder. Nothing but entries is looked at, whatever else lies there.
        now: The time; None: what it is.
    """
    now = time.time() if now is None else now
    found = sorted(_entries(cache, now), key=lambda entry: entry.used)
    going = [entry for entry in found if now - entry.used > UNUSED_DAYS * _DAY]
    staying = found[len(going) :]
    total = sum(entry.size for entry in staying)
    free = shutil.disk_usage(cache).free if found else 0
    free += sum(entry.size for entry in going)
    for entry in staying:
        if total <= free or now - entry.used <= SAFE_DAYS * _DAY:
            break
        going.append(entry)
        total, free = total - entry.size, free + entry.size
    gone = [entry for entry in going if _delete(entry)]
    return len(gone), sum(entry.size for entry in gone)


def _entries(cache: Path, now: float) -> list[_Found]:
    found = []
    for kind, mark in KINDS.items():
        for shelf in _folders(cache / kind):
            for folder in _folders(shelf):
                try:
                    with os.scandir(folder) as files:
                        sizes = {file.name: file.stat(follow_symlinks=False) for file in files}
                except OSError:
                    continue  # deleted meanwhile
                if mark in sizes:
                    size = sum(entry.st_size for entry in sizes.values())
                    found.append(_Found(folder, folder / mark, sizes[mark].st_mtime, size))
                elif folder.name.endswith(".part") and now - folder.stat().st_mtime > _DAY:
                    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    return found


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _delete(entry: _Found) -> bool:
    """Delete an entry, at once for all who look for it; not one that was taken up this moment."""
    aside = entry.folder.with_name(f".{secrets.token_hex(8)}.part")
    try:
        entry.folder.rename(aside)
        if (aside / entry.mark.name).stat().st_mtime > entry.used:
            aside.rename(entry.folder)
            return False
    except OSError:
        return False  # another process was faster, or the cache may only be read
    shutil.rmtree(aside, ignore_errors=True)
    return True
