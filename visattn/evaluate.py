"""`visattn evaluate`: scores a folder of masks, made by any tool, as `validate` and `test` score a network.

A mask is no probability map, so the measures are those that need none: the suite "surface" for images, "volume", in mm
and ml, for volumes. S, E, weighted F and the
means of PraNet's protocol could be computed of a mask as well, but would have the names and not the meaning of the
numbers that `validate` and `test` give for probabilities (`docs/evaluate.md`).
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from visattn import NOTICE
from visattn.data.cases import Case
from visattn.data.nifti import collect_warnings
from visattn.data.splits import find_groups
from visattn.errors import UserError
from visattn.evaluate_output import default_output, evaluation_folder
from visattn.evaluate_plan import Pair, Plan, choose_cases, few, plan_pairs, read_labels
from visattn.evaluate_show import print_detections, print_table, tell
from visattn.labels import IGNORE, Labels
from visattn.mask_files import Mask, check_image, check_prediction, read_any_mask
from visattn.metrics import NSD_TOLERANCE, CaseRow, Detection, LesionRule, Summary, case_metrics, detections, summarise
from visattn.metrics.confusion import confusion_shape, count_confusion, describe_confusion
from visattn.metrics.lesions import PATIENT_DICE, RULE
from visattn.predict_plan import shown
from visattn.progress import Bar
from visattn.report import write_report
from visattn.scored import CASES, Input, write_cases, write_inputs, write_overlays, write_summary
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
        doubtful: Whether a volume's header says two things of where it lies.
    """

    rows: list[CaseRow]
    confusion: NDArray[np.int64]
    digest: str
    rounded: bool
    doubtful: bool = False


@dataclass(frozen=True)
class Rules:
    """How volumes are scored.

    Attributes:
        lesions: When a lesion counts and is found.
        nsd_tolerance: Of NSD, in mm.
        patient_dice: Dice from which a patient counts as found.
    """

    lesions: LesionRule = RULE
    nsd_tolerance: float = NSD_TOLERANCE
    patient_dice: float = PATIENT_DICE

    def __post_init__(self) -> None:
        if not (self.nsd_tolerance >= 0 and 0 < self.patient_dice <= 1):
            raise ValueError(f"needs nsd_tolerance >= 0 and 0 < patient_dice <= 1, got {self}")


RULES = Rules()
"""The defaults."""


def make_rules(
    tolerance: float | None = None,
    lesion_iou: float | None = None,
    minimum_ml: float | None = None,
    patient_dice: float | None = None,
) -> Rules:
    """The rules that options of the command line ask for; what is None keeps its default.

    Raises:
        UserError: A number means nothing.
    """
    lesions = {"iou": lesion_iou, "minimum_ml": minimum_ml}
    others = {"nsd_tolerance": tolerance, "patient_dice": patient_dice}
    try:
        rule = LesionRule(**{key: value for key, value in lesions.items() if value is not None})
        return Rules(rule, **{key: value for key, value in others.items() if value is not None})
    except ValueError as error:
        raise UserError(
            f"visattn evaluate: a number is out of range: {error}.\n"
            "--lesion_iou and --patient_dice are shares of 0..1, --tolerance is in mm, --minimum_ml in ml."
        ) from None


