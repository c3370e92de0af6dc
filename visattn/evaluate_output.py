"""The folder that `visattn evaluate` writes: whole or not at all, and never in the place of anything but its like."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visattn.errors import UserError
from visattn.predict_plan import shown
from visattn.scored import CASES, INPUTS, SUMMARY, read_summary

REPORT, OVERLAYS = "report.html", "overlays"

_OURS = re.compile(r"(cases\.csv|(summary|inputs)\.json|report\.html|(curves|confusion|calibration)\.png|overlays)")
_OVERLAY = re.compile(r"(worst|median|best)-\d+-.*\.png", re.DOTALL)


def default_output(prediction: Path) -> Path:
    """`evaluation/` in the folder of masks; for the masks of a run, which only the run writes to, beside them."""
    of_run = prediction.name == "masks" and (prediction.parent / SUMMARY).is_file()
    return (prediction.parent if of_run else prediction) / "evaluation"


def is_evaluation(folder: Path) -> bool:
    """Whether `folder` holds the results of an earlier evaluation and nothing else, hidden files aside."""
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    overlays = os.listdir(folder / OVERLAYS) if (folder / OVERLAYS).is_dir() else []
    if not all(_OURS.fullmatch(name) for name in names) or not all(_OVERLAY.fullmatch(name) for name in overlays):
        return False
    if not all((folder / name).is_file() for name in (CASES, SUMMARY, INPUTS)):
        return False
    try:
        return {"prediction", "truth"} <= read_summary(folder / SUMMARY).keys()
    except UserError:
        return False


@contextmanager
def evaluation_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder, called as `output`, which at the end takes its place; on an exception nothing changes.

    An existing folder is replaced by two renames. A process killed between them leaves none under the name, but never
    a partial one.

    Raises:
        UserError: `output` cannot be written, or holds something that is no earlier evaluation.
    """
    path = Path(os.path.realpath(output))
    named = f"--output {shown(output)}"
    if path.exists() and not path.is_dir():
        raise UserError(f"{named}: is a file; name a folder")
    if os.path.ismount(path):
        raise UserError(f"{named}: is a mount point, which cannot be replaced; name a folder in it")
    if path.is_dir() and any(path.iterdir()) and not is_evaluation(path):
        raise UserError(
            f"{named}: holds something other than the results of an evaluation.\nName another folder, or empty it."
        )
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            work = tempfile.TemporaryDirectory(prefix=f".{path.name[:40]}-", suffix=".part", dir=path.parent)
        except OSError as error:
            raise UserError(f"{named}: cannot be written: {error.strerror}") from error
        with work:
            new = Path(work.name, "new", path.name)
            try:
                new.mkdir(parents=True)  # the temporary folder is private, this one has the usual permissions
                _try_writing(new / ".try")
                yield new
                _put(new, path, Path(work.name, "old"))
            except OSError as error:
                raise UserError(f"{named}: cannot be written: {error.strerror}. Nothing was changed.") from error
    finally:
        for folder in made:
            try:
                folder.rmdir()  # fails, as it should, where something was written
            except OSError:
                break


def _try_writing(path: Path) -> None:
    with path.open("wb", buffering=0) as handle:
        handle.write(bytes(4096))
        os.fsync(handle.fileno())
    path.unlink()


def _put(new: Path, path: Path, old: Path) -> None:
    """Rename `new` to `path`; what was there goes to `old`, and comes back if that fails."""
    replaced = path.exists()
    if replaced:
        os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        if replaced:
            os.rename(old, path)
        raise
