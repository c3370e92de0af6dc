"""A trained network as a Python object: `visattn.load("best.ckpt").predict(image)`."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from visattn.checkpoint import Checkpoint, build_network, read_checkpoint
from visattn.data.images import Preprocessing, prepare, read_image
from visattn.errors import UserError, unknown
from visattn.folds_file import has_folds, read_folds
from visattn.inference import TestTimeAugmentation, iter_probabilities
from visattn.labels import Labels

DEVICES = ("auto", "cpu", "cuda", "mps")

ImageLike = Path | str | Image.Image | NDArray[np.uint8]


class Predictor:
    """A network with what it needs to be used: labels, preprocessing, recipe; or the networks of several folds.

    Several networks give the mean of their probabilities.

    Args:
        checkpoints: What `read_checkpoint` or `read_members` returns.
        device: `auto` (cuda, else mps, else cpu), `cpu`, `cuda`, `cuda:1` or `mps`.

    Attributes:
        labels: What the values of a mask mean.
        preprocessing: Size and normalisation of the network's input.
        recipe: The resolved recipe it was trained with (that of the first fold).
        networks: The modules, in eval mode, on the device; one, or one for each fold.
        threshold: Probability from which a binary or region output is foreground.

    Raises:
        UserError: The checkpoint does not fit this version, or the device is not there.
    """

    def __init__(self, checkpoints: Checkpoint | Sequence[Checkpoint], device: str = "auto") -> None:
        self.device = find_device(device)
        self.checkpoints = (checkpoints,) if isinstance(checkpoints, Checkpoint) else tuple(checkpoints)
        _check_members(self.checkpoints)
        self.labels, self.preprocessing, self.threshold = parse_checkpoint(self.checkpoints[0])
        self.recipe = self.checkpoints[0].recipe
        networks = [build_network(checkpoint) for checkpoint in self.checkpoints]
        try:
            self.networks: tuple[nn.Module, ...] = tuple(network.to(self.device) for network in networks)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            raise UserError(f"--device {device}: {str(error).splitlines()[0]}\nTry --device cpu.") from error

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, the first one of several folds."""
        return self.checkpoints[0]

    @property
    def network(self) -> nn.Module:
        """The network.

        Raises:
            UserError: There are several, one for each fold; see `networks`.
        """
        if len(self.networks) > 1:
            raise UserError(f"this predictor has {len(self.networks)} networks, one for each fold: use networks")
        return self.networks[0]

    def predict(self, image: ImageLike, tta: TestTimeAugmentation = "none") -> NDArray[Any]:
        """The mask of one image: the recipe's label values (H, W), uint8 or uint16, at the image's own size.

        Args:
            image: A path, a PIL image, or an array (H, W) or (H, W, C) uint8. A path or PIL image is turned upright as
                its EXIF entry says, so the mask fits the upright picture.
            tta: `flips` averages over mirror images.
        """
        probabilities = self.predict_proba(image, tta)
        return self.labels.decode(self.labels.from_probabilities(probabilities, self.threshold))

    def predict_proba(self, image: ImageLike, tta: TestTimeAugmentation = "none") -> NDArray[np.float32]:
        """Probabilities (channels, H, W): one channel if binary, else one for each class or region."""
        array = self._as_array(image)
        (result,) = self.iter_batch([prepare(array, self.preprocessing)], [array.shape[:2]], tta)
        return result

    def iter_batch(
        self, prepared: Sequence[Tensor], sizes: Sequence[tuple[int, int]], tta: TestTimeAugmentation = "none"
    ) -> Iterator[NDArray[np.float32]]:
        """Probabilities of images (C, h, w) that went through `prepare`, one at a time, at the given sizes."""
        batch = torch.stack(list(prepared)).to(self.device)
        members = [iter_probabilities(n, batch, sizes, self.labels.activation, tta) for n in self.networks]
        for maps in zip(*members, strict=True):
            # In the order of the folds, in float32; one network's map is divided by 1, which changes no bit.
            yield sum(maps[1:], start=maps[0]) / np.float32(len(maps))

    def _as_array(self, image: ImageLike) -> NDArray[np.uint8]:
        channels = self.preprocessing.channels
        if isinstance(image, Path | str):
            return read_image(image, channels)
        if isinstance(image, Image.Image):
            if image.mode[0] in "IF":
                raise UserError(f"a PIL image of mode {image.mode} has more than 8 bits: give its path, or convert it")
            upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            return np.asarray(upright).reshape(upright.height, upright.width, channels)
        array = np.asarray(image)
        if array.ndim == 2:
            array = array[..., None]
        if array.dtype != np.uint8 or array.ndim != 3 or array.size == 0 or array.shape[2] not in (1, channels):
            raise UserError(
                f"an image array must be uint8 of shape (H, W) or (H, W, {channels}), got {array.dtype} of shape "
                f"{np.shape(image)}"
            )
        return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], channels)))

    def __repr__(self) -> str:
        count = len(self.networks)
        name = f"{self.checkpoint.network.get('name')}{f' x {count} folds' if count > 1 else ''}"
        return f"Predictor({name}, labels={list(self.labels.names)}, size={self.preprocessing.size}, {self.device})"


