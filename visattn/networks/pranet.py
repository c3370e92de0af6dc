"""PraNet: Res2Net-50 features, a partial decoder and reverse attention.

Paper: Fan et al., "PraNet: Parallel Reverse Attention Network for Polyp Segmentation", MICCAI 2020, arXiv 2006.11392.
Official code: github.com/DengPingFan/PraNet, revision 95f12bd, lib/PraNet_Res2Net.py (it states no licence; nothing is
copied from it). Its backbone, "Res2Net-50 v1b 26w x 4s", is timm's `res2net50d`; its decoder is `visattn.heads.pranet`.

Deviations: the official code takes sides that are multiples of 32, here others are padded and cropped; any timm
backbone, number of input channels and classes. The official constructor always loads ImageNet weights; here
`pretrained` decides.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from visattn.attention.reverse import Activation
from visattn.heads.pranet import PraNetHead
from visattn.networks.compose import SegmentationNet
from visattn.networks.features import TimmFeatures
from visattn.weights import load_renamed

INFO: dict[str, Any] = {
    "name": "pranet",
    "task": "segmentation",
    "input": "2-D, any size, any channels",
    "parameters": 30_498_319,
    "paper": "Fan et al., MICCAI 2020, arXiv 2006.11392",
    "licence": "none stated by the authors; not included",
}
"""What `visattn models` shows; parameters with the default backbone, one class and three channels."""

UNUSED = {"resnet.fc.weight": (1000, 2048), "resnet.fc.bias": (1000,)}
"""Entries of the official state dict that the official forward pass never reads: the backbone's classifier."""


def pranet(
    backbone: str = "res2net50d",
    pretrained: bool | str | Path = False,
    in_channels: int = 3,
    classes: int = 1,
    channels: int = 32,
    activation: Activation | None = None,
    backbone_args: Mapping[str, Any] | None = None,
) -> SegmentationNet:
    """Build PraNet.

    Args:
        backbone: Any timm model that gives at least three feature maps; the last three are used.
        pretrained: Backbone weights: true (download), false, or the path of a file.
        in_channels: Channels of the image.
        classes: Output channels: 1 for a binary task, else one per class (background first) or per region.
        channels: Width of the decoder.
        activation: How the logits will be read: `sigmoid` (also for overlapping regions) or `softmax`. None means
            sigmoid for one class, softmax for several.
        backbone_args: Further arguments of the timm model, e.g. `{drop_path_rate: 0.1}`.

    Returns:
        A network with four outputs: the prediction `map2`, then `map3`, `map4` and the global map `map5`.

    Raises:
        UserError: No such backbone, or its weights cannot be had.
    """
    options = dict(backbone_args or {})
    if backbone.startswith("res2net"):
        # The official initialisation: timm would start the last norm of each residual branch at zero.
        options.setdefault("zero_init_last", False)
    features = TimmFeatures(backbone, 3, in_channels, pretrained, options)
    return SegmentationNet(features, PraNetHead(features.features, classes, channels, activation))


def from_official(name: str, state_dict: Mapping[str, Tensor], **kwargs: Any) -> SegmentationNet:
    """PraNet with the authors' weights; every entry must match, by name and shape.

    Args:
        name: `pranet`.
        state_dict: The official state dict, unwrapped.
        kwargs: Arguments of `pranet`.
    """
    from visattn.networks import create_model

    network = create_model(name, **kwargs)
    assert isinstance(network, SegmentationNet)
    load_renamed(network, state_dict, official_name, UNUSED, "official PraNet")
    return network


def official_name(key: str) -> str:
    """The official name of our entry `key`."""
    for pattern, replacement in _NAMES:
        key, count = re.subn(pattern, replacement, key)
        if count:
            return key
    return key


# Levels 0, 1, 2 are the official 2, 3, 4; a branch's convolutions are numbered from 1, the coarsest has one more.
_NAMES = [
    (r"^backbone\.net\.", "resnet."),
    (r"^head\.decoder\.(upsample|concat)(\d)\.", r"agg1.conv_\1\2."),
    (r"^head\.decoder\.", "agg1."),
    *((rf"^head\.receptive\.{i}\.branches\.(\d)\.", rf"rfb{i + 2}_1.branch\1.") for i in range(3)),
    *((rf"^head\.receptive\.{i}\.fuse\.", f"rfb{i + 2}_1.conv_cat.") for i in range(3)),
    *((rf"^head\.receptive\.{i}\.shortcut\.", f"rfb{i + 2}_1.conv_res.") for i in range(3)),
    *((rf"^head\.branches\.{i}\.narrow\.", f"ra{i + 2}_conv1.") for i in range(3)),
    *((rf"^head\.branches\.{i}\.inner\.{j}\.", f"ra{i + 2}_conv{j + 2}.") for i in range(3) for j in range(3)),
    *((rf"^head\.branches\.{i}\.last\.", f"ra{i + 2}_conv{5 if i == 2 else 4}.") for i in range(3)),
]
