"""MedViTV2 against the layers of the released code, from their definitions; attention gathers, see `nat.py`.

The paper's form has no released code: there only the layers are those.
"""

import torch
import torch.nn.functional as F
from attention import load
from backbones import CASES as FAMILIES
from backbones import swapped
from torch import Tensor, nn

from visattn.attention import FullAttention, NeighborhoodAttention
from visattn.backbones._faster_kan import GRID, Bumps

neighborhood = load(FAMILIES, "nat").neighborhood


class Attention(nn.Module):
    """E-MHSA: keys and values from averages over runs of tokens, softmax between two products."""

    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads, self.ratio, self.scale = heads, ratio, (dim // heads) ** -0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        if ratio > 1:
            self.pool, self.norm = nn.AvgPool1d(ratio**2, ratio**2), nn.BatchNorm1d(dim)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, h, N, d)."""
        return x.reshape(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, H, W, C)."""
        tokens = fewer = x.reshape(len(x), -1, x.shape[-1])
        if self.ratio > 1:
            fewer = self.norm(self.pool(tokens.transpose(1, 2))).transpose(1, 2)
        q, k, v = self.split(self.q(tokens)), self.split(self.k(fewer)), self.split(self.v(fewer))
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(x.shape))


class Basis(nn.Module):
    """The bumps of FasterKAN: 1 - tanh((x - grid) / width) ** 2."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(*GRID))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C, G)."""
        return 1 - torch.tanh((x[..., None] - self.grid) / 0.33) ** 2


class Swish(nn.Module):
    """x * relu6(x + 3) / 6."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return x * F.relu6(x + 3) / 6


class Sigmoid(nn.Module):
    """relu6(x + 3) / 6."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return F.relu6(x + 3) / 6


def official(model: nn.Module) -> nn.Module:
    """The official formulation with the weights of `model`."""
    return swapped(
        model,
        {
            NeighborhoodAttention: neighborhood,
            FullAttention: lambda ours: Attention(ours.dim, ours.num_heads, ours.sr_ratio),
            Bumps: lambda ours: Basis(),
            nn.Hardswish: lambda ours: Swish(),
            nn.Hardsigmoid: lambda ours: Sigmoid(),
        },
    )


CASES = [(name, {"drop_path_rate": 0.0}, official, (1.5, 1.5)) for name in ("va_medvit_tiny", "va_medvit_dina_tiny")]
