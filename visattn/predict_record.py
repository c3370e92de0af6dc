"""What `visattn predict` has done in an output folder: `manifest.json` and `predictions.csv`.

The manifest is the memory between runs. A case stands in it as `planned` before its files are touched, then as `done`
with the hashes of what was written, or as `failed`. So a run that is killed at any moment leaves a folder in which each
file is known to be ours or not, and the next run does again only what is missing. Files that visattn did not write, or
that were changed by hand since, are never overwritten without being asked.
"""

import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from visattn import NOTICE
from visattn.cells import cell
from visattn.errors import UserError
from visattn.files import read_small, write_bytes_atomic
from visattn.predict_plan import AnyCase, Planned, shown

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass
class Entry:
    """One case in the manifest.

    Attributes:
        image: The input as it was named.
        mask: The mask's path in the output folder.
        state: `planned`, `done` or `failed`.
        settings: Which of the manifest's settings it was made with.
        input_sha256: Of the image file.
        files: Path to hash of all that was written.
        size: Height and width in pixels, or the three sides of a volume in voxels.
        seconds: Reading, network and writing.
        rows: One for each foreground class.
        error: Why it failed.
        notes: What a user should know of the input.
        peak_mb: The process's largest memory until the case was done; 0 where it was not measured.
        case: The case's name.
    """

    image: str
    mask: str
    state: str
    settings: str
    input_sha256: str = ""
    files: dict[str, str] = field(default_factory=dict)
    size: list[int] = field(default_factory=list)
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    notes: list[str] = field(default_factory=list)
    peak_mb: float = 0.0
    case: str = ""


