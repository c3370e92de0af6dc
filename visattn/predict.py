"""`visattn predict`: masks for images and folders of images.

While the network works on one batch, a few threads read the next images and write the last masks; how many images are
in memory at a time is bounded. A bad image fails alone; the batch goes on and the exit code tells.
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from visattn.checkpoint import Checkpoint
from visattn.data.images import prepare, read_image
from visattn.errors import UserError, unknown
from visattn.files import write_bytes_atomic
from visattn.inference import TTA, TestTimeAugmentation
from visattn.labels import Labels
from visattn.members import find_device, parse_checkpoint, read_members
from visattn.overlay import draw_overlay, encode_png, foreground_masks
from visattn.predict_common import Outcomes, about, ahead, explained_end, tell_end, tell_folds, weights_of
from visattn.predict_plan import Case, check_space, find_images, output_folder, plan_cases
from visattn.predict_record import IMAGES, MANIFEST, Entry, Record, file_hash
from visattn.predictor import Predictor
from visattn.progress import Bar

RULES = 1  # raise it when the same weights and settings begin to give other files
BATCH = {"cuda": 16, "mps": 4, "cpu": 1}  # on a CPU a larger batch is no faster (docs/predict.md)


@dataclass(frozen=True)
class Decoded:
    """An image that waits for the network."""

    case: Case
    sha256: str
    prepared: Tensor  # (C, h, w)
    size: tuple[int, int]
    pixels: NDArray[np.uint8] | None  # (H, W, C), kept if an overlay is wanted
    seconds: float


def predict_folder(
    inputs: Sequence[Path | str],
    checkpoint: Path | str,
    output: Path | str,
    probabilities: bool = False,
    overlays: bool = False,
    threshold: float = 0.5,
    tta: TestTimeAugmentation = "none",
    device: str = "auto",
    overwrite: bool = False,
    members: Sequence[Checkpoint] | None = None,
) -> int:
    """Predict masks for `inputs` into the folder `output`.

    Args:
        inputs: Image files, and folders that are searched with their subfolders.
        checkpoint: What `visattn.load` takes.
        output: Mirrors the input folders. Masks are PNG with the recipe's label values at the image's own size, upright
            as its EXIF entry says; `predictions.csv` and `manifest.json` lie beside them.
        probabilities: Also write 16-bit PNG (65535 is 1) to `probabilities/`, one for each class when several.
        overlays: Also write the images with the outline of the prediction to `overlays/`.
        threshold: Probability from which a binary or region output is foreground; several classes take the largest.
        tta: `flips` averages over mirror images.
        device: `auto` (cuda, else mps, else cpu), `cpu`, `cuda` or `mps`.
        overwrite: Do finished cases again, and replace files that visattn did not write.
        members: The checkpoints, if they were read before.

    Returns:
        0 if every case has its mask, 1 if some failed.

    Raises:
        UserError: Nothing could be started, or the disk is full. What was finished is kept and recorded.
    """
    output = Path(output)
    if not 0.0 < threshold < 1.0:
        raise UserError(f"--threshold {threshold}: must lie between 0 and 1.")
    if tta not in TTA:
        raise unknown("tta", tta, TTA)
    images = find_images([Path(given) for given in inputs], output)
    place = find_device(device)
    with output_folder(output) as case_sensitive:
        members = tuple(members or read_members(checkpoint))
        content = members[0]
        labels = parse_checkpoint(content)[0]
        if labels.activation == "softmax" and threshold != 0.5:
            raise UserError("--threshold: this network tells several classes apart, and the largest probability wins.")
        cases = plan_cases(images, output, labels, probabilities, overlays, case_sensitive)
        settings = {"weights": weights_of(members), "threshold": threshold, "tta": tta, "rules": RULES}
        record = Record(output, settings, about(members, checkpoint, place), overwrite)
        todo = record.unfinished(cases, overwrite)
        check_space(todo, output, labels.channels)
        predictor = Predictor(members, device) if todo else None
        failed = 0
        tell_folds(members, checkpoint)
        with explained_end(output):
            record.start(todo)
            if predictor is not None:
                failed = _Run(predictor, record, output, threshold, tta).run(todo)
        beside = [IMAGES.file, MANIFEST, *(["overlays/"] * overlays), *(["probabilities/"] * probabilities)]
        tell_end(output, record, f"{len(todo) - failed} predicted", len(cases) - len(todo), failed, beside)
    return 1 if failed else 0


class _Run:
    """One pass over the cases: read ahead, predict, write behind."""

    def __init__(
        self, predictor: Predictor, record: Record, output: Path, threshold: float, tta: TestTimeAugmentation
    ) -> None:
        self.predictor = predictor
        self.record = record
        self.output = output
        self.threshold = threshold
        self.tta: TestTimeAugmentation = tta
        self.batch = BATCH[predictor.device.type]
        self.threads = min(4, max(2, os.cpu_count() or 1))
        self.writing: deque[tuple[Case, Future[Entry]]] = deque()

    def run(self, cases: Sequence[Case]) -> int:
        """Predict `cases` and return how many failed."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="visattn")
        self.bar = Bar("predicting", len(cases))
        self.outcomes = Outcomes(self.record, self.bar, "memory does not suffice for this image", 1)
        try:
            with self.bar:
                batch: list[Decoded] = []
                for case, future in ahead(pool, self._decode, cases, self.batch + self.threads):
                    decoded = self.outcomes.of(case, future)
                    if decoded is not None:
                        batch.append(decoded)
                    if len(batch) == self.batch:
                        self._predict(pool, batch)
                        batch = []
                self._predict(pool, batch)
                self._collect(0)
        finally:
            pool.shutdown(cancel_futures=True)
            self.outcomes.save(self.writing)
        return self.outcomes.failed

    def _decode(self, case: Case) -> Decoded:
        started = time.monotonic()
        sha256 = file_hash(case.image)
        pixels = read_image(case.image, self.predictor.preprocessing.channels)
        prepared = prepare(pixels, self.predictor.preprocessing)
        kept = pixels if case.overlay else None
        height, width = pixels.shape[:2]
        return Decoded(case, sha256, prepared, (height, width), kept, time.monotonic() - started)

    def _predict(self, pool: ThreadPoolExecutor, batch: Sequence[Decoded]) -> None:
        started = time.monotonic()
        for decoded, probability in self._infer(batch, self.batch):
            seconds = decoded.seconds + (time.monotonic() - started) / max(1, len(batch))
            if probability is None:
                self.outcomes.fail(decoded.case, "the device's memory does not suffice; try --device cpu")
                continue
            self.writing.append((decoded.case, pool.submit(self._write, decoded, probability, seconds)))
            self._collect(self.threads)

    def _infer(self, batch: Sequence[Decoded], size: int) -> Iterator[tuple[Decoded, NDArray[np.float32] | None]]:
        """The batch's probabilities; where the device's memory does not suffice, in smaller parts."""
        if not batch:
            return
        # Always a full batch: kernels are chosen by batch size, and a mask must not depend on how many images were
        # left when a run was resumed.
        prepared = [decoded.prepared for decoded in batch]
        prepared += [prepared[-1]] * (size - len(batch))
        sizes = [decoded.size for decoded in batch] + [(1, 1)] * (size - len(batch))
        done = 0
        try:
            for decoded, probability in zip(batch, self.predictor.iter_batch(prepared, sizes, self.tta), strict=False):
                yield decoded, probability
                done += 1
        except torch.OutOfMemoryError:
            if size > 1:
                half = size // 2
                for start in range(done, len(batch), half):
                    yield from self._infer(batch[start : start + half], half)
            else:
                yield batch[0], None

    def _write(self, decoded: Decoded, probability: NDArray[np.float32], seconds: float) -> Entry:
        """Write one case's files, the mask last."""
        started = time.monotonic()
        case, labels = decoded.case, self.predictor.labels
        indices = labels.from_probabilities(probability, self.threshold)
        self.predictor.postprocessing.apply(indices)
        content: dict[str, bytes] = {}
        for file, channel in zip(case.probabilities, probability, strict=False):
            content[file] = encode_png(np.round(channel * 65535).astype(np.uint16))
        if case.overlay and decoded.pixels is not None:
            content[case.overlay] = encode_png(draw_overlay(decoded.pixels, indices, labels))
        content[case.mask] = encode_png(labels.decode(indices))
        for file, data in content.items():
            write_bytes_atomic(self.output / file, data)
        rows = measure(indices, probability, labels)
        return Entry(
            image=str(case.image),
            mask=case.mask,
            state="done",
            settings=self.record.settings_id,
            input_sha256=decoded.sha256,
            files={file: hashlib.sha256(data).hexdigest() for file, data in content.items()},
            size=list(decoded.size),
            seconds=round(seconds + time.monotonic() - started, 3),
            rows=rows,
            case=case.name,
        )

    def _collect(self, limit: int) -> None:
        """Take up finished writes, oldest first, until at most `limit` are under way."""
        while self.writing and (len(self.writing) > limit or self.writing[0][1].done()):
            case, future = self.writing[0]
            entry = self.outcomes.of(case, future)
            self.writing.popleft()
            if entry is not None:
                self.record.done(case, entry)
                self.bar.advance()


def measure(indices: NDArray[np.uint8], probability: NDArray[np.float32], labels: Labels) -> list[dict[str, Any]]:
    """One row of `predictions.csv` for each foreground class or region.

    Args:
        indices: Predicted class indices (H, W).
        probability: (channels, H, W).
        labels: What the indices mean.

    Returns:
        `class`, `pixels`, `percent_of_image`, `components` (8-connected) and `mean_foreground_probability`: the mean
        of the class's probability over its own pixels, None if it has none. It is no calibrated confidence.
    """
    channels = probability[1:] if labels.activation == "softmax" else probability
    rows = []
    for name, mask, channel in zip(labels.foreground, foreground_masks(indices, labels), channels, strict=True):
        pixels = int(mask.sum())
        components = int(ndimage.label(mask, structure=np.ones((3, 3)))[1])
        mean = round(float(channel[mask].mean(dtype=np.float64)), 4) if pixels else None
        rows.append(
            {
                "class": name,
                "pixels": pixels,
                "percent_of_image": round(100 * pixels / mask.size, 4),
                "components": components,
                "mean_foreground_probability": mean,
            }
        )
    return rows
