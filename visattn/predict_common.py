"""What `visattn predict` does alike for images and for volumes.

What the manifest says of the weights, what a failure means for its case and for the run, how a run ends that was
stopped or that filled the disk, and what is said at the end.
"""

import errno
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from visattn.checkpoint import LIBRARIES, Checkpoint
from visattn.errors import UserError
from visattn.predict_plan import AnyCase, Planned, shown
from visattn.predict_record import MANIFEST, Entry, Record
from visattn.progress import Bar
from visattn.versions import library_versions

_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what concerns the output folder and so every case to come
_TOLD = 20  # failures that are named on the terminal

T = TypeVar("T")


def weights_of(members: Sequence[Checkpoint]) -> str | list[str]:
    """The checksum of the weights, or those of all folds: part of what decides a mask."""
    hashes = [member.sha256 for member in members]
    return hashes if len(hashes) > 1 else hashes[0]


def about(members: Sequence[Checkpoint], checkpoint: Path | str, device: object) -> dict[str, Any]:
    """What the manifest says of versions, weights and device, and of the recipe behind them."""
    first = members[0]
    return {
        "versions": library_versions(LIBRARIES),
        "checkpoint": {"path": str(first.path), "sha256": first.sha256}
        if len(members) == 1
        else {"path": str(checkpoint), "folds": [{"path": str(m.path), "sha256": m.sha256} for m in members]},
        "recipe": first.recipe,
        "labels": first.labels,
        "preprocessing": first.preprocessing,
        "training_data": first.data,
        "device": str(device),
    }


def tell_folds(members: Sequence[Checkpoint], checkpoint: Path | str) -> None:
    """Say that several networks predict together."""
    if len(members) > 1:
        print(f"mean of {len(members)} folds: {shown(checkpoint)}", file=sys.stderr)


@contextmanager
def explained_end(output: Path) -> Iterator[None]:
    """Say what a run leaves behind that is stopped, or whose disk is full.

    Raises:
        UserError: The output folder cannot be written any more.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("stopped. What is finished is recorded; the same command goes on from here", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in _FATAL:
            raise
        raise UserError(
            f"--output {shown(output)}: {error.strerror}. Finished masks are whole and recorded.\n"
            "Make room and give the same command again to go on."
        ) from error


def tell_end(
    output: Path, record: Record, done: str, kept: int, failed: int, beside: Sequence[str], what: str = "masks"
) -> None:
    """Say what was done (`done`, in words), what was kept, what failed, and where the results lie with what beside."""
    parts = [done]
    parts += [f"{kept} unchanged and kept"] if kept else []
    parts += [f"{failed} failed (listed in {MANIFEST})"] if failed else []
    lines = [", ".join(parts), f"{what}: {shown(output)} ({', '.join(beside)})"]
    if record.others:
        lines.append(
            f"{record.others} {what} of other weights or settings lie there too; they are not in {record.table.file}"
        )
    print("\n".join(lines), file=sys.stderr)


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[AnyCase], T], cases: Sequence[AnyCase], count: int
) -> Iterator[tuple[AnyCase, "Future[T]"]]:
    """Run `function` on the cases in order, at most `count` of them ahead of the consumer."""
    waiting: deque[tuple[AnyCase, Future[T]]] = deque()
    remaining = iter(cases)
    while True:
        while len(waiting) < count and (case := next(remaining, None)) is not None:
            waiting.append((case, pool.submit(function, case)))
        if not waiting:
            return
        yield waiting.popleft()


class Outcomes:
    """What becomes of the cases of one run: a failure is counted, told and recorded, and the others go on.

    Args:
        record: Of the output folder.
        bar: Of the run.
        memory: What to do where memory does not suffice for a case.
        step: How far the bar moves for a case that failed.
    """

    def __init__(self, record: Record, bar: Bar, memory: str, step: int = 0) -> None:
        self.record, self.bar, self.memory, self.step = record, bar, memory, step
        self.failed = 0

    def of(self, case: Planned, future: "Future[T]") -> T | None:
        """What a thread made of a case; None where its error fails the case.

        Raises:
            OSError: The output folder cannot be written any more.
        """
        try:
            return future.result()
        except UserError as error:
            self.fail(case, str(error))
        except OSError as error:
            if error.errno in _FATAL:
                raise
            self.fail(case, f"{error.filename or case.image}: {error.strerror or error}")
        except MemoryError:
            self.fail(case, f"{case.image}: {self.memory}")
        return None

    def fail(self, case: Planned, error: str) -> None:
        """Count and record a failure, and name it unless there have been many."""
        self.failed += 1
        self.record.failed(case, error)
        self.bar.advance(self.step)
        if self.failed <= _TOLD:
            self.bar.say(f"failed: {shown(' '.join(error.split()))}")
        elif self.failed == _TOLD + 1:
            self.bar.say(f"failed: more; all are listed in {MANIFEST}")

    def save(self, writing: Iterable[tuple[Planned, "Future[Entry]"]]) -> None:
        """Record what was written by the end, also that of an interrupted run."""
        try:
            for case, future in writing:
                if future.done() and not future.cancelled() and future.exception() is None:
                    self.record.done(case, future.result())
            self.record.save()
        except OSError:
            if sys.exception() is None:
                raise  # else the disk is full, and that is being told already
