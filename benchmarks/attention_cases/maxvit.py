"""Window and grid attention against timm's, 56 x 56 positions, 64 channels, windows of 7.

Each case is (name, ours, baseline, make_inputs, floors), see `agent.py`.
"""

import torch
from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from visattn.attention import GridAttention, WindowAttention


class MaxViT(nn.Module):
    """The attention of timm's MaxViT block, without its norm and MLP."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        config = MaxxVitTransformerCfg(dim_head=32, rel_pos_type="bias", window_size=(7, 7), grid_size=(7, 7))
        self.inner = PartitionAttentionCl(64, kind, config)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, H, W, C)."""
        return self.inner._partition_attn(x)


class Swin(nn.Module):
    """The attention of timm's Swin block, shifted, without its norm and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SwinTransformerBlock(64, (56, 56), num_heads=2, window_size=7, shift_size=3)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, H, W, C)."""
        return self.inner._attn(x)


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's with equal weights."""
    torch.manual_seed(0)
    if kind == "shift":
        theirs, ours = Swin(), WindowAttention(64, shift_size=3)
        state = theirs.inner.attn.state_dict()
        ours.load_state_dict({("rel_pos." if "table" in key else "") + key: value for key, value in state.items()})
        return ours, theirs
    other = MaxViT(kind)
    mine = (WindowAttention if kind == "block" else GridAttention)(64, qkv_layout="per_head")
    mine.load_state_dict(other.inner.attn.state_dict())
    return mine, other


CASES = [
    (
        name,
        lambda kind=kind: pair(kind)[0],
        lambda kind=kind: pair(kind)[1],
        lambda: (torch.randn(1, 56, 56, 64),),
        (0.95, 0.95),
    )
    for name, kind in (
        ("window 56x56 C64", "block"),
        ("window 56x56 C64, shifted", "shift"),
        ("grid 56x56 C64", "grid"),
    )
]
