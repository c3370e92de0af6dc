"""`visattn predict` for classifiers: a table with the probability of every class for each image or volume.

As for masks, a few threads read ahead, a bad image fails alone, and a run that was stopped goes on where it was.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visattn.checkpoint import Checkpoint
from visattn.class_labels import ClassLabels
from visattn.class_predictor import ClassPredictor
from visattn.class_scored import BETWEEN
from visattn.data.class_preprocessing import with_channels
from visattn.data.images import read_image
from visattn.errors import UserError, unknown
from visattn.inference import TTA, TestTimeAugmentation
from visattn.members import find_device, parse_classifier, read_members
from visattn.metrics.classes import choose_classes
from visattn.predict_classes_plan import Arrays, ClassCase, plan_classes
from visattn.predict_common import Outcomes, about, ahead, explained_end, tell_end, tell_folds, weights_of
from visattn.predict_plan import output_folder, shown
from visattn.predict_record import MANIFEST, Entry, Record, Table, file_hash
from visattn.progress import Bar

PREDICTIONS = "predictions.csv"
RULES = 1  # raise it when the same weights and settings begin to give other probabilities
_BATCH = 32
_VALUES = 2**26  # numbers in a batch: fewer cases where these are large


@dataclass(frozen=True)
class Decoded:
    """A case that waits for the network."""

    case: ClassCase
    sha256: str
    prepared: Tensor  # (C, *S)
    size: tuple[int, ...]
    seconds: float


def predict_classes(
    inputs: Sequence[Path | str],
    checkpoint: Path | str,
    output: Path | str,
    split: str | None = None,
    tta: TestTimeAugmentation = "none",
    device: str = "auto",
    overwrite: bool = False,
    members: Sequence[Checkpoint] | None = None,
) -> int:
    """Classify `inputs` and write `predictions.csv` and `manifest.json` into the folder `output`.

    Args:
        inputs: Image files, folders that are searched with their subfolders, and .npz files of MedMNIST's form.
        checkpoint: What `visattn.load` takes.
        output: The folder.
        split: Of .npz files take train, val or test alone.
        tta: `flips` averages over mirror images: four of an image, eight of a volume.
        device: `auto` (cuda, else mps, else cpu), `cpu`, `cuda` or `mps`.
        overwrite: Do finished cases again, and replace a table that visattn did not write.
        members: The checkpoints, if they were read before.

    Returns:
        0 if every case has its row, 1 if some failed.

    Raises:
        UserError: Nothing could be started, or the disk is full. What was finished is kept and recorded.
    """
    output = Path(output)
    if tta not in TTA:
        raise unknown("tta", tta, TTA)
    place = find_device(device)
    members = tuple(members or read_members(checkpoint))
    labels, preprocessing = parse_classifier(members[0])
    cases = plan_classes([Path(given) for given in inputs], output, preprocessing.rank, split)
    with output_folder(output):
        settings = {"weights": weights_of(members), "task": "classification", "tta": tta, "rules": RULES}
        record = Record(
            output, settings, about(members, checkpoint, place), overwrite, _table(labels, preprocessing.rank)
        )
        _refuse_foreign(record, output, overwrite)
        todo = record.unfinished(cases, overwrite)
        predictor = ClassPredictor(members, device) if any(not case.error for case in todo) else None
        tell_folds(members, checkpoint)
        with explained_end(output):
            record.start(todo)
            failed = _Run(predictor, record, len(cases), tta).run(todo) if todo else 0
            record.save()
        done = f"{len(todo) - failed} predicted"
        tell_end(output, record, done, len(cases) - len(todo), failed, [PREDICTIONS, MANIFEST], "predictions")
    return 1 if failed else 0


class _Run:
    """One pass over the cases: read ahead, then a batch at a time."""

    def __init__(
        self, predictor: ClassPredictor | None, record: Record, planned: int, tta: TestTimeAugmentation
    ) -> None:
        self.predictor, self.record, self.arrays = predictor, record, Arrays()
        self.tta: TestTimeAugmentation = tta
        # By what the command names, not by what is left of it: a resumed run computes the same numbers.
        self.batch = min(_BATCH, planned)
        if predictor is not None:
            values = predictor.preprocessing.in_channels * int(np.prod(predictor.preprocessing.size))
            self.batch = max(1, min(self.batch, _VALUES // values))
        self.hash = lru_cache(4)(file_hash)  # of an .npz file once, not for each of its cases

    def run(self, cases: Sequence[ClassCase]) -> int:
        """Classify `cases` and return how many failed."""
        threads = min(4, max(2, os.cpu_count() or 1))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="visattn")
        bar = Bar("predicting", len(cases))
        outcomes = Outcomes(self.record, bar, "memory does not suffice for this image", 1)
        try:
            with bar:
                batch: list[Decoded] = []
                for case, future in ahead(pool, self._decode, cases, self.batch + threads):
                    decoded = outcomes.of(case, future)
                    if decoded is not None:
                        batch.append(decoded)
                    if len(batch) == self.batch:
                        self._predict(batch, outcomes, bar)
                        batch = []
                self._predict(batch, outcomes, bar)
        finally:
            pool.shutdown(cancel_futures=True)
            outcomes.save(())
        return outcomes.failed

    def _decode(self, case: ClassCase) -> Decoded:
        started = time.monotonic()
        if case.error or self.predictor is None:
            raise UserError(case.error)
        preprocessing = self.predictor.preprocessing
        sha256 = self.hash(case.image)
        if case.part:
            image = with_channels(self.arrays.read(case), preprocessing.rank, preprocessing.in_channels)
        else:
            image = read_image(case.image, 3 if preprocessing.in_channels == 3 else 1)
        prepared = preprocessing.prepare(image)
        return Decoded(case, sha256, prepared, image.shape[:-1], time.monotonic() - started)

    def _predict(self, batch: Sequence[Decoded], outcomes: Outcomes, bar: Bar) -> None:
        if not batch:
            return
        started = time.monotonic()
        probabilities = self._classify([decoded.prepared for decoded in batch], self.batch)
        seconds = (time.monotonic() - started) / len(batch)
        for decoded, shares in zip(batch, probabilities, strict=True):
            if shares is None:
                outcomes.fail(
                    decoded.case, f"{decoded.case.image}: the device's memory does not suffice; try --device cpu"
                )
            elif not np.isfinite(shares).all():
                outcomes.fail(decoded.case, f"{decoded.case.image}: the network's output is not finite")
            else:
                self.record.done(decoded.case, self._entry(decoded, shares, seconds))
                bar.advance()

    def _classify(self, prepared: Sequence[Tensor], size: int) -> list[NDArray[np.float32] | None]:
        """Probabilities of each case; where the device's memory does not suffice, in smaller parts."""
        assert self.predictor is not None
        # Always a full batch: kernels are chosen by its size, and the last one must not differ for being short.
        padded = [*prepared, *([prepared[-1]] * (size - len(prepared)))]
        try:
            return list(self.predictor.classify(padded, self.tta)[: len(prepared)])
        except torch.OutOfMemoryError:
            if size == 1:
                return [None]
        half = max(1, size // 2)
        parts = [prepared[start : start + half] for start in range(0, len(prepared), half)]
        return [shares for part in parts for shares in self._classify(part, half)]

    def _entry(self, decoded: Decoded, shares: NDArray[np.float32], seconds: float) -> Entry:
        assert self.predictor is not None
        labels, case = self.predictor.labels, decoded.case
        chosen = choose_classes(shares[None], labels.multi_label)[0]
        named = BETWEEN.join(name for name, there in zip(labels.names, chosen, strict=True) if there)
        row: dict[str, Any] = {"prediction": named}
        row |= {f"p_{name}": float(f"{share:.6g}") for name, share in zip(labels.names, shares, strict=True)}
        return Entry(
            image=str(case.image),
            mask=case.name,
            state="done",
            settings=self.record.settings_id,
            input_sha256=decoded.sha256,
            size=list(decoded.size),
            seconds=round(decoded.seconds + seconds, 4),
            rows=[row],
            case=case.name,
        )


def _table(labels: ClassLabels, rank: int) -> Table:
    """The form of `predictions.csv`."""
    probabilities = [f"p_{name}" for name in labels.names]
    return Table(
        PREDICTIONS,
        ("case", "prediction", *probabilities, "seconds", "image"),
        rank,
        lambda entry: {"case": entry.case, "seconds": entry.seconds, "image": entry.image},
    )


def _refuse_foreign(record: Record, output: Path, overwrite: bool) -> None:
    """Keep what another program wrote, and the masks of a segmentation network with their table."""
    if overwrite:
        return
    masks = any(entry.files for entry in record.entries.values())
    if masks or (not record.entries and (output / PREDICTIONS).exists()):
        what = "masks of visattn predict" if masks else f"a {PREDICTIONS} that visattn predict did not write"
        raise UserError(
            f"--output {shown(output)}: holds {what}.\nName another --output, or add --overwrite to replace the table."
        )
