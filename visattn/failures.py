"""What libraries and the system say when a run fails for want of memory or space, in words that name what to change."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from visattn.errors import UserError

_MEMORY = (
    "can't allocate memory",  # the CPU allocator
    "not enough memory",  # the same on other systems
    "Cannot allocate memory",  # shared memory, through which a loading process passes its batches
    "out of memory",  # CUDA, MPS, ROCm
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def explained(advice: str, folder: str) -> Iterator[None]:
    """Turn failures that a user can do something about into `UserError`s; others pass through.

    Args:
        advice: Which keys to lower when memory runs out, with their values.
        folder: Where files are being written.

    Raises:
        UserError: Out of memory, the disk is full or read-only, a loading process died, or `model.compile` failed.
    """
    try:
        yield
    except Exception as error:
        told = explanation(error, advice, folder)
        if told is None:
            raise
        raise UserError(told) from error


def explanation(error: Exception, advice: str, folder: str) -> str | None:
    """What to tell about `error`, or None where it is a defect that wants its traceback."""
    text = str(error)
    if isinstance(error, UserError):
        # One raised in a loading process arrives with that process's traceback as its text.
        return text.split("UserError: ")[-1].strip() if text.startswith("Caught UserError in DataLoader") else text
    if re.search(r"DataLoader worker.*(killed|exited|Bus error)", text) or "bus error" in text.lower():
        return (
            "a process that loads images died, most often because memory (or shared memory) ran out.\n"
            "Lower data.num_workers, or set data.cache to false."
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(part in text for part in _MEMORY)
    ):
        return f"out of memory.\n{advice}"
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in _SPACE | _DENIED:
            where = cause.filename or folder
            what = "free space" if cause.errno in _SPACE else "make it writable"
            return (
                f"{where}: cannot be written: {cause.strerror}.\n"
                f"Files written before are whole: {what}, then continue with --run {folder} --ckpt_path last"
            )
        if type(cause).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return (
                f"model.compile: torch.compile failed: {_first_line(cause)}\nSet model.compile to false, or install "
                "what it asks for."
            )
        if type(cause).__name__ == "MisconfigurationException":
            return f"trainer: {_first_line(cause)}"
    return None


def _first_line(error: BaseException) -> str:
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
