"""Neighbourhood attention on overlapping tiles: dense products per tile instead of a gather per query.

A piece (a box of `_neighborhood_plan`) is copied from strided, overlapping views into buffers that stay in the cache,
computed, and written back. Backward copies the pieces again: nothing but the arguments is kept.

Legend: B batch, *S spatial sizes, H query heads, G key heads, R = H / G query heads per key head, D head dim of query
and key, V head dim of value; in a piece N tiles times key heads, `rows` (R times the queries of a tile) and `keys`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from visattn.attention._backend import scaled_dot_product, scaled_dot_product_lse, softmax_backward
from visattn.attention._neighborhood_plan import Box, Layout, Run, Unit, View, boxes_of, turns_of, units_of, view_of
from visattn.attention._neighborhood_windows import Axis
from visattn.attention._precision import without_autocast

# Scores of one piece, for each thread: its buffers then stay within a core's second-level cache.
PIECE_SCORES = 1 << 17
# Masks with more elements are made anew in every call.
KEPT_MASKS = 1 << 19


def _spread(table: Tensor, number: int, rank: int) -> Tensor:
    """(queries, keys) of one axis, shaped to combine with the other axes into (*queries, *keys)."""
    shape = [1] * (2 * rank)
    shape[number], shape[rank + number] = table.shape
    return table.view(shape)


def _seen(unit: Unit, device: torch.device) -> Tensor | None:
    """Whether a query sees a key, (queries, keys), or None where every query sees every key."""
    rank, seen = len(unit.runs), None
    for number, run in enumerate(unit.runs):
        if run.masked:
            limits = torch.tensor(run.bounds, device=device)
            keys = torch.arange(run.keys, device=device)
            mask = _spread((keys >= limits[:, :1]) & (keys < limits[:, 1:]), number, rank)
            seen = mask if seen is None else seen & mask
    if seen is None:
        return None
    sizes = [run.queries for run in unit.runs] + [run.keys for run in unit.runs]
    return seen.expand(sizes).reshape(unit.queries, unit.keys)


def _offsets(run: Run, axis: Axis, device: torch.device) -> Tensor:
    """(queries, keys): key index - query index + kernel - 1, the index into a table of relative positions."""
    query = torch.arange(run.queries, device=device)[:, None] + run.query_start
    key = torch.arange(run.keys, device=device) + run.key_start
    return (key - query + axis.kernel - 1).clamp(0, 2 * axis.kernel - 2)  # what lies outside is masked


class Piece(NamedTuple):
    """A box, its views of the tensors, and for those that collect overlapping tiles the turns in which to add them."""

    box: Box
    views: tuple[View, ...]
    turns: tuple[list[tuple[View, View]], ...]


class Program:
    """What is computed for one layout of the arguments, and the masks that it needs.

    Args:
        layouts: Of the tensors; the first is the query, the second the key.
        sides: For each tensor "q" or "k" (over queries or keys), or "+" for one over the keys that collects tiles.
        axes: Settings of each axis.
        most: Scores that a piece may hold, if more than one tile has.
    """

    def __init__(self, layouts: tuple[Layout, ...], sides: str, axes: tuple[Axis, ...], most: int) -> None:
        (batch, *sizes, heads, width), groups = layouts[0][0], layouts[1][0][-2]
        self.axes, self.repeat = axes, heads // groups
        self.units = units_of(tuple(sizes), axes, width, batch * heads, PIECE_SCORES)
        self.pieces = []
        for box in boxes_of(self.units, batch, groups, self.repeat, most):
            unit = self.units[box.unit]
            views = tuple(view_of(layout, box, unit, axes, side) for layout, side in zip(layouts, sides, strict=True))
            turns = tuple(turns_of(view, unit) for view, side in zip(views, sides, strict=True) if side == "+")
            self.pieces.append(Piece(box, views, turns))
        self._small = sum(unit.queries * unit.keys for unit in self.units) <= KEPT_MASKS
        self._kept: dict[tuple[Any, ...], Tensor | None] = {}

    def _keep(self, make: Callable[[int, Tensor], Tensor | None], number: int, like: Tensor) -> Tensor | None:
        place = (make.__name__, number, like.device, like.dtype)
        if place in self._kept:
            return self._kept[place]
        made = make(number, like)
        if self._small and type(made) in (Tensor, type(None)):  # no fake or functional tensor outlives its context
            self._kept[place] = made
        return made

    def _mask(self, number: int, like: Tensor) -> Tensor | None:
        """0 where a row sees a key, else -inf: (1, rows, keys)."""
        seen = _seen(self.units[number], like.device)
        if seen is None:
            return None
        mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -math.inf)
        return mask.repeat(1, self.repeat, 1)

    def _index(self, number: int, like: Tensor) -> Tensor:
        """For every query and key of a tile the place in the flattened table of relative positions."""
        unit, rank = self.units[number], len(self.axes)
        index = torch.zeros((), dtype=torch.int64, device=like.device)
        for place, (run, axis) in enumerate(zip(unit.runs, self.axes, strict=True)):
            index = index * (2 * axis.kernel - 1) + _spread(_offsets(run, axis, like.device), place, rank)
        return index.reshape(-1)

    def bias(self, number: int, table: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to the scores of a unit's tiles, (G or 1, rows, keys): the mask and the position bias."""
        mask = self._keep(self._mask, number, like)
        if table is None:
            return mask
        unit, index = self.units[number], self._keep(self._index, number, like)
        bias = table.flatten(1)[:, index].view(-1, self.repeat * unit.queries, unit.keys)
        return bias if mask is None else bias + mask

    def table_gradient(self, number: int, grad: Tensor) -> Tensor:
        """From the gradient of a unit's bias (G, rows, keys) that of the table, by a one-hot product per axis."""
        unit, rank = self.units[number], len(self.axes)
        grad = grad.view(-1, *(run.queries for run in unit.runs), *(run.keys for run in unit.runs))
        grad = grad.permute(0, *(1 + side * rank + place for place in range(rank) for side in range(2)))
        for run, axis in zip(unit.runs, self.axes, strict=True):  # (H, q, k, rest) -> (H, rest, 2 * kernel - 1)
            onehot = F.one_hot(_offsets(run, axis, grad.device).flatten(), 2 * axis.kernel - 1).to(grad.dtype)
            grad = torch.tensordot(grad.flatten(1, 2), onehot, dims=([1], [0]))
        return grad


