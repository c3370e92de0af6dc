"""NAT and DiNAT against their attention by its definition: every query gathers its keys and values."""

from functools import cache

import torch
import torch.nn.functional as F
from backbones import swapped
from torch import Tensor, nn

from visattn.attention import NeighborhoodAttention


@cache
def line(length: int, kernel: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Along one axis the keys of each query (L, k), and where its entries of the position table begin (L,)."""
    place = torch.arange(length)
    group, index = place % dilation, place // dilation
    members = (length - group + dilation - 1) // dilation
    start = torch.minimum((index - kernel // 2).clamp(min=0), members - kernel)
    keys = group[:, None] + dilation * (start[:, None] + torch.arange(kernel))
    return keys, start - index + kernel - 1


@cache
def neighbours(size: tuple[int, int], kernel: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The keys of each query and their entries of the position table, both (N, k * k)."""
    (rows, above), (columns, left) = (line(length, kernel, dilation) for length in size)
    keys = rows[:, None, :, None] * size[1] + columns[None, :, None, :]
    step = torch.arange(kernel)
    entries = (above[:, None, None, None] + step[:, None]) * (2 * kernel - 1) + left[:, None, None] + step
    return keys.flatten(2).flatten(0, 1).to(device), entries.flatten(2).flatten(0, 1).to(device)


class OfficialNeighborhood(nn.Module):
    """The published module in PyTorch: gather, two products, a softmax between."""

    def __init__(self, dim: int, heads: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.heads, self.kernel, self.dilation = heads, kernel, dilation
        self.scale = (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * kernel - 1, 2 * kernel - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, H, W, C)."""
        batch, height, width, dim = x.shape
        needed = self.kernel * self.dilation
        x = F.pad(x, (0, 0, 0, max(needed - width, 0), 0, max(needed - height, 0)))
        size = (x.shape[1], x.shape[2])
        keys, entries = neighbours(size, self.kernel, self.dilation, x.device)
        qkv = self.qkv(x).reshape(batch, -1, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, N, d)
        logits = (q * self.scale)[:, :, :, None] @ k[:, :, keys].transpose(-2, -1)  # (B, h, N, 1, k * k)
        weights = (logits + self.rpb.flatten(1)[:, entries][:, :, None]).softmax(-1)
        out = (weights @ v[:, :, keys])[:, :, :, 0].transpose(1, 2).reshape(batch, *size, dim)
        return self.proj(out[:, :height, :width])


def neighborhood(ours: NeighborhoodAttention) -> nn.Module:
    """The official form of our module."""
    axis = ours.axes[0]
    return OfficialNeighborhood(ours.dim, ours.num_heads, axis.kernel, axis.dilation)


def official(model: nn.Module) -> nn.Module:
    """The official formulation with the weights of `model`."""
    return swapped(model, {NeighborhoodAttention: neighborhood})


CASES = [
    (name, {"drop_path_rate": 0.0}, official, (1.5, 1.5))
    for name in ("va_nat_mini", "va_dinat_mini", "va_dinat_s_tiny")
]
