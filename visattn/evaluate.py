"""`visattn evaluate`: scores a folder of masks, made by any tool, as `validate` and `test` score a network.

A mask is no probability map, so the measures are those that need none: the suite "surface". S, E, weighted F and the
means of PraNet's protocol could be computed of a mask as well, but would have the names and not the meaning of the
numbers that `validate` and `test` give for probabilities (`docs/evaluate.md`).
"""

import hashlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from visattn import NOTICE
from visattn.data.cases import Case
from visattn.data.images import image_size, read_mask
from visattn.data.splits import find_groups
from visattn.errors import UserError
from visattn.evaluate_output import OVERLAYS, REPORT, default_output, evaluation_folder
from visattn.evaluate_plan import Pair, Plan, few, plan_pairs, read_labels
from visattn.labels import IGNORE, Labels
from visattn.metrics import METRICS, CaseRow, Summary, case_metrics, summarise
from visattn.metrics.confusion import confusion_shape, count_confusion, describe_confusion
from visattn.predict_plan import shown
from visattn.progress import Bar
from visattn.report import write_report
from visattn.scored import CASES, INPUTS, SUMMARY, Input, write_cases, write_inputs, write_overlays, write_summary
from visattn.versions import library_versions

Missing = Literal["error", "miss"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_LIBRARIES = ("visattn", "numpy", "scipy", "pillow")
_MOST_LINES = 5  # of an error, below its first
_LONGEST_LINE = 300


@dataclass(frozen=True)
class Scores:
    """One case.

    Attributes:
        rows: One for each foreground class; empty where the case was only read.
        confusion: Its pixels, as `count_confusion` gives them.
        digest: SHA-256 of the bytes of both masks.
        rounded: Whether the prediction holds values that the labels do not name and that were taken for the nearest.
    """

    rows: list[CaseRow]
    confusion: NDArray[np.int64]
    digest: str
    rounded: bool


def evaluate_folder(
    prediction: Path | str,
    truth: Path | str,
    labels: Path | str,
    output: Path | str | None = None,
    images: Path | str | None = None,
    group_by: str | None = None,
    missing: Missing = "error",
) -> int:
    """Score the masks below `prediction` against those below `truth`, print the means and write a scored folder.

    Args:
        prediction: Folder of predicted masks, with subfolders.
        truth: Folder of true masks, or a data set with images/ and masks/.
        labels: YAML file with the recipe's labels block.
        output: Folder for the results; default: `evaluation/` in `prediction`, or beside it for the masks of a run.
        images: Folder of images, to draw overlays on; default: the images/ beside the true masks, if there are such.
        group_by: As `data.split.group_by`, of the names of the cases.
        missing: What a case without prediction is: an error, or a miss as if the predicted mask were empty. With
            "miss", predictions without a true mask are left out.

    Returns:
        The exit code, 0.

    Raises:
        UserError: Something is wrong with a folder or a file in it, or the output cannot be written. All problems are
            in one message, and nothing was written.
    """
    started = time.monotonic()
    prediction, truth = Path(prediction), Path(truth)
    meaning = read_labels(Path(labels))
    target = default_output(prediction) if output is None else Path(output)
    plan = plan_pairs(prediction, truth, None if images is None else Path(images), target)
    groups = _groups(plan, group_by, str(truth))
    with evaluation_folder(target) as folder:
        refused = bool(plan.problems) or (missing == "error" and bool(plan.missing or plan.extra))
        scores, problems = _score(plan.pairs, meaning, measure=not refused)
        if refused or problems:
            raise UserError(_refusal(prediction, plan, problems, missing))
        rows: list[dict[str, Any]] = [
            {"case": pair.name, "group": group, "class": name, **row}
            for pair, group, scored in zip(plan.pairs, groups, scores, strict=True)
            for name, row in zip(meaning.foreground, scored.rows, strict=True)
        ]
        entries = summarise(rows)
        summary = {
            "notice": NOTICE,
            "prediction": str(prediction),
            "truth": str(truth),
            "split": "",
            "cases": len(plan.pairs),
            "groups": len(set(groups)),
            "group_by": group_by,
            "missing": list(plan.missing),
            "extra": [str(path) for path in plan.extra],
            "metrics": [asdict(entry) for entry in entries],
            "means": _means(entries, meaning, len(plan.pairs)),
            "confusion": _confusion(scores, meaning),
            "data": {
                "description": str(truth),
                "fingerprint": _fingerprint(plan.pairs, scores),
                "counts": {"scored": len(plan.pairs)},
            },
            "seconds": round(time.monotonic() - started, 1),
            "versions": library_versions(_LIBRARIES),
            "labels": meaning.to_config(),
        }
        inputs = {
            (group, pair.name): Input(pair.name, group, str(truth), pair.image, pair.truth, pair.prediction)
            for pair, group in zip(plan.pairs, groups, strict=True)
        }
        write_cases(folder / CASES, rows, split="")
        write_summary(folder, summary)
        write_inputs(folder, list(inputs.values()))
        write_overlays(folder, rows, inputs, meaning)
        written = write_report(folder)
    print_table(entries)
    _tell(plan, groups, target, sum(scored.rounded for scored in scores), report=written is not None)
    return 0


def _groups(plan: Plan, group_by: str | None, root: str) -> list[str]:
    # The table and the expression look at the stem of the image, which is the last part of the name.
    cases = [Case(pair.name, Path(f"{pair.name}.png"), pair.truth, pair.name, root) for pair in plan.pairs]
    try:
        return find_groups(cases, group_by)
    except UserError as error:
        raise UserError(str(error).replace("data.split.group_by", "--group_by")) from None


def _score(pairs: Sequence[Pair], labels: Labels, measure: bool) -> tuple[list[Scores], list[str]]:
    """The scores of the cases that can be read, and what is wrong with the others."""
    scores: list[Scores] = []
    problems: list[str] = []
    with Bar("scoring" if measure else "checking", len(pairs)) as bar:
        for result in _in_order(lambda pair: score_pair(pair, labels, measure), pairs):
            if isinstance(result, str):
                problems.append(result)
            else:
                scores.append(result)
            bar.advance()
    return scores, problems


def score_pair(pair: Pair, labels: Labels, measure: bool = True) -> Scores | str:
    """Read and score one case at its native size; what is wrong with it, if anything is.

    Args:
        pair: Its files.
        labels: What the values in the masks mean.
        measure: Whether to compute the measures; otherwise the files are read and checked alone.
    """
    try:
        truth, _ = _read(pair.truth, labels)
        predicted, rounded = np.zeros_like(truth), False
        if pair.prediction is not None:
            predicted, values = _read(pair.prediction, labels)
            rounded = not _named(labels).issuperset(np.flatnonzero(np.bincount(values.ravel())).tolist())
        _check(pair, predicted, truth)
        digest = hashlib.sha256()
        for path in filter(None, (pair.truth, pair.prediction)):
            digest.update(path.read_bytes())
        rows = case_metrics(predicted, truth, labels, suite="surface") if measure else []
        return Scores(rows, count_confusion(predicted, truth, labels), digest.hexdigest(), rounded)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or pair.truth}: cannot be read: {error.strerror}"
    except MemoryError:
        return f"{pair.truth}: memory does not suffice for this case"


