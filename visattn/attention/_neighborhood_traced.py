"""Neighbourhood attention on overlapping tiles as one straight line of tensor operations, for compilers and export.

The same tiles as `_neighborhood_tiles`, but all at once, with one mask for all of them and index tensors in place of
strided views. No loop depends on a size, and no dimension that depends on one is split or merged with a constant, since
such a reshape asks about divisibility: sizes may be symbolic. It takes more memory.

Legend: B batch, *S spatial sizes, N positions, H query heads, G key heads, R = H / G, D head dim of query and key, V
head dim of value, T tiles over all axes and dilation groups, q queries and k keys of a tile.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visattn.attention._backend import scaled_dot_product, scaled_dot_product_lse
from visattn.attention._neighborhood_windows import Axis, limits
from visattn.attention._precision import without_autocast

# Queries of a tile along each axis, by rank, before they are rounded up to whole stride groups.
TILE = {1: 32, 2: 8, 3: 4}


class Cut(NamedTuple):
    """How one axis is cut.

    Attributes:
        queries: of a tile.
        keys: of a tile.
        tiles: of a dilation group; maybe symbolic, as is `longest`.
        longest: members of the longest dilation group.
    """

    queries: int
    keys: int
    tiles: int
    longest: int

    @classmethod
    def of(cls, length: int, axis: Axis, rank: int) -> "Cut":
        queries = math.ceil(TILE[rank] / axis.stride) * axis.stride
        # A short dilation group may begin one key before a long one, which shows if the tile is a single stride group.
        keys = queries - axis.stride + axis.kernel + (axis.dilation > 1 and queries == axis.stride)
        longest = (length + axis.dilation - 1) // axis.dilation
        return cls(queries, keys, (longest + queries - 1) // queries, longest)


class Tiles(NamedTuple):
    """All tiles of a map.

    Attributes:
        query: (T, q) positions of the queries in the flattened map; beyond the end a query of the tile's group again.
        key: (T, k) positions of the keys, in range even where masked.
        seen: (T, q, k) bool.
        offset: (T, q, k) index into the flattened table of relative positions, in range.
    """

    query: Tensor
    key: Tensor
    seen: Tensor
    offset: Tensor


def tiles_of(sizes: Sequence[int], axes: Sequence[Axis], cuts: Sequence[Cut], device: torch.device) -> Tiles:
    """The tiles of a map that is cut like that."""
    count = math.prod([cut.tiles * axis.dilation for cut, axis in zip(cuts, axes, strict=True)])
    # A symbolic number that might be 1 puts a condition on the sizes; one tile more, a copy of the first, avoids it.
    tile = torch.arange(count + int(isinstance(count, torch.SymInt)), device=device)
    row = torch.arange(math.prod([cut.queries for cut in cuts]), device=device)
    column = torch.arange(math.prod([cut.keys for cut in cuts]), device=device)
    query = key = offset = torch.zeros((), dtype=torch.int64, device=device)
    seen = torch.ones((), dtype=torch.bool, device=device)
    step, table = 1, 1
    for length, axis, cut in reversed([*zip(sizes, axes, cuts, strict=True)]):  # the last axis varies fastest
        number, tile = tile % (cut.tiles * axis.dilation), tile // (cut.tiles * axis.dilation)
        (i, row), (j, column) = (row % cut.queries, row // cut.queries), (column % cut.keys, column // cut.keys)
        group, first = (number // cut.tiles)[:, None], (number % cut.tiles * cut.queries)[:, None]  # (T, 1)
        members = ((length - group + axis.dilation - 1) // axis.dilation).clamp(min=1)
        x = torch.minimum(first + i, members - 1)  # (T, q)
        lead = axis.stride - axis.kernel if axis.causal else axis.stride // 2 - axis.kernel // 2
        index = (first + lead).clamp(max=cut.longest - cut.keys).clamp(min=0) + j  # (T, k)
        low, high = limits(x, members, axis)
        index_of_key = index[:, None, :]
        seen = seen & (index_of_key >= low[..., None]) & (index_of_key < high[..., None])
        offset = offset + table * (index_of_key - x[..., None] + axis.kernel - 1).clamp(0, 2 * axis.kernel - 2)
        query = query + step * (group + axis.dilation * x).clamp(max=length - 1)
        key = key + step * (group + axis.dilation * index).clamp(max=length - 1)
        step, table = step * length, table * (2 * axis.kernel - 1)
    return Tiles(query, key, seen, offset)


def places_of(
    sizes: Sequence[int], axes: Sequence[Axis], cuts: Sequence[Cut], device: torch.device
) -> tuple[Tensor, Tensor]:
    """For every position (N,) the tile and the row in which it is a query."""
    position = torch.arange(math.prod(sizes), device=device)
    tile = row = torch.zeros((), dtype=torch.int64, device=device)
    tiles = rows = 1
    for length, axis, cut in reversed([*zip(sizes, axes, cuts, strict=True)]):
        at, position = position % length, position // length
        x = at // axis.dilation
        tile = tile + tiles * (at % axis.dilation * cut.tiles + x // cut.queries)
        row = row + rows * (x % cut.queries)
        tiles, rows = tiles * cut.tiles * axis.dilation, rows * cut.queries
    return tile, row


def neighborhood_traced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: Sequence[Axis],
    scale: float,
    rpb: Tensor | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `neighborhood_tiles`; arguments and results are the same."""
    batch, sizes, heads, groups = query.shape[0], query.shape[1:-2], query.shape[-2], key.shape[-2]
    repeat = heads // groups
    cuts = [Cut.of(size, axis, len(sizes)) for size, axis in zip(sizes, axes, strict=True)]
    tiles = tiles_of(sizes, axes, cuts, query.device)

    def gather(x: Tensor, index: Tensor) -> Tensor:
        """(B, *S, heads, c) -> (T, B * G, R * tokens, c)."""
        x = torch.unflatten(x.flatten(1, -3)[:, index], -2, (groups, x.shape[-2] // groups))  # (B, T, tokens, G, R, c)
        return x.permute(1, 0, 3, 4, 2, 5).flatten(3, 4).flatten(1, 2)

    q, k, v = gather(query, tiles.query), gather(key, tiles.key), gather(value, tiles.key)
    mask = torch.zeros_like(tiles.seen, dtype=q.dtype).masked_fill(~tiles.seen, -torch.inf)
    mask = mask.repeat(1, repeat, 1).unsqueeze(1)  # (T, 1, R * q, k)
    if rpb is not None:
        bias = torch.unflatten(rpb.to(q.dtype).flatten(1)[:, tiles.offset], 0, (groups, repeat))  # (G, R, T, q, k)
        bias = bias.permute(2, 0, 1, 3, 4).flatten(2, 3)  # (T, G, R * q, k)
        mask = (mask + bias).unsqueeze(1).expand(-1, batch, -1, -1, -1).flatten(1, 2)  # (T, B * G, R * q, k)
    with without_autocast(query.device):
        if with_lse:
            out, lse = scaled_dot_product_lse(q, k, v, mask, scale)
        else:
            out, lse = scaled_dot_product(q, k, v, mask, scale), None
    tile, row = places_of(sizes, axes, cuts, query.device)

    def scatter(x: Tensor) -> Tensor:
        """(T, B * G, R * q, c) -> (B, *S, H, c)."""
        x = torch.unflatten(torch.unflatten(x, 2, (repeat, x.shape[2] // repeat)), 1, (batch, groups))
        x = x[tile, :, :, :, row]  # (N, B, G, R, c)
        return torch.unflatten(x.flatten(2, 3).transpose(0, 1), 1, sizes)

    return scatter(out), None if lse is None else scatter(lse.unsqueeze(-1)).squeeze(-1)
