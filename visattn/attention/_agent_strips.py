"""Agent attention in strips, the branch of the CSwin form; see `agent.py` for paper and official code.

Legend: B batch, *S spatial axes, C channels of this branch, T strips of a map, *P size of a strip, h heads,
d channels of a head, n agents.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention._agent import biases, pool, register_tables, split_heads, two_steps
from visattn.attention._precision import without_autocast

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class AgentStrips(nn.Module):
    """Agent attention inside strips that span one axis of the map and are `split_size` thick along the others.

    In 2-D axis 0 gives the vertical strips of the official index 0, axis 1 the horizontal ones of index 1, None the
    single strip of index -1. Each strip pools its own agents, and the depthwise convolution `get_v` sees zeros beyond
    the strip.

    Border policy: a map that is no multiple of `split_size` is padded with zeros at the end of the axis and the padding
    takes no part: padded keys are masked, agents average real positions only, and an agent with none is masked.

    Args:
        dim: Channels C.
        num_heads: Heads h.
        axis: The axis that strips span; None makes the whole map one strip.
        split_size: Thickness of a strip along the other axes.
        window_size: Size of the map that the tables are stored for, one integer per axis.
        stored_grid: Grid of agents that the tables are stored for.
        grid: Grid of agents in use.
        attn_drop: Probability of dropping an attention weight, in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        axis: int | None,
        split_size: int,
        window_size: Sequence[int],
        stored_grid: tuple[int, ...],
        grid: tuple[int, ...],
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        rank = len(window_size)
        self.num_heads, self.axis, self.split_size = num_heads, axis, split_size
        self.stored_grid, self.grid, self.attn_drop = stored_grid, grid, attn_drop
        self.scale = (dim // num_heads) ** -0.5
        self.get_v = CONV[rank](dim, dim, 3, padding=1, groups=dim)
        agents = 1
        for side in stored_grid:
            agents *= side
        strip = self._strip(window_size)
        register_tables(self, num_heads, agents, strip, strip)

    def _strip(self, size: Sequence[int]) -> list[int]:
        """The size of a strip of a map of `size`."""
        if self.axis is None:
            return list(size)
        return [each if axis == self.axis else self.split_size for axis, each in enumerate(size)]

    def forward(self, qkv: Tensor) -> Tensor:
        """Mix within strips.

        Args:
            qkv: Queries, keys and values stacked, (3, B, *S, C).

        Returns:
            (B, *S, C).
        """
        size = qkv.shape[2:-1]
        batch = qkv.shape[1]
        strip = self._strip(size)
        counts = [-(-each // side) for each, side in zip(size, strip, strict=True)]
        padding = [count * side - each for each, side, count in zip(size, strip, counts, strict=True)]
        strips = 1
        for count in counts:
            strips = strips * count
        padded = any(amount != 0 for amount in padding)
        parts = list(qkv.unbind(0))
        if padded:
            ends = [each for amount in reversed(padding) for each in (0, amount)]
            parts = [F.pad(part, [0, 0, *ends]) for part in parts]
        q, k, v = (partition(part, strip, counts) for part in parts)  # (B * T, *P, C)
        with without_autocast(qkv.device):
            bias = biases(self, strip, strip, (self.stored_grid, self.grid))
            agents = pool(q, self.grid)
            if padded:
                real = F.pad(qkv.new_ones((1, *size, 1), dtype=torch.float32), [0, 0, *ends])
                real = partition(real, strip, counts)  # (T, *P, 1)
                share = pool(real, self.grid)  # (T, *grid, 1), the part of each agent's cell that is map
                agents = agents.reshape(batch, strips, *agents.shape[1:]) / share.clamp(min=1e-6).to(agents.dtype)
                agents = agents.flatten(0, 1)
                bias = (mask(real, -2) + bias[0], mask(share, -1) + bias[1])  # (T, h, n, P), (T, h, n, P)
            heads = [split_heads(t.flatten(1, -2), self.num_heads) for t in (q, k, v, agents * self.scale)]
            q, k, values, agents = (t.reshape(batch, strips, *t.shape[1:]) for t in heads)  # (B, T, h, ..., d)
            drop = self.attn_drop if self.training else 0.0
            out = two_steps(q, k, values, agents, bias, drop)  # (B, T, h, P, d)
            out = out.transpose(2, 3).flatten(-2).reshape(v.shape)
        out = out + self.get_v(v.movedim(-1, 1)).movedim(1, -1)
        out = unpartition(out, strip, counts, batch)
        for axis, each in enumerate(size, 1):
            out = out.narrow(axis, 0, each)
        return out

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        return f"num_heads={self.num_heads}, axis={self.axis}, split_size={self.split_size}, agents={self.grid}"


def mask(share: Tensor, axis: int) -> Tensor:
    """0 where `share` (T, *P, 1) is positive and -inf elsewhere, (T, 1, 1, P) or, with `axis` -1, (T, 1, P, 1)."""
    blocked = torch.zeros_like(share).masked_fill(share <= 0, float("-inf")).flatten(1)
    return blocked[:, None, None] if axis == -2 else blocked[:, None, :, None]


def partition(x: Tensor, strip: Sequence[int], counts: Sequence[int]) -> Tensor:
    """`x` (B, *S, C), S = counts * strip per axis, cut into strips: (B * T, *strip, C)."""
    rank = len(strip)
    shape = [x.shape[0], *(each for pair in zip(counts, strip, strict=True) for each in pair), x.shape[-1]]
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
    return x.reshape(shape).permute(order).flatten(0, rank)


def unpartition(x: Tensor, strip: Sequence[int], counts: Sequence[int], batch: int) -> Tensor:
    """The inverse of `partition`: (B, *S, C)."""
    rank = len(strip)
    order = [0, *(axis for which in range(1, rank + 1) for axis in (which, rank + which)), 2 * rank + 1]
    x = x.reshape(batch, *counts, *strip, x.shape[-1]).permute(order)
    return x.reshape(batch, *(count * side for count, side in zip(counts, strip, strict=True)), x.shape[-1])
