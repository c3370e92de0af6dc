"""Halo attention: blocks of queries attend to their block and a border of it, with relative positions.

Paper: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", CVPR 2021,
arXiv 2103.12731, section 3: blocked local attention with haloing; the relative logits q . R are those of Bello et al.,
"Attention Augmented Convolutional Networks", ICCV 2019, arXiv 1904.09925.
Code: the authors published none. Definition and keys are those of timm 1.0.31 (Apache-2.0; nothing is copied from it),
timm/layers/halo_attn.py, which its author calls unfinished: "some details in paper weren't clear to me". As there, a
strided query has the relative index of its place among the queries of the block, not of its place on the map.

Deviations:
- Every size is accepted: the last block of an axis may be partly outside the map. timm refuses sizes that are no
  multiple of `block_size`.
- Positions outside the map are zero keys, unmasked, with their relative logits (timm's behaviour, `boundary="zero"`),
  or take no part (`boundary="mask"`).
- Any stride; an average pool never reduces an axis to nothing. Rank 3 has a third table, `depth_rel`.

Legend: B batch, *S spatial axes, C channels, b block size, t halo size, w = b + 2 t window size, N blocks, Q queries of
a block, K keys of a window, h heads, d channels of a head of queries and keys, e of values, A = sum of w over the axes.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention import _checks as check
from visattn.attention._halo_product import Layout, halo_product, relative_logits
from visattn.attention._resample import KEPT, kept
from visattn.attention._windows import (
    ceil_div,
    certain,
    every,
    flat_index,
    pad_axes,
    room,
    window_partition,
    window_reverse,
)
from visattn.attention.lepe import CONV, pointwise

AXES = ("depth_rel", "height_rel", "width_rel")
AVERAGE: dict[int, Any] = {2: F.avg_pool2d, 3: F.avg_pool3d}


class _RelativeTables(nn.Module):
    """One table [2w - 1, d] per axis; entry w - 1 + key - query belongs to key and query of these places."""

    def __init__(self, window: Sequence[int], dim_head: int) -> None:
        super().__init__()
        for name, size in zip(AXES[-len(window) :], window, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(2 * size - 1, dim_head)))
        self.names = AXES[-len(window) :]

    def joined(self) -> Tensor:
        """All tables, one after the other, (sum of 2w - 1, d)."""
        # By attribute: replicas of DataParallel have no parameters.
        tables: list[Tensor] = [getattr(self, name) for name in self.names]
        return torch.cat(tables)


class HaloAttention(nn.Module):
    """Blocked local attention with a halo.

    There is no projection after the attention. Border policy: see `boundary`; a map that is no multiple of the block
    size is treated as if it lay in a larger one whose rest is outside.

    Args:
        dim: Channels C.
        num_heads: Heads h, a divisor of `dim_out`.
        rank: Number of spatial axes, 2 or 3.
        dim_out: Channels of the output; None keeps `dim`.
        stride: Step between queries. Where it does not divide the block size, or with `avg_down`, all tokens are
            queries and the output is averaged over cells of this size instead, leaving out an incomplete last cell.
        block_size: Tokens per axis of a block, b, one integer or one per axis.
        halo_size: Tokens added on either side, t, one integer or one per axis; 0 gives attention within blocks.
        dim_head: Channels d of a head of queries and keys. None: dim_out * qk_ratio, rounded to a multiple of 8, over
            the heads.
        qk_ratio: See `dim_head`.
        qkv_bias: Whether the projections have a bias.
        avg_down: See `stride`.
        scale_pos_embed: Whether the relative logits are scaled by d ** -0.5 like the others.
        boundary: What a position outside the map is. `zero`: a key and a value of zeros, attended to. `mask`: nothing.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        rank: int = 2,
        dim_out: int | None = None,
        stride: int = 1,
        block_size: int | Sequence[int] = 8,
        halo_size: int | Sequence[int] = 3,
        dim_head: int | None = None,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        boundary: Literal["zero", "mask"] = "zero",
    ) -> None:
        super().__init__()
        self.dim = check.positive("dim", dim)
        self.dim_out = dim if dim_out is None else check.positive("dim_out", dim_out)
        self.num_heads = check.heads_of(self.dim_out, num_heads)
        self.rank = check.rank_of("HaloAttention", rank, self.supported_ranks)
        self.stride = check.positive("stride", stride)
        self.block_size = check.per_axis("block_size", block_size, rank)
        self.halo_size = (halo_size,) * rank if isinstance(halo_size, int) else tuple(halo_size)
        if len(self.halo_size) != rank or any(each < 0 for each in self.halo_size):
            raise ValueError(f"halo_size must be one integer of at least 0, or {rank} of them, got {halo_size!r}")
        self.window = tuple(b + 2 * t for b, t in zip(self.block_size, self.halo_size, strict=True))
        self.boundary = check.choice("boundary", boundary, ("zero", "mask"))
        self.scale_pos_embed, self.avg_down = scale_pos_embed, avg_down
        if dim_head is None:
            dim_head = self._rounded(self.dim_out * qk_ratio) // num_heads
            if dim_head < 1:
                raise ValueError(f"qk_ratio={qk_ratio} leaves no channel per head; raise it, or pass dim_head")
        self.dim_head, self.dim_head_v = check.positive("dim_head", dim_head), self.dim_out // num_heads
        self.scale = self.dim_head**-0.5
        self.pooled = stride > 1 and (avg_down or any(b % stride for b in self.block_size))
        self.query_stride = 1 if self.pooled else stride
        self.query_block = tuple(b // self.query_stride for b in self.block_size)

        # Stored as the convolutions of kernel size 1 that they are in timm, so that its weights fit as they are.
        self.q = CONV[rank](dim, num_heads * self.dim_head, 1, bias=qkv_bias)
        self.kv = CONV[rank](dim, num_heads * (self.dim_head + self.dim_head_v), 1, bias=qkv_bias)
        self.pos_embed = _RelativeTables(self.window, self.dim_head)
        self.reset_parameters()

    @staticmethod
    def _rounded(width: float) -> int:
        """The multiple of 8 nearest to `width`, at least 8, and no more than a tenth below it."""
        nearest = max(8, int(width + 4) // 8 * 8)
        return nearest + 8 if nearest < 0.9 * width else nearest

    def reset_parameters(self) -> None:
        """Draw projections from a truncated normal of std C ** -0.5, tables from one of std d ** -0.5."""
        for projection in (self.q, self.kv):
            nn.init.trunc_normal_(projection.weight, std=self.dim**-0.5)
        for table in self.pos_embed.parameters():
            nn.init.trunc_normal_(table, std=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: (B, *S, C), any size of at least 1 per axis.

        Returns:
            (B, *T, dim_out): T is S without stride, S / stride rounded up with strided queries and rounded down, but at
            least 1, with an average pool.

        Raises:
            ValueError: `x` has another shape.
        """
        q, kv, layout = self._blocks(x)
        out = halo_product(q, kv, self.pos_embed.joined(), layout)  # (B, N, Q, h, e)
        sizes = ceil_div(x.shape[1:-1], (self.query_stride,) * self.rank)
        counts = [room(count) for count in ceil_div(x.shape[1:-1], self.block_size)]
        out = window_reverse(out.flatten(3), self.query_block, sizes, counts)
        if not self.pooled:
            return out
        cell = tuple(min(self.stride, size) for size in sizes)
        pooled: Tensor = AVERAGE[self.rank](out.movedim(-1, 1), cell, self.stride)
        return pooled.movedim(1, -1)

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """How much the query at index `query` attends to every token of `x` (B, *S, C): (B, h, *S).

        The index counts queries, before an average pool. With `boundary="zero"` what goes to positions outside the map
        is missing, so the sum can be below 1.
        """
        sizes = x.shape[1:-1]
        flat_index(query, ceil_div(sizes, (self.query_stride,) * self.rank))  # refuses an index outside
        q, kv, layout = self._blocks(x)
        counts = ceil_div(sizes, self.block_size)
        block = [i // b for i, b in zip(query, self.query_block, strict=True)]
        n = flat_index(block, counts)
        i = flat_index([i % b for i, b in zip(query, self.query_block, strict=True)], self.query_block)
        dtype = torch.promote_types(x.dtype, torch.float32)
        q, tables = q[:, n].to(dtype), self.pos_embed.joined().to(dtype)
        k = kv.flatten(1, -2)[:, layout.keys[n]].to(dtype)  # (B, K, h (d + e))
        k = k.reshape(*k.shape[:2], self.num_heads, -1)[..., : self.dim_head]
        logits = torch.einsum("bhd,bkhd->bhk", q[:, i], k) * self.scale
        logits = logits + relative_logits(q, tables, layout)[:, :, i] @ layout.axes
        if layout.outside is not None:
            logits = logits.masked_fill(layout.outside[n], -math.inf)
        weights = logits.softmax(-1).reshape(x.shape[0], self.num_heads, *self.window)
        padded = [c * b + 2 * t for c, b, t in zip(counts, self.block_size, self.halo_size, strict=True)]
        full: Tensor = weights.new_zeros(x.shape[0], self.num_heads, *padded)
        start = [c * b for c, b in zip(block, self.block_size, strict=True)]
        target = full
        for axis, (s, w) in enumerate(zip(start, self.window, strict=True), start=2):
            target = target.narrow(axis, s, w)
        target.copy_(weights)
        for axis, (t, size) in enumerate(zip(self.halo_size, sizes, strict=True), start=2):
            full = full.narrow(axis, t, size)
        return full

    def _blocks(self, x: Tensor) -> tuple[Tensor, Tensor, Layout]:
        """Queries in blocks (B, N, Q, h, d), the padded map of keys and values, and which key lies where."""
        check.channels_last("HaloAttention", x, self.dim, (self.rank,))
        x, sizes = x.contiguous(), x.shape[1:-1]  # one copy for both projections
        counts = [room(count) for count in ceil_div(sizes, self.block_size)]
        queries = every(x, self.query_stride) if self.query_stride > 1 else x
        q = window_partition(pointwise(self.q, queries), self.query_block, counts)
        q = q.reshape(*q.shape[:3], self.num_heads, self.dim_head)
        padded = [c * b + 2 * t for c, b, t in zip(counts, self.block_size, self.halo_size, strict=True)]
        after = [p - s - t for p, s, t in zip(padded, sizes, self.halo_size, strict=True)]
        kv = pad_axes(pointwise(self.kv, x), self.halo_size, after)
        return q, kv, self._layout(sizes, counts, padded, q)

    def _layout(self, sizes: Sequence[int], counts: Sequence[int], padded: Sequence[int], q: Tensor) -> Layout:
        plan = _Plan(
            self.window,
            self.block_size,
            self.halo_size,
            self.query_block,
            self.boundary == "mask",
            self.scale,
            self.scale if self.scale_pos_embed else 1.0,
        )
        maps = tuple(sizes), tuple(counts), tuple(padded)
        small = certain(math.prod(counts) * math.prod(self.window) <= KEPT)
        return kept(_layout, q, plan, *maps) if small else _layout(plan, *maps, q)

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return (
            f"{self.dim}, num_heads={self.num_heads}, rank={self.rank}, dim_out={self.dim_out}, stride={self.stride}, "
            f"block_size={self.block_size}, halo_size={self.halo_size}, dim_head={self.dim_head}, "
            f"boundary={self.boundary!r}"
        )


class _Plan(NamedTuple):
    """What a layout depends on beside the sizes of the map, see `HaloAttention` and `Layout`."""

    window: tuple[int, ...]
    block: tuple[int, ...]
    halo: tuple[int, ...]
    query_block: tuple[int, ...]
    masked: bool
    scale: float
    relative_scale: float


def _layout(
    plan: _Plan, sizes: tuple[int, ...], counts: tuple[int, ...], padded: tuple[int, ...], like: Tensor
) -> Layout:
    """Which key lies where in a map of `sizes`, of `counts` blocks and `padded` to these sizes; types as for `like`."""
    device = like.device
    others = torch.meshgrid(*(torch.arange(w, device=device) for w in plan.window), indexing="ij")
    block = torch.arange(math.prod(counts), device=device)
    keys = torch.zeros(1, 1, dtype=torch.long, device=device)
    outside = torch.zeros(1, 1, dtype=torch.bool, device=device)
    inner, stride = math.prod(counts), math.prod(padded)
    spans = zip(sizes, counts, padded, plan.block, plan.halo, others, strict=True)
    for size, count, length, b, t, other in spans:
        inner, stride = inner // count, stride // length
        at = (block // inner % count * b)[:, None] + other.reshape(1, -1)  # (N, K), along this axis
        keys = keys + at * stride
        outside = outside | (at < t) | (at >= size + t)
    outside = outside & ~outside.all(1, keepdim=True)  # a block that `room` added attends to zeros, not to nothing

    places = torch.meshgrid(*(torch.arange(b, device=device) for b in plan.query_block), indexing="ij")
    rows, axes, first = [], [], 0
    for place, other, w in zip(places, others, plan.window, strict=True):
        along = torch.arange(w, device=device)
        rows.append(along - place.reshape(-1, 1) + w - 1 + first)  # (Q, w)
        axes.append(along[:, None] == other.reshape(1, -1))  # (w, K)
        first += 2 * w - 1
    return Layout(
        window=plan.window,
        step=plan.block,
        keys=keys,
        rows=torch.cat(rows, dim=1),
        axes=torch.cat(axes).to(torch.promote_types(like.dtype, torch.float32)),
        outside=outside if plan.masked else None,
        scale=plan.scale,
        relative_scale=plan.relative_scale,
    )
