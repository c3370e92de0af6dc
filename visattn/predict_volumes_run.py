"""One pass over the cases: read ahead, predict, write behind; within a bound on memory."""

import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from visattn.components import slabs
from visattn.data.geometry import Geometry
from visattn.data.nifti import StreamWriter
from visattn.data.volume_preprocessing import Plan, Size3
from visattn.data.volumes import check_contrast, image_geometry, read_case
from visattn.errors import UserError
from visattn.memory import free_bytes, peak_bytes
from visattn.overlay import write_png
from visattn.overlay3d import draw_planes
from visattn.predict_common import Outcomes
from visattn.predict_plan import shown
from visattn.predict_record import Entry, Record, file_hash, inputs_hash
from visattn.predict_volumes_measure import measure
from visattn.predict_volumes_plan import VolumeOutput
from visattn.progress import Bar
from visattn.scratch import Scratch, copied
from visattn.volume_inference import Maps
from visattn.volume_predictor import VolumePredictor

_SHARE = 0.7  # of the free memory that is taken if nothing was said
_MOST_DRAWN = 2**25  # voxels
_LEAST = 256 * 2**20  # bytes that a bounded case needs beside the network


@dataclass(frozen=True)
class Ready:
    """A case that waits for the network."""

    sha256: str
    prepared: NDArray[np.float32]  # (C, D, H, W)
    plan: Plan
    geometry: Geometry
    shown: NDArray[np.float32] | None  # the first channel, kept if an overlay is wanted
    notes: list[str]
    seconds: float


def grids_of(outputs: Sequence[VolumeOutput]) -> list[Geometry]:
    """The grids of the cases from their headers; a grid of one voxel where that is known to fail."""
    unknown = Geometry((1, 1, 1), np.eye(4))
    grids = []
    for entry in outputs:
        try:
            grids.append(unknown if entry.case is None else _quiet_geometry(entry))
        except UserError:
            grids.append(unknown)  # told when its turn comes
    return grids


def _quiet_geometry(entry: VolumeOutput) -> Geometry:
    from visattn.data.nifti import collect_warnings

    assert entry.case is not None
    with collect_warnings():  # they are told when the case is read
        return image_geometry(entry.case)


