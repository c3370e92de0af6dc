"""Decoders: they read a list of feature maps and know no backbone.

A head is built from `features`, a list of (channels, reduction) with the finest map first, and `classes`; it is called
with the maps (B, C, *S) and the size of the output, and returns logits (B, classes, *size), or a tuple of such maps,
the prediction first. Its `output_names` name them.
"""

from torch import nn

from visattn.heads.fpn import FPNHead, UPerHead
from visattn.heads.linear import LinearHead
from visattn.heads.pranet import PraNetHead
from visattn.heads.unet import UNetHead

HEADS: dict[str, type[nn.Module]] = {
    "fpn": FPNHead,
    "linear": LinearHead,
    "pranet": PraNetHead,
    "unet": UNetHead,
    "upernet": UPerHead,
}
"""Heads by the name that recipes use."""

__all__ = ["HEADS", "FPNHead", "LinearHead", "PraNetHead", "UNetHead", "UPerHead"]
