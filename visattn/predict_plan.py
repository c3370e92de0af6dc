"""Which files `visattn predict` reads and writes, settled and checked before anything is written."""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from visattn.data.images import SUFFIXES, image_size
from visattn.errors import UserError, nearest
from visattn.errors import shown as shown  # other commands take it from here
from visattn.files import predicted_files, walk_files
from visattn.labels import Labels
from visattn.overlay import safe_name

LOCK = ".visattn.lock"
_LONGEST_NAME = 255  # bytes; every file system in use allows as many


class Planned(Protocol):
    """One case: what it is read from, and what is written for it, relative to the output folder."""

    @property
    def name(self) -> str:
        """What the case is called."""
        ...

    @property
    def image(self) -> Path:
        """The input as it was named."""
        ...

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All files that it is read from."""
        ...

    @property
    def mask(self) -> str:
        """The file that tells that the case is done."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """All files that are written, the mask last."""
        ...


AnyCase = TypeVar("AnyCase", bound=Planned)


@dataclass(frozen=True)
class Case:
    """One image and the files that its prediction consists of, relative to the output folder."""

    image: Path
    mask: str
    probabilities: tuple[str, ...] = ()
    overlay: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """All files, the mask last: where it is there, the others are."""
        return (*self.probabilities, *([self.overlay] if self.overlay else []), self.mask)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that it is read from."""
        return (self.image,)

    @property
    def name(self) -> str:
        """The mask's path without its ending."""
        return self.mask.removesuffix(".png")


def find_images(inputs: Sequence[Path], output: Path, *, predicted: bool = False) -> list[tuple[Path, PurePosixPath]]:
    """The images that `inputs` name, each with its path relative to the input folder (its name, for a file).

    Folders are searched with all subfolders, linked ones too; hidden files and folders and the output folder are left
    out, and without `predicted` what an earlier `visattn predict` wrote. A file that is named outright is taken
    whatever its ending.

    Raises:
        UserError: an input does not exist, holds no image, or is the output folder.
    """
    found: dict[tuple[str, PurePosixPath], Path] = {}
    target = output.resolve()
    for given in inputs:
        if given.is_file():
            images = [(given, PurePosixPath(given.name))]
        elif given.is_dir():
            if given.resolve() == target:
                raise UserError(
                    f"--output {shown(output)}: is an input folder too.\nName another folder for the masks."
                )
            images = list(_walk(given, target, predicted))
            if not images:
                raise UserError(f"{shown(given)}: no image in this folder.\nImages end in: {', '.join(SUFFIXES)}")
        else:
            if given.exists():
                raise UserError(f"{shown(given)}: a pipe or a device, not an image file or a folder.")
            there = [p.name for p in given.parent.iterdir()] if given.parent.is_dir() else []
            guess = nearest(given.name, there)
            hint = f"\nDid you mean {shown(given.parent / guess)}?" if guess else ""
            raise UserError(f"{shown(given)}: no such file or folder.{hint}")
        for path, relative in images:
            # A file named twice, as `predict photos photos/a.jpg`, is one case if it leads to one mask.
            found.setdefault((os.path.realpath(path), relative), path)
    return [(path, relative) for (_, relative), path in found.items()]


def _walk(folder: Path, skipped: Path, predicted: bool) -> Iterator[tuple[Path, PurePosixPath]]:
    written: set[str] = set()
    for inner, files in walk_files(folder, skipped):
        if not predicted:
            written |= predicted_files(inner)
        for path in files:
            if written and os.path.realpath(path) in written:  # an earlier output within the input
                continue
            if path.suffix.lower() in SUFFIXES and path.is_file():
                yield path, PurePosixPath(path.relative_to(folder).as_posix())


def plan_cases(
    images: Sequence[tuple[Path, PurePosixPath]],
    output: Path,
    labels: Labels,
    probabilities: bool,
    overlays: bool,
    case_sensitive: bool = True,
) -> list[Case]:
    """The files of each case, in the order of the images.

    Masks mirror the input folders; `probabilities/` and `overlays/` do so once more.

    Raises:
        UserError: two inputs would write one file, or an input would be overwritten.
    """
    cases = []
    names = channel_names(labels)
    for path, relative in images:
        folder = relative.parent
        files = tuple(
            str("probabilities" / folder / fitted_name(relative.stem, f"{'_' + name if name else ''}_prob.png"))
            for name in names
        )
        mask = str(folder / fitted_name(relative.stem, ".png"))
        overlay = str("overlays" / folder / fitted_name(relative.stem, ".png")) if overlays else None
        cases.append(Case(path, mask, files if probabilities else (), overlay))
    check_collisions(cases, output, case_sensitive)
    check_inside(cases, output)
    return cases


def channel_names(labels: Labels) -> tuple[str, ...]:
    """For each output channel its part of a file name, none of them twice; empty if there is one channel."""
    if labels.channels == 1:
        return ("",)
    names = labels.foreground if labels.regions else labels.names
    parts = [safe_name(name, 40) for name in names]
    folded = [part.casefold() for part in parts]
    return tuple(f"{p}-{i}" if folded.count(p.casefold()) > 1 else p for i, p in enumerate(parts))


def fitted_name(stem: str, ending: str) -> str:
    """`stem` + `ending`; a stem too long for a file name is cut and told apart by a hash of the whole."""
    raw = os.fsencode(stem)
    room = _LONGEST_NAME - len(os.fsencode(ending))
    if len(raw) <= room:
        return stem + ending
    digest = hashlib.sha256(raw).hexdigest()[:8]
    return raw[: room - 9].decode("utf-8", "ignore") + "~" + digest + ending


