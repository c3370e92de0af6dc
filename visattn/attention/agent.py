"""Agent attention: a few agent tokens gather from all keys and answer all queries, so the cost is linear in the map.

Paper: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874,
equations 4 to 8: O = softmax(Q A^T + B2) softmax(A K^T + B1) V + DWC(V), A = Pool(Q).
Official code: github.com/LeapLabTHU/Agent-Attention, revision 207ce3e, agent_transformer/models/agent_*.py (no
licence file; nothing is copied from it).

Deviations:
- The map may have any size: tables stored for another one are resized linearly, as the authors' segmentation code does.
  (Their classification code fixes the size.) A map of the stored size uses the tables as they are.
- Ranks 1 and 3: agents on a line or in a cube, one table per axis, and a depthwise convolution of that rank.
- Reduced keys (`pvt`): an axis shorter than `sr_ratio` is zero-padded up to it, where the official convolution fails;
  otherwise the remainder of the division is dropped, as there.
- Strips (`cswin`) of a map that is no multiple of `split_size` are padded, see `AgentStrips`; the official code fails.
- Logits and softmax are computed in float32 under half precision.

Legend: B batch, *S spatial axes with N positions in all, C channels, h heads, d channels of a head, n agents,
M keys (N, or fewer after reduction).
"""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention import _checks as check
from visattn.attention._agent import (
    agent_weights,
    biases,
    register_tables,
    split_heads,
    two_steps,
)
from visattn.attention._agent_strips import AgentStrips
from visattn.attention._backend import launch_bound
from visattn.attention._depthwise import depthwise
from visattn.attention._precision import without_autocast
from visattn.attention._resample import pool, resize_linear
from visattn.attention._windows import flat_index, short_of

