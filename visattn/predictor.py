"""A trained network as a Python object: `visattn.load("best.ckpt").predict(image)`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from visattn.checkpoint import Checkpoint
from visattn.class_predictor import ClassPredictor
from visattn.data.images import Preprocessing, prepare, read_image
from visattn.data.volume_preprocessing import VolumePreprocessing
from visattn.errors import UserError
from visattn.inference import TestTimeAugmentation, iter_probabilities
from visattn.members import (
    check_members,
    find_device,
    parse_checkpoint,
    parse_postprocessing,
    place_networks,
    rank_of,
    read_members,
)
from visattn.volume_predictor import VolumePredictor

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
        postprocessing: What is done to a mask.

    Raises:
        UserError: The checkpoint does not fit this version, or the device is not there.
    """

    def __init__(self, checkpoints: Checkpoint | Sequence[Checkpoint], device: str = "auto") -> None:
        self.device = find_device(device)
        self.checkpoints = (checkpoints,) if isinstance(checkpoints, Checkpoint) else tuple(checkpoints)
        check_members(self.checkpoints)
        self.labels, preprocessing, self.threshold = parse_checkpoint(self.checkpoints[0])
        self.postprocessing = parse_postprocessing(self.checkpoints[0])
        if isinstance(preprocessing, VolumePreprocessing):
            raise UserError(f"{self.checkpoints[0].path}: its network takes volumes; visattn.load gives its predictor")
        self.preprocessing: Preprocessing = preprocessing
        self.recipe = self.checkpoints[0].recipe
        self.networks = place_networks(self.checkpoints, self.device)

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
        indices = self.labels.from_probabilities(probabilities, self.threshold)
        self.postprocessing.apply(indices)
        return self.labels.decode(indices)

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


def load(checkpoint: Path | str, device: str = "auto") -> "Predictor | VolumePredictor | ClassPredictor":
    """Load a trained network: a `Predictor` if it segments images, a `VolumePredictor` if volumes.

    A classifier, of images or volumes, becomes a `ClassPredictor`.

    Args:
        checkpoint: A `.ckpt` of a run, a run folder (its best checkpoint), a `.safetensors` from
            `visattn export-weights`, or a run with folds (the mean of the folds' probabilities).
        device: `auto` (cuda, else mps, else cpu), `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises:
        UserError: The checkpoint is damaged or does not fit this version, or the device is not there.
    """
    members = read_members(checkpoint)
    if members[0].task == "classification":
        return ClassPredictor(members, device)
    return VolumePredictor(members, device) if rank_of(members[0]) == 3 else Predictor(members, device)
