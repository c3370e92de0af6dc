"""Cross-shaped window attention: half of the heads look along vertical strips, the other half along horizontal ones.

Paper: Dong et al., "CSWin Transformer", CVPR 2022, arXiv 2107.00652, equations 4 to 10.
Official code: as used by Agent-CSwin, https://github.com/LeapLabTHU/Agent-Attention, revision 207ce3e,
agent_transformer/models/agent_cswin.py (no licence file; nothing is copied from it), for the state dict's names.

Deviations:
- A map that is no multiple of a strip is padded at its end, and padding is masked. The official code refuses it.

Legend: B batch, C channels, H and W sides of a map, T strips, P positions of a strip, h heads, d channels of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visattn.attention._backend import scaled_dot_product
from visattn.attention._depthwise import depthwise
from visattn.attention._windows import known_zero, window_partition, window_reverse


class Strips(nn.Module):
    """Softmax attention inside strips, plus a depthwise convolution of the values that ends at the strip's border.

    Args:
        dim: Channels C.
        num_heads: Heads h.
        thickness: Height and width of a strip; None: the whole axis.
    """

    def __init__(self, dim: int, num_heads: int, thickness: tuple[int | None, int | None]) -> None:
        super().__init__()
        self.num_heads, self.thickness = num_heads, thickness
        self.scale = (dim // num_heads) ** -0.5
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, qkv: Tensor) -> Tensor:
        """Mix within strips: queries, keys and values, stacked, (3, B, H, W, C) to (B, H, W, C)."""
        size = qkv.shape[2:-1]
        strip = [whole if side is None else side for side, whole in zip(self.thickness, size, strict=True)]
        counts = [1 if side is None else -(-whole // side) for side, whole in zip(self.thickness, size, strict=True)]
        q, k, v = (window_partition(part, strip, counts) for part in qkv.unbind(0))  # (B, T, P, C)
        shape = v.shape
        mask = self._mask(qkv, strip, counts)
        out = scaled_dot_product(self._heads(q), self._heads(k), self._heads(v), mask, self.scale)
        maps = v.reshape(shape[0] * shape[1], *strip, shape[-1])
        out = out.transpose(1, 2).reshape(shape) + depthwise(self.get_v, maps).reshape(shape)
        return window_reverse(out, strip, size, counts)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, P, C) to (B T, h, P, d)."""
        return torch.unflatten(x.flatten(0, 1), -1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, qkv: Tensor, strip: Sequence[int], counts: Sequence[int]) -> Tensor | None:
        """Which keys are positions of the map, (B T, 1, 1, P); None if all are."""
        size = qkv.shape[2:-1]
        if known_zero(*(count * side - whole for count, side, whole in zip(counts, strip, size, strict=True))):
            return None
        real = window_partition(torch.ones((1, *size, 1), device=qkv.device), strip, counts)[0, :, :, 0]  # (T, P)
        return (real > 0)[:, None, None].repeat(qkv.shape[1], 1, 1, 1)

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return f"num_heads={self.num_heads}, thickness={self.thickness}"


class CrossShapedAttention(nn.Module):
    """Attention along vertical strips, across which columns do not mix, beside attention along horizontal ones.

    Args:
        dim: Channels C.
        num_heads: Heads h, even with strips.
        thickness: Height of a horizontal strip and width of a vertical one; None: one attention over the whole map.
    """

    def __init__(self, dim: int, num_heads: int, thickness: tuple[int, int] | None) -> None:
        super().__init__()
        self.dim = dim
        self.qkv = nn.Linear(dim, 3 * dim)
        if thickness is None:
            parts = [Strips(dim, num_heads, (None, None))]
        else:
            shapes = ((None, thickness[1]), (thickness[0], None))
            parts = [Strips(dim // 2, num_heads // 2, shape) for shape in shapes]
        self.attns = nn.ModuleList(parts)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        number = len(self.attns)
        qkv = self.qkv(x).unflatten(-1, (3, number, self.dim // number)).movedim(-3, 0)  # (3, B, H, W, parts, C)
        parts = [attend(part) for attend, part in zip(self.attns, qkv.unbind(-2), strict=True)]
        out: Tensor = self.proj(parts[0] if number == 1 else torch.cat(parts, dim=-1))
        return out
