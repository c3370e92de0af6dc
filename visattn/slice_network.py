"""A network for images on the slices of a volume, each prepared as the image that it would be as a PNG file.

Legend: C channels of the image, K outputs, D slices, H x W a slice's own size, h x w the network's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.data.images import Preprocessing, prepare
from visattn.data.intensity import Normalise
from visattn.data.slices import ORIENTATIONS
from visattn.data.volume_preprocessing import Size3, VolumePreprocessing
from visattn.errors import UserError
from visattn.inference3d import Grid, plan_windows
from visattn.volume_inference import Engine


@dataclass(frozen=True)
class SliceNetwork:
    """Takes windows of single slices, whose values run from 0 (black) to 1.

    Args:
        network: For images, in eval mode.
        preprocessing: Of the images.
    """

    network: Callable[[Tensor], Any]
    preprocessing: Preprocessing

    def __call__(self, windows: Tensor) -> Tensor:
        """(B, 1, D, H, W) to logits (B, K, D, H, W)."""
        count, _, depth, height, width = windows.shape
        grey = (windows * 255).round().clamp(0, 255).to(torch.uint8).cpu().reshape(-1, height, width, 1).numpy()
        images = [prepare(one.repeat(self.preprocessing.channels, axis=2), self.preprocessing) for one in grey]
        output = self.network(torch.stack(images).to(windows.device))
        logits: Tensor = output[0] if isinstance(output, tuple | list) else output
        native = F.interpolate(logits.float(), (height, width), mode="bilinear", align_corners=False)
        return native.reshape(count, depth, -1, height, width).movedim(2, 1)


class SliceEngine(Engine):
    """An `Engine` whose windows are the slices of each volume, whatever their size; `patch` is what one costs."""

    def grid(self, size: Size3) -> Grid:
        """One window for each slice."""
        return plan_windows(size, (1, *size[1:]), 0.0)


def slice_preprocessing(preprocessing: Preprocessing, source: str) -> VolumePreprocessing:
    """What a volume goes through before it is cut.

    Raises:
        UserError: The recipe named no axis.
    """
    slices = preprocessing.slices
    if slices is None:
        raise UserError(
            f"{source}: its network takes images, not volumes, and its recipe names no axis to cut volumes along.\n"
            "Which slices it was trained on, only you know. Train it with data.slices: axial (or coronal, sagittal) "
            "in the recipe, or give images."
        )
    if slices.window is None:
        method = Normalise("percentile")
    else:
        low, high = slices.window
        method = Normalise("ct", low=low, high=high, mean=low, std=high - low)
    h, w = preprocessing.size
    return VolumePreprocessing(("image",), (method,), ORIENTATIONS[slices.axis], patch=(1, h, w))