class Run:
    """Predicts cases one after the other.

    Args:
        predictor: The networks.
        record: What has been done.
        output: The folder.
        memory: Bytes that the process may take; None: most of what is free.
    """

    def __init__(self, predictor: VolumePredictor, record: Record, output: Path, memory: int | None) -> None:
        self.predictor, self.record, self.output = predictor, record, output
        self.engine = predictor.engine
        self.memory = memory
        self.writing: tuple[VolumeOutput, Future[Entry]] | None = None

    def run(self, outputs: Sequence[VolumeOutput], grids: Sequence[Geometry]) -> int:
        """Predict `outputs`, whose grids are `grids`, and return how many failed."""
        counts = [0 if entry.case is None else self._windows(grid) for entry, grid in zip(outputs, grids, strict=True)]
        self._tell_start(outputs, grids, counts)
        self.left = self._left()
        pool = ThreadPoolExecutor(2, thread_name_prefix="visattn")
        ahead: Future[Ready] | None = None
        self.bar = Bar("predicting", sum(counts))
        self.outcomes = Outcomes(self.record, self.bar, "memory does not suffice for this volume; try --memory")
        try:
            with self.bar:
                expected = 0
                for index, (entry, grid) in enumerate(zip(outputs, grids, strict=True)):
                    self.bar.expect(sum(counts), f"case {index + 1} of {len(outputs)}, windows")
                    expected += counts[index]
                    small = self._need(grid) <= self.left / 4
                    if not small:
                        self._collect()
                    scratch = Scratch(None if self._need(grid) <= self.left else self.output)
                    current, ahead = ahead or pool.submit(self._read, entry, scratch), None
                    ready = self.outcomes.of(entry, current)
                    following = index + 1 < len(outputs) and self._need(grids[index + 1]) <= self.left / 4
                    if small and following:
                        ahead = pool.submit(self._read, outputs[index + 1], Scratch())
                    if ready is not None:
                        counts[index] = self.engine.grid(ready.plan.size).count  # known only after cropping
                        expected = sum(counts[: index + 1])
                        self.bar.expect(sum(counts), self.bar.title)
                        self._predict(pool, entry, ready, scratch)
                    del ready
                    self.bar.advance(expected - self.bar.count)  # those of a case that failed
                self._collect()
        finally:
            pool.shutdown(cancel_futures=True)
            self.outcomes.save([] if self.writing is None else [self.writing])
        return self.outcomes.failed

    def _windows(self, grid: Geometry) -> int:
        return self.engine.grid(self._size(grid)).count

    def _size(self, grid: Geometry) -> Size3:
        """The size on the network's grid, as far as the header tells: without cropping."""
        empty = np.broadcast_to(np.float32(0), (self.predictor.preprocessing.in_channels, *grid.shape))
        whole = replace(self.predictor.preprocessing, crop_foreground=False)
        return whole.plan(empty, grid).size

    def _need(self, grid: Geometry) -> float:
        """Bytes that a case takes if all of it lies in memory."""
        channels, outputs = self.predictor.preprocessing.in_channels, self.predictor.labels.channels
        native, there = math.prod(grid.shape), self._size(grid)
        depth = min((self.engine.patch or there)[0], there[0])
        return (
            native * (12 * channels + 8) + 4 * channels * math.prod(there) + 12 * outputs * depth * math.prod(there[1:])
        )

    def _left(self) -> int:
        """Bytes for the cases, when one window has been through the network."""
        taken = peak_bytes()
        if self.memory is None:
            return int(_SHARE * free_bytes())
        if self.memory - taken < _LEAST:
            raise UserError(
                f"--memory: {self.memory / 2**30:.1f} GiB do not suffice: libraries, network and one window take "
                f"{taken / 2**30:.1f} GiB.\nGive at least {(taken + _LEAST) / 2**30:.1f}G."
            )
        return self.memory - taken

    def _tell_start(self, outputs: Sequence[VolumeOutput], grids: Sequence[Geometry], counts: Sequence[int]) -> None:
        """Time one call of the network and say how long all will take."""
        cases = [(grid, count) for grid, count in zip(grids, counts, strict=True) if count]
        if not cases:
            return
        size = self.engine.patch
        share = 1.0
        if size is None:  # whole volumes: an eighth of the first one tells as much
            d, h, w = self._size(cases[0][0])
            size = (max(1, d // 2), max(1, h // 2), max(1, w // 2))
            share = d * h * w / math.prod(size)
        seconds = share * self._time(size)
        total = sum(count for _, count in cases)
        windows = f"{total} windows of {' x '.join(map(str, size))}, " if self.engine.patch else ""
        precision = "" if self.engine.autocast is None else ", bfloat16"
        of = f" of {len(outputs)}" if len(cases) < len(outputs) else ""
        print(
            f"{len(cases)}{of} case{'s' if len(outputs) > 1 else ''}, {windows}about {duration(seconds * total)} "
            f"on {self.predictor.device}{precision}",
            file=sys.stderr,
            flush=True,
        )

    @torch.no_grad()
    def _time(self, size: Size3) -> float:
        """Seconds of one window."""
        shape = (self.engine.batch, self.predictor.preprocessing.in_channels, *size)
        seconds = 0.0
        for _ in range(2):  # the first call also chooses kernels
            started = time.perf_counter()
            try:
                windows = torch.zeros(shape, device=self.engine.device)
                self.engine.call(windows.to(memory_format=self.engine.memory_format))
            except torch.OutOfMemoryError:
                shape = (max(1, shape[0] // 2), *shape[1:])
                continue
            if self.predictor.device.type == "cuda":
                torch.cuda.synchronize(self.predictor.device)
            seconds = (time.perf_counter() - started) / shape[0]
            if seconds > 5:
                break
        return seconds

    def _read(self, entry: VolumeOutput, scratch: Scratch) -> Ready:
        started = time.monotonic()
        if entry.case is None:
            raise UserError(entry.error)
        sha256 = inputs_hash(entry.inputs)
        array, geometry, notes = read_case(entry.case, scratch=scratch)
        notes += check_contrast(entry.case, array)
        prepared, plan = self.predictor.preprocessing.forward(array, geometry, scratch)
        kept = array[0] if entry.overlay else None
        return Ready(sha256, prepared.numpy(), plan, geometry, kept, notes, time.monotonic() - started)

    def _predict(self, pool: ThreadPoolExecutor, entry: VolumeOutput, ready: Ready, scratch: Scratch) -> None:
        started = time.monotonic()
        for note in ready.notes:
            self.bar.say(f"note: {shown(' '.join(note.split()))}")
        try:
            maps = self.engine.run(
                ready.prepared,
                ready.plan,
                scratch,
                strip_bytes=self._strip_bytes(scratch),
                with_probabilities=entry.probabilities is not None,
                with_uncertainty=entry.uncertainty is not None,
                advance=self.bar.advance,
            )
        except torch.OutOfMemoryError:
            self.outcomes.fail(entry, f"{entry.image}: the device's memory does not suffice; try --device cpu")
            return
        except MemoryError:
            self.outcomes.fail(entry, f"{entry.image}: memory does not suffice; try --memory")
            return
        except ValueError as error:
            if "rows are fewer" not in str(error):
                raise
            self.outcomes.fail(entry, f"{entry.image}: --memory does not suffice for its windows; give more")
            return
        seconds = ready.seconds + time.monotonic() - started
        self._collect()
        task = pool.submit(self._write, entry, replace(ready, prepared=ready.prepared[:, :0]), maps, seconds)
        self.writing = entry, task
        if scratch.folder is not None:
            self._collect()

    def _strip_bytes(self, scratch: Scratch) -> int | None:
        if self.predictor.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.predictor.device)[0] * 0.5)
        return None if scratch.folder is None else self.left // 2

    def _write(self, entry: VolumeOutput, ready: Ready, maps: Maps, seconds: float) -> Entry:
        """Write one case's files, the mask last."""
        started = time.monotonic()
        labels, geometry = self.predictor.labels, ready.geometry
        self.predictor.postprocessing.apply(maps.indices, geometry.voxel_ml)
        maps_of = {
            entry.probabilities: maps.probabilities,
            entry.uncertainty: maps.entropy,
            entry.variance: maps.variance,
        }
        for file, volume in maps_of.items():
            if file is not None and volume is not None:
                _write_map(self.output / file, volume, geometry)
        if entry.overlay is not None and ready.shown is not None:
            write_png(self.output / entry.overlay, draw_planes(*_coarse(ready.shown, geometry, maps.indices), labels))
        dtype = labels.decode(np.zeros(1, np.uint8)).dtype.type
        with StreamWriter(self.output / entry.mask, geometry, dtype, labels=True) as writer:
            for part in slabs(geometry.shape, 2**21):
                writer.append(labels.decode(copied(maps.indices[:, :, part])))
        rows = measure(maps.indices, geometry, labels)
        return Entry(
            image=str(entry.image),
            mask=entry.mask,
            state="done",
            settings=self.record.settings_id,
            input_sha256=ready.sha256,
            files={file: file_hash(self.output / file) for file in entry.files},
            size=list(geometry.shape),
            seconds=round(seconds + time.monotonic() - started, 3),
            rows=rows,
            notes=ready.notes,
            peak_mb=round(peak_bytes() / 1e6, 1),
            case=entry.name,
        )

    def _collect(self) -> None:
        """Wait for the case that is being written, if there is one."""
        if self.writing is not None:
            (entry, future), self.writing = self.writing, None
            done = self.outcomes.of(entry, future)
            if done is not None:
                self.record.done(entry, done)


def _coarse(
    image: NDArray[np.float32], geometry: Geometry, indices: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], Geometry, NDArray[np.uint8]]:
    """Of a very large volume every second voxel, or third: a picture shows no more."""
    step = math.ceil((indices.size / _MOST_DRAWN) ** (1 / 3))
    image, indices = (copied(array[::step, ::step, ::step]) for array in (image, indices))
    i, j, k = indices.shape
    return image, Geometry((i, j, k), geometry.affine @ np.diag([step, step, step, 1.0])), indices


def _write_map(path: Path, volume: NDArray[np.float32], geometry: Geometry) -> None:
    """Write a map (I, J, K), or several (channels, I, J, K) along a fourth axis, a few planes at a time."""
    channels = len(volume) if volume.ndim == 4 and len(volume) > 1 else None
    with StreamWriter(path, geometry, np.float32, channels) as writer:
        for one in volume if volume.ndim == 4 else [volume]:
            for part in slabs(geometry.shape, 2**22):
                writer.append(copied(one[:, :, part]))


def duration(seconds: float) -> str:
    """A time as a person says it: 12 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
