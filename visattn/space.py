"""Whether a run can be written where it is to be written, found out before hours are spent on it."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visattn.errors import UserError

MARGIN = 50_000_000  # bytes for tables, logs, pictures and the report
LOCK = ".lock"


def refuse_unwritable(folder: Path, option: str) -> None:
    """Look at the nearest folder that exists, before anything is made.

    Raises:
        UserError: It is read-only, full, or a file; `option` names what to change.
    """
    place = _nearest(folder)
    if not place.is_dir():
        raise UserError(f"{option}: {folder} cannot be a folder: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{option}: {place} is read-only; name a folder that can be written")
    if shutil.disk_usage(place).free < MARGIN:
        raise UserError(f"{option}: the disk of {place} is full; free space or name another folder")


def refuse_too_small(folder: Path, checkpoint: int, count: int) -> None:
    """Compare what a run needs with what is free.

    Args:
        folder: The run folder, or the one that it will be made in.
        checkpoint: Bytes of one checkpoint.
        count: How many will be written beside what lies there already.

    Raises:
        UserError: It does not fit.
    """
    place = _nearest(folder)
    free, needed = shutil.disk_usage(place).free, checkpoint * count + MARGIN
    if free < needed:
        raise UserError(
            f"{place}: {free / 1e6:.0f} MB are free, and this run needs about {needed / 1e6:.0f} MB "
            f"({count} x {checkpoint / 1e6:.0f} MB of checkpoints).\n"
            "Free space, or name a folder on another disk with --run or trainer.default_root_dir."
        )


def _nearest(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Prove that `folder` can be written, and keep other training processes out of it; a killed one lets go of it.

    Raises:
        UserError: Read-only, full, or another process trains there.
    """
    path = folder / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}. Name another with --run") from error
    try:
        try:
            # Not flock, which forked loading processes inherit and hold for seconds after this one was killed.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{folder}: another process is training there. Wait for it, or stop it") from None
        except OSError:  # a file system without locks
            pass
        try:
            os.write(handle, bytes(4096))
            os.fsync(handle)
            os.ftruncate(handle, 0)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}. Free space or name another") from error
        yield
    finally:
        os.close(handle)
