"""A backbone and a head make a segmentation network. The only file that sees both."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

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

    def forward(self, x: Tensor) -> Any:
        """Logits.

        Args:
            x: Images (B, in_channels, H, W), normalised.

        Returns:
            Logits (B, classes, H, W), or a tuple of such maps, the prediction first, named by `output_names`.
        """
        height, width = x.shape[-2:]
        padded = self.backbone.padded_size((height, width))
        if padded != (height, width):
            x = F.pad(x, (0, padded[1] - width, 0, padded[0] - height))
        output: Output = self.head(self.backbone(x), padded)
        if isinstance(output, Tensor):
            return output[..., :height, :width]
        return tuple(map_[..., :height, :width] for map_ in output)
