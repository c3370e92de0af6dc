"""A backbone and a head make a segmentation network. The only file that sees both."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from visattn.networks._sizes import crop
from visattn.networks.features import TimmFeatures

Output = Tensor | tuple[Tensor, ...]


class SegmentationNet(nn.Module):
    """Pads, extracts feature maps, decodes, crops.

    Border policy: an image whose sides do not suit the backbone is padded at the bottom and on the right with zeros
    (the mean colour, after normalisation), and the outputs are cropped; an image whose sides suit it is not touched.

    Args:
        backbone: Feature maps of an image.
        head: Decoder of those maps, see `visattn.heads`.
    """

    def __init__(self, backbone: TimmFeatures, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.output_names: tuple[str, ...] = tuple(getattr(head, "output_names", ("logits",)))

    def padded_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The size that images of the spatial `size` are padded to.

        Raises:
            UserError: The backbone takes one size only, and the image is larger.
        """
        return self.backbone.padded_size(size)

    def forward(self, x: Tensor) -> Any:
        """Logits.

        Args:
            x: Images (B, in_channels, *S), normalised.

        Returns:
            Logits (B, classes, *S), or a tuple of such maps, the prediction first, named by `output_names`; maps of a
            lower resolution cover the image too, (B, classes, ceil(S / reduction)).

        Raises:
            ValueError: `x` has another number of axes.
        """
        if x.ndim != self.backbone.dims + 2:
            axes = "(B, C, H, W)" if self.backbone.dims == 2 else "(B, C, D, H, W)"
            raise ValueError(f"expected images {axes}, got {tuple(x.shape)}")
        sizes = tuple(x.shape[2:])
        padded = self.padded_size(sizes)
        if padded != sizes:
            missing = [goal - size for goal, size in zip(padded, sizes, strict=True)]
            x = F.pad(x, [each for end in reversed(missing) for each in (0, end)])
        output: Output = self.head(self.backbone(x), padded)
        if isinstance(output, Tensor):
            return _cropped(output, sizes, padded)
        return tuple(_cropped(map_, sizes, padded) for map_ in output)


def _cropped(map_: Tensor, sizes: tuple[int, ...], padded: tuple[int, ...]) -> Tensor:
    """The part of `map_`, which covers an image of `padded` size, that belongs to the first `sizes` pixels."""
    shape = [-(-size * have // whole) for size, have, whole in zip(sizes, map_.shape[2:], padded, strict=True)]
    return crop(map_, shape)
