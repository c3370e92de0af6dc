"""What happens to an image or volume before a classifier sees it; it rides in the checkpoint."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visattn.data.images import resize_image
from visattn.errors import UserError

if TYPE_CHECKING:
    import torch  # takes seconds, and whoever only reads files needs none of it

MOST = 2**27  # pixels or voxels of an input
_LONGEST = 1 << 14


@dataclass(frozen=True)
class ClassPreprocessing:
    """Crop, resize, normalise.

    Args:
        size: Height and width, or depth, height and width, that the network gets.
        mean: Per channel, subtracted after scaling to 0..1.
        std: Per channel, divided by.
        crop: Share of the largest centred rectangle with the shape of `size` that is kept, such as 0.875, before it is
            resized; null: the whole image, whatever its shape. Volumes are always taken whole.
    """

    size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float | None = None

    def __post_init__(self) -> None:
        if len(self.size) not in (2, 3) or not all(type(n) is int and 1 <= n <= _LONGEST for n in self.size):
            raise UserError(
                f"data.size: needs one side, or two for images and three for volumes; got {self.size!r:.60}"
            )
        if math.prod(self.size) > MOST:
            raise UserError(f"data.size: {' x '.join(map(str, self.size))} is more than the limit of {MOST}")
        numbers = (*self.mean, *self.std)
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or not all(map(math.isfinite, numbers)):
            raise UserError(f"data.mean, data.std: need a number per channel, got {self.mean!r:.60}, {self.std!r:.60}")
        if min(self.std) <= 0:
            raise UserError(f"data.std: needs numbers above 0, got {self.std!r:.60}")
        if self.crop is not None and not 0.05 <= self.crop <= 1:
            raise UserError(f"data.crop: must be a share of 0.05 to 1, or null; got {self.crop!r:.60}")

    @property
    def rank(self) -> int:
        """Spatial axes: 2 for images, 3 for volumes."""
        return len(self.size)

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return len(self.mean)

    def to_config(self) -> dict[str, Any]:
        """Plain Python that `from_config` reads back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ClassPreprocessing":
        """The inverse of `to_config`."""
        return cls(tuple(config["size"]), tuple(config["mean"]), tuple(config["std"]), config["crop"])

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An image (H, W, C) at the size of the network; volumes (D, H, W, C) are returned as they are."""
        if self.rank == 3:
            return image
        if self.crop is not None:
            height, width = image.shape[:2]
            scale = self.crop * min(height / self.size[0], width / self.size[1])
            h, w = (max(1, round(side * scale)) for side in self.size)
            top, left = (height - h) // 2, (width - w) // 2
            image = image[top : top + h, left : left + w]
        return resize_image(np.ascontiguousarray(image), (self.size[0], self.size[1]))

    def normalise(self, image: NDArray[np.uint8]) -> "torch.Tensor":
        """Values (*S, C) of 0..255 to a float32 tensor (C, *S); volumes are brought to the size of the network."""
        import torch
        import torch.nn.functional as F

        std = torch.tensor(self.std).view(-1, *[1] * self.rank)
        mean = torch.tensor(self.mean).view(-1, *[1] * self.rank)
        values = torch.tensor(np.ascontiguousarray(image)).movedim(-1, 0).float()
        if tuple(values.shape[1:]) != self.size:
            values = F.interpolate(values[None], self.size, mode="trilinear", align_corners=False)[0]
        return values.mul_(1 / (255 * std)).sub_(mean / std).contiguous()

    def prepare(self, image: NDArray[np.uint8]) -> "torch.Tensor":
        """An image or volume (*S, C) as it was read, to the tensor (C, *S) that the network gets."""
        return self.normalise(self.resize(image))


def with_channels(image: NDArray[np.uint8], rank: int, channels: int) -> NDArray[np.uint8]:
    """An image (H, W), (H, W, 1) or (H, W, 3), or a volume likewise, as (*S, channels)."""
    if image.ndim == rank:
        image = image[..., None]
    if image.shape[-1] == channels:
        return np.asarray(image, np.uint8)
    if channels == 3:
        return np.repeat(image, 3, axis=-1)
    grey = image @ np.array([0.299, 0.587, 0.114])  # ITU-R 601, as everywhere
    return np.asarray(np.rint(grey), np.uint8)[..., None]


def fits(shape: Sequence[int], rank: int) -> bool:
    """Whether an array of this shape is one case: grey, or of images also colour."""
    plain = len(shape) == rank and not (rank == 3 and shape[-1] in (1, 3))  # an image, with its channels last
    return 0 not in shape and (plain or (len(shape) == rank + 1 and shape[-1] in ((1, 3) if rank == 2 else (1,))))


def read_size(size: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """The `size` of a recipe, one side or one for each axis."""
    sides = [size] * rank if isinstance(size, int) else list(size)
    if len(sides) != rank:
        raise UserError(f"data.size: needs one side or {rank} of them, got {size!r:.60}")
    return tuple(sides)
