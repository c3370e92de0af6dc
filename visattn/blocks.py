"""What networks are built of around a block of attention: residual blocks, MLPs, norms, and the choice of the mixer.

Legend: B batch, *S spatial axes (d of them), C channels.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention import ATTENTION, DepthwiseConvolution
from visattn.errors import UserError, did_you_mean, unknown

Mixer = str | Mapping[str, Any]
HEAD_DIM = 32  # channels of a head unless told otherwise, as the published hierarchical networks have


class BatchNorm(nn.Module):
    """Batch normalisation of channels-last maps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *S, dim) to the same shape."""
        out: Tensor = self.norm(x.flatten(0, -2))
        return out.reshape(x.shape)


NORM: dict[str, type[nn.Module]] = {"batch": BatchNorm, "layer": nn.LayerNorm, "rms": nn.RMSNorm}


CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
ADAPTIVE: dict[int, Any] = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
_BATCH: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def conv_norm(kind: str, rank: int, width: int) -> nn.Module:
    """The norm of channels-first maps (B, width, *S) called `kind`: `batch`, `instance` or `group` (up to 8 groups)."""
    norm: nn.Module
    if kind == "group":
        groups = max(size for size in range(1, min(8, width) + 1) if width % size == 0)
        norm = nn.GroupNorm(groups, width)
    elif kind == "batch":
        norm = _BATCH[rank](width)
    elif kind == "instance":
        norm = _INSTANCE[rank](width, affine=True)
    else:
        raise unknown("norm", kind, ("batch", "instance", "group"))
    return norm


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """`x` (B, C, *S) at the spatial `size`, by linear interpolation with half-pixel centres."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear" if len(size) == 2 else "trilinear", align_corners=False)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """The rate of each block of each stage, growing linearly from 0 to `rate` over all blocks.

    Raises:
        UserError: No rate.
    """
    if not 0.0 <= rate < 1.0:
        raise UserError(f"drop_path_rate must be in [0, 1), got {rate!r}")
    each = torch.linspace(0, rate, sum(depths), dtype=torch.float64, device="cpu").tolist()
    return [each[sum(depths[:i]) : sum(depths[: i + 1])] for i in range(len(depths))]


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): in training, a sample's branch is left out at random.

    What is kept is divided by the probability of being kept, so that the mean stays.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise UserError(f"drop_path_rate must be in [0, 1), got {rate!r}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """`x`, in training with some samples set to zero."""
        if not self.training:
            return x
        keep = 1 - self.rate
        return x * x.new_empty([x.shape[0]] + [1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """The setting shown by `repr`."""
        return f"rate={self.rate:g}"


def drop_path(rate: float) -> nn.Module:
    """Stochastic depth of probability `rate`; the identity where that is 0."""
    return DropPath(rate) if rate else nn.Identity()


class Mlp(nn.Module):
    """Two linear layers with an activation between, on the last axis.

    Args:
        dim: Channels in and out.
        hidden: Channels between.
        act: Activation layer's class.
        drop: Dropout after each layer.
    """

    def __init__(self, dim: int, hidden: int, act: type[nn.Module] = nn.GELU, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *S, dim) to the same shape."""
        x = self.drop(self.act(self.fc1(x)))
        x = self.drop(self.fc2(x))
        return x


class ConvMlp(nn.Module):
    """An MLP with a depthwise 3^d convolution before its activation."""

    def __init__(self, dim: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = DepthwiseConvolution(hidden, kernel_size=3, rank=rank)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *S, dim) to the same shape."""
        out: Tensor = self.fc2(self.act(self.conv(self.fc1(x))))
        return out


class Scale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        """(B, *S, C) to the same shape."""
        return x * self.gamma


class Block(nn.Module):
    """Position, mixer and MLP, each a residual branch.

    Args:
        dim: Channels C.
        mixer: (B, *S, C) to the same shape.
        mlp: Likewise.
        norm: Class of the two norms.
        rank: Spatial axes.
        positional_conv: Whether a depthwise convolution tells positions apart.
        drop_path_rate: Stochastic depth of mixer and MLP.
        layer_scale: Initial value of a learned factor per channel on both branches; None: no factor.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        norm: type[nn.Module],
        rank: int,
        positional_conv: bool,
        drop_path_rate: float,
        layer_scale: float | None,
    ) -> None:
        super().__init__()
        self.position = DepthwiseConvolution(dim, kernel_size=3, rank=rank) if positional_conv else None
        self.norm1, self.mixer, self.drop_path1 = norm(dim), mixer, drop_path(drop_path_rate)
        self.norm2, self.mlp, self.drop_path2 = norm(dim), mlp, drop_path(drop_path_rate)
        self.scale1 = nn.Identity() if layer_scale is None else Scale(dim, layer_scale)
        self.scale2 = nn.Identity() if layer_scale is None else Scale(dim, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *S, C) to the same shape."""
        if self.position is not None:
            x = x + self.position(x)
        x = x + self.drop_path1(self.scale1(self.mixer(self.norm1(x))))
        x = x + self.drop_path2(self.scale2(self.mlp(self.norm2(x))))
        return x


def build_mixer(mixer: Mixer, dim: int, rank: int) -> nn.Module:
    """The block of `ATTENTION` that `mixer` names, for `dim` channels and `rank` spatial axes.

    Raises:
        UserError: An unknown block or argument, or one that does not fit.
    """
    arguments: dict[str, Any] = {"name": mixer} if isinstance(mixer, str) else dict(mixer)
    name = str(arguments.pop("name", None))
    if name not in ATTENTION:
        raise unknown("attention", name, ATTENTION)
    block = ATTENTION[name]
    valid = inspect.signature(block).parameters
    for key in arguments:
        if key not in valid or key in ("dim", "rank"):
            names = [each for each in valid if each not in ("dim", "rank")]
            raise UserError(
                f"attention '{name}' has no argument '{key}'.{did_you_mean(key, names)}\nIt takes: {', '.join(names)}"
            )
    ranks: tuple[int, ...] = vars(block)["supported_ranks"]
    if rank not in ranks:
        raise UserError(f"attention '{name}' exists for {' and '.join(f'{r}-D' for r in ranks)} only, not {rank}-D")
    if "rank" in valid:
        arguments["rank"] = rank
    if "num_heads" in valid and "num_heads" not in arguments:
        arguments["num_heads"] = next(h for h in range(max(dim // HEAD_DIM, 1), dim + 1) if dim % h == 0)
    try:
        return block(dim, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"attention '{name}' with {dim} channels: {error}") from error


class PatchMerging(nn.Module):
    """Swin's downsampling: four neighbours become one position of twice the channels, by a norm and a linear layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 C); odd sides are padded with zeros at the end."""
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = nn.functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # The channels of the four come in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column).
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
        out: Tensor = self.reduction(self.norm(x))
        return out


class ToChannelsLast(nn.Module):
    """(B, C, *S) to (B, *S, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """A view of `x`."""
        return x.movedim(1, -1)


class ToChannelsFirst(nn.Module):
    """(B, *S, C) to (B, C, *S)."""

    def forward(self, x: Tensor) -> Tensor:
        """A view of `x`."""
        return x.movedim(-1, 1)


def init_linear(module: nn.Module) -> None:
    """The usual initialisation of transformers: linear weights from a normal of 0.02, cut at 2, and biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
