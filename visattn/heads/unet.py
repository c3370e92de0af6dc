"""The decoder of a U-Net over any list of feature maps: every fusion on the skips, every block in the levels.

Papers: Ronneberger et al., "U-Net", MICCAI 2015, arXiv 1505.04597 (skips that concatenate); Oktay et al., "Attention
U-Net", arXiv 1804.03999 (gates); Fan et al., "PraNet", arXiv 2006.11392 (reverse attention); Cao et al., "Swin-Unet",
arXiv 2105.05537 (patch expanding). Status: no parity target; written from these descriptions.

A level doubles the resolution (or does what lies between two maps), joins the skip, and runs its blocks. Where one
reduction is no multiple of the next, the next whole factor is followed by linear interpolation. Below the finest map,
levels without a skip go on to the full resolution, by 2 at a time.

Legend: B batch, C channels, K classes, *S spatial axes.
"""

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visattn.attention import ATTENTION, FUSION
from visattn.blocks import CONV, Block, Mixer, Mlp, build_mixer, conv_norm, drop_path_rates, resize
from visattn.errors import UserError, did_you_mean, unknown

Skip = str | Mapping[str, Any]
Upsampling = Literal["interpolate", "transpose", "pixel_shuffle", "patch_expand"]
SKIPS = ("concat", "add", *FUSION)
DECODERS = tuple(dict.fromkeys(("conv", "residual", *ATTENTION)))
UPSAMPLING = ("interpolate", "transpose", "pixel_shuffle", "patch_expand")
TRANSPOSED: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SLOPE = 0.01  # of the leaky ReLU
NARROWEST = 16  # channels that levels without a skip do not go below


