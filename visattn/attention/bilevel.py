"""Bi-level routing attention: regions choose regions, then tokens attend within what their region chose.

Paper: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023, arXiv 2303.08810,
equations 2 to 7: A^r = Q^r (K^r)^T on region means, I^r = topk(A^r), O = softmax(Q (K^g)^T) V^g + LCE(V) with K^g and
V^g the keys and values of the chosen regions. LePE (the paper's LCE) is a depthwise convolution.
Official code: github.com/rayleizhu/BiFormer, revision 1697bbb (MIT; nothing is copied from it), ops/bra_legacy.py
(`legacy`), ops/bra_nchw.py (`nchw`) and the attention with LePE of models/_common.py.

Deviations:
- Region means are taken of the input and then projected, in float32 at least. The mean of a projection is the
  projection of the mean, so the choice is the same; in half precision it is the choice that full precision makes. (In
  full precision the mean of the projection is taken where that is quicker.)
- `auto_pad` is on by default, as every size is accepted here; sizes that are multiples are not affected by it.
- `nchw` on an axis shorter than `n_win`: regions of one token, hence fewer of them, and `topk` is clipped to their
  number. The official code fails there.
- Pooling of keys by a ratio is clipped to the window; the official code fails on a window shorter than the ratio.
- Rank 3: windows are boxes and the convolution is 3-D. Tensors are channels-last in both variants.

Legend: B batch, *S spatial axes, C channels, R regions (windows), T tokens of a region, U keys of a region (T unless
they are pooled), k chosen regions, h heads, d channels of a head of queries and keys.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention import _checks as check
from visattn.attention._backend import launch_bound, scaled_dot_product
from visattn.attention._depthwise import depthwise
from visattn.attention._precision import exact_logits, without_autocast
from visattn.attention._routing import (
    RoutedAttention,
    Windows,
    choose,
    map_means,
    masked_attention,
    region_means,
    region_of,
)
from visattn.attention._windows import (
    ceil_div,
    certain,
    crop,
    flat_index,
    known_zero,
    pad_to,
    pool_windows,
    real_tokens,
    window_partition,
    window_reverse,
)
from visattn.attention.lepe import CONV, local_enhancement, pointwise

Variant = Literal["legacy", "nchw"]
Downsample = Literal["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"]
VARIANTS = ("legacy", "nchw")
DOWNSAMPLE = ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool")
# From this share of all regions on, attention over the whole map under a mask of whole regions costs less than
# collecting the chosen keys; regions of few tokens are collected at a loss, so for them the share is lower (measured on
# the CPU).
DENSE_SHARE, DENSE_SHARE_SMALL, SMALL_TOKENS = 0.6, 0.25, 32
# From this many channels for each token of a region on, the mean of the projection is quicker than its projected mean.
WIDE = 64


class _QKV(nn.Module):
    """One projection to queries, keys and values under the official key `qkv`."""

    def __init__(self, dim: int, qk_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim)


class _Router(nn.Module):
    """The routing's own embedding of region means, under the official key `emb`; nothing without parameters."""

    def __init__(self, qk_dim: int, param_routing: bool) -> None:
        super().__init__()
        self.emb = nn.Linear(qk_dim, qk_dim) if param_routing else nn.Identity()