@functools.lru_cache(maxsize=64)
def _program(layouts: tuple[Layout, ...], sides: str, axes: tuple[Axis, ...], most: int) -> Program:
    return Program(layouts, sides, axes, most)


def program_of(tensors: Sequence[Tensor], sides: str, axes: tuple[Axis, ...]) -> Program:
    """The program for these tensors; those used last are kept, since every layer asks again at every step."""
    workers = torch.get_num_threads() if tensors[0].device.type == "cpu" else 4096
    layouts = tuple((tuple(x.shape), x.stride()) for x in tensors)
    return _program(layouts, sides, axes, PIECE_SCORES * workers)


class Buffers:
    """Memory that every piece uses again: fresh pages would cost more than the copies into them.

    Args:
        program: Its pieces.
        like: A tensor of the device.
        dtype: Of the buffers.
        widths: Of each buffer the rows, "q" or "k", and the channels; 0 stands for the keys of a tile.
    """

    def __init__(self, program: Program, like: Tensor, dtype: torch.dtype, *widths: tuple[str, int]) -> None:
        self._widths = widths
        counts = [0] * len(widths)
        for piece in program.pieces:
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
        program = program_of(tensors, "qkkqq"[: len(tensors)], axes)
        buffers = Buffers(program, query, query.dtype, ("q", width), ("k", width), ("k", deep))
        table, bias, unit = None if rpb is None else rpb.to(query.dtype), None, -1
        for box, views, _ in program.pieces:
            q, k, v = buffers.of(box)
            if box.unit != unit:
                unit, bias = box.unit, program.bias(box.unit, table, q)
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
    program = program_of(tensors, "qkkqq++q"[: len(tensors)], ctx.axes)
    widths = (("q", width), ("k", width), ("k", deep), ("q", deep), ("q", 0), ("q", 0), ("k", width), ("q", 1))
    buffers = Buffers(program, query, precise, *widths)
    table = None if rpb is None else rpb.to(precise)
    grad_table = None if table is None else torch.zeros_like(table)
    bias, grad_bias, unit = None, None, -1
    for box, views, (turns_key, turns_value) in program.pieces:
        q, k, v, g, p, s, dk, row = buffers.of(box)
        if box.unit != unit:
            if grad_table is not None and grad_bias is not None:
                grad_table += program.table_gradient(unit, grad_bias)
            unit, bias = box.unit, program.bias(box.unit, table, q)
            grad_bias = None if table is None or bias is None else torch.zeros_like(bias)
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
            grad_table += program.table_gradient(unit, grad_bias)
        grad_table = grad_table.to(rpb.dtype)
    kind = query.dtype
    return grad_query.to(kind), grad_key.to(kind), grad_value.to(kind), grad_table


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
    with without_autocast(query.device):
        out, lse = TiledAttention.apply(query, key, value, rpb, tuple(axes), scale, with_lse)
    return out, lse if with_lse else None
