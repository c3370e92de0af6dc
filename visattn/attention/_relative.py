"""Biases that depend on where a key lies relative to its query, for windows of any rank.

Sources:
- tables: Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030 (stored flat, query minus key), and Tu et al.,
  "MaxViT", ECCV 2022, arXiv 2204.01697 (stored as a grid per head, key minus query, in the authors' TensorFlow code).
- log-MLP: the idea of Liu et al., "Swin Transformer V2", CVPR 2022, arXiv 2111.09883, in the form of timm 1.0.31's
  MaxViT-RMLP models (Apache-2.0): an MLP of sign(d) ln(1 + |d|), d in tokens, without a sigmoid.

Everything is built from views of the table, so there are no index buffers.

Legend: h heads, P tokens per axis of a window, T tokens of a window.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

TableLayout = Literal["flat", "grid"]


def toeplitz(table: Tensor, window: Sequence[int], query_minus_key: bool = False) -> Tensor:
    """The bias (h, T, T), query by key, of a table (h, 2P - 1, ...) by offset.

    Args:
        table: Entry P - 1 + d of each axis belongs to the offset d.
        window: Tokens per axis, P.
        query_minus_key: Whether d is query minus key, otherwise key minus query.
    """
    rank = len(window)
    for axis, size in enumerate(window):
        # unfold gives entry a + b at (a, b); one of the two counted backwards makes of it P - 1 plus a difference.
        table = table.unfold(axis + 1, size, 1)
    table = table.flip(tuple(range(rank + 1, 2 * rank + 1) if query_minus_key else range(1, rank + 1)))
    tokens = math.prod(window)
    return table.reshape(table.shape[0], tokens, tokens)  # from (h, query axes, key axes)


class RelativePositionTable(nn.Module):
    """A learned bias for every offset between two tokens of a window.

    Args:
        window: Tokens per axis, P.
        num_heads: Heads h.
        layout: How the table is stored. `flat`: Swin's [prod(2P - 1), h], by query minus key, drawn from a truncated
            normal of std 0.02. `grid`: the MaxViT authors' [h, 2P - 1, ...], by key minus query, drawn from a normal of
            std 0.02.
    """

    def __init__(self, window: Sequence[int], num_heads: int, layout: TableLayout = "flat") -> None:
        super().__init__()
        self.window, self.num_heads, self.layout = tuple(window), num_heads, layout
        self.sides = tuple(2 * size - 1 for size in window)
        shape = (math.prod(self.sides), num_heads) if layout == "flat" else (num_heads, *self.sides)
        self.relative_position_bias_table = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        if self.layout == "flat":
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        else:
            nn.init.normal_(self.relative_position_bias_table, std=0.02)

    def forward(self) -> Tensor:
        """The bias (h, T, T), query by key."""
        table: Tensor = self.relative_position_bias_table
        if self.layout == "flat":
            table = table.t().reshape(self.num_heads, *self.sides)
        return toeplitz(table, self.window, self.layout == "flat")

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return f"window={self.window}, num_heads={self.num_heads}, layout={self.layout!r}"


class _Mlp(nn.Module):
    """Two layers with a ReLU between, under the official keys fc1 and fc2."""

    def __init__(self, inputs: int, hidden: int, outputs: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.drop1(self.fc1(x).relu()))
        return out


class RelativePositionMlp(nn.Module):
    """A bias computed from the offset between two tokens, so that any window size uses the same weights.

    Args:
        window: Tokens per axis, P.
        num_heads: Heads h.
        hidden: Width of the hidden layer.
        drop: Probability of dropping a hidden value, in training.
    """

    def __init__(self, window: Sequence[int], num_heads: int, hidden: int = 512, drop: float = 0.0) -> None:
        super().__init__()
        self.window, self.num_heads = tuple(window), num_heads
        self.mlp = _Mlp(len(self.window), hidden, num_heads, drop)

    def forward(self) -> Tensor:
        """The bias (h, T, T), query by key."""
        weight = self.mlp.fc1.weight
        axes = [torch.arange(size - 1, -size, -1, device=weight.device, dtype=weight.dtype) for size in self.window]
        offset = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # (2P - 1, ..., rank): query minus key,
        table = self.mlp(offset.sign() * offset.abs().log1p())  # so that the table runs by key minus query
        return toeplitz(table.movedim(-1, 0), self.window)

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return f"window={self.window}, num_heads={self.num_heads}"
