"""PAT_ch, PAT_sp and PAT_sf against the official formulation: split, torch's own layers, concatenate.

Both forms get the memory they are made for: ours channels-last features, the official one a channels-first copy. Case:
(name, ours, baseline, make_inputs, floors), as in `agent.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention import PartialChannelAttention, PartialSelfAttention, PartialSpatialAttention


class ChannelsLast(nn.Module):
    """Runs a block on the first of two tensors."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        """Mix `x` (B, H, W, C)."""
        return self.block(x)


class ChannelsFirst(nn.Module):
    """Runs a block on the second of two tensors, and shows its result as a channels-last view."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, _: Tensor, x: Tensor) -> Tensor:
        """Mix `x` (B, C, H, W)."""
        return self.block(x).movedim(1, -1)


class Gate(nn.Module):
    """The official channel gate, from mean and standard deviation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cfc1, self.bn = nn.Conv2d(dim, dim, (1, 2), bias=False), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Gate `x` (B, C, H, W)."""
        flat = x.reshape(*x.shape[:2], -1)
        pair = torch.stack((flat.mean(-1), flat.std(-1)), dim=-1)[:, :, None]
        return x * F.hardsigmoid(self.bn(self.cfc1(pair)))


class Bias(nn.Module):
    """The official position bias: a table looked up for every pair, buckets made on the fly."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.lookup_table_bias = nn.Parameter(torch.zeros(heads, 81))

    def forward(self, height: int, width: int) -> Tensor:
        """Bias (heads, N, N)."""
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        at = torch.stack((rows, columns), dim=-1).reshape(-1, 2)
        distance = (at[:, None] - at[None]).square().sum(-1).float().sqrt().round()
        far = (20 + (distance.clamp(min=1) / 20).log() / math.log(8) * 20).round().clamp(max=40)
        return self.lookup_table_bias[:, 40 + torch.where(distance <= 20, distance, far).long()]


class Attention(nn.Module):
    """The official self-attention over all positions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj, self.rpe_k = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim), Bias(heads)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the positions of `x` (B, C, H, W)."""
        batch, dim, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1) + self.rpe_k(height, width)).softmax(-1)
        out = self.proj((weights @ v).transpose(1, 2).reshape(batch, height * width, dim))
        return out.transpose(1, 2).reshape(x.shape)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OfficialPartial(nn.Module):
    """PAT_ch or PAT_sf: a convolution for a quarter of the channels, attention for the others."""

    def __init__(self, dim: int, attention: nn.Module, norm: nn.Module, norm_first: bool) -> None:
        super().__init__()
        self.split, self.norm_first = dim // 4, norm_first
        self.partial_conv3 = nn.Conv2d(self.split, self.split, 3, padding=1, bias=False)
        self.attn, self.norm = attention, norm

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, C, H, W)."""
        left, right = torch.split(x, [self.split, x.shape[1] - self.split], dim=1)
        right = self.attn(self.norm(right)) if self.norm_first else self.norm(self.attn(right))
        return torch.cat([self.partial_conv3(left), right], dim=1)


class OfficialSpatial(nn.Module):
    """PAT_sp: half of the channels gated, the other half convolved."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.conv, self.conv_attn = nn.Conv2d(half, half, 1, bias=False), nn.Conv2d(half, 1, 1, bias=False)
        self.norm, self.norm2 = nn.BatchNorm2d(half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, C, H, W)."""
        left, right = x.chunk(2, dim=1)
        left = self.norm(left * F.hardsigmoid(self.conv_attn(left)))
        return torch.cat([left, self.conv(self.norm2(right))], dim=1)


def pair(kind: str, dim: int) -> tuple[nn.Module, nn.Module]:
    """Ours and the official formulation with equal weights."""
    torch.manual_seed(0)
    rest = dim - dim // 4
    if kind == "ch":
        ours, official = PartialChannelAttention(dim), OfficialPartial(dim, Gate(rest), nn.BatchNorm2d(rest), False)
    elif kind == "sp":
        ours, official = PartialSpatialAttention(dim), OfficialSpatial(dim)
    else:
        ours = PartialSelfAttention(dim, attn_drop=0.0, proj_drop=0.0)
        official = OfficialPartial(dim, Attention(rest, 4), LayerNorm(rest, eps=1e-6), True)
    official.load_state_dict(ours.state_dict())
    return ChannelsLast(ours), ChannelsFirst(official)


def inputs(batch: int, side: int, dim: int) -> tuple[Tensor, ...]:
    """Features (B, H, W, C), and their channels-first copy."""
    x = torch.randn(batch, side, side, dim)
    return x, x.movedim(-1, 1).contiguous()


CASES = [
    (
        f"PAT_{kind} {side}x{side} C{dim}, batch {batch}",
        lambda kind=kind, dim=dim: pair(kind, dim)[0],
        lambda kind=kind, dim=dim: pair(kind, dim)[1],
        lambda batch=batch, side=side, dim=dim: inputs(batch, side, dim),
        (0.95, 0.95),
    )
    for kind, side, dim, batch in (
        ("ch", 56, 64, 2),
        ("ch", 28, 128, 2),
        ("ch", 14, 256, 2),
        ("sp", 56, 64, 2),
        ("sp", 28, 128, 2),
        ("sf", 7, 512, 2),
        ("sf", 14, 256, 2),
    )
]