class BiLevelRoutingAttention(nn.Module):
    """Attention among the regions that matter to each other, in both official forms.

    Border policy on sizes that are no multiple of `n_win`:

    - `legacy` zero-pads the input at the end of each axis up to a multiple, before the projection. Padded tokens so
      have the projection's bias as query, key and value; they count in the region means and are attended to.
    - `nchw` makes regions of floor(S / n_win) tokens, hence more than `n_win` of them per axis, and pads queries, keys
      and values with zeros after the projection. Means leave the padding out; zero keys are attended to.

    Args:
        dim: Channels C.
        num_heads: Heads h, a divisor of `dim` and `qk_dim`.
        variant: `legacy`: the code of the published weights. `nchw`: the authors' later form; `qk_dim`,
            `param_attention`, the `*_routing` options and pooled keys do not exist there.
        rank: Number of spatial axes, 2 or 3.
        n_win: Regions per axis (a count, not a size), one integer or one per axis.
        topk: Regions that each region attends to, k.
        qk_dim: Channels of queries and keys; None takes `dim`.
        qk_scale: Factor of the logits; None takes qk_dim ** -0.5 (not the width of a head).
        side_dwconv: Kernel size of the depthwise convolution of the values, odd; 0 leaves it out.
        kv_downsample_mode: Pooling of keys and values inside each window: `identity`, `ada_avgpool` or `ada_maxpool` to
            `kv_per_win` per axis, `avgpool` or `maxpool` by `kv_downsample_ratio`.
        kv_per_win: Keys per axis of a window, for the `ada_` modes.
        kv_downsample_ratio: Ratio per axis, for `avgpool` and `maxpool`; 1 pools nothing.
        param_attention: `qkvo`, or `qkv` without the last projection.
        param_routing: Whether region means pass through a projection of their own; needs `diff_routing`.
        diff_routing: Whether gradients flow through the routing logits; needs `soft_routing`.
        soft_routing: Whether the keys and the values of a chosen region are multiplied by its routing weight.
        auto_pad: Whether `legacy` pads; False refuses sizes that are no multiple. `nchw` always pads.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        variant: Variant = "legacy",
        rank: int = 2,
        n_win: int | Sequence[int] = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        side_dwconv: int = 3,
        kv_downsample_mode: Downsample = "identity",
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        param_attention: Literal["qkvo", "qkv"] = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        auto_pad: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, check.heads_of(dim, num_heads)
        self.variant = check.choice("variant", variant, VARIANTS)
        self.rank = check.rank_of("BiLevelRoutingAttention", rank, self.supported_ranks)
        self.n_win = check.per_axis("n_win", n_win, rank)
        self.topk = check.positive("topk", topk)
        self.qk_dim = dim if qk_dim is None else check.positive("qk_dim", qk_dim)
        self.scale = self.qk_dim**-0.5 if qk_scale is None else float(qk_scale)
        self.kv_downsample_mode = check.choice("kv_downsample_mode", kv_downsample_mode, DOWNSAMPLE)
        self.kv_per_win = check.positive("kv_per_win", kv_per_win)
        self.kv_downsample_ratio = check.positive("kv_downsample_ratio", kv_downsample_ratio)
        self.param_attention = check.choice("param_attention", param_attention, ("qkvo", "qkv"))
        self.param_routing, self.diff_routing, self.soft_routing = param_routing, diff_routing, soft_routing
        self.auto_pad = auto_pad
        self._check_settings()

        self.lepe = local_enhancement(dim, side_dwconv, rank)
        if variant == "legacy":
            self.router = _Router(self.qk_dim, param_routing)
            self.qkv = _QKV(dim, self.qk_dim)
            self.wo = nn.Linear(dim, dim) if param_attention == "qkvo" else nn.Identity()
        else:
            self.qkv_linear = CONV[rank](dim, 3 * dim, 1)
            self.output_linear = CONV[rank](dim, dim, 1)

    def _check_settings(self) -> None:
        regions = math.prod(self.n_win)
        if self.topk > regions:
            raise ValueError(f"topk must be at most the {regions} regions of n_win={self.n_win}, got {self.topk}")
        if self.qk_dim % self.num_heads:
            raise ValueError(f"qk_dim must be a multiple of num_heads={self.num_heads}, got {self.qk_dim}")
        if self.param_routing and not self.diff_routing:
            raise ValueError("param_routing=True needs diff_routing=True: without it the routing's weights never learn")
        if self.diff_routing and not self.soft_routing:
            raise ValueError("diff_routing=True needs soft_routing=True: a hard choice has no gradient")
        if self.variant == "nchw":
            own = {
                "qk_dim": self.qk_dim != self.dim,
                "param_attention": self.param_attention != "qkvo",
                "kv_downsample_mode": self.kv_downsample_mode != "identity",
                "soft_routing": self.soft_routing,
            }
            wrong = [name for name, changed in own.items() if changed]
            if wrong:
                raise ValueError(f"variant='nchw' has no {', '.join(wrong)}; variant='legacy' has")

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: (B, *S, C), any size of at least 1 per axis.

        Returns:
            (B, *S, C).

        Raises:
            ValueError: `x` has another shape, or its size is no multiple of `n_win` with `auto_pad` off.
        """
        check.channels_last("BiLevelRoutingAttention", x, self.dim, (self.rank,))
        layout = self._layout(x.shape[1:-1])
        if self._dense(layout):
            out, values = self._attend_dense(x, layout)
        else:
            parts = self._windows(x)
            out, values = self._join(self._attend_gathered(parts, *self._route(parts.means)), parts), parts.value_map
        return self._finish(out, values, x.shape[1:-1])

    def forward_with_attention(self, x: Tensor) -> RoutedAttention:
        """Attend and return the routing and the attention beside the output; slower than `forward`.

        Args:
            x: (B, *S, C).
        """
        check.channels_last("BiLevelRoutingAttention", x, self.dim, (self.rank,))
        parts = self._windows(x)
        r_weight, r_idx = self._route(parts.means)
        q, k, v = self._select(parts, r_weight, r_idx)
        attention = exact_logits(q, k, self.scale).softmax(-1)  # (B R, h, T, k U)
        out = self._join((attention.to(v.dtype) @ v).transpose(1, 2).flatten(2), parts)
        out = self._finish(out, parts.value_map, x.shape[1:-1])
        return RoutedAttention(out, r_weight, r_idx, attention.reshape(*parts.q.shape[:2], *attention.shape[1:]))

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """How much the token at index `query` attends to every token of `x` (B, *S, C): (B, h, *S).

        The weights of padded tokens are left out, so the sum can be below 1. Pooled keys have no place on the map.
        """
        if self.kv_downsample_mode != "identity":
            raise ValueError("attention_map needs kv_downsample_mode='identity': pooled keys have no single position")
        flat_index(query, x.shape[1:-1])  # refuses an index outside
        result = self.forward_with_attention(x)
        window, counts = self._layout(x.shape[1:-1])
        at = [q // w for q, w in zip(query, window, strict=True)]
        inside = [q % w for q, w in zip(query, window, strict=True)]
        region = flat_index(at, counts)
        row = result.attention[:, region, :, flat_index(inside, window)]  # (B, h, k U)
        batch, heads = row.shape[:2]
        tokens = math.prod(window)
        chosen = result.r_idx[:, region, None, :, None].expand(batch, heads, -1, tokens)
        weights = row.new_zeros(batch, heads, math.prod(counts), tokens)
        weights = weights.scatter_add(2, chosen, row.reshape(chosen.shape))
        full = window_reverse(weights.flatten(0, 1)[..., None], window, x.shape[1:-1], counts)
        return full.reshape(batch, heads, *x.shape[1:-1])

    def _projection(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the projection to queries, keys and values."""
        projection: Any = self.qkv.qkv if self.variant == "legacy" else self.qkv_linear
        return projection.weight.flatten(1), projection.bias

    def _projections(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The same, for each of the three."""
        widths = [self.qk_dim, self.qk_dim, self.dim]
        weights, biases = (torch.split(each, widths) for each in self._projection())
        return tuple(zip(weights, biases, strict=True))

    def _layout(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens of a window and number of windows, per axis."""
        if self.variant == "legacy":
            window = ceil_div(sizes, self.n_win)
            padded = tuple(n * w for n, w in zip(self.n_win, window, strict=True))
            if not self.auto_pad and padded != tuple(sizes):
                raise ValueError(
                    f"auto_pad=False takes multiples of n_win={self.n_win}: pad {tuple(sizes)} to {padded}"
                )
            return window, self.n_win
        layout = []
        for size, n in zip(sizes, self.n_win, strict=True):
            if certain(size >= n):  # so written, that there are n regions or more is plain even for a symbolic size
                layout.append((size // n, n + (size % n + size // n - 1) // (size // n)))
            else:
                w = max(1, size // n)
                layout.append((w, (size + w - 1) // w))
        return tuple(w for w, _ in layout), tuple(n for _, n in layout)

    def _windows(self, x: Tensor) -> Windows:
        sizes = x.shape[1:-1]
        window, counts = self._layout(sizes)
        padded = [n * w for n, w in zip(counts, window, strict=True)]
        cut = functools.partial(window_partition, window=window, counts=counts)
        if self.variant == "legacy":
            x = pad_to(x, padded)
        if launch_bound(x):  # one product
            parts = torch.split(F.linear(x, *self._projection()), [self.qk_dim, self.qk_dim, self.dim], dim=-1)
            (q, k, v), value_map, means = map(cut, parts), parts[2], map_means(x, window, counts)
        else:
            (wq, bq), (wk, bk), (wv, bv) = self._projections()
            value_map = F.linear(x, wv, bv)
            inputs, v = cut(x), cut(value_map)  # (B, R, T, C)
            means = region_means(inputs, x.shape[1:-1], window, counts)
            if known_zero(*(p - s for p, s in zip(padded, x.shape[1:-1], strict=True))):
                q, k = F.linear(inputs, wq, bq), F.linear(inputs, wk, bk)
            else:  # zeros after the projection
                q, k = cut(F.linear(x, wq, bq)), cut(F.linear(x, wk, bk))
        if self.kv_downsample_mode != "identity":
            k, v = self._pool(k, window), self._pool(v, window)
        return Windows(q, k, v, value_map, means, window, counts)

    def _pool(self, windows: Tensor, window: Sequence[int]) -> Tensor:
        """Keys or values (B, R, U, C) of `windows` (B, R, T, C), by `kv_downsample_mode`."""
        per_axis = self.kv_per_win if self.kv_downsample_mode.startswith("ada_") else self.kv_downsample_ratio
        return pool_windows(windows, window, self.kv_downsample_mode, per_axis)

    def _route(self, means: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices (B, R, k) of the regions that each region chooses, from its mean input (B, R, C)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.diff_routing), without_autocast(means.device):
            (wq, bq), (wk, bk), _ = self._projections()
            q, k = (F.linear(means, w.to(means.dtype), b.to(means.dtype)) for w, b in ((wq, bq), (wk, bk)))
            if self.param_routing:
                emb: Any = self.router.emb
                q, k = (F.linear(each, emb.weight.to(q.dtype), emb.bias.to(q.dtype)) for each in (q, k))
            return choose(q, k, self.scale, self.topk)

    def _select(self, parts: Windows, r_weight: Tensor, r_idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B R, h, T, d), and the keys and values (B R, h, k U, .) of the chosen regions."""
        batch, regions, chosen = r_idx.shape
        first = torch.arange(batch, device=r_idx.device)[:, None, None] * regions
        index = (r_idx + first).flatten()

        def collect(x: Tensor) -> Tensor:  # (B, R, U, C) -> (B R, h, k U, C / h)
            # Whole regions at a time: the gradient of index_select adds rows, that of a gather scatters elements.
            rows = x.flatten(0, 1).flatten(1).index_select(0, index)
            if self.soft_routing:
                rows = rows * r_weight.flatten()[:, None].to(x.dtype)
            rows = rows.reshape(batch * regions, chosen * x.shape[2], self.num_heads, x.shape[3] // self.num_heads)
            return rows.transpose(1, 2)

        return self._heads(parts.q.flatten(0, 1)), collect(parts.k), collect(parts.v)

    def _heads(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, h, T, C / h)."""
        return x.reshape(*x.shape[:2], self.num_heads, x.shape[2] // self.num_heads).transpose(1, 2)

    def _attend_gathered(self, parts: Windows, r_weight: Tensor, r_idx: Tensor) -> Tensor:
        """(B R, T, C), by collecting the keys of the chosen regions."""
        q, k, v = self._select(parts, r_weight, r_idx)
        own = real_tokens(parts.window, q.device) if self.kv_downsample_mode == "identity" else None
        mask = None if own is None else own.repeat(r_idx.shape[-1])[None, None, None]  # (1, 1, 1, k U)
        return scaled_dot_product(q, k, v, mask, self.scale).transpose(1, 2).flatten(2)

    def _attend_dense(self, x: Tensor, layout: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Attention over the map in which the regions that were not chosen are masked, and the map of values.

        Nothing is cut into windows but what the routing needs, and one product makes queries, keys and values.
        """
        window, counts = layout
        padded = [n * w for n, w in zip(counts, window, strict=True)]
        if self.variant == "legacy":
            x = pad_to(x, padded)
        weight, bias = self._projection()
        projected = F.linear(x, weight, bias)
        parts = torch.split(projected, [self.qk_dim, self.qk_dim, self.dim], dim=-1)
        tokens, regions = math.prod(window), math.prod(counts)
        whole = known_zero(*(p - s for p, s in zip(padded, x.shape[1:-1], strict=True)))
        if projected.dtype.itemsize >= 4 and whole and certain(tokens * WIDE <= self.dim):
            sums = window_partition(projected[..., : 2 * self.qk_dim].detach(), window, counts).sum(2)
            r_idx = choose(sums[..., : self.qk_dim], sums[..., self.qk_dim :], self.scale / tokens**2, self.topk)[1]
        else:
            r_idx = self._route(map_means(x, window, counts))[1]
        q, k, v = (pad_to(each, padded) for each in parts)
        query_region = key_region = region_of(window, counts, x)  # (N,)
        if self.kv_downsample_mode != "identity":  # keys then come window by window
            k, v = (self._pool(window_partition(each, window, counts), window) for each in (k, v))
            key_region = torch.arange(regions, device=x.device).repeat_interleave(k.shape[2])
        q, k, v = (self._heads(each.flatten(1, -2)) for each in (q, k, v))  # (B, h, N, .)
        out = masked_attention(q, k, v, r_idx, (query_region, key_region), regions, self.scale)
        return out.transpose(1, 2).reshape(x.shape[0], *padded, self.dim), parts[2]

    def _dense(self, layout: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
        """Whether one attention over the map is the cheaper way, see `DENSE_SHARE`; all regions need no mask."""
        if self.soft_routing:
            return False
        window, regions = layout[0], math.prod(layout[1])
        small = certain(math.prod(window) <= SMALL_TOKENS)
        return certain(min(self.topk, regions) >= regions * (DENSE_SHARE_SMALL if small else DENSE_SHARE))

    def _join(self, out: Tensor, parts: Windows) -> Tensor:
        """The padded map (B, *S, C) of `out` (B R, T, C)."""
        windows = out.reshape(parts.q.shape[0], parts.q.shape[1], parts.q.shape[2], self.dim)
        padded = [n * w for n, w in zip(parts.counts, parts.window, strict=True)]
        return window_reverse(windows, parts.window, padded, parts.counts)

    def _finish(self, out: Tensor, values: Tensor, sizes: Sequence[int]) -> Tensor:
        """`out`, cut to `sizes`, plus the convolution of the values, projected: (B, *S, C)."""
        out = crop(out, sizes)
        if self.lepe is not None:
            out = out + crop(depthwise(self.lepe, values), sizes)
        if self.variant == "legacy":
            return self.wo(out)  # type: ignore[no-any-return]
        return pointwise(self.output_linear, out)

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        text = (
            f"{self.dim}, num_heads={self.num_heads}, variant={self.variant!r}, rank={self.rank}, n_win={self.n_win}, "
            f"topk={self.topk}, scale={self.scale:.4g}"
        )
        if self.kv_downsample_mode != "identity":
            text += f", kv_downsample_mode={self.kv_downsample_mode!r}"
        return text + f", soft_routing={self.soft_routing}" * self.soft_routing