def load(checkpoint: Path | str, device: str = "auto") -> Predictor:
    """Load a trained network.

    Args:
        checkpoint: A `.ckpt` of a run, a run folder (its best checkpoint), a `.safetensors` from
            `visattn export-weights`, or a run with folds (the mean of the folds' probabilities).
        device: `auto` (cuda, else mps, else cpu), `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises:
        UserError: The checkpoint is damaged or does not fit this version, or the device is not there.
    """
    return Predictor(read_members(checkpoint), device)


def read_members(checkpoint: Path | str) -> tuple[Checkpoint, ...]:
    """The checkpoints that predict together: the best of every fold of a run with folds, else the one there is.

    Raises:
        UserError: One is missing or damaged, or they do not belong together.
    """
    path = Path(checkpoint)
    if not has_folds(path):
        return (read_checkpoint(path),)
    members = tuple(read_checkpoint(file) for file in read_folds(path).checkpoints())
    _check_members(members)
    return members


def _check_members(members: Sequence[Checkpoint]) -> None:
    """Refuse networks whose probabilities mean different things."""
    first = members[0]
    for other in members[1:]:
        for key in ("task", "labels", "preprocessing", "network", "postprocessing"):
            if getattr(other, key) != getattr(first, key):
                raise UserError(
                    f"{other.path}: its {key} differ{'s' if key in ('task', 'network') else ''} from those of "
                    f"{first.path}: {_difference(getattr(other, key), getattr(first, key))}.\n"
                    "Folds predict together only if they were trained with one recipe. Give one fold's run folder."
                )


def _difference(value: Any, other: Any) -> str:
    """Two values that differ, as short as they can be told."""
    if isinstance(value, dict) and isinstance(other, dict):
        key = next(key for key in sorted({*value, *other}) if value.get(key) != other.get(key))
        return f"{key}: {_difference(value.get(key), other.get(key))}"
    return f"{value!s:.60} and {other!s:.60}"


def parse_checkpoint(checkpoint: Checkpoint) -> tuple[Labels, Preprocessing, float]:
    """Labels, preprocessing and threshold of a checkpoint.

    Raises:
        UserError: One of them makes no sense.
    """
    try:
        labels = Labels.from_config(**checkpoint.labels)
        preprocessing = Preprocessing.from_config(checkpoint.preprocessing)
        threshold = float(checkpoint.postprocessing["threshold"])
        height, width = preprocessing.size
        widths = {len(preprocessing.mean), len(preprocessing.std), preprocessing.channels}
        if min(height, width) < 1 or max(height, width) > 1 << 14 or widths not in ({1}, {3}):
            raise ValueError(f"preprocessing: size {preprocessing.size} for {preprocessing.channels} channels")
        if not all(math.isfinite(x) for x in (*preprocessing.mean, *preprocessing.std, threshold)):
            raise ValueError("preprocessing: a number is not finite")
        if min(preprocessing.std) <= 0:
            raise ValueError("preprocessing: std must be above 0")
        expectations = {
            "classes": labels.channels,
            "in_channels": preprocessing.channels,
            "activation": labels.activation,
        }
        for key, expected in expectations.items():
            if checkpoint.network.get(key, expected) != expected:
                raise ValueError(f"network.{key} is {checkpoint.network[key]}, not {expected}")
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{checkpoint.path}: damaged checkpoint: its labels or preprocessing make no sense ({error}).\n"
            "Use another checkpoint of the same run."
        ) from error
    if checkpoint.task != "segmentation":
        raise UserError(f"{checkpoint.path}: its task is '{checkpoint.task}'; masks need a segmentation network.")
    return labels, preprocessing, threshold


def find_device(name: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises:
        UserError: It is unknown, or not on this machine.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    kind, _, index = name.partition(":")
    if kind not in there:
        raise unknown("device", name, DEVICES)
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not there[kind] or (index and not (index.isdecimal() and int(index) < count)):
        raise UserError(f"--device {name}: not on this machine.\nUse --device auto, or cpu.")
    return torch.device(name)
