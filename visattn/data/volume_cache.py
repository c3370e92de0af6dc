"""Preprocessed volumes on disk, made once and then mapped into memory.

An entry is a folder of arrays (.npy). Its name is a hash of the bytes of the case's files and of everything that
decides its content: label map, preprocessing, the version of this format. So a changed file or setting makes a new
entry, never a wrong one, and folds and runs share what is equal. Entries appear whole or not at all, also where several
processes make the same one. Those that no training takes up for long are deleted (`visattn.data.stale`). The folder may
be deleted whenever no training runs.

Legend: C channels, I x J x K the file's voxels, D x H x W the network's.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visattn.data.geometry import Geometry
from visattn.data.stale import KINDS, drop_stale, touch
from visattn.data.volume_preprocessing import Plan, VolumePreprocessing
from visattn.data.volumes import VolumeCase, read_case, read_case_label
from visattn.errors import UserError
from visattn.labels import IGNORE, Labels

FORMAT = 2
POINTS = 10_000
"""The most voxels of each class that are kept as centres of patches; as many as nnU-Net keeps."""


@dataclass(frozen=True)
class Facts:
    """What was learned about a case by reading it.

    Args:
        digest: SHA-256 of the bytes of its files.
        classes: Indices of the classes in the label, besides the background.
        geometry: Of the first channel's file.
        notes: What the user should know.
    """

    digest: str
    classes: tuple[int, ...]
    geometry: Geometry
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A preprocessed case.

    Args:
        folder: Where its arrays are.
        plan: The way it was prepared and back.
        counts: For each class index that occurs, the number of its rows in `points`.
    """

    folder: Path
    plan: Plan
    counts: dict[int, int]

    def array(self, name: str) -> NDArray[Any]:
        """`image` (C, D, H, W) float32, `target` (D, H, W) and `truth` (I, J, K) uint8, `points` (n, 3) int32.

        Mapped from the disk; what is written to it goes nowhere.
        """
        loaded: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
        return loaded


