"""Neighbourhood attention on overlapping tiles: dense products per tile instead of a gather per query.

A piece (a box of `_neighborhood_plan`) is copied from strided, overlapping views into buffers that stay in the cache,
computed, and written back. Backward copies the pieces again: nothing but the arguments is kept.

Legend: B batch, *S spatial sizes, H query heads, G key heads, R = H / G query heads per key head, D head dim of query
and key, V head dim of value; in a piece N tiles times key heads, `rows` (R times the queries of a tile) and `keys`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visattn.attention._backend import scaled_dot_product, scaled_dot_product_lse, softmax_backward
from visattn.attention._neighborhood_gathered import fits, neighborhood_gathered
from visattn.attention._neighborhood_plan import Box, Layout, View, boxes_of, turns_of, view_of
from visattn.attention._neighborhood_tiling import Tiling, tiling_of
from visattn.attention._neighborhood_windows import Axis
from visattn.attention._precision import without_autocast


class Piece(NamedTuple):
    """A box, its views of the tensors, and for those that collect overlapping tiles the turns in which to add them."""

    box: Box
    views: tuple[View, ...]
    turns: tuple[list[tuple[View, View]], ...]


class Program(NamedTuple):
    """A tiling of tensors with certain strides."""

    tiling: Tiling
    pieces: list[Piece]


@functools.lru_cache(maxsize=128)
def _program(layouts: tuple[Layout, ...], sides: str, axes: tuple[Axis, ...], workers: int) -> Program:
    (batch, *sizes, heads, width), groups = layouts[0][0], layouts[1][0][-2]
    tiling = tiling_of(tuple(sizes), axes, batch, groups, heads // groups, width)
    pieces = []
    for box in boxes_of(tiling.units, batch, groups, tiling.repeat, width, tiling.limit(workers)):
        unit = tiling.units[box.unit]
        views = tuple(view_of(layout, box, unit, axes, side) for layout, side in zip(layouts, sides, strict=True))
        turns = tuple(turns_of(view, unit) for view, side in zip(views, sides, strict=True) if side == "+")
        pieces.append(Piece(box, views, turns))
    return Program(tiling, pieces)


def program_of(tensors: Sequence[Tensor], sides: str, axes: tuple[Axis, ...]) -> Program:
    """The program for some tensors.

    Args:
        tensors: (B, *S, heads, channels); the first is the query, the second the key.
        sides: For each tensor "q" or "k" (over queries or keys), or "+" for one over the keys that collects tiles.
        axes: Settings of each axis.
    """
    workers = torch.get_num_threads() if tensors[0].device.type == "cpu" else 4096
    layouts = tuple((tuple(x.shape), x.stride()) for x in tensors)
    return _program(layouts, sides, axes, workers)


class Buffers:
    """Memory that every piece uses again: fresh pages would cost more than the copies into them.

    Args:
        pieces: That are to share them.
        like: A tensor of the device.
        dtype: Of the buffers.
        widths: Of each buffer the rows, "q" or "k", and the channels; 0 stands for the keys of a tile.
    """

    def __init__(self, pieces: Sequence[Piece], like: Tensor, dtype: torch.dtype, *widths: tuple[str, int]) -> None:
        self._widths = widths
        counts = [0] * len(widths)
        for piece in pieces:
            for number, sizes in enumerate(self._sizes(piece.box)):
                counts[number] = max(counts[number], math.prod(sizes))
        self._flat = [like.new_empty(count, dtype=dtype) for count in counts]

    def _sizes(self, box: Box) -> list[tuple[int, int, int]]:
        return [(box.tiles, box.rows if side == "q" else box.keys, width or box.keys) for side, width in self._widths]

    def of(self, box: Box) -> list[Tensor]:
        """The buffers, shaped (N, rows or keys, channels) for a box."""
        return [
            flat.as_strided(sizes, (sizes[1] * sizes[2], sizes[2], 1))
            for flat, sizes in zip(self._flat, self._sizes(box), strict=True)
        ]


def _load(into: Tensor, x: Tensor, view: View) -> Tensor:
    into.view(view.sizes).copy_(x.as_strided(view.sizes, view.strides, x.storage_offset() + view.offset))
    return into


def _store(into: Tensor, tiles: Tensor, view: View) -> None:
    into.as_strided(view.sizes, view.strides, view.offset).copy_(tiles.view(view.sizes))


def _add(into: Tensor, tiles: Tensor, turns: Sequence[tuple[View, View]]) -> None:
    for source, target in turns:
        part = tiles.as_strided(source.sizes, source.strides, source.offset)
        into.as_strided(target.sizes, target.strides, target.offset).add_(part)


def _select(bias: Tensor, box: Box) -> Tensor:
    """The part of (G or 1, rows, keys) that belongs to the key heads of a box."""
    heads = box.sizes[-1]
    return bias if bias.shape[0] in (1, heads) else bias[box.starts[-1] : box.starts[-1] + heads]


def _by_head(tiles: Tensor, box: Box) -> Tensor:
    """(N, ..) -> (tiles, key heads of the box, ..)."""
    heads = box.sizes[-1]
    return tiles.view(tiles.shape[0] // heads, heads, *tiles.shape[1:])


class TiledAttention(torch.autograd.Function):
    """Forward and backward over the pieces of a program; for the arguments see `neighborhood_tiles`."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        axes: tuple[Axis, ...],
        scale: float,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        """Output, and the log-sum-exp or an empty tensor."""
        width, deep = query.shape[-1], value.shape[-1]
        precise = torch.promote_types(query.dtype, torch.float32)
        out = query.new_empty(*query.shape[:-1], deep)
        lse = query.new_empty(query.shape[:-1] if with_lse else 0, dtype=precise)
        tensors = (query, key, value, out, lse.unsqueeze(-1))[: 4 + with_lse]
        tiling, pieces = program_of(tensors, "qkkqq"[: len(tensors)], axes)
        buffers = Buffers(pieces, query, query.dtype, ("q", width), ("k", width), ("k", deep))
        table, bias, number = None if rpb is None else rpb.to(query.dtype), None, -1
        for box, views, _ in pieces:
            q, k, v = buffers.of(box)
            if box.unit != number:
                number, bias = box.unit, tiling.bias(tiling.units[box.unit], table, q)
            q = _by_head(_load(q, query, views[0]), box)
            k = _by_head(_load(k, key, views[1]), box)
            v = _by_head(_load(v, value, views[2]), box)
            mask = None if bias is None else _select(bias, box)[None]
            if with_lse:
                o, row = scaled_dot_product_lse(q, k, v, mask, scale)
                _store(lse, row, views[4])
            else:
                o = scaled_dot_product(q, k, v, mask, scale)
            _store(out, o, views[3])
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps the arguments."""
        query, key, value, rpb, ctx.axes, ctx.scale, ctx.with_lse = inputs
        if not ctx.with_lse:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, value, rpb)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and table; the softmax is computed again."""
        query, key, value, rpb = ctx.saved_tensors
        with without_autocast(query.device):
            return *_gradients(ctx, query, key, value, rpb, grad_out, grad_lse), None, None, None


