"""Neighbourhood attention on overlapping tiles as one straight line of tensor operations, for compilers and export.

The same tiles as `_neighborhood_tiles`, but all at once, with one mask for all of them and index tensors in place of
strided views: no loop and no condition depends on a size, so sizes may be symbolic. It takes more memory.

Legend: B batch, *S spatial sizes, H query heads, G key heads, R = H / G, D head dim of query and key, V head dim of
value, T tiles over all axes and dilation groups, q queries and k keys of a tile.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visattn.attention._backend import scaled_dot_product, scaled_dot_product_lse
from visattn.attention._neighborhood_windows import Axis, limits
from visattn.attention._precision import without_autocast

# Queries of a tile along each axis, by rank, before they are rounded up to whole stride groups.
TILE = {1: 32, 2: 8, 3: 4}


class _Cut(NamedTuple):
    """One axis, cut into tiles.

    Attributes:
        query: (tiles, q) positions of the queries; what lies beyond the end repeats a query of the tile's group.
        key: (tiles, k) positions of the keys, in range even where masked.
        seen: (tiles, q, k) bool.
        offset: (tiles, q, k) index into a table of relative positions, in range.
        place: (length,) where a position's query is in the flattened `query`.
    """

    query: Tensor
    key: Tensor
    seen: Tensor
    offset: Tensor
    place: Tensor


def _cut(length: int, axis: Axis, tile: int, device: torch.device) -> _Cut:
    kernel, stride, dilation, causal = axis
    tile = -(-tile // stride) * stride
    # A short dilation group may begin one key earlier than a long one, which shows when the tile is one stride group.
    keys = tile - stride + kernel + (1 if dilation > 1 and tile == stride else 0)
    longest = (length + dilation - 1) // dilation
    count = (longest + tile - 1) // tile
    group = torch.arange(dilation, device=device)[:, None, None]  # (D, 1, 1)
    members = (length - group + dilation - 1) // dilation
    first = torch.arange(count, device=device)[:, None] * tile  # (tiles of a group, 1)
    lead = stride - kernel if causal else stride // 2 - kernel // 2
    start = (first + lead).clamp(max=longest - keys).clamp(min=0)
    x = torch.minimum(first + torch.arange(tile, device=device), members - 1).clamp(min=0)  # (D, tiles, q)
    key = start + torch.arange(keys, device=device)  # (tiles, k)
    query = (group + dilation * x).clamp(max=length - 1)
    _, low, high = (table[query] for table in limits(length, axis, device))  # (D, tiles, q)
    index = key[:, None, :]
    seen = (index >= low[..., None]) & (index < high[..., None])  # (D, tiles, q, k)
    offset = (index - x[..., None] + kernel - 1).clamp(0, 2 * kernel - 2)
    position = (group + dilation * key).clamp(max=length - 1)  # (D, tiles, k)
    every = torch.arange(length, device=device)
    place = (every % dilation) * (count * tile) + every // dilation
    return _Cut(query.flatten(0, 1), position.flatten(0, 1), seen.flatten(0, 1), offset.flatten(0, 1), place)


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
    rank, repeat = len(sizes), heads // groups
    cuts = [_cut(size, axis, TILE[rank], query.device) for size, axis in zip(sizes, axes, strict=True)]

    def tiles_of(x: Tensor, indices: list[Tensor]) -> Tensor:
        """(B, *S, heads, c) -> (T, B * G, rows of a tile, c)."""
        for number, index in enumerate(indices):
            x = torch.unflatten(x.index_select(1 + 2 * number, index.flatten()), 1 + 2 * number, index.shape)
        # (B, t1, n1, t2, n2, .., heads, c) -> (t1, t2, .., B, G, R, n1, n2, .., c)
        x = torch.unflatten(x, -2, (groups, x.shape[-2] // groups))
        tiles, tokens = [1 + 2 * number for number in range(rank)], [2 + 2 * number for number in range(rank)]
        x = x.permute(*tiles, 0, 2 * rank + 1, 2 * rank + 2, *tokens, 2 * rank + 3)
        return x.flatten(rank + 2, -2).flatten(0, rank - 1).flatten(1, 2)

    q = tiles_of(query, [cut.query for cut in cuts])
    k = tiles_of(key, [cut.key for cut in cuts])
    v = tiles_of(value, [cut.key for cut in cuts])

    def spread(table: Tensor, number: int) -> Tensor:
        """(tiles, q, k) of one axis -> (t1, .., q1, .., k1, ..) with size 1 elsewhere."""
        shape = [1] * (3 * rank)
        shape[number], shape[rank + number], shape[2 * rank + number] = table.shape
        return table.reshape(shape)

    seen, index = spread(cuts[0].seen, 0), spread(cuts[0].offset, 0)
    for number, cut in enumerate(cuts[1:], 1):
        seen = seen & spread(cut.seen, number)
        index = index * (2 * axes[number].kernel - 1) + spread(cut.offset, number)

    def fold(table: Tensor) -> Tensor:
        """(t1, .., q1, .., k1, ..) -> (T, q, k)."""
        return table.flatten(2 * rank).flatten(rank, 2 * rank - 1).flatten(0, rank - 1)

    seen = fold(seen)
    mask = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    mask = mask.repeat(1, repeat, 1).unsqueeze(1)  # (T, 1, R * q, k)
    if rpb is not None:
        bias = rpb.to(q.dtype).flatten(1)[:, fold(index)]  # (H, T, q, k)
        bias = torch.unflatten(bias, 0, (groups, repeat)).permute(2, 0, 1, 3, 4).flatten(2, 3)  # (T, G, R * q, k)
        mask = (mask + bias).unsqueeze(1).expand(-1, batch, -1, -1, -1).flatten(1, 2)  # (T, B * G, R * q, k)
    with without_autocast(query.device):
        if with_lse:
            out, lse = scaled_dot_product_lse(q, k, v, mask, scale)
        else:
            out, lse = scaled_dot_product(q, k, v, mask, scale), None

    def map_of(x: Tensor) -> Tensor:
        """(T, B * G, R * q, c) -> (B, *S, H, c)."""
        x = torch.unflatten(torch.unflatten(x, 0, [cut.query.shape[0] for cut in cuts]), rank, (batch, groups))
        x = torch.unflatten(
            x, rank + 2, (repeat, *(cut.query.shape[1] for cut in cuts))
        )  # (t1, .., B, G, R, q1, .., c)
        order = [rank] + [place for number in range(rank) for place in (number, rank + 3 + number)]
        x = x.permute(*order, rank + 1, rank + 2, 2 * rank + 3).flatten(-3, -2)  # (B, t1, q1, .., H, c)
        for number, cut in enumerate(cuts):
            x = x.flatten(1 + number, 2 + number).index_select(1 + number, cut.place)
        return x

    return map_of(out), None if lse is None else map_of(lse.unsqueeze(-1)).squeeze(-1)
