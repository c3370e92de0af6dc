"""The parts of MaxViT's blocks; sources and deviations stand in maxvit.py.

Legend: B batch, C channels, H and W the map's sides.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from visattn.attention import GridAttention, WindowAttention
from visattn.backbones._residual import layers
from visattn.blocks import Mlp, drop_path

HEAD_DIM = 32


@dataclass(frozen=True)
class Lineage:
    """What the authors' models (`tf`) and timm's own (`rw`) do differently.

    Attributes:
        act: Activation of the convolutions.
        bn_eps: Epsilon of their norms.
        padding: `same`: TensorFlow's, at the bottom and the right only where the size is even; empty: on all sides.
        bias: Whether stem, projection and shortcut convolutions have a bias.
        expand_output: Whether a block expands 4 times its output or its input width.
        reduced: Width of the squeeze over that of the output (`tf`) or of the expanded map (`rw`).
        ln_eps: Epsilon of the layer norms.
        mlp_act: Activation of the MLPs.
        qkv_layout: See `WindowAttention`.
        table: See `WindowAttention`.
        hidden_head: Whether norm, linear layer and tanh follow the pooling, otherwise the norm comes before it.
    """

    act: type[nn.Module]
    bn_eps: float
    padding: str
    bias: bool
    expand_output: bool
    reduced: float
    ln_eps: float
    mlp_act: type[nn.Module]
    qkv_layout: Literal["qkv", "per_head"]
    table: Literal["flat", "grid"]
    hidden_head: bool


TF = Lineage(layers.GELUTanh, 1e-3, "same", True, True, 1 / 4, 1e-5, layers.GELUTanh, "qkv", "grid", True)
RW = Lineage(nn.SiLU, 1e-5, "", False, False, 1 / 16, 1e-6, nn.GELU, "per_head", "flat", False)


class Stem(nn.Module):
    """Two 3x3 convolutions, the first one strided, a norm and an activation between."""

    def __init__(self, in_chans: int, widths: tuple[int, int], kind: Lineage) -> None:
        super().__init__()
        self.conv1 = layers.create_conv2d(in_chans, widths[0], 3, stride=2, padding=kind.padding, bias=kind.bias)
        self.norm1 = layers.BatchNormAct2d(widths[0], eps=kind.bn_eps, act_layer=kind.act)
        self.conv2 = layers.create_conv2d(widths[0], widths[1], 3, padding=kind.padding, bias=kind.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, C, ceil(H / 2), ceil(W / 2))."""
        # The attention works channels-last: with convolutions in that memory layout nothing is copied between the two.
        x = x.contiguous(memory_format=torch.channels_last)
        out: Tensor = self.conv2(self.norm1(self.conv1(x)))
        return out


class Shortcut(nn.Module):
    """Averages of 2x2, and a 1x1 convolution where the width changes."""

    def __init__(self, dim: int, dim_out: int, kind: Lineage) -> None:
        super().__init__()
        self.pool = (
            layers.create_pool2d("avg", 2, padding=kind.padding) if kind.padding else nn.AvgPool2d(2, ceil_mode=True)
        )
        self.expand = nn.Identity() if dim == dim_out else nn.Conv2d(dim, dim_out, 1, bias=kind.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) to (B, dim_out, ceil(H / 2), ceil(W / 2))."""
        out: Tensor = self.expand(self.pool(x))
        return out


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze and excitation, norm first, no activation at the end."""

    def __init__(self, dim: int, dim_out: int, stride: int, kind: Lineage, rate: float) -> None:
        super().__init__()
        inner = 4 * (dim_out if kind.expand_output else dim)
        reduced = int(kind.reduced * (dim_out if kind.expand_output else inner))
        self.shortcut = Shortcut(dim, dim_out, kind) if stride == 2 else nn.Identity()
        self.pre_norm = layers.BatchNormAct2d(dim, eps=kind.bn_eps, apply_act=False)
        self.conv1_1x1 = layers.create_conv2d(dim, inner, 1)
        self.norm1 = layers.BatchNormAct2d(inner, eps=kind.bn_eps, act_layer=kind.act)
        self.conv2_kxk = layers.create_conv2d(inner, inner, 3, stride=stride, padding=kind.padding, groups=inner)
        self.norm2 = layers.BatchNormAct2d(inner, eps=kind.bn_eps, act_layer=kind.act)
        self.se = layers.SqueezeExcite(inner, rd_channels=reduced, act_layer=nn.SiLU)
        self.conv3_1x1 = layers.create_conv2d(inner, dim_out, 1, bias=kind.bias)
        self.drop_path = drop_path(rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) to (B, dim_out, ceil(H / stride), ceil(W / stride))."""
        inner = self.norm1(self.conv1_1x1(self.pre_norm(x)))
        inner = self.se(self.norm2(self.conv2_kxk(inner)))
        out: Tensor = self.drop_path(self.conv3_1x1(inner)) + self.shortcut(x)
        return out


@register_notrace_module  # attention chooses its way by sizes, which torch.fx cannot follow
class AttentionBlock(nn.Module):
    """Attention and MLP, each a residual branch that begins with a norm."""

    def __init__(self, dim: int, attn: nn.Module, kind: Lineage, rate: float) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = nn.LayerNorm(dim, eps=kind.ln_eps), attn, drop_path(rate)
        self.norm2, self.drop_path2 = nn.LayerNorm(dim, eps=kind.ln_eps), drop_path(rate)
        self.mlp = Mlp(dim, 4 * dim, kind.mlp_act)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class Block(nn.Module):
    """MBConv, window attention, grid attention."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        stride: int,
        partition: tuple[int, int],
        kind: Lineage,
        rel_pos: Literal["table", "log_mlp"],
        rate: float,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {
            "bias": rel_pos,
            "table": kind.table,
            "qkv_layout": kind.qkv_layout,
            "bias_hidden_rate": 0.125 if rel_pos == "log_mlp" else 0.0,
        }
        heads = dim_out // HEAD_DIM
        self.conv = MBConv(dim, dim_out, stride, kind, rate)
        window = WindowAttention(dim_out, heads, window_size=partition, **options)
        grid = GridAttention(dim_out, heads, grid_size=partition, **options)
        self.attn_block = AttentionBlock(dim_out, window, kind, rate)
        self.attn_grid = AttentionBlock(dim_out, grid, kind, rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) to (B, dim_out, ceil(H / stride), ceil(W / stride))."""
        x = self.conv(x).movedim(1, -1)
        x = self.attn_grid(self.attn_block(x))
        return x.movedim(-1, 1)


class Hidden(nn.Module):
    """A linear layer and tanh, before the classifier."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to the same shape."""
        out: Tensor = self.fc(x).tanh()
        return out