@dataclass(frozen=True)
class Table:
    """The table beside the manifest.

    Args:
        file: Its name.
        columns: Its columns.
        sizes: How many sizes an entry has.
        common: What an entry's rows have in common.
    """

    file: str
    columns: tuple[str, ...]
    sizes: int
    common: Callable[[Entry], dict[str, Any]]

    def content(self, entries: Sequence[Entry]) -> bytes:
        """The table of the entries that are done, as CSV."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        for entry in entries:
            if entry.state == "done":
                common = self.common(entry)
                for row in entry.rows:
                    writer.writerow({key: cell((common | row).get(key)) for key in self.columns})
        return text.getvalue().encode("utf-8", "backslashreplace")


def _of_image(entry: Entry) -> dict[str, Any]:
    height, width = entry.size
    return {
        "case": entry.mask.removesuffix(".png"),
        "image": entry.image,
        "mask": entry.mask,
        "seconds": round(entry.seconds, 3),
        "width": width,
        "height": height,
    }


IMAGES = Table(
    "predictions.csv",
    (
        *("case", "class", "pixels", "percent_of_image", "components", "mean_foreground_probability"),
        *("seconds", "width", "height", "image", "mask"),
    ),
    2,
    _of_image,
)


class Record:
    """The manifest and the table of an output folder.

    Args:
        output: The folder.
        settings: What decides a result besides the image: hash of the weights, threshold, and so on.
        about: Further facts for the manifest: versions, device, checkpoint.
        fresh: Whether to forget what an earlier run recorded if it cannot be read.
        table: The table beside the manifest.

    Raises:
        UserError: There is a manifest that visattn did not write.
    """

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, Any],
        about: Mapping[str, Any],
        fresh: bool = False,
        table: Table = IMAGES,
    ) -> None:
        self.output, self.table = output, table
        text = json.dumps(settings, sort_keys=True)
        self.settings_id = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.about = dict(about)
        self.entries, known = self._read(fresh)
        self.settings = known | {self.settings_id: dict(settings)}
        self._saved = 0.0
        self._pause = 2.0
        self._hashes: dict[tuple[Path, ...], str] = {}  # of inputs that hold many cases

    def _read(self, fresh: bool) -> tuple[dict[str, Entry], dict[str, Any]]:
        path = self.output / MANIFEST
        try:
            content = json.loads(read_small(path))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            entries = [_entry(values, self.table.sizes) for values in content["cases"]]
            return {entry.mask: entry for entry in entries}, dict(content["settings"])
        except FileNotFoundError:
            return {}, {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if fresh:
                return {}, {}
            raise UserError(
                f"{shown(path)}: not a manifest of this visattn predict.\n"
                "Name another --output, or add --overwrite to replace it and the masks beside it."
            ) from error

    def unfinished(self, cases: Sequence[AnyCase], overwrite: bool) -> list[AnyCase]:
        """The cases that are still to be done.

        A case is finished if its image, the weights and the settings are unchanged and its files are there.

        Raises:
            UserError: Something in the way was not written by visattn, or was changed since.
        """
        todo, foreign = [], []
        for case in cases:
            entry = self.entries.get(case.mask)
            if not overwrite and entry is not None and self._finished(case, entry):
                continue
            todo.append(case)
            if overwrite or (entry is not None and entry.state != "done"):
                continue
            foreign += [file for file in case.files if not self._ours(file, entry)]
        if foreign:
            listed = "\n".join(f"  {shown(self.output / file)}" for file in foreign[:2])
            raise UserError(
                f"{len(foreign)} files in the way were not written by visattn predict, or were changed since:\n"
                f"{listed}{' ...' if len(foreign) > 2 else ''}\n"
                "Name another --output, or add --overwrite to replace them."
            )
        return todo

    def _finished(self, case: Planned, entry: Entry) -> bool:
        return (
            entry.state == "done"
            and entry.settings == self.settings_id
            and all(file in entry.files and (self.output / file).is_file() for file in case.files)
            and entry.input_sha256 == self._hash(case.inputs)
        )

    def _hash(self, inputs: tuple[Path, ...]) -> str:
        if inputs not in self._hashes:
            self._hashes = {inputs: inputs_hash(inputs)}
        return self._hashes[inputs]

    def _ours(self, file: str, entry: Entry | None) -> bool:
        path = self.output / file
        if not os.path.lexists(path):
            return True
        return path.is_file() and entry is not None and entry.files.get(file) == file_hash(path)

    def start(self, cases: Sequence[Planned]) -> None:
        """Note that the files of `cases` are about to be written, before the first one is."""
        for mask, entry in list(self.entries.items()):
            # What a killed run planned stays: it may have written a mask that it had no time to record.
            if entry.state == "failed" or (
                entry.state == "done" and mask in entry.files and not (self.output / mask).is_file()
            ):
                del self.entries[mask]
        for case in cases:
            old = self.entries.get(case.mask)
            files = dict(old.files) if old else {}  # so that what becomes obsolete can be removed
            self.entries[case.mask] = Entry(
                str(case.image), case.mask, "planned", self.settings_id, files=files, case=case.name
            )
        self._remove_leftovers({(self.output / file).parent for case in cases for file in case.files} | {self.output})
        self.save()

    def done(self, case: Planned, entry: Entry) -> None:
        """Take up a finished case; files that an earlier run wrote for it and this one did not are removed."""
        self._remove_obsolete(case, keep=set(entry.files))
        self.entries[case.mask] = entry
        self.save_sometimes()

    def failed(self, case: Planned, error: str) -> None:
        """Take up a case that failed; an older mask must not pass for its result."""
        self._remove_obsolete(case, keep=set())
        for file in case.files:
            with suppress(OSError):  # it cannot be there, if what failed was making its folder
                (self.output / file).unlink()
        self.entries[case.mask] = Entry(
            str(case.image), case.mask, "failed", self.settings_id, error=error, case=case.name
        )
        self.save_sometimes()

    def _remove_obsolete(self, case: Planned, keep: set[str]) -> None:
        for file, digest in self.entries[case.mask].files.items():
            path = self.output / file
            # The name comes from a file that anyone may have edited: it must not lead out of the folder.
            inside = path.resolve().is_relative_to(self.output.resolve())
            if file not in keep and inside and path.is_file() and file_hash(path) == digest:
                path.unlink()

    def _remove_leftovers(self, folders: set[Path]) -> None:
        """Remove temporary files of a killed run; no other run is active, since we hold the lock."""
        for folder in folders:
            if folder.is_dir():
                for path in folder.glob(".*.part.*"):
                    path.unlink(missing_ok=True)

    def save_sometimes(self) -> None:
        """Save, but so seldom that saving costs at most a few percent of the time."""
        if time.monotonic() - self._saved > self._pause:
            self.save()

    def save(self) -> None:
        """Write table and manifest, each whole or not at all."""
        started = time.monotonic()
        current = [e for _, e in sorted(self.entries.items()) if e.settings == self.settings_id]
        write_bytes_atomic(self.output / self.table.file, self.table.content(current))
        content = {
            "format": FORMAT,
            "notice": NOTICE,
            **self.about,
            "settings": self.settings,
            "current_settings": self.settings_id,
            "cases": [asdict(entry) for _, entry in sorted(self.entries.items())],
        }
        # ASCII: file names that are not valid UTF-8 survive as escapes.
        write_bytes_atomic(self.output / MANIFEST, json.dumps(content, indent=1).encode("ascii"))
        self._saved = time.monotonic()
        self._pause = max(2.0, 20 * (self._saved - started))

    @property
    def others(self) -> int:
        """How many masks in the folder were made with other weights or settings, and are not in the table."""
        return sum(e.state == "done" and e.settings != self.settings_id for e in self.entries.values())


def _entry(values: Mapping[str, Any], sizes: int) -> Entry:
    entry = Entry(**values)
    empty = Entry("", "", "", "")
    for item in fields(entry):
        if not isinstance(getattr(entry, item.name), type(getattr(empty, item.name))):
            raise TypeError(f"{item.name} of {entry.mask}")
    if entry.state == "done" and len(entry.size) != sizes:
        raise ValueError(f"size of {entry.mask}")
    return entry


def file_hash(path: Path) -> str:
    """SHA-256 of a file, empty if it cannot be read."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return ""


def inputs_hash(paths: Sequence[Path]) -> str:
    """SHA-256 of the only file, or of the hashes of several; empty if one cannot be read."""
    hashes = [file_hash(path) for path in paths]
    if len(hashes) == 1 or not all(hashes):
        return hashes[0] if len(hashes) == 1 else ""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