def check_collisions(cases: Sequence[Planned], output: Path, case_sensitive: bool) -> None:
    """Make sure that every file is written once and no input is overwritten.

    Raises:
        UserError: Two inputs would write one file, or an input would be overwritten.
    """

    def key(path: str) -> str:
        # macOS: names that differ in case, or in how an accent is composed, are one file
        return path if case_sensitive else unicodedata.normalize("NFC", path).casefold()

    writers: defaultdict[str, list[tuple[Path, str]]] = defaultdict(list)
    for case in cases:
        for file in case.files:
            writers[key(file)].append((case.image, file))
    for file in list(writers):
        for parent in PurePosixPath(file).parents:
            if str(parent) in writers:  # a mask a.png, and a folder a.png for the masks of another folder
                writers[str(parent)].append(writers[file][0])
    double = [found for found in writers.values() if len(found) > 1]
    if double:
        first = double[0]
        more = f" (and {len(double) - 1} more such files)" if len(double) > 1 else ""
        raise UserError(
            f"two inputs would write the same file {shown(output / first[0][1])}{more}:\n"
            f"  {shown(first[0][0])}\n  {shown(first[1][0])}\n{_advice(first[0][0], first[1][0])}"
        )
    sources = {os.path.realpath(path) for case in cases for path in case.inputs}
    for case in cases:
        for file in case.files:
            if os.path.realpath(output / file) in sources:
                raise UserError(
                    f"{shown(output / file)}: is an input image and would be overwritten.\nName another --output."
                )


def check_inside(cases: Sequence[Planned], output: Path) -> None:
    """Refuse links in the output folder that lead out of it: masks would be written there.

    Raises:
        UserError: There is such a link.
    """
    real = Path(os.path.realpath(output))
    for folder in sorted({str(PurePosixPath(file).parent) for case in cases for file in case.files}):
        if not Path(os.path.realpath(output / folder)).is_relative_to(real):
            raise UserError(
                f"{shown(output / folder)}: a link that leads out of the output folder.\n"
                "Remove it, or name another --output."
            )


def _advice(one: Path, other: Path) -> str:
    if one.parent == other.parent:
        return (
            "A mask is named by its image's stem: rename one of the two, or predict each into an --output of its own."
        )
    return "Rename one, give the folder above both as the INPUT, or use an --output for each."


@contextmanager
def output_folder(output: Path) -> Iterator[bool]:
    """Create the output folder, prove that it can be written, and keep other processes out of it meanwhile.

    If what happens inside fails before a file was written, the folders made here disappear again.

    Yields:
        Whether names that differ in case are different files there.

    Raises:
        UserError: it cannot be written, is full, or another `visattn predict` is writing there.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {shown(output)}: is a file; name a folder for the masks.")
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        _refuse_foreign_lock(handle, output)
    except OSError as error:
        raise UserError(f"--output {shown(output)}: cannot be written: {error.strerror}.") from error
    try:
        _lock(handle, output)
        try:
            _try_writing(handle, output)
            yield not (output / LOCK.upper()).exists()
        finally:
            (output / LOCK).unlink(missing_ok=True)
    finally:
        os.close(handle)
        for path in made:
            try:
                path.rmdir()  # fails, as it should, where something was written
            except OSError:
                break


def _refuse_foreign_lock(handle: int, output: Path) -> None:
    """A lock that is another name of some file, or a pipe, is not ours: writing to it would spoil that file."""
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        raise UserError(f"--output {shown(output / LOCK)}: is no lock of visattn predict.\nRemove it, or name another.")


def _try_writing(handle: int, output: Path) -> None:
    try:
        os.write(handle, bytes(4096))
        os.fsync(handle)
    except OSError as error:
        raise UserError(f"--output {shown(output)}: cannot be written: {error.strerror}.") from error


def _lock(handle: int, output: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The process that had it may have removed the file since we opened it.
        held = (output / LOCK).exists() and os.path.samestat(os.fstat(handle), (output / LOCK).stat())
    except OSError as error:
        # Some network file systems know no locks; there the manifest is the only guard.
        held = error.errno not in (errno.EAGAIN, errno.EACCES)
    if not held:
        raise UserError(
            f"--output {shown(output)}: another visattn predict is writing there.\nWait for it, or name another folder."
        )


def check_space(cases: Sequence[Case], output: Path, channels: int) -> None:
    """Compare an estimate of what will be written, from a sample of the images' headers, with the free space.

    Raises:
        UserError: the space does not suffice.
    """
    sample = cases[:: max(1, len(cases) // 100)]
    total = 0.0
    for case in sample:
        try:
            height, width = image_size(case.image)
        except UserError:
            continue  # told when its turn comes
        # Bytes a pixel: a mask compresses to next to nothing, 16 bits of probability hardly, an overlay as a photo.
        total += height * width * (0.05 + (1.5 * channels if case.probabilities else 0) + (2.0 if case.overlay else 0))
    need = total / max(1, len(sample)) * len(cases)
    free = shutil.disk_usage(output).free
    if need > free:
        raise UserError(
            f"--output {shown(output)}: needs about {need / 1e6:,.0f} MB, but {free / 1e6:,.0f} MB are free.\n"
            "Free some space, or leave out --probabilities or --overlays."
        )