def default_folder() -> Path:
    """The folder of this user for what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "visattn" / "volumes"


class VolumeCache:
    """Reads cases and keeps what was made of them.

    Args:
        folder: Where; None: `default_folder()`.
        labels: The meaning of the values in label volumes.
    """

    def __init__(self, folder: Path | None, labels: Labels) -> None:
        self.folder = default_folder() if folder is None else folder
        self.labels = labels

    def facts(self, case: VolumeCase) -> Facts:
        """Read and check a case, or recall what reading the same bytes with the same labels has shown.

        Raises:
            UserError: A file cannot be read, or image and label do not fit each other.
        """
        digest = _digest(case)
        path = self._place("facts", digest) / KINDS["facts"]
        known = _read_json(path)
        if known is not None:
            touch(path)
            return Facts(digest, tuple(known["classes"]), _geometry(known["geometry"]), tuple(known["notes"]))
        array, geometry, notes = read_case(case)
        truth = read_case_label(case, self.labels, geometry)
        found = np.flatnonzero(np.bincount(truth.ravel())).tolist()
        facts = Facts(digest, tuple(c for c in found if c not in (0, IGNORE)), geometry, tuple(notes))
        if not np.isfinite(array).any():
            raise UserError(f"{case.images[0]}: holds no finite voxel")
        described = {"classes": list(facts.classes), "notes": notes, "geometry": _geometry_config(geometry)}
        self._keep(path.parent, {}, described, path.name, lambda: _read_json(path) is not None)
        return facts

    def entry(self, case: VolumeCase, facts: Facts, preprocessing: VolumePreprocessing) -> Entry:
        """The preprocessed case; made now if it is not there."""
        config = preprocessing.to_config()
        del config["patch"]  # changes no volume
        folder = self._place("volume", facts.digest, config)
        entry = _read_entry(folder)
        if entry is None:
            array, geometry, _ = read_case(case)
            truth = read_case_label(case, self.labels, geometry)
            image, plan = preprocessing.forward(array, geometry)
            classes = [0, *facts.classes, *([IGNORE] if (truth == IGNORE).any() else [])]
            target = plan.forward_labels(truth, classes).numpy()
            points, counts = _points(target, facts.classes)
            arrays = {"image": image.numpy(), "target": target, "truth": truth, "points": points}
            described = {"plan": _plan_config(plan), "counts": {str(c): n for c, n in counts.items()}}
            described["shapes"] = {name: list(array.shape) for name, array in arrays.items()}
            self._keep(folder, arrays, described, KINDS["volume"], lambda: _read_entry(folder) is not None)
            entry = _read_entry(folder)
            if entry is None:
                raise UserError(f"data.cache_dir: {folder} cannot be read back; is its disk damaged?")
        touch(folder / KINDS["volume"])
        return entry

    def tidy(self) -> tuple[int, int]:
        """Delete entries that have not been taken up for long; how many, and how many bytes."""
        return drop_stale(self.folder)

    def _place(self, kind: str, digest: str, settings: Any = None) -> Path:
        text = json.dumps([FORMAT, kind, digest, self.labels.to_config(), settings], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / kind / name[:2] / name

    def _keep(
        self,
        folder: Path,
        arrays: dict[str, NDArray[Any]],
        described: dict[str, Any],
        name: str,
        sound: Callable[[], bool],
    ) -> None:
        """Fill a folder beside, then give it its name; what another process made meanwhile stays, if it is `sound`."""
        part = folder.with_name(f".{secrets.token_hex(8)}.part")
        try:
            part.mkdir(parents=True)
            for key, array in arrays.items():
                np.save(part / f"{key}.npy", np.ascontiguousarray(array), allow_pickle=False)
            (part / name).write_text(json.dumps(described))
            try:
                part.rename(folder)
            except OSError:
                if not sound():  # damaged: only now, since a look before the work says nothing of what came meanwhile
                    aside = folder.with_name(f".{secrets.token_hex(8)}.part")
                    folder.rename(aside)
                    part.rename(folder)
                    shutil.rmtree(aside, ignore_errors=True)
        except OSError as error:
            raise UserError(
                f"data.cache_dir: cannot write {folder}: {error.strerror}.\n"
                "Name a folder with more room (data.cache_dir), or delete what older trainings left in this one."
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _digest(case: VolumeCase) -> str:
    total = hashlib.sha256()
    if not case.files:  # the phantom: what draws it stands for what is drawn
        total.update(case.name.encode())
        for path in sorted(Path(__file__).parent.glob("*phantom*.py")):
            total.update(path.read_bytes())
    # Axis and choice of channels change what is read from the same bytes.
    total.update(repr((case.channel_axis, case.picks)).encode())
    for path in case.files:
        try:
            with path.open("rb") as handle:
                total.update(hashlib.file_digest(handle, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return total.hexdigest()


def _points(target: NDArray[np.uint8], classes: Sequence[int]) -> tuple[NDArray[np.int32], dict[int, int]]:
    """Voxels of each class on the network's grid (n, 3), class after class, an even choice where there are many."""
    rows, counts = [np.empty((0, 3), np.int32)], {}
    for index in classes:
        flat = np.flatnonzero(target == index)
        if len(flat) > POINTS:
            flat = flat[np.arange(POINTS) * len(flat) // POINTS]
        if len(flat):
            rows.append(np.stack(np.unravel_index(flat, target.shape), axis=1).astype(np.int32))
            counts[index] = len(flat)
    return np.concatenate(rows), counts


def _plan_config(plan: Plan) -> dict[str, Any]:
    return {
        "shape": list(plan.shape),
        "axes": list(plan.axes),
        "flips": list(plan.flips),
        "box": [[part.start, part.stop] for part in plan.box],
        "size": list(plan.size),
        "spacing": list(plan.spacing),
    }


def _geometry_config(geometry: Geometry) -> dict[str, Any]:
    header = None if geometry.header is None else geometry.header.hex()
    return {"shape": list(geometry.shape), "affine": geometry.affine.tolist(), "header": header}


def _geometry(config: dict[str, Any]) -> Geometry:
    i, j, k = config["shape"]
    header = None if config["header"] is None else bytes.fromhex(config["header"])
    return Geometry((i, j, k), np.array(config["affine"], np.float64), header)


def _read_entry(folder: Path) -> Entry | None:
    """The entry in `folder`; None where there is none, or where a crash of the machine left less than was written."""
    described = _read_json(folder / KINDS["volume"])
    if described is None:
        return None
    plan = {key: tuple(value) for key, value in described["plan"].items()}
    plan["box"] = tuple(slice(*part) for part in plan["box"])
    entry = Entry(folder, Plan(**plan), {int(c): n for c, n in described["counts"].items()})
    try:
        whole = all(list(entry.array(name).shape) == shape for name, shape in described["shapes"].items())
    except (OSError, ValueError):
        return None
    return entry if whole else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