def evaluate_folder(
    prediction: Path | str,
    truth: Path | str,
    labels: Path | str,
    output: Path | str | None = None,
    images: Path | str | None = None,
    group_by: str | None = None,
    missing: Missing = "error",
    cases: Path | str | None = None,
    rules: Rules = RULES,
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
        cases: A table of cases of ours, or a text file with a name on each line: those cases alone are scored.
        rules: How volumes are scored.

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
    if cases is not None:
        plan = choose_cases(plan, Path(cases))
    if rules != RULES and not plan.volumes:
        raise UserError("--tolerance, --lesion_iou, --minimum_ml and --patient_dice are for volumes; these are images.")
    groups = _groups(plan, group_by, str(truth))
    with evaluation_folder(target) as folder:
        refused = bool(plan.problems) or (missing == "error" and bool(plan.missing or plan.extra))
        scores, problems = _score(plan, meaning, not refused, rules)
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
        found = detections(rows, rules.patient_dice, rules.lesions.large_ml) if plan.volumes else {}
        if plan.volumes:
            summary |= {"rules": asdict(rules), "detection": _plain(found)}
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
    if found:
        print_detections(found, rules.lesions.large_ml)
    tell(
        plan,
        groups,
        target,
        rounded=sum(scored.rounded for scored in scores),
        doubtful=sum(scored.doubtful for scored in scores),
        report=written is not None,
    )
    return 0


def _groups(plan: Plan, group_by: str | None, root: str) -> list[str]:
    # The table and the expression look at the stem of the image, which is the last part of the name.
    cases = [Case(pair.name, Path(f"{pair.name}.png"), pair.truth, pair.name, root) for pair in plan.pairs]
    try:
        return find_groups(cases, group_by)
    except UserError as error:
        raise UserError(str(error).replace("data.split.group_by", "--group_by")) from None


def _score(plan: Plan, labels: Labels, measure: bool, rules: Rules) -> tuple[list[Scores], list[str]]:
    """The scores of the cases that can be read, and what is wrong with the others."""
    scores: list[Scores] = []
    problems: list[str] = []
    # Decoding and much of the scoring releases the interpreter's lock; volumes are held one at a time.
    threads = 1 if plan.volumes else min(8, os.cpu_count() or 1)
    with Bar("scoring" if measure else "checking", len(plan.pairs)) as bar:
        for result in _in_order(lambda pair: score_pair(pair, labels, measure, rules), plan.pairs, threads):
            if isinstance(result, str):
                problems.append(result)
            else:
                scores.append(result)
            bar.advance()
    return scores, problems


def score_pair(pair: Pair, labels: Labels, measure: bool = True, rules: Rules = RULES) -> Scores | str:
    """Read and score one case at its native size; what is wrong with it, if anything is.

    Args:
        pair: Its files.
        labels: What the values in the masks mean.
        measure: Whether to compute the measures; otherwise the files are read and checked alone.
        rules: Of volumes.
    """
    try:
        with collect_warnings() as warned:
            truth = read_any_mask(pair.truth, labels)
            if pair.image is not None:
                check_image(pair.image, truth)
            predicted = Mask(pair.truth, np.zeros_like(truth.indices), truth.geometry)
            if pair.prediction is not None:
                predicted = read_any_mask(pair.prediction, labels)
                check_prediction(predicted, truth)
                _check_decided(predicted, truth)
        digest = hashlib.sha256()
        for path in filter(None, (pair.truth, pair.prediction)):
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
        rows: list[CaseRow] = []
        if measure and truth.geometry is None:
            rows = case_metrics(predicted.indices, truth.indices, labels, suite="surface")
        elif measure and truth.geometry is not None:
            rows = case_metrics(
                predicted.indices,
                truth.indices,
                labels,
                suite="volume",
                spacing=truth.geometry.zooms,
                voxel_ml=truth.geometry.voxel_ml,
                nsd_tolerance=rules.nsd_tolerance,
                lesions=rules.lesions,
            )
        confusion = count_confusion(predicted.indices, truth.indices, labels)
        return Scores(rows, confusion, digest.hexdigest(), predicted.strays > 0, bool(warned))
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or pair.truth}: cannot be read: {error.strerror}"
    except MemoryError:
        return f"{pair.truth}: memory does not suffice for this case"


def _check_decided(predicted: Mask, truth: Mask) -> None:
    undecided = int(np.count_nonzero((predicted.indices == IGNORE) & (truth.indices != IGNORE)))
    if undecided:
        what = "pixels" if truth.geometry is None else "voxels"
        raise UserError(
            f"{predicted.path}: holds the value to ignore in {undecided} {what} that count in {truth.path.name}; "
            f"a prediction names a class for every {what[:-1]}"
        )


def _in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """The results in the order of the items, computed by a few threads that keep little ahead."""
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
            lines.append(
                f"no prediction for {len(plan.missing)}: {names} "
                "(--missing miss counts each as a miss, --cases FILE scores some alone)"
            )
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


def _plain(found: Mapping[str, Mapping[str, Detection]]) -> dict[str, dict[str, dict[str, float]]]:
    return {name: {kind: entry.to_json() for kind, entry in of.items()} for name, of in found.items()}
