"""Networks over any backbone: a U-Net with any attention block in encoder, skips and decoder, and other decoders.

The encoder is a timm model that gives feature maps, one of ours or of timm's own, of images or volumes; the decoders
are those of `visattn.heads`. `unet3d` is the plain network of convolutions that these have to beat.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from visattn.blocks import Mixer
from visattn.errors import UserError
from visattn.heads.fpn import FPNHead, UPerHead
from visattn.heads.linear import LinearHead
from visattn.heads.unet import Skip, UNetHead, Upsampling
from visattn.networks.compose import SegmentationNet
from visattn.networks.features import TimmFeatures

_COMMON = {
    "task": "segmentation",
    "input": "2-D or 3-D, any size, any channels",
    "licence": "ours; no weights included",
}
INFO: dict[str, dict[str, Any]] = {
    "fpn": {"name": "fpn", "parameters": 15_466_557, "paper": "Lin et al., CVPR 2017, arXiv 1612.03144", **_COMMON},
    "linear": {"name": "linear", "parameters": 11_236_477, "paper": "a linear probe", **_COMMON},
    "unet": {"name": "unet", "parameters": 13_758_077, "paper": "Ronneberger et al., MICCAI 2015", **_COMMON},
    "upernet": {
        "name": "upernet",
        "parameters": 19_548_605,
        "paper": "Xiao et al., ECCV 2018, arXiv 1807.10221",
        **_COMMON,
    },
}
"""What `visattn models` shows; parameters with the default arguments."""

BACKBONES = {2: "va_pyramid_small", 3: "va_pyramid3d_small"}
"""The encoder unless another is named."""


def encoder(
    dims: int,
    backbone: str | None,
    pretrained: bool | str | Path,
    in_channels: int | None,
    maps: int | None,
    backbone_args: Mapping[str, Any] | None,
) -> TimmFeatures:
    """The encoder of a network over any backbone; arguments as in `unet`."""
    if dims not in (2, 3):
        raise UserError(f"dims must be 2 or 3, got {dims!r}")
    name = BACKBONES[dims] if backbone is None else backbone
    options = dict(backbone_args or {})
    if name == "va_pyramid":
        options.setdefault("dims", dims)
    channels = in_channels if in_channels is not None else (3 if dims == 2 else 1)
    return TimmFeatures(name, maps, channels, pretrained, options, dims)


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
    features = encoder(dims, backbone, pretrained, in_channels, maps, backbone_args)
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


def fpn(
    dims: Literal[2, 3] = 2,
    backbone: str | None = None,
    pretrained: bool | str | Path = False,
    in_channels: int | None = None,
    classes: int = 1,
    width: int = 256,
    branch_width: int = 128,
    drop_rate: float = 0.0,
    maps: int | None = None,
    backbone_args: Mapping[str, Any] | None = None,
) -> SegmentationNet:
    """Build a feature pyramid network; arguments as in `unet` and `visattn.heads.fpn.FPNHead`."""
    features = encoder(dims, backbone, pretrained, in_channels, maps, backbone_args)
    head = FPNHead(
        features.features, classes, dims=dims, width=width, branch_width=branch_width, drop_rate=drop_rate
    )  # fmt: skip
    return SegmentationNet(features, head)


def upernet(
    dims: Literal[2, 3] = 2,
    backbone: str | None = None,
    pretrained: bool | str | Path = False,
    in_channels: int | None = None,
    classes: int = 1,
    width: int = 256,
    bins: Sequence[int] = (1, 2, 3, 6),
    norm: Literal["batch", "instance", "group"] | None = None,
    drop_rate: float = 0.1,
    maps: int | None = None,
    backbone_args: Mapping[str, Any] | None = None,
) -> SegmentationNet:
    """Build UPerNet; arguments as in `unet` and `visattn.heads.fpn.UPerHead`."""
    features = encoder(dims, backbone, pretrained, in_channels, maps, backbone_args)
    kind = norm or ("batch" if dims == 2 else "instance")
    head = UPerHead(features.features, classes, dims=dims, width=width, bins=bins, norm=kind, drop_rate=drop_rate)
    return SegmentationNet(features, head)


def linear(
    dims: Literal[2, 3] = 2,
    backbone: str | None = None,
    pretrained: bool | str | Path = False,
    in_channels: int | None = None,
    classes: int = 1,
    maps: int | None = None,
    backbone_args: Mapping[str, Any] | None = None,
) -> SegmentationNet:
    """Build a linear probe over all maps; arguments as in `unet`."""
    features = encoder(dims, backbone, pretrained, in_channels, maps, backbone_args)
    return SegmentationNet(features, LinearHead(features.features, classes, dims=dims))