def _read(path: Path, labels: Labels) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """A mask as class indices and as values of the file; the only place that knows how masks are stored."""
    values = read_mask(path)
    return labels.encode(values, str(path)), values


def _named(labels: Labels) -> set[int]:
    return {value for group in (*labels.values, labels.ignore) for value in group}


def _check(pair: Pair, predicted: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
    sizes = [(pair.prediction, predicted.shape, "Resize it by nearest neighbour: scores are taken at the native size")]
    if pair.image is not None:
        sizes.append((pair.image, image_size(pair.image), "Overlays need an image of the same size"))
    for path, shape, advice in sizes:
        if shape != truth.shape:
            turned = " (one of the two may carry an EXIF orientation)" if shape == truth.shape[::-1] else ""
            raise UserError(
                f"{path}: {shape[1]} x {shape[0]} pixels, but its true mask {pair.truth.name} has "
                f"{truth.shape[1]} x {truth.shape[0]}{turned}. {advice}"
            )
    undecided = int(np.count_nonzero((predicted == IGNORE) & (truth != IGNORE)))
    if undecided:
        raise UserError(
            f"{pair.prediction}: holds the value to ignore in {undecided} pixels that count in {pair.truth.name}; "
            "a prediction names a class for every pixel"
        )


def _in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results in the order of the items, computed by a few threads that keep little ahead."""
    threads = min(8, os.cpu_count() or 1)  # decoding and much of the scoring releases the interpreter's lock
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="visattn")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _refusal(prediction: Path, plan: Plan, problems: Sequence[str], missing: Missing) -> str:
    """One message for all that is wrong."""
    lines = []
    count = len(plan.problems) + len(problems)
    if missing == "error":
        count += len(plan.missing) + len(plan.extra)
        if plan.missing:
            names = few(plan.missing)
            lines.append(f"no prediction for {len(plan.missing)}: {names} (--missing miss counts each as a miss)")
        if plan.extra:
            names = few([path.name for path in plan.extra])
            lines.append(f"no true mask for {len(plan.extra)}: {names} (--missing miss leaves them out)")
    lines += [*plan.problems, *problems]
    told = lines if len(lines) <= _MOST_LINES else lines[: _MOST_LINES - 1]
    head = (
        f"{shown(prediction)}: {count} problem{'s' if count > 1 else ''} in {len(plan.pairs)} cases, nothing written:"
    )
    text = [head, *(f"- {shown(' '.join(line.split()))[:_LONGEST_LINE]}" for line in told)]
    return "\n".join([*text, *([f"... and {len(lines) - len(told)} more"] if len(lines) > len(told) else [])])


def _means(entries: Sequence[Summary], labels: Labels, cases: int) -> dict[str, float]:
    """The means under the names that `SegmentationMetrics.compute` gives them."""
    means: dict[str, float] = {"cases": cases}
    for entry in entries:
        means[f"{entry.name}/{entry.metric}"] = entry.mean
        if len(labels.foreground) == 1:
            means[f"mean/{entry.metric}"] = entry.mean
    undefined = {entry.name: entry.undefined for entry in entries if entry.metric == "dice"}
    return means | {f"{name}/undefined": undefined[name] for name in labels.foreground}


def _confusion(scores: Iterable[Scores], labels: Labels) -> dict[str, Any]:
    total = np.zeros(confusion_shape(labels), np.int64)
    for scored in scores:
        total += scored.confusion
    return describe_confusion(total, labels)


def _fingerprint(pairs: Sequence[Pair], scores: Sequence[Scores]) -> str:
    """SHA-256 over names and bytes of all masks that were scored, true and predicted."""
    total = hashlib.sha256()
    for pair, scored in zip(pairs, scores, strict=True):
        total.update(os.fsencode(f"{pair.name}\0{scored.digest}\n"))
    return total.hexdigest()


def print_table(entries: Sequence[Summary]) -> None:
    """Print means and intervals, a block for each class and, of several, one for their mean."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("measure")
    for column in ("mean", "95 % interval", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    names = list(dict.fromkeys(entry.name for entry in entries))
    for name in names:
        if len(names) > 1:
            table.add_row(Text(shown(name) if name != names[-1] else "mean of the classes", style="bold"))
        for entry in (entry for entry in entries if entry.name == name):
            info = METRICS[entry.metric]
            interval = f"{entry.low:.4f} \u2013 {entry.high:.4f}" if math.isfinite(entry.low) else "\u2013"
            table.add_row(
                Text(info.title + (f" ({info.unit})" if info.unit else "")),
                f"{entry.mean:.4f}" if entry.cases else "\u2013",
                interval,
                str(entry.cases),
            )
        table.add_section()
    Console().print(table)


def _tell(plan: Plan, groups: Sequence[str], target: Path, rounded: int, report: bool) -> None:
    number = len(set(groups))
    drawn = f"{number} groups" if number < len(groups) else "cases"
    lines = [f"{len(groups)} cases; 95 % intervals by bootstrap over {drawn}"]
    if plan.missing:
        lines.append(f"without prediction, counted as misses: {len(plan.missing)}: {few(plan.missing)}")
    if plan.extra:
        names = few([path.name for path in plan.extra])
        lines.append(f"predictions without a true mask, left out: {len(plan.extra)}: {names}")
    without = sum(pair.image is None for pair in plan.pairs)
    if 0 < without < len(plan.pairs):
        lines.append(f"cases without image, shown on a plain ground: {without}")
    if rounded:
        lines.append(
            f"predictions with values that the labels do not name (soft edges, JPEG, probabilities): {rounded}; "
            "each pixel took the nearest label"
        )
    files = [CASES, SUMMARY, INPUTS, f"{OVERLAYS}/", *([REPORT] if report else [])]
    lines.append(f"results: {shown(target)} ({', '.join(files)})")
    print("\n".join(lines), file=sys.stderr)
