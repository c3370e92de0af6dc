"""Agent attention in strips, the branch of the CSwin form; see `agent.py` for paper and official code.

Legend: B batch, *S spatial axes, C channels of this branch, T strips of a map, P positions of a strip,
h heads, d channels of a head, n agents.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visattn.attention._agent import agent_weights, biases, register_tables, two_steps
from visattn.attention._depthwise import depthwise
from visattn.attention._precision import without_autocast
from visattn.attention._resample import pool
from visattn.attention._windows import flat_index, known_zero, regroup, window_partition, window_reverse

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
        strip = self._strip(window_size)
        register_tables(self, num_heads, math.prod(stored_grid), strip, strip)

    def _strip(self, size: Sequence[int]) -> list[int]:
        """The size of a strip of a map of `size`."""
        if self.axis is None:
            return list(size)
        return [each if axis == self.axis else self.split_size for axis, each in enumerate(size)]

    def _counts(self, size: Sequence[int]) -> list[int]:
        """Strips per axis of a map of `size`; said outright where it is 1, which keeps symbolic sizes simple."""
        return [
            1 if self.axis in (None, axis) else (each + self.split_size - 1) // self.split_size
            for axis, each in enumerate(size)
        ]

    def forward(self, qkv: Tensor) -> Tensor:
        """Mix within strips.

        Args:
            qkv: Queries, keys and values stacked, (3, B, *S, C).

        Returns:
            (B, *S, C).
        """
        size = qkv.shape[2:-1]
        strip, counts = self._strip(size), self._counts(size)
        q, k, v = (window_partition(part, strip, counts) for part in qkv.unbind(0))  # (B, T, P, C)
        with without_autocast(qkv.device):
            agents, bias = self._agents(q, size, strip)
            drop = self.attn_drop if self.training else 0.0
            queries, keys, values, agents = (self._split(each) for each in (q, k, v, agents))
            out = two_steps(queries, keys, values, agents, bias, self.scale, drop)
            out = out.transpose(2, 3).flatten(-2)  # (B, T, P, C)
        maps = regroup(v, (v.shape[0] * v.shape[1], *strip, v.shape[-1]))
        return window_reverse(out + regroup(depthwise(self.get_v, maps), v.shape), strip, size, counts)

    def attention_map(self, qkv: Tensor, query: Sequence[int]) -> Tensor:
        """How much the token at index `query` attends to every token of the map (3, B, *S, C): (B, h, *S)."""
        size = qkv.shape[2:-1]
        flat_index(query, size)  # refuses an index outside
        strip, counts = self._strip(size), self._counts(size)
        q, k = (window_partition(part, strip, counts) for part in qkv[:2])
        with without_autocast(qkv.device):
            agents, bias = self._agents(q, size, strip)
            queries, keys, agents = (self._split(each) for each in (q, k, agents))
            first, second = agent_weights(queries, keys, agents, self.scale, bias)
        which = flat_index([at // side for at, side in zip(query, strip, strict=True)], counts)
        inside = flat_index([at % side for at, side in zip(query, strip, strict=True)], strip)
        row = torch.einsum("bhn,bhnp->bhp", second[:, which, ..., inside], first[:, which])
        weights = row.new_zeros(q.shape[0] * self.num_heads, q.shape[1], q.shape[2], 1)
        weights[:, which, :, 0] = row.flatten(0, 1)
        return window_reverse(weights, strip, size, counts).reshape(q.shape[0], self.num_heads, *size)

    def _agents(self, q: Tensor, size: Sequence[int], strip: Sequence[int]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Agents (B, T, n, C) of the queries `q` (B, T, P, C), and the biases of both steps."""
        agents = pool(regroup(q, (q.shape[0] * q.shape[1], *strip, q.shape[-1])), self.grid)
        agents = regroup(agents, (q.shape[0], q.shape[1], math.prod(self.grid), q.shape[-1]))
        bias = biases(self, strip, strip, (self.stored_grid, self.grid), q.dtype)
        counts = self._counts(size)
        if known_zero(*(count * side - each for each, side, count in zip(size, strip, counts, strict=True))):
            return agents, bias
        real = window_partition(torch.ones((1, *size, 1), device=q.device), strip, counts)[0]  # (T, P, 1)
        share = pool(regroup(real, (real.shape[0], *strip, 1)), self.grid).flatten(
            1, -2
        )  # (T, n, 1), how much of a cell is map
        agents = agents / share.clamp(min=1e-6).to(agents.dtype)
        return agents, (blocked(real).mT[:, None] + bias[0], blocked(share)[:, None] + bias[1])

    def _split(self, x: Tensor) -> Tensor:
        """Heads (B, T, h, N, d) of `x` (B, T, N, C)."""
        return x.reshape(*x.shape[:3], self.num_heads, x.shape[-1] // self.num_heads).transpose(2, 3)

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        return f"num_heads={self.num_heads}, axis={self.axis}, split_size={self.split_size}, agents={self.grid}"


def blocked(share: Tensor) -> Tensor:
    """0 where `share` is positive, -inf elsewhere."""
    return torch.zeros_like(share).masked_fill(share <= 0, float("-inf"))
