"""A trained classifier as a Python object: `visattn.load("best.ckpt").predict(image)`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from visattn.checkpoint import Checkpoint
from visattn.data.class_preprocessing import fits, with_channels
from visattn.data.images import read_image
from visattn.errors import UserError, unknown
from visattn.inference import TTA, TestTimeAugmentation
from visattn.inference3d import VIEWS
from visattn.members import check_members, find_device, parse_classifier, place_networks
from visattn.metrics.classes import choose_classes

CaseLike = Path | str | Image.Image | NDArray[np.uint8]
"""The path of an image, a PIL image, or an array: (H, W) or (H, W, C), of a volume (D, H, W)."""


class ClassPredictor:
    """A classifier with what it needs to be used; or the classifiers of several folds.

    Several networks give the mean of their probabilities.

    Args:
        checkpoints: What `read_checkpoint` or `read_members` returns.
        device: `auto` (cuda, else mps, else cpu), `cpu`, `cuda`, `cuda:1` or `mps`.

    Attributes:
        labels: The classes.
        preprocessing: Size and normalisation of the network's input; its `rank` tells images from volumes.
        recipe: The resolved recipe it was trained with (that of the first fold).
        networks: The modules, in eval mode, on the device; one, or one for each fold.

    Raises:
        UserError: The checkpoint does not fit this version, or the device is not there.
    """

    def __init__(self, checkpoints: Checkpoint | Sequence[Checkpoint], device: str = "auto") -> None:
        self.device = find_device(device)
        self.checkpoints = (checkpoints,) if isinstance(checkpoints, Checkpoint) else tuple(checkpoints)
        check_members(self.checkpoints)
        self.labels, self.preprocessing = parse_classifier(self.checkpoints[0])
        self.recipe = self.checkpoints[0].recipe
        self.networks: tuple[nn.Module, ...] = place_networks(self.checkpoints, self.device)

    def predict(self, image: CaseLike, tta: TestTimeAugmentation = "none") -> str | tuple[str, ...]:
        """The class of one image or volume; where it may have several, all that it has.

        Args:
            image: A path or PIL image is turned upright as its EXIF entry says. An array is uint8.
            tta: `flips` averages over mirror images: four of an image, eight of a volume.
        """
        chosen = choose_classes(self.predict_proba(image, tta)[None], self.labels.multi_label)[0]
        names = tuple(name for name, there in zip(self.labels.names, chosen, strict=True) if there)
        return names if self.labels.multi_label else names[0]

    def predict_proba(self, image: CaseLike, tta: TestTimeAugmentation = "none") -> NDArray[np.float32]:
        """The probability of each class, (K,), in the order of `labels.names`."""
        (shares,) = self.classify([self.preprocessing.prepare(self._as_array(image))], tta)
        return np.asarray(shares)

    @torch.inference_mode()
    def classify(self, prepared: Sequence[Tensor], tta: TestTimeAugmentation = "none") -> NDArray[np.float32]:
        """Probabilities (B, K) of cases (C, *S) that went through `preprocessing.prepare`.

        Raises:
            UserError: There is no such `tta`.
        """
        views: Mapping[str, Sequence[tuple[int, ...]]] = TTA if self.preprocessing.rank == 2 else VIEWS
        if tta not in views:
            raise unknown("tta", tta, views)
        batch = torch.stack(list(prepared)).to(self.device)
        total: Tensor | None = None
        for network in self.networks:
            for axes in views[tta]:
                logits = network(batch.flip(axes) if axes else batch).float()
                shares = logits.softmax(dim=1) if self.labels.activation == "softmax" else logits.sigmoid()
                total = shares if total is None else total + shares
        assert total is not None  # there is at least one network
        return np.asarray((total / (len(self.networks) * len(views[tta]))).cpu().numpy(), np.float32)

    def _as_array(self, image: CaseLike) -> NDArray[np.uint8]:
        rank, channels = self.preprocessing.rank, self.preprocessing.in_channels
        if rank == 2 and isinstance(image, Path | str):
            return read_image(image, 3 if channels == 3 else 1)
        if rank == 2 and isinstance(image, Image.Image):
            if image.mode[0] in "IF":
                raise UserError(f"a PIL image of mode {image.mode} has more than 8 bits: give its path, or convert it")
            upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            return with_channels(np.asarray(upright), 2, channels)
        array = np.asarray(image)
        if array.dtype != np.uint8 or not fits(array.shape, rank):
            shapes = "(H, W) or (H, W, 3)" if rank == 2 else "(D, H, W)"
            raise UserError(f"this classifier takes arrays of uint8 {shapes}, not {array.dtype} of shape {array.shape}")
        return with_channels(np.ascontiguousarray(array), rank, channels)

    def __repr__(self) -> str:
        count = len(self.networks)
        name = f"{self.checkpoints[0].network.get('name')}{f' x {count} folds' if count > 1 else ''}"
        return (
            f"ClassPredictor({name}, labels={list(self.labels.names)}, size={self.preprocessing.size}, {self.device})"
        )