def _gradients(
    ctx: Any, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor | None, ...]:
    width, deep = query.shape[-1], value.shape[-1]
    precise = torch.promote_types(query.dtype, torch.float32)
    grad_query = query.new_empty(query.shape, dtype=precise)
    # Heads outside: a row of a tile is then contiguous in the tile and in the gradient.
    grad_key = key.new_zeros(key.movedim(-2, 1).shape, dtype=precise).movedim(1, -2)
    grad_value = value.new_zeros(value.movedim(-2, 1).shape, dtype=precise).movedim(1, -2)
    tensors = (query, key, value, grad_out, grad_query, grad_key, grad_value, grad_lse.unsqueeze(-1))[
        : 7 + ctx.with_lse
    ]
    tiling, pieces = program_of(tensors, "qkkqq++q"[: len(tensors)], ctx.axes)
    widths = (("q", width), ("k", width), ("k", deep), ("q", deep), ("q", 0), ("q", 0), ("k", width), ("q", 1))
    buffers = Buffers(pieces, query, precise, *widths)
    table = None if rpb is None else rpb.to(precise)
    needed = table is not None and ctx.needs_input_grad[3]
    grad_table = table.new_zeros(table[0].numel(), table.shape[0]) if table is not None and needed else None
    bias, grad_bias, number = None, None, -1
    for box, views, (turns_key, turns_value) in pieces:
        q, k, v, g, p, s, dk, row = buffers.of(box)
        if box.unit != number:
            if grad_table is not None and grad_bias is not None:
                tiling.add_table_gradient(tiling.units[number], grad_bias, grad_table)
            number, bias = box.unit, tiling.bias(tiling.units[box.unit], table, q)
            grad_bias = None if grad_table is None or bias is None else torch.zeros_like(bias)
        _load(q, query, views[0]).mul_(ctx.scale)
        _load(k, key, views[1])
        _load(v, value, views[2])
        _load(g, grad_out, views[3])
        torch.bmm(q, k.transpose(1, 2), out=s)
        if bias is not None:
            _by_head(s, box).add_(_select(bias, box))
        torch.softmax(s, -1, out=p)
        softmax_backward(torch.bmm(g, v.transpose(1, 2), out=s), p)  # from here on s is the gradient of the scores
        if ctx.with_lse:
            s.addcmul_(p, _load(row, tensors[7], views[7]))
        if grad_bias is not None:
            _select(grad_bias, box).add_(_by_head(s, box).sum(0))
        _add(grad_value, torch.bmm(p.transpose(1, 2), g, out=v), turns_value)
        _add(grad_key, torch.bmm(s.transpose(1, 2), q, out=dk), turns_key)
        _store(grad_query, torch.bmm(s, k, out=q).mul_(ctx.scale), views[4])
    if grad_table is not None and rpb is not None:
        if grad_bias is not None:
            tiling.add_table_gradient(tiling.units[number], grad_bias, grad_table)
        grad_table = grad_table.t().reshape(rpb.shape).to(rpb.dtype)
    kind = query.dtype
    return grad_query.to(kind), grad_key.to(kind), grad_value.to(kind), grad_table


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of all to all under a mask (1, rows, keys): the best form for a map not much larger than the window."""
    heads, groups = query.shape[-2], key.shape[-2]
    rows = torch.unflatten(query.flatten(1, -3), -2, (groups, heads // groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    keys, values = (x.flatten(1, -3).transpose(1, 2) for x in (key, value))
    out = scaled_dot_product(rows, keys, values, mask if mask is None else mask[None], scale)
    out = torch.unflatten(out, 2, (heads // groups, rows.shape[2] // (heads // groups)))  # (B, G, R, N, V)
    return out.permute(0, 3, 1, 2, 4).reshape(*query.shape[:-1], value.shape[-1])


def neighborhood_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: Sequence[Axis],
    scale: float,
    rpb: Tensor | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of every query to its own window, on tiles.

    Args:
        query: (B, *S, H, D).
        key: (B, *S, G, D).
        value: (B, *S, G, V).
        axes: The settings of each spatial axis.
        scale: Factor of the scores.
        rpb: (H, *(2 * kernel - 1)) relative position bias, added to the scaled scores, or None.
        with_lse: Whether to compute the log-sum-exp.

    Returns:
        (B, *S, H, V), and with `with_lse` the natural log-sum-exp (B, *S, H), else None.
    """
    axes, (batch, *sizes, heads, width), groups = tuple(axes), query.shape, key.shape[-2]
    with without_autocast(query.device):
        if rpb is None and not with_lse:
            tiling = tiling_of(tuple(sizes), axes, batch, groups, heads // groups, width)
            if tiling.whole is not None:
                return _dense(query, key, value, tiling.bias(tiling.whole, None, query.new_empty(0)), scale), None
        if query.device.type != "cpu" and not with_lse and fits(query, key, axes):
            return neighborhood_gathered(query, key, value, axes, scale, rpb), None
        out, lse = TiledAttention.apply(query, key, value, rpb, axes, scale, with_lse)
    return out, lse if with_lse else None
