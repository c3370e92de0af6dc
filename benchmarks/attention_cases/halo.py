"""Halo attention against timm's module, 56 x 56 positions, 64 channels, blocks of 8 with a halo of 3.

Each case is (name, ours, baseline, make_inputs, floors), see `agent.py`.
"""

import torch
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from visattn.attention import HaloAttention


class Timm(nn.Module):
    """timm's module on a channels-last map: the permuted view is what it calls channels_last."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.inner = HaloAttn(64, num_heads=heads)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, H, W, C)."""
        return self.inner(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def pair(heads: int) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's with equal weights."""
    torch.manual_seed(0)
    theirs, ours = Timm(heads), HaloAttention(64, heads)
    ours.load_state_dict(theirs.inner.state_dict())
    return ours, theirs


CASES = [
    (
        f"halo 56x56 C64, {heads} heads",
        lambda heads=heads: pair(heads)[0],
        lambda heads=heads: pair(heads)[1],
        lambda: (torch.randn(1, 56, 56, 64),),
        (1.9, 0.95),
    )
    for heads in (2, 4, 8)
]
