"""Bi-level routing attention against the official formulation, written from its definition, and against a dense mask.

Each case is (name, ours, baseline, make_inputs, floors): two builders of modules that give equal outputs on the tensors
of `make_inputs`, and the least ratio of the baseline's time to ours, forward and forward with backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention import BiLevelRoutingAttention

REGIONS = 7  # per axis


class OfficialBiLevel(nn.Module):
    """The published module: windows first, then a gather through an expanded view of all windows."""

    def __init__(self, dim: int, heads: int, topk: int) -> None:
        super().__init__()
        self.dim, self.heads, self.topk, self.scale = dim, heads, topk, dim**-0.5
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.qkv = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim)})
        self.wo = nn.Linear(dim, dim)

    def cut(self, x: Tensor) -> Tensor:
        """Windows (B, R, h, w, C) of (B, H, W, C)."""
        batch, height, width, dim = x.shape
        x = x.reshape(batch, REGIONS, height // REGIONS, REGIONS, width // REGIONS, dim)
        return x.transpose(2, 3).reshape(batch, REGIONS**2, height // REGIONS, width // REGIONS, dim)

    def join(self, x: Tensor) -> Tensor:
        """The map of windows."""
        batch, _, height, width, dim = x.shape
        x = x.reshape(batch, REGIONS, REGIONS, height, width, dim).transpose(2, 3)
        return x.reshape(batch, REGIONS * height, REGIONS * width, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys with values in windows, the convolution, and the chosen regions."""
        q, kv = self.qkv["qkv"](self.cut(x)).split([self.dim, 2 * self.dim], dim=-1)
        local = self.lepe(self.join(kv[..., self.dim :]).permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
        means = q.mean((2, 3)).detach(), kv[..., : self.dim].mean((2, 3)).detach()
        return q, kv, local, (means[0] * self.scale @ means[1].transpose(-2, -1)).topk(self.topk, dim=-1)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, H, W, C)."""
        q, kv, local, index = self.project(x)
        batch, regions, height, width, _ = q.shape
        tokens, two = height * width, 2 * self.dim
        every = kv.reshape(batch, 1, regions, tokens, two).expand(-1, regions, -1, -1, -1)
        chosen = index[..., None, None].expand(-1, -1, -1, tokens, two)
        k, v = torch.gather(every, 2, chosen).split(self.dim, dim=-1)
        k, v = (each.reshape(batch * regions, self.topk * tokens, self.heads, -1).transpose(1, 2) for each in (k, v))
        q = q.reshape(batch * regions, tokens, self.heads, -1).transpose(1, 2)
        out = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        out = out.transpose(1, 2).reshape(batch, regions, height, width, self.dim)
        return self.wo(self.join(out) + local)


class DenseBiLevel(OfficialBiLevel):
    """The same by one attention over all tokens under a mask of regions."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, H, W, C)."""
        q, kv, local, index = self.project(x)
        batch, regions, height, width, _ = q.shape
        tokens = height * width
        mask = torch.zeros(batch, regions, regions, dtype=torch.bool).scatter(2, index, True)
        mask = mask.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)[:, None]
        k, v = kv.split(self.dim, dim=-1)
        q, k, v = (e.reshape(batch, regions * tokens, self.heads, -1).transpose(1, 2) for e in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        out = out.transpose(1, 2).reshape(batch, regions, height, width, self.dim)
        return self.wo(self.join(out) + local)


def pair(kind: type[OfficialBiLevel], dim: int, topk: int) -> tuple[nn.Module, nn.Module]:
    """Ours and a baseline with equal weights."""
    torch.manual_seed(0)
    baseline = kind(dim, dim // 32, topk)
    ours = BiLevelRoutingAttention(dim, dim // 32, topk=topk, side_dwconv=5)
    ours.load_state_dict(baseline.state_dict())
    return ours, baseline


def case(name: str, kind: type[OfficialBiLevel], side: int, dim: int, topk: int, floors: tuple[float, float]) -> tuple:
    """One case."""
    return (
        name,
        lambda: pair(kind, dim, topk)[0],
        lambda: pair(kind, dim, topk)[1],
        lambda: (torch.randn(1, side, side, dim),),
        floors,
    )


CASES = [
    case("bilevel 56x56 C64 top-1", OfficialBiLevel, 56, 64, 1, (1.3, 3.3)),
    case("bilevel 56x56 C128 top-4", OfficialBiLevel, 56, 128, 4, (1.3, 2.1)),
    case("bilevel 14x14 C256 top-17, dense mask", DenseBiLevel, 14, 256, 17, (1.0, 1.0)),
    case("bilevel 56x56 C64 top-17, dense mask", DenseBiLevel, 56, 64, 17, (1.0, 1.0)),
]
