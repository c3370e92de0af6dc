"""A pyramid over any block of `ATTENTION`: the same network around every mechanism, in 2-D and 3-D.

No paper: the plan that hierarchical transformers share (stem, four stages, pre-norm blocks of mixer and MLP), written
so that one argument changes the mechanism and nothing else. `identity` and `conv` are the controls of a comparison.

    x = x + position(x)          depthwise 3^d convolution, `positional_conv`
    x = x + mixer(norm(x))       any key of `ATTENTION`
    x = x + mlp(norm(x))

Legend: B batch, *S spatial axes (d of them), C channels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from visattn.backbones._backbone import Backbone, Head, Stage
from visattn.backbones._build import build, config
from visattn.blocks import (
    CONV,
    NORM,
    Block,
    ConvMlp,
    Mixer,
    Mlp,
    ToChannelsFirst,
    ToChannelsLast,
    build_mixer,
    drop_path_rates,
    init_linear,
)
from visattn.errors import UserError, unknown


@register_notrace_module  # whether anything is missing depends on the size
class PadTo(nn.Module):
    """Zeros at the end of each axis of (B, C, *S), up to a multiple."""

    def __init__(self, multiple: tuple[int, ...]) -> None:
        super().__init__()
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        """The padded map; `x` itself where nothing is missing."""
        missing = [-size % unit for size, unit in zip(x.shape[2:], self.multiple, strict=True)]
        if not any(missing):
            return x
        return F.pad(x, [each for end in reversed(missing) for each in (0, end)])


class Downsample(nn.Module):
    """A strided convolution between stages, and a norm: (B, *S, C) to (B, *ceil(S / stride), dim_out)."""

    def __init__(self, dim: int, dim_out: int, stride: tuple[int, ...], norm: type[nn.Module]) -> None:
        super().__init__()
        # An axis that keeps its size (an anisotropic volume's through-plane axis) is not mixed either.
        kernel = tuple(1 if step == 1 else step + 1 - step % 2 for step in stride)
        padding = tuple(size // 2 for size in kernel)
        self.conv = CONV[len(stride)](dim, dim_out, kernel, stride=stride, padding=padding)
        self.norm = norm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """The coarser map."""
        out: Tensor = self.norm(self.conv(x.movedim(-1, 1)).movedim(1, -1))
        return out


def conv_stem(in_chans: int, dim: int, stride: tuple[int, ...], norm: type[nn.Module]) -> nn.Module:
    """Convolutions 3^d that halve the axes step by step, at least two of them, each with a norm."""
    if any(step & (step - 1) for step in stride):
        raise UserError(
            f"stem 'conv' halves the axes: its stride must be a power of 2, got {stride}. Use stem 'patch'."
        )
    steps = max(2, max(step.bit_length() - 1 for step in stride))
    layers: list[nn.Module] = []
    for index in range(steps):
        halving = tuple(2 if step.bit_length() - 1 > index else 1 for step in stride)
        width = dim if index == steps - 1 else max(dim // 2, 1)
        conv = CONV[len(stride)](in_chans if index == 0 else max(dim // 2, 1), width, 3, stride=halving, padding=1)
        last = index == steps - 1
        layers += [conv, ToChannelsLast(), norm(width), *([] if last else [nn.GELU(), ToChannelsFirst()])]
    return nn.Sequential(*layers)


def patch_stem(in_chans: int, dim: int, stride: tuple[int, ...], norm: type[nn.Module]) -> nn.Module:
    """One convolution over patches that do not overlap, zeros at the end where the image is no multiple."""
    conv = CONV[len(stride)](in_chans, dim, stride, stride=stride)
    return nn.Sequential(PadTo(stride), conv, ToChannelsLast(), norm(dim))


def pyramid(
    *,
    dims: int = 2,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    depths: Sequence[int] = (2, 2, 6, 2),
    widths: Sequence[int] = (64, 128, 256, 512),
    strides: Sequence[int | Sequence[int]] = (4, 2, 2, 2),
    attention: Mixer | Sequence[Mixer | Sequence[Mixer]] = "neighborhood",
    stem: Literal["conv", "patch"] = "conv",
    mlp: Literal["linear", "conv"] = "linear",
    mlp_ratio: float = 3.0,
    norm: Literal["layer", "rms", "batch"] = "layer",
    positional_conv: bool = True,
    layer_scale: float | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Backbone:
    """Build the pyramid.

    Args:
        dims: Spatial axes of the images, 2 or 3.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: `avg`, `max`, or empty for none.
        depths: Blocks of each stage.
        widths: Channels of each stage.
        strides: Reduction by the stem and before each later stage; one number, or one per axis.
        attention: A key of `ATTENTION`; or `{"name": key, argument: value, ...}`; or a list with one of these per
            stage, or per stage a list with one per block. Heads get 32 channels unless `num_heads` is given.
        stem: `conv`: overlapping convolutions; `patch`: patches.
        mlp: `linear`, or `conv` with a depthwise convolution inside.
        mlp_ratio: Width of the MLP over that of the stage.
        norm: `layer`, `rms` or `batch`.
        positional_conv: Depthwise 3^d convolution before each mixer. Without it, mixers that know no positions see
            them through the strided convolutions only, and a comparison isolates the mixer most strictly.
        layer_scale: Initial value of learned factors on the branches; None: none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Raises:
        UserError: An argument does not fit; the message says what would.
    """
    if dims not in CONV:
        raise UserError(f"dims must be 2 or 3, got {dims!r}")
    if not len(depths) == len(widths) == len(strides) > 0:
        raise UserError(
            f"depths, widths and strides need one entry per stage, got {len(depths)}, {len(widths)} and {len(strides)}"
        )
    if norm not in NORM:
        raise unknown("norm", norm, NORM)
    if mlp not in ("linear", "conv") or stem not in ("conv", "patch"):
        raise UserError(f"mlp must be 'linear' or 'conv' and stem 'conv' or 'patch', got {mlp!r} and {stem!r}")
    steps = [_per_axis(stride, dims) for stride in strides]
    mixers = _per_block(attention, depths)
    rates = drop_path_rates(drop_path_rate, depths)
    norm_class = NORM[norm]
    stages = []
    for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        down = nn.Identity() if index == 0 else Downsample(widths[index - 1], width, steps[index], norm_class)
        blocks = []
        for i in range(depth):
            hidden = round(width * mlp_ratio)
            blocks.append(
                Block(
                    width,
                    build_mixer(mixers[index][i], width, dims),
                    Mlp(width, hidden) if mlp == "linear" else ConvMlp(width, hidden, dims),
                    norm_class,
                    dims,
                    positional_conv,
                    rates[index][i],
                    layer_scale,
                )
            )
        stages.append(Stage(down, blocks))
    total = [tuple(math.prod(axis) for axis in zip(*steps[: i + 1], strict=True)) for i in range(len(steps))]
    network = Backbone(
        (conv_stem if stem == "conv" else patch_stem)(in_chans, widths[0], steps[0], norm_class),
        stages,
        widths=widths,
        reductions=[max(each) for each in total],
        norm=norm_class(widths[-1]),
        head=Head(widths[-1], num_classes, pool=global_pool, channels_last=True, drop_rate=drop_rate),
        in_chans=in_chans,
        num_classes=num_classes,
        channels_last=True,
        no_decay=("rpb", "_bias", "gamma"),
    )
    for info, each in zip(network.feature_info, total, strict=True):
        if len(set(each)) > 1:
            info["reductions"] = each  # timm's records know one number for all axes: the largest
    for module in network.modules():
        if isinstance(module, Mlp | ConvMlp):
            module.apply(init_linear)
    return network


def _per_axis(stride: int | Sequence[int], dims: int) -> tuple[int, ...]:
    steps = (stride,) * dims if isinstance(stride, int) else tuple(stride)
    if len(steps) != dims or any(type(step) is not int or step < 1 for step in steps):
        raise UserError(f"a stride must be a whole number above 0, or {dims} of them, one per axis; got {stride!r}")
    return steps


def _per_block(attention: Any, depths: Sequence[int]) -> list[list[Mixer]]:
    if isinstance(attention, str | Mapping):
        return [[attention] * depth for depth in depths]
    if len(attention) != len(depths):
        raise UserError(f"attention: a list needs one entry per stage ({len(depths)}), got {len(attention)}")
    each: list[list[Mixer]] = []
    for index, (stage, depth) in enumerate(zip(attention, depths, strict=True)):
        blocks = [stage] * depth if isinstance(stage, str | Mapping) else list(stage)
        if len(blocks) != depth:
            raise UserError(f"attention: stage {index} has {depth} blocks, but {len(blocks)} entries")
        each.append(blocks)
    return each


_2D = config("stem.0")
# timm's records know images only: a volume's size and channels stay unsaid there.
_3D = config("stem.0", input_size=None, pool_size=None, mean=(0.5,), std=(0.5,))

default_cfgs = generate_default_cfgs(
    {
        "va_pyramid": _2D,
        "va_pyramid_tiny": _2D,
        "va_pyramid_small": _2D,
        "va_pyramid3d_tiny": _3D,
        "va_pyramid3d_small": _3D,
    }
)


@register_model
def va_pyramid(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The pyramid with every argument free; see `pyramid`."""
    stages = len(kwargs.get("depths", (2, 2, 6, 2)))
    return build(pyramid, "va_pyramid", pretrained, **{"out_indices": tuple(range(stages)), **kwargs})


@register_model
def va_pyramid_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """2-D, widths 32 to 256."""
    return build(
        pyramid, "va_pyramid_tiny", pretrained, **{"depths": (2, 2, 4, 2), "widths": (32, 64, 128, 256), **kwargs}
    )


@register_model
def va_pyramid_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """2-D, widths 64 to 512."""
    return build(pyramid, "va_pyramid_small", pretrained, **{"drop_path_rate": 0.1, **kwargs})


_VOLUME: dict[str, Any] = {
    "dims": 3,
    "in_chans": 1,
    "strides": (2, 2, 2, 2),
    "attention": {"name": "neighborhood", "kernel_size": 5},
}


@register_model
def va_pyramid3d_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """3-D, widths 16 to 128."""
    plan = {**_VOLUME, "depths": (1, 1, 2, 1), "widths": (16, 32, 64, 128)}
    return build(pyramid, "va_pyramid3d_tiny", pretrained, **{**plan, **kwargs})


@register_model
def va_pyramid3d_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """3-D, widths 32 to 256."""
    plan = {**_VOLUME, "depths": (2, 2, 4, 2), "widths": (32, 64, 128, 256)}
    return build(pyramid, "va_pyramid3d_small", pretrained, **{**plan, **kwargs})
