"""The two blocks of MedViTV2: local and global feature perception.

Paper and official code: see `medvit`. The released code hands channels-first memory to layers that work on channels
last by reshaping it, not by permuting: what such a layer takes for the channels of a position are the values of one
channel along a row of the map. Weights trained with it need it. Both blocks compute it with `scrambled=True`, and what
the paper describes without.

Legend: B batch, C channels, H and W sides of the map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention import FullAttention, NeighborhoodAttention
from visattn.backbones._faster_kan import FasterKAN
from visattn.blocks import drop_path

HEAD_DIM = 32


class ConvNorm(nn.Module):
    """Convolution without bias and batch norm: (B, C, H, W) to (B, dim_out, H / stride, W / stride), rounded up."""

    def __init__(self, dim: int, dim_out: int, kernel_size: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.norm(self.conv(x))
        return out


class PatchEmbed(nn.Module):
    """Halve the map by averages, odd sides rounded up, and change the width: (B, C, H, W) to (B, dim_out, H', W')."""

    def __init__(self, dim: int, dim_out: int, stride: int) -> None:
        super().__init__()
        pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        self.pool = nn.Identity() if stride == 1 else pool
        self.conv = nn.Conv2d(dim, dim_out, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.norm(self.conv(self.pool(x)))
        return out


def patch_embed(dim: int, dim_out: int, stride: int) -> nn.Module:
    """What a block does first; nothing where neither size nor width changes."""
    return nn.Identity() if stride == 1 and dim == dim_out else PatchEmbed(dim, dim_out, stride)


class SqueezeExcite(nn.Module):
    """A factor per channel from the mean of all channels, through `hidden` values: (B, C, H, W) to the same shape."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        factor: Tensor = self.fc(x.mean((2, 3)))
        return x * factor[:, :, None, None]


class LocalFeedForward(nn.Module):
    """LFF: an inverted bottleneck with a depthwise convolution, residual: (B, C, H, W) to the same shape.

    Args:
        dim: Channels C.
        kernel_size: Of the depthwise convolution.
        expansion: Width inside over C. The squeeze has as many values: the official code divides the width by C.
    """

    def __init__(self, dim: int, kernel_size: int, expansion: int = 3) -> None:
        super().__init__()
        hidden = expansion * dim
        self.conv = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            SqueezeExcite(hidden, expansion),
            nn.Conv2d(hidden, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = x + self.conv(x)
        return out


class LocalPerception(nn.Module):
    """LFP: neighbourhood attention and a local feed-forward layer.

        x = patch_embed(x);  x = x + attn(norm1(x));  x = x + LFF(norm2(x))

    Args:
        dim: Channels of the input.
        dim_out: Channels C of the output.
        stride: Reduction of the map.
        kernel_size: Of the feed-forward layer's convolution.
        dilation: Distance between neighbouring keys of the attention.
        scrambled: Whether memory is reshaped as in the released code; see the file's head.
        drop_path_rate: Stochastic depth of the attention.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        stride: int = 1,
        kernel_size: int = 3,
        dilation: int = 1,
        scrambled: bool,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.scrambled = scrambled
        self.patch_embed = patch_embed(dim, dim_out, stride)
        self.norm1 = nn.BatchNorm2d(dim_out)
        self.attn = NeighborhoodAttention(dim_out, dim_out // HEAD_DIM, kernel_size=7, dilation=dilation)
        self.drop_path = drop_path(drop_path_rate)
        self.norm2 = nn.BatchNorm2d(dim_out)
        self.conv = LocalFeedForward(dim_out, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) to (B, C, H / stride, W / stride), rounded up."""
        x = self.patch_embed(x)
        height, width = x.shape[2:]
        out = self.norm1(x)
        if self.scrambled:
            out = self.attn(out.reshape(-1, height, width, x.shape[1])).reshape(x.shape)
        else:
            out = self.attn(out.movedim(1, -1)).movedim(-1, 1)
        x = x + self.drop_path(out)
        x = x + self.conv(self.norm2(x))
        return x


class MultiHeadConvolution(nn.Module):
    """MHCA of Next-ViT: a grouped 3x3 convolution and a projection: (B, C, H, W) to the same shape."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.group_conv3x3 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim // HEAD_DIM, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.projection = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.projection(F.relu(self.norm(self.group_conv3x3(x))))
        return out


class GlobalPerception(nn.Module):
    """GFP: attention over the whole map on three quarters of the channels, convolutions on the rest, and a KAN.

        a = patch_embed(x);  a = a + e_mhsa(norm1(a));  b = projection(a);  b = b + mhca(b)
        x = concat(a, b);    x = x + kan(norm2(x))

    Args:
        dim: Channels of the input.
        dim_out: Channels C of the output.
        stride: Reduction of the map.
        sr_ratio: Reduction of keys and values of the attention, per axis.
        scrambled: Whether memory is reshaped as in the released code; see the file's head.
        drop_path_rate: Stochastic depth of the KAN; attention and convolutions share it by their parts of the channels.
    """

    def __init__(
        self, dim: int, dim_out: int, *, stride: int = 1, sr_ratio: int, scrambled: bool, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.scrambled = scrambled
        attended = _whole_heads(0.75 * dim_out)
        rest = dim_out - attended
        self.patch_embed = patch_embed(dim, attended, stride)
        self.norm1 = nn.BatchNorm2d(attended)
        self.e_mhsa = FullAttention(attended, attended // HEAD_DIM, variant="e_mhsa", sr_ratio=sr_ratio)
        self.mhsa_drop_path = drop_path(0.75 * drop_path_rate)
        self.projection = ConvNorm(attended, rest)
        self.mhca = MultiHeadConvolution(rest)
        self.mhca_drop_path = drop_path(0.25 * drop_path_rate)
        self.norm2 = nn.BatchNorm2d(dim_out)
        self.kan = FasterKAN((dim_out, 2 * dim_out, dim_out))
        self.kan_drop_path = drop_path(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) to (B, C, H / stride, W / stride), rounded up."""
        x = self.patch_embed(x)
        x = x + self.mhsa_drop_path(self.e_mhsa(self.norm1(x).movedim(1, -1)).movedim(-1, 1))
        out = self.projection(x)
        out = out + self.mhca_drop_path(self.mhca(out))
        x = torch.cat((x, out), 1)
        out = self.norm2(x)
        if self.scrambled:
            out = self.kan(out.reshape(-1, x.shape[1])).reshape(x.shape)
        else:
            out = self.kan(out.movedim(1, -1)).movedim(-1, 1)
        x = x + self.kan_drop_path(out)
        return x


def _whole_heads(width: float) -> int:
    """`width` rounded to a multiple of the head dim, up where rounding down would lose more than a tenth."""
    whole = max(HEAD_DIM, int(width + HEAD_DIM / 2) // HEAD_DIM * HEAD_DIM)
    return whole + HEAD_DIM if whole < 0.9 * width else whole