class UNetHead(nn.Module):
    """Decoder of a U-Net.

    Args:
        features: (channels, reduction) of the maps, finest first; a reduction is one number or one per axis.
        classes: Output channels K.
        dims: Spatial axes, 2 or 3.
        channels: Width of each level from the finest map on up to the one below the coarsest; None: as the maps.
        skip: `concat`, `add` or a key of `FUSION`; or a mapping of `name` and arguments of its class.
        decoder: `conv`, `residual` or a key of `ATTENTION`; or a mapping of `name` and arguments of its class.
        depth: Blocks of each level: for `conv` and `residual` pairs of convolutions.
        upsample: `interpolate` (linear), `transpose` (transposed convolution), `pixel_shuffle` or `patch_expand`.
        norm: `batch`, `instance` or `group`, of the convolutions.
        deep_supervision: Whether levels of coarser maps give predictions too, all but the lowest.
        drop_path_rate: Stochastic depth of the blocks of attention, growing with the depth.

    Attributes:
        output_names: `logits`, then with deep supervision `logits_1`, `logits_2`, ... ever coarser.

    Raises:
        UserError: An argument cannot be.
    """

    def __init__(
        self,
        features: Sequence[tuple[int, int | Sequence[int]]],
        classes: int,
        *,
        dims: int = 2,
        channels: Sequence[int] | None = None,
        skip: Skip = "concat",
        decoder: Mixer = "conv",
        depth: int = 1,
        upsample: Upsampling = "interpolate",
        norm: Literal["batch", "instance", "group"] = "batch",
        deep_supervision: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if upsample not in UPSAMPLING:
            raise unknown("upsample", str(upsample), UPSAMPLING)
        widths = [width for width, _ in features]
        reductions = [(each,) * dims if isinstance(each, int) else tuple(each) for _, each in features]
        if type(depth) is not int or depth < 1:
            raise UserError(f"depth must be a whole number above 0, got {depth!r}")
        own = list(widths[:-1]) if channels is None else _widths(channels, len(features) - 1)
        # Between neighbouring maps; rounded up where they do not divide.
        factors = [
            tuple(-(-a // b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(reductions[::-1])
        ]
        divide = [all(a % b == 0 for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(reductions[::-1])]
        steps = _halvings(reductions[0])  # from the finest map to the full resolution
        rates = drop_path_rates(drop_path_rate, [depth] * (len(own) + len(steps)))
        levels: list[Level] = []
        width = widths[-1]
        for i, factor, exact in zip(reversed(range(len(own))), factors, divide, strict=True):
            plan = (width, own[i], factor, widths[i])
            levels.append(Level(*plan, skip, decoder, rates[len(levels)], upsample, norm, classes, exact))
            width = own[i]
        for step in steps:
            # Attention at full resolution would dominate the cost of the network: these levels are convolutions.
            out = max(width // 2, min(width, NARROWEST))
            simple = decoder if decoder in ("conv", "residual") else "conv"
            levels.append(Level(width, out, step, 0, "concat", simple, rates[len(levels)], upsample, norm, classes))
            width = out
        self.dims, self.classes = dims, classes
        self.grad_checkpointing = False
        self.levels = nn.ModuleList(levels)
        self.head = CONV[dims](width, classes, 1)
        outputs = [level.width for level in levels[1:-1]][::-1] if deep_supervision else []
        self.side_heads = nn.ModuleList(CONV[dims](each, classes, 1) for each in outputs)
        self.output_names = ("logits", *(f"logits_{i + 1}" for i in range(len(outputs))))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether backward computes the levels' activations again instead of keeping them."""
        self.grad_checkpointing = enable

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
        """Decode.

        Args:
            maps: Feature maps (B, C, *S), finest first.
            size: Spatial size of the output.

        Returns:
            Logits (B, K, *size), or with deep supervision a tuple of it and the coarser maps.
        """
        x, skips = maps[-1], list(maps[:-1])[::-1]
        found = []
        for i, level in enumerate(self.levels):
            skip = skips[i] if i < len(skips) else None
            goal = size if i == len(self.levels) - 1 else None
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(level, x, skip, goal, use_reentrant=False))
            else:
                x = level(x, skip, goal)
            found.append(x)
        logits: Tensor = self.head(x)
        sides = [head(side) for head, side in zip(self.side_heads, found[1:-1][::-1], strict=False)]
        return (logits, *sides) if sides else logits


class Level(nn.Module):
    """One step of the decoder: upsample, join the skip, run the blocks.

    Args:
        dim: Channels in.
        width: Channels out.
        factor: How much finer the output is, per axis.
        skip_dim: Channels of the skip, 0 if there is none.
        skip: As in `UNetHead`.
        decoder: As in `UNetHead`.
        rates: Stochastic depth of each block.
        upsample: As in `UNetHead`.
        norm: As in `UNetHead`.
        classes: Channels of the prediction that reverse attention reads.
        exact: Whether `factor` leads to the skip's size, but for what padding adds; else the rest is interpolated.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        factor: tuple[int, ...],
        skip_dim: int,
        skip: Skip,
        decoder: Mixer,
        rates: Sequence[float],
        upsample: str,
        norm: str,
        classes: int,
        exact: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.exact = width, exact
        self.up = Upsample(dim, width, factor, upsample)
        self.join = Join(width, skip_dim, skip, len(factor), classes) if skip_dim else None
        joined = width if self.join is None else self.join.width
        self.blocks = decoder_blocks(joined, width, decoder, rates, norm, len(factor))

    def forward(self, x: Tensor, skip: Tensor | None = None, size: Sequence[int] | None = None) -> Tensor:
        """(B, dim, *S) to (B, width, *T), where T is the skip's size, else `size`, else that of the factor."""
        goal = skip.shape[2:] if skip is not None else size
        x = self.up(x)
        if goal is not None:
            x = fit(x, goal) if self.exact else resize(x, goal)
        if self.join is not None and skip is not None:
            x = self.join(x, skip)
        x = self.blocks(x)
        return x


class Upsample(nn.Module):
    """(B, dim, *S) to (B, width, *(S * factor))."""

    def __init__(self, dim: int, width: int, factor: tuple[int, ...], kind: str) -> None:
        super().__init__()
        self.factor, self.kind = factor, kind
        rank, many = len(factor), math.prod(factor)
        conv = CONV[rank]
        self.layer: nn.Module
        if kind == "transpose" and many > 1:
            self.layer = TRANSPOSED[rank](dim, width, factor, factor)
        elif kind == "pixel_shuffle":
            self.layer = conv(dim, width * many, 1)
        elif kind == "patch_expand":
            self.layer = conv(dim, width * many, 1, bias=False)
            self.norm = nn.LayerNorm(width)
        else:
            self.layer = conv(dim, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The finer map."""
        x = self.layer(x)
        if self.kind == "interpolate" and any(step > 1 for step in self.factor):
            size = [side * step for side, step in zip(x.shape[2:], self.factor, strict=True)]
            x = F.interpolate(x, size=size, mode="bilinear" if len(size) == 2 else "trilinear", align_corners=False)
        elif self.kind in ("pixel_shuffle", "patch_expand"):
            x = unfold_channels(x, self.factor)
        if self.kind == "patch_expand":
            x = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return x


class Join(nn.Module):
    """The decoder's features and the skip, joined: (B, dim, *S) and (B, skip_dim, *S) to (B, width, *S).

    Attributes:
        width: Channels of the result.
    """

    def __init__(self, dim: int, skip_dim: int, skip: Skip, rank: int, classes: int) -> None:
        super().__init__()
        arguments: dict[str, Any] = {"name": skip} if isinstance(skip, str) else dict(skip)
        self.kind = str(arguments.pop("name", None))
        if self.kind not in SKIPS:
            raise unknown("skip", self.kind, SKIPS)
        if self.kind in ("concat", "add") and arguments:
            raise UserError(f"skip '{self.kind}' takes no arguments, got {', '.join(arguments)}")
        self.width = dim if self.kind == "add" else dim + skip_dim
        self.fusion: nn.Module | None = None
        self.project: nn.Module | None = None
        if self.kind == "add":
            self.project = nn.Identity() if dim == skip_dim else CONV[rank](skip_dim, dim, 1)
        elif self.kind == "reverse":
            self.project = CONV[rank](dim, classes, 1)  # the coarse prediction that is reversed
        if self.kind in FUSION:
            self.fusion = build_fusion(self.kind, dim, skip_dim, rank, arguments)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Both, joined."""
        if self.project is not None and self.fusion is None:
            return x + cast(Tensor, self.project(skip))
        if self.fusion is not None:
            ours, theirs = x.movedim(1, -1), skip.movedim(1, -1)
            if self.project is not None:
                theirs = self.fusion(theirs, self.project(x).movedim(1, -1))
            else:
                fused = self.fusion(ours, theirs)
                ours, theirs = fused if isinstance(fused, tuple) else (ours, fused)
            x, skip = ours.movedim(-1, 1), theirs.movedim(-1, 1)
        return torch.cat([x, skip], dim=1)


def build_fusion(name: str, dim: int, skip_dim: int, rank: int, arguments: Mapping[str, Any]) -> nn.Module:
    """The block of `FUSION` called `name`, for features of `dim` and a skip of `skip_dim` channels.

    Raises:
        UserError: An argument that the block does not have, or that cannot be.
    """
    block = FUSION[name]
    valid = inspect.signature(block).parameters
    given = {"dim": dim, "skip_dim": skip_dim, "rank": rank}
    names = [each for each in valid if each not in given]
    for key in arguments:
        if key not in names:
            raise UserError(f"skip '{name}' has no argument '{key}'.{did_you_mean(key, names)}\nIt takes: {names}")
    try:
        return block(**{key: value for key, value in given.items() if key in valid}, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"skip '{name}': {error}") from error


class ConvBlock(nn.Module):
    """Two convolutions 3^d with norm and leaky ReLU; the residual form adds the input before the last one."""

    def __init__(self, dim: int, width: int, norm: str, rank: int, residual: bool) -> None:
        super().__init__()
        self.conv1 = CONV[rank](dim, width, 3, padding=1, bias=False)
        self.norm1 = conv_norm(norm, rank, width)
        self.conv2 = CONV[rank](width, width, 3, padding=1, bias=False)
        self.norm2 = conv_norm(norm, rank, width)
        self.shortcut: nn.Module | None = None
        if residual:
            self.shortcut = nn.Identity() if dim == width else CONV[rank](dim, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, *S) to (B, width, *S)."""
        y: Tensor = F.leaky_relu(self.norm1(self.conv1(x)), SLOPE)
        y = self.norm2(self.conv2(y))
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return F.leaky_relu(y, SLOPE)


class MixerBlocks(nn.Module):
    """A projection, then residual blocks of attention and MLP."""

    def __init__(self, dim: int, width: int, mixer: Mixer, rates: Sequence[float], rank: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, width)
        self.blocks = nn.Sequential(
            *(
                Block(
                    width, build_mixer(mixer, width, rank), Mlp(width, 3 * width), nn.LayerNorm, rank, True, rate, None
                )
                for rate in rates
            )
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, *S) to (B, width, *S)."""
        out: Tensor = self.norm(self.blocks(self.project(x.movedim(1, -1))))
        return out.movedim(-1, 1)


def decoder_blocks(dim: int, width: int, decoder: Mixer, rates: Sequence[float], norm: str, rank: int) -> nn.Module:
    """The blocks of a level: (B, dim, *S) to (B, width, *S).

    Raises:
        UserError: There is no such decoder.
    """
    name = decoder if isinstance(decoder, str) else decoder.get("name")
    if name not in DECODERS:
        raise unknown("decoder", str(name), DECODERS)
    if name in ("conv", "residual"):
        if not isinstance(decoder, str) and len(decoder) > 1:
            raise UserError(
                f"decoder '{name}' takes no arguments, got {', '.join(key for key in decoder if key != 'name')}"
            )
        pairs = [(dim if i == 0 else width, width) for i in range(len(rates))]
        return nn.Sequential(*(ConvBlock(a, b, norm, rank, name == "residual") for a, b in pairs))
    return MixerBlocks(dim, width, decoder, rates, rank)


def fit(x: Tensor, size: Sequence[int]) -> Tensor:
    """`x` (B, C, *S) at `size`: what lies beyond is cropped, what is missing at the end repeats the last values."""
    missing = [max(0, goal - side) for goal, side in zip(size, x.shape[2:], strict=True)]
    if any(missing):
        x = F.pad(x, [each for end in reversed(missing) for each in (0, end)], mode="replicate")
    index: tuple[Any, ...] = (..., *(slice(side) for side in size))
    return x[index]


def unfold_channels(x: Tensor, factor: Sequence[int]) -> Tensor:
    """(B, prod(factor) * C, *S) to (B, C, *(S * factor)); a voxel's channels hold its finer positions, row by row."""
    rank, sizes = len(factor), x.shape[2:]
    x = x.reshape(x.shape[0], *factor, -1, *sizes)  # (B, *factor, C, *S)
    order = [0, rank + 1, *(axis for i in range(rank) for axis in (rank + 2 + i, 1 + i))]
    return x.permute(order).reshape(x.shape[0], -1, *(a * b for a, b in zip(sizes, factor, strict=True)))


def _widths(channels: Any, number: int) -> list[int]:
    given: list[Any] = list(channels) if isinstance(channels, Sequence) else [channels]
    if (
        not isinstance(channels, Sequence)
        or len(given) != number
        or any(type(each) is not int or each < 1 for each in given)
    ):
        raise UserError(
            f"channels needs {number} whole number{'s' * (number != 1)} above 0, one per skip, finest first; "
            f"got {channels!r}"
        )
    return given


def _halvings(reduction: Sequence[int]) -> list[tuple[int, ...]]:
    """Steps of at most 2 per axis that lead from `reduction` to 1; what is no power of 2 goes in one step."""
    left, steps = list(reduction), []
    while any(each > 1 for each in left):
        step = tuple(each if each % 2 else min(each, 2) for each in left)
        steps.append(step)
        left = [each // by for each, by in zip(left, step, strict=True)]
    return steps
