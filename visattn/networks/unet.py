"""A U-Net over any backbone, with any attention block in its encoder, its skips and its decoder, in 2-D and 3-D.

The encoder is a timm model that gives feature maps, one of ours or of timm's own; the decoder is `visattn.heads.unet`.
`unet3d` is the plain network of convolutions that this one has to beat.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from visattn.blocks import Mixer
from visattn.errors import UserError
from visattn.heads.unet import Skip, UNetHead, Upsampling
from visattn.networks.compose import SegmentationNet
from visattn.networks.features import TimmFeatures

INFO: dict[str, Any] = {
    "name": "unet",
    "task": "segmentation",
    "input": "2-D or 3-D, any size, any channels",
    "parameters": 13_758_077,
    "paper": "Ronneberger et al., MICCAI 2015, arXiv 1505.04597",
    "licence": "ours; no weights included",
}
"""What `visattn models` shows; parameters with the default arguments."""

BACKBONES = {2: "va_pyramid_small", 3: "va_pyramid3d_small"}
"""The encoder unless another is named."""


def unet(
    dims: Literal[2, 3] = 2,
    backbone: str | None = None,
    pretrained: bool | str | Path = False,
    in_channels: int | None = None,
    classes: int = 1,
    skip: Skip = "concat",
    decoder: Mixer = "conv",
    depth: int = 1,
    upsample: Upsampling = "interpolate",
    norm: Literal["batch", "instance", "group"] | None = None,
    channels: Sequence[int] | None = None,
    maps: int | None = None,
    deep_supervision: bool = False,
    drop_path_rate: float = 0.0,
    backbone_args: Mapping[str, Any] | None = None,
) -> SegmentationNet:
    """Build a U-Net.

    Args:
        dims: Spatial axes of the images: 2, or 3 for volumes.
        backbone: A timm model that gives feature maps, `va_...` or any other; None: the small pyramid of `dims`.
        pretrained: Backbone weights: true (download), false, or the path of a file.
        in_channels: Channels of the image; None: 3 in 2-D, 1 in 3-D.
        classes: Output channels: 1 for a binary task, else one per class (background first) or per region.
        skip: How decoder and skip are joined: `concat`, `add`, or a key of `visattn.attention.FUSION`; or a mapping of
            `name` and arguments of its class.
        decoder: What the levels consist of: `conv`, `residual`, or a key of `visattn.attention.ATTENTION`; or a mapping
            of `name` and arguments of its class.
        depth: Blocks of each level of the decoder.
        upsample: `interpolate`, `transpose`, `pixel_shuffle` or `patch_expand`.
        norm: Of the decoder's convolutions: `batch`, `instance` or `group`; None: batch in 2-D, instance in 3-D, where
            batches are small.
        channels: Width of the decoder at each skip, finest first; None: as the encoder's maps.
        maps: How many of the encoder's maps to use, the coarsest ones; None: all.
        deep_supervision: Whether coarser levels have an output too.
        drop_path_rate: Stochastic depth of attention blocks in the decoder.
        backbone_args: Further arguments of the backbone, e.g. `{attention: halo}` for a pyramid.

    Returns:
        A network whose prediction has the full resolution, whatever that of the backbone's finest map.

    Raises:
        UserError: An argument cannot be.
    """
    if dims not in (2, 3):
        raise UserError(f"network 'unet': dims must be 2 or 3, got {dims!r}")
    name = BACKBONES[dims] if backbone is None else backbone
    options = dict(backbone_args or {})
    if name == "va_pyramid":
        options.setdefault("dims", dims)
    channels_in = in_channels if in_channels is not None else (3 if dims == 2 else 1)
    features = TimmFeatures(name, maps, channels_in, pretrained, options, dims)
    head = UNetHead(
        features.features,
        classes,
        dims=dims,
        channels=channels,
        skip=skip,
        decoder=decoder,
        depth=depth,
        upsample=upsample,
        norm=norm or ("batch" if dims == 2 else "instance"),
        deep_supervision=deep_supervision,
        drop_path_rate=drop_path_rate,
    )
    return SegmentationNet(features, head)