Variant = Literal["swin", "deit", "pvt", "cswin"]
VARIANTS = ("swin", "deit", "pvt", "cswin")
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class AgentAttention(nn.Module):
    """Agent attention in its four official forms.

    Border policy: nothing is padded but the depthwise convolution, with zeros; pooling cells are those of adaptive
    average pooling, which overlap on sizes that are no multiple and repeat on maps smaller than the grid of agents.

    `forward` takes (B, *S, C); the form `deit` takes (B, 1 + N, C), the class token first.

    Args:
        dim: Channels C.
        num_heads: Heads h; None takes the fewest with at most 32 channels each.
        variant: `swin`: one projection `qkv`, keys at every position. `deit`: the same with a class token, which is a
            query and a key but no part of the pooling or the convolution. `pvt`: projections `q` and `kv`, keys and
            values reduced by a strided convolution and a LayerNorm when `sr_ratio` exceeds 1. `cswin`: the channels are
            divided between strips along each axis, see `AgentStrips`.
        rank: Number of spatial axes.
        agent_num: Agents n, a power with exponent `rank` (pooled on a square, cube, ...). None: 49, in 3-D 64.
        window_size: Size of the map that the tables are stored for (the paper's H and W), one integer or one per axis.
            Maps of any other size resize the tables.
        agent_shape: Grid of agents to use in place of the one that the tables are stored for, one integer or one per
            axis; the tables are resized. None keeps the stored grid.
        sr_ratio: Reduction of keys and values per axis, `pvt` only.
        split_size: Thickness of the strips, `cswin` only; None makes the whole map one strip (the last stage).
        qkv_bias: Whether the projections to queries, keys and values have a bias.
        attn_drop: Probability of dropping an attention weight, in training.
        proj_drop: Probability of dropping an output, in training.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        variant: Variant = "swin",
        rank: int = 2,
        agent_num: int | None = None,
        window_size: int | Sequence[int] = 14,
        agent_shape: int | Sequence[int] | None = None,
        sr_ratio: int = 1,
        split_size: int | None = 7,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, check.heads_of(dim, num_heads)
        self.variant = check.choice("variant", variant, VARIANTS)
        self.rank = check.rank_of("AgentAttention", rank, self.supported_ranks)
        self.window_size = check.per_axis("window_size", window_size, rank)
        self.sr_ratio = check.positive("sr_ratio", sr_ratio)
        if sr_ratio > 1 and variant != "pvt":
            raise ValueError(f"sr_ratio={sr_ratio} needs variant='pvt'; variant={variant!r} keeps all keys")
        self.agent_num = (64 if rank == 3 else 49) if agent_num is None else check.positive("agent_num", agent_num)
        side = round(self.agent_num ** (1 / rank))
        if side**rank != self.agent_num:
            nearest = f"{max(1, side - 1) ** rank}, {side**rank} or {(side + 1) ** rank}"
            raise ValueError(f"agent_num must be a whole number to the power {rank}, as {nearest}, got {agent_num}")
        self.stored_grid = (side,) * rank
        self.grid = self.stored_grid if agent_shape is None else check.per_axis("agent_shape", agent_shape, rank)
        self.attn_drop = check.probability("attn_drop", attn_drop)
        self.scale = (dim // self.num_heads) ** -0.5
        self.split_size = None if split_size is None else check.positive("split_size", split_size)

        if variant == "pvt":
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
            if sr_ratio > 1:
                self.sr = CONV[rank](dim, dim, sr_ratio, stride=sr_ratio)
                self.norm = nn.LayerNorm(dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        if variant == "cswin":
            self.attns = nn.ModuleList(self._strips())
        else:
            self.dwc = CONV[rank](dim, dim, 3, padding=1, groups=dim)
            reduced = [max(1, size // sr_ratio) for size in self.window_size]
            register_tables(self, self.num_heads, self.agent_num, self.window_size, reduced)
        if variant == "deit":
            self.ac_bias = nn.Parameter(torch.empty(1, self.num_heads, self.agent_num, 1))
            self.ca_bias = nn.Parameter(torch.empty(1, self.num_heads, 1, self.agent_num))
            nn.init.trunc_normal_(self.ac_bias, std=0.02)
            nn.init.trunc_normal_(self.ca_bias, std=0.02)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(check.probability("proj_drop", proj_drop))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _strips(self) -> list[nn.Module]:
        """One branch per axis with an equal share of channels and heads, or one branch for whole maps."""
        branches = self.rank if self.split_size is not None else 1
        if self.dim % branches or self.num_heads % branches:
            raise ValueError(
                f"variant='cswin' divides channels and heads between {branches} axes: dim={self.dim} and "
                f"num_heads={self.num_heads} must be multiples of {branches}, or split_size=None (whole maps)"
            )
        return [
            AgentStrips(
                self.dim // branches,
                self.num_heads // branches,
                axis=None if self.split_size is None else axis,
                split_size=self.split_size or 1,
                window_size=self.window_size,
                stored_grid=self.stored_grid,
                grid=self.grid,
                attn_drop=self.attn_drop,
            )
            for axis in range(branches)
        ]

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Mix the positions of `x`.

        Args:
            x: (B, *S, C), or with the class token (B, 1 + N, C), the map's positions in row-major order.
            size: Size of the map, for `deit` only; None means `window_size`.

        Returns:
            The same shape.

        Raises:
            ValueError: `x` has another form than the block takes.
        """
        if self.variant == "deit":
            return self._with_class_token(x, self.window_size if size is None else tuple(size))
        check.channels_last("AgentAttention", x, self.dim, (self.rank,))
        if size is not None:
            raise ValueError("only variant='deit' takes a size: the other forms read it from x (B, *S, C)")
        if self.variant == "cswin":
            shares = self._shares(self.qkv(x))
            out = torch.cat([branch(share) for branch, share in zip(self.attns, shares, strict=True)], dim=-1)
            return self._project(out)
        q, k, v = self._query_key_value(x)
        out = self._attend(q.flatten(1, -2), k.flatten(1, -2), v.flatten(1, -2), q, k.shape[1:-1])
        values = resize_linear(v, x.shape[1:-1]) if self.sr_ratio > 1 else v
        return self._project(depthwise(self.dwc, values).add(out.reshape(x.shape)))

    def attention_map(self, x: Tensor, query: Sequence[int], size: Sequence[int] | None = None) -> Tensor:
        """How much the token at index `query` attends to every token of the map, through all agents: (B, h, *S).

        Heads of `cswin` come branch by branch, those along the first axis first. With a class token its share is left
        out, so the sum is below 1.

        Args:
            x: As in `forward`.
            query: Index into the map.
            size: As in `forward`.
        """
        if self.sr_ratio > 1:
            raise ValueError("attention_map needs sr_ratio=1: reduced keys have no single position")
        if self.variant == "cswin":
            parts = zip(self.attns, self._shares(self.qkv(x)), strict=True)
            return torch.cat([branch.attention_map(share, query) for branch, share in parts], dim=1)  # type: ignore[operator]
        token = self.variant == "deit"
        size = x.shape[1:-1] if not token else self.window_size if size is None else tuple(size)
        q, k, _ = self._query_key_value(x)
        position = flat_index(query, size) + token
        pooled = self._map(q, size) if token else q
        with without_autocast(x.device):
            tokens = q if token else q.flatten(1, -2), k if token else k.flatten(1, -2)
            queries, keys, agents, bias = self._prepare(*tokens, pooled, size)
            first, second = agent_weights(queries, keys, agents, self.scale, bias)
        row = torch.einsum("bhn,bhnm->bhm", second[..., position], first)
        return row[..., int(token) :].reshape(x.shape[0], self.num_heads, *size)

    def _with_class_token(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """`forward` of `deit`."""
        positions = math.prod(size)
        if len(size) != self.rank or x.ndim != 3 or x.shape[1] != 1 + positions or x.shape[2] != self.dim:
            raise ValueError(
                f"variant='deit' takes (B, 1 + N, {self.dim}), class token first, with N positions of a map of size "
                f"{tuple(size)} ({self.rank} axes): pass another size, or x with 1 + {positions} tokens; "
                f"got {tuple(x.shape)}"
            )
        q, k, v = self._query_key_value(x)
        out = self._attend(q, k, v, self._map(q, size), size)
        convolved = depthwise(self.dwc, self._map(v, size)).flatten(1, -2)
        return self._project(out + F.pad(convolved, (0, 0, 1, 0)))

    def _shares(self, qkv: Tensor) -> Iterator[Tensor]:
        """The part (3, B, *S, C / branches) of each branch of `cswin`."""
        branches = len(self.attns)
        parts = qkv.reshape(*qkv.shape[:-1], 3, branches, self.dim // branches)
        return iter(parts.movedim(-3, 0).unbind(-2))

    def _map(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """The map (B, *S, C) in `tokens` (B, 1 + N, C)."""
        return tokens[:, 1:].reshape(tokens.shape[0], *size, self.dim)

    def _query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries (B, *S, C), keys and values (B, *T, C), where T is S or its reduction."""
        if self.variant == "pvt":
            source = x
            if self.sr_ratio > 1:
                maps = x.movedim(-1, 1)
                short = [short_of(size, self.sr_ratio) for size in x.shape[1:-1]]
                maps = F.pad(maps, [each for amount in reversed(short) for each in (0, amount)])
                source = self.norm(self.sr(maps).movedim(1, -1))
            k, v = self.kv(source).chunk(2, dim=-1)
            return self.q(x), k, v
        if launch_bound(x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.dim)).unbind(-2)
            return q, k, v
        # One product per part instead of slices of one product: putting their gradients together costs more on the CPU
        # than the products themselves.
        weights = self.qkv.weight.chunk(3)
        offsets = self.qkv.bias.chunk(3) if self.qkv.bias is not None else (None, None, None)
        q, k, v = (F.linear(x, weight, offset) for weight, offset in zip(weights, offsets, strict=True))
        return q, k, v

    def _prepare(
        self, q: Tensor, k: Tensor, pooled: Tensor, key_size: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Heads of q (B, h, N, d) and k (B, h, M, d), agents (B, h, n, d), and both biases."""
        agents = pool(pooled, self.grid).flatten(1, -2)  # (B, n, C)
        bias = biases(self, pooled.shape[1:-1], key_size, (self.stored_grid, self.grid), q.dtype)
        heads = self.num_heads
        return split_heads(q, heads), split_heads(k, heads), split_heads(agents, heads), bias

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, pooled: Tensor, key_size: Sequence[int]) -> Tensor:
        """The two steps for tokens q (B, N, C), k and v (B, M, C), with agents from the map `pooled` (B, *S, C)."""
        with without_autocast(q.device):
            queries, keys, agents, bias = self._prepare(q, k, pooled, key_size)
            drop = self.attn_drop if self.training else 0.0
            out = two_steps(queries, keys, split_heads(v, self.num_heads), agents, bias, self.scale, drop)
            return out.transpose(1, 2).flatten(2)  # (B, N, C)

    def _project(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj_drop(self.proj(x))
        return out

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        text = (
            f"dim={self.dim}, num_heads={self.num_heads}, variant={self.variant!r}, rank={self.rank}, "
            f"agent_num={self.agent_num}, window_size={self.window_size}"
        )
        if self.grid != self.stored_grid:
            text += f", agent_shape={self.grid}"
        if self.variant == "pvt":
            text += f", sr_ratio={self.sr_ratio}"
        if self.variant == "cswin":
            text += f", split_size={self.split_size}"
        return text + f", attn_drop={self.attn_drop}"
