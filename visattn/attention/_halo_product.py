"""The product at the heart of halo attention, in two forms with equal results.

`plain` cuts all windows, makes a bias of the relative logits and calls SDPA once. On the CPU, in full precision,
`halo_product` instead goes through a few blocks at a time: it collects their keys, so that neither windows nor logits
are ever all in memory, and both stay in the processor's cache; backward computes them again. That takes half the time
of autograd's way, which keeps every intermediate of every block.

Legend: as in `halo.py`; P positions of the padded map, R rows of all tables.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.attention._backend import scaled_dot_product
from visattn.attention._precision import autocast_enabled, exact
from visattn.attention._windows import overlapping_windows

CHUNK = 2**17  # logits computed at a time; with their gradient they fit a second-level cache of 1 MiB


class Layout(NamedTuple):
    """Which key lies where; no tensor of it has a gradient.

    Attributes:
        window: Tokens per axis of a window of keys, w.
        step: Tokens from one window to the next, b.
        keys: Position in the padded map of each key of each block, (N, K).
        rows: Row of the tables for each place of a key along each axis, by query, (Q, A).
        axes: (A, K), one where a key has the place of the row along the row's axis, and zero elsewhere.
        outside: Whether each key takes no part, (N, K); None if all do.
        scale: Factor of q k^T.
        relative_scale: Factor of the relative logits.
    """

    window: tuple[int, ...]
    step: tuple[int, ...]
    keys: Tensor
    rows: Tensor
    axes: Tensor
    outside: Tensor | None
    scale: float
    relative_scale: float


def halo_product(q: Tensor, kv: Tensor, tables: Tensor, layout: Layout) -> Tensor:
    """softmax(scale q k^T + relative logits) v, block by block.

    Args:
        q: (B, N, Q, h, d).
        kv: Keys and values of the padded map, (B, *S, h (d + e)), every head's keys before its values.
        tables: All relative tables, one after the other, (R, d).
        layout: See `Layout`.

    Returns:
        (B, N, Q, h, e).
    """
    relative = relative_logits(q.flatten(0, 1), tables, layout)
    if q.device.type != "cpu" or q.dtype.itemsize < 4 or torch.compiler.is_compiling() or q.numel() == 0:
        return plain(q, relative, kv, layout)
    out: Tensor = _Chunked.apply(q, relative, kv, layout)
    return out


def relative_logits(q: Tensor, tables: Tensor, layout: Layout) -> Tensor:
    """Logits (n, h, Q, A) for each place of a key along each axis, of queries (n, Q, h, d).

    They are float32 at least, but for autocast, under which a product comes in half precision whatever it is made of.
    """
    q = q.transpose(1, 2)
    if not autocast_enabled(q.device):
        q, tables = exact(q), exact(tables)
    every = F.linear(q, tables)  # (n, h, Q, R)
    own = every.gather(-1, layout.rows.expand(*every.shape[:2], *layout.rows.shape))
    return own if layout.relative_scale == 1 else own * layout.relative_scale


def plain(q: Tensor, relative: Tensor, kv: Tensor, layout: Layout) -> Tensor:
    """As `halo_product`, all blocks at once, through autograd."""
    batch, blocks, queries, heads, width = q.shape
    windows = overlapping_windows(kv, layout.window, layout.step)  # (B, N, K, h (d + e))
    windows = windows.reshape(batch * blocks, windows.shape[2], heads, kv.shape[-1] // heads).transpose(1, 2)
    if q.dtype == torch.float16:  # whose range the sum of relative logits can exceed
        relative = relative.clamp(-1e4, 1e4)
    bias = _bias(relative, layout, None if layout.outside is None else layout.outside.repeat(batch, 1))
    k, v = windows[..., :width], windows[..., width:]
    out = scaled_dot_product(q.flatten(0, 1).transpose(1, 2), k, v, bias.to(q.dtype), layout.scale)
    return out.transpose(1, 2).reshape(batch, blocks, queries, heads, v.shape[-1])


def _bias(relative: Tensor, layout: Layout, outside: Tensor | None) -> Tensor:
    """(n, h, Q, K) of `relative` (n, h, Q, A) and `outside` (n, K)."""
    bias = relative @ layout.axes
    return bias if outside is None else bias.masked_fill(outside[:, None, None, :], -math.inf)


class _Chunked(torch.autograd.Function):
    """A few blocks at a time; only the inputs are kept for backward."""

    @staticmethod
    def forward(q: Tensor, relative: Tensor, kv: Tensor, layout: Layout) -> Tensor:
        batch, blocks, queries, heads, width = q.shape
        source, flat_q = kv.flatten(0, -2), q.flatten(0, 1).transpose(1, 2)
        out = q.new_empty(batch * blocks, queries, heads, kv.shape[-1] // heads - width)
        for part, index, outside in _parts(q, kv, layout):
            one = source.index_select(0, index.flatten()).view(*index.shape, heads, -1).transpose(1, 2)  # (n, h, K, .)
            bias = _bias(relative[part], layout, outside)
            done = scaled_dot_product(flat_q[part], one[..., :width], one[..., width:], bias, layout.scale)
            out[part] = done.transpose(1, 2)
        return out.view(batch, blocks, queries, heads, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.layout = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, relative, kv = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for: let autograd see every step
            wanted = [each for each in (q, relative, kv) if each.requires_grad]
            found = iter(torch.autograd.grad(plain(q, relative, kv, ctx.layout), wanted, grads[0], create_graph=True))
            return (*(next(found) if each.requires_grad else None for each in (q, relative, kv)), None)
        return (*_backward(q, relative, kv, ctx.layout, grads[0]), None)


def _backward(q: Tensor, relative: Tensor, kv: Tensor, layout: Layout, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, relative and kv."""
    batch, blocks, queries, heads, width = q.shape
    source = kv.flatten(0, -2)
    # (B N h, T, .), contiguous: batched products of plain matrices
    flat_q, flat_grad = (each.flatten(0, 1).transpose(1, 2).flatten(0, 1) for each in (q * layout.scale, grad))
    bias_grad, source_grad = torch.empty_like(relative), torch.zeros_like(source)
    q_grad = torch.empty_like(flat_q)
    for part, index, outside in _parts(q, kv, layout):
        rows = slice(part.start * heads, part.stop * heads)
        one_q, one_grad = flat_q[rows], flat_grad[rows]
        one = source.index_select(0, index.flatten()).view(*index.shape, heads, -1).transpose(1, 2).flatten(0, 1)
        k, v = one[..., :width], one[..., width:]  # (n h, K, .)
        logits = _bias(relative[part], layout, outside).flatten(0, 1)
        weights = logits.baddbmm_(one_q, k.mT).softmax(-1)  # (n h, Q, K)
        # d logits = weights * (d weights - their weighted mean), one pass of torch's own kernel
        change = torch._softmax_backward_data(torch.bmm(one_grad, v.mT), weights, -1, weights.dtype)

        both = torch.cat([torch.bmm(change.mT, one_q), torch.bmm(weights.mT, one_grad)], dim=-1)
        both = both.view(-1, heads, *both.shape[1:]).transpose(1, 2)  # (n, K, h, d + e)
        source_grad.index_add_(0, index.flatten(), both.reshape(-1, source.shape[1]))
        bias_grad[part] = torch.mm(change.flatten(0, 1), layout.axes.t()).view_as(bias_grad[part])
        q_grad[rows] = torch.bmm(change, k)
    q_grad = q_grad.mul_(layout.scale).view(batch, blocks, heads, queries, width).transpose(2, 3)
    return q_grad, bias_grad, source_grad.view_as(kv)


def _parts(q: Tensor, kv: Tensor, layout: Layout) -> list[tuple[slice, Tensor, Tensor | None]]:
    """Ranges of blocks (over all images), each with the positions of their keys and which of these lie outside."""
    batch, blocks, queries, heads, _ = q.shape
    step = max(1, CHUNK // (heads * queries * layout.keys.shape[1]))
    first = torch.arange(batch)[:, None, None] * math.prod(kv.shape[1:-1])
    index = (layout.keys + first).flatten(0, 1)  # (B N, K)
    outside = None if layout.outside is None else layout.outside.repeat(batch, 1)
    parts = [slice(start, min(start + step, batch * blocks)) for start in range(0, batch * blocks, step)]
    return [(part, index[part], None if outside is None else outside[part]) for part in parts]
