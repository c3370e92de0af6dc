"""Files that appear whole or not at all, and the files below a folder."""

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end it is synced to disk and takes the final name.

    A reader, or a process killed half-way, never sees a partial file under the final name. The temporary keeps the
    suffix of `path`, because writers such as Pillow choose the format by it. On an exception it is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp, whose files are private whatever the umask says; the umask can only be read by changing it, which
    # would show in other threads.
    temporary = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(6)}.part{path.suffix}")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a full disk names no file, and nobody knows the temporary's name
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path | str) -> None:
    """Remove the temporary files of processes that were killed while they wrote into `folder` itself."""
    for path in Path(folder).glob(".*.part*"):
        if path.is_file():  # a folder that was being filled belongs to its owner
            path.unlink(missing_ok=True)


@contextmanager
def open_regular(path: Path | str) -> Iterator[BinaryIO]:
    """Open a file to read from; a pipe or a device, from which reading may never end, is an `OSError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe that nobody writes to would wait
    except ValueError as error:  # a NUL character, or one that no file system knows
        raise OSError(errno.EINVAL, "no name that a file can have", ascii(str(path))) from error
    with open(descriptor, "rb") as handle:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "a folder, a pipe or a device, not a file", str(path))
        yield handle


def read_small(path: Path | str, most: int = 1 << 28) -> bytes:
    """The bytes of a file that is read whole; more than `most` of them, or a pipe or a device, are an `OSError`."""
    with open_regular(path) as handle:
        data = handle.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most} bytes, which is too many for such a file", str(path))
    return data


def write_bytes_atomic(path: Path | str, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text_atomic(path: Path | str, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    write_bytes_atomic(path, text.encode())


def _raise(error: OSError) -> None:
    """What os.walk calls where a folder may not be listed; by default it leaves that folder out in silence."""
    raise error


def walk_files(folder: Path, skipped: Path | None = None) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each folder below `folder`, itself first, with its files in order of their names.

    Links to folders are followed, each folder once. Hidden files and folders, and the folder `skipped`, are left out.
    """
    visited: set[str] = set()
    left_out = os.path.realpath(skipped) if skipped is not None else None
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        visited.add(os.path.realpath(root))  # a link to a folder above would lead in circles
        inner = [name for name in sorted(folders) if not name.startswith(".")]
        real = {name: os.path.realpath(os.path.join(root, name)) for name in inner}
        folders[:] = [name for name in inner if real[name] not in visited and real[name] != left_out]
        yield Path(root), [Path(root, name) for name in sorted(files) if not name.startswith(".")]


def predicted_files(folder: Path) -> set[str]:
    """The files that `visattn predict` wrote into a folder and those below, by its manifest there; real paths.

    An earlier output that lies within an input must not be taken for images. A manifest that cannot be read, or is that
    of another tool, says nothing.
    """
    try:
        cases = json.loads(read_small(folder / "manifest.json"))["cases"]
        names = {str(name) for case in cases for name in (case["mask"], *case["files"])}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()
    return {os.path.realpath(folder / name) for name in names if "\0" not in name}
