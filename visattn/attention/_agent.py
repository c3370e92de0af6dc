"""What all forms of agent attention share: agents, bias tables that fit any map, and the two softmax steps.

Legend: B batch, *S spatial axes with N positions in all, C channels, h heads, d channels of a head, n agents,
M keys (N, or fewer after reduction).
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention._backend import launch_bound, scaled_dot_product
from visattn.attention._precision import exact
from visattn.attention._resample import KEPT, kept, linear_weights, resize_linear
from visattn.attention._windows import certain, regroup

TABLE_SIDE = 7  # an_bias and na_bias are stored on a 7 x 7 grid whatever the map
AXES = "dhw"  # names of the last one, two or three axes


def register_tables(
    module: nn.Module, heads: int, agents: int, query_size: Sequence[int], key_size: Sequence[int]
) -> None:
    """Give `module` the official bias tables, drawn from a truncated normal of std 0.02.

    In 2-D: an_bias, na_bias (h, n, 7, 7); ah_bias (1, h, n, H, 1), aw_bias (1, h, n, 1, W) for the keys; ha_bias
    (1, h, H, 1, n), wa_bias (1, h, 1, W, n) for the queries. In 1-D there is no H, in 3-D a D stands before it.
    """
    rank = len(query_size)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("an_bias", "na_bias"):
        shapes[name] = (heads, agents, *(TABLE_SIDE,) * rank)
    for axis, letter in enumerate(AXES[-rank:]):
        key = [1] * rank
        key[axis] = key_size[axis]
        shapes[f"a{letter}_bias"] = (1, heads, agents, *key)
    for axis, letter in enumerate(AXES[-rank:]):
        query = [1] * rank
        query[axis] = query_size[axis]
        shapes[f"{letter}a_bias"] = (1, heads, *query, agents)
    for name, shape in shapes.items():
        parameter = nn.Parameter(torch.empty(shape))
        nn.init.trunc_normal_(parameter, std=0.02)
        module.register_parameter(name, parameter)


def resize_agents(table: Tensor, stored: Sequence[int], used: Sequence[int]) -> Tensor:
    """`table` (h, n, ...) for agents on the grid `used` instead of `stored`."""
    if tuple(stored) == tuple(used):
        return table
    resized = resize_linear(table.reshape(table.shape[0], *stored, -1), used)
    return resized.reshape(table.shape[0], -1, *table.shape[2:])


def table_bias(grid: Tensor, lines: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The bias (h, n, positions of the map): `grid` resized, plus one value per axis.

    Rows of an interpolation matrix sum to 1, so the values of an axis are added as soon as that axis has its final size
    and travel through the remaining axes unchanged. Nothing but the result is as large as the map.

    Args:
        grid: (h, n, 7, ..., 7).
        lines: One (h, n, stored size) per spatial axis.
        weights: The matrix (size, 7) that resizes an axis of `grid` to the map, per axis.
    """
    heads, agents = grid.shape[:2]
    last = len(weights) - 1
    bias = grid.flatten(2)[..., None]  # (h, n, rows still on the grid, positions already final)
    for axis in range(last, -1, -1):
        size = weights[axis].shape[0]
        line = lines[axis]
        if not certain(line.shape[-1] == size):
            line = torch.matmul(line, linear_weights(line.shape[-1], size, line).mT)  # (h, n, size)
        if axis == last:
            bias = torch.matmul(regroup(bias, (heads, agents, TABLE_SIDE**axis, TABLE_SIDE)), weights[axis].mT)
            bias = bias.add_(line[:, :, None])  # (h, n, rows, size)
        else:
            rows, done = TABLE_SIDE**axis, bias.shape[-1]
            bias = torch.matmul(weights[axis], regroup(bias, (heads * agents * rows, TABLE_SIDE, done)))
            bias = regroup(bias, (heads, agents, rows, size, done)).add_(line[:, :, None, :, None])
            bias = regroup(bias, (heads, agents, rows, size * done))
    return bias[:, :, 0]


def _entries(tables: Sequence[Tensor], size: Sequence[int]) -> int:
    """Entries of the matrix `_place_weights`, roughly."""
    return math.prod(size) * sum([TABLE_SIDE ** len(size), *(each.shape[-1] for each in tables[1:])])


def _first_bias(tables: Sequence[Tensor], size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """B1 (h, n, M) as one product: `tables` are the grid, the lines and the class token. Rows start aligned."""
    heads, agents = tables[0].shape[:2]
    joined = torch.cat([tables[0].flatten(2), *tables[1:]], dim=-1).flatten(0, 1)
    places, tokens = _places(tables, size)
    return torch.mm(joined, places).to(dtype).view(heads, agents, -1)[..., :tokens]


def _second_bias(tables: Sequence[Tensor], size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """B2 (h, n, N) likewise; agents are next to each other in memory, as the keys of the second step."""
    heads, agents = tables[0].shape[:2]
    joined = torch.cat([each.flatten(2).permute(2, 0, 1) for each in tables]).flatten(1)
    places, tokens = _places(tables, size)
    return torch.mm(places.mT[:tokens], joined).to(dtype).view(-1, heads, agents).permute(1, 2, 0)


def _places(tables: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, int]:
    """`_place_weights` for `tables` and a map of `size`, and how many of its columns are tokens."""
    lines = tuple(each.shape[-1] for each in tables[1 : len(size) + 1])
    token = len(tables) > len(size) + 1
    return kept(_place_weights, tables[0], lines, tuple(size), token), math.prod(size) + token


def _place_weights(lines: tuple[int, ...], size: tuple[int, ...], token: bool, like: Tensor) -> Tensor:
    """The matrix that makes a bias at each place of a map of what the tables hold for one agent.

    Its rows are the grid's entries, those of each line, of the sizes `lines`, and the class token. Its columns are the
    class token, the positions, and zeros up to a multiple of 8, which fused attention wants rows to be.
    """
    grid = [linear_weights(TABLE_SIDE, each, like) for each in size]
    rows = [functools.reduce(torch.kron, grid).mT]
    for axis, (stored, each) in enumerate(zip(lines, size, strict=True)):
        before, after = math.prod(size[:axis]), math.prod(size[axis + 1 :])
        rows.append(linear_weights(stored, each, like).mT.repeat_interleave(after, 1).repeat(1, before))
    weights = torch.cat(rows)
    if token:
        weights = F.pad(weights, (1, 0, 0, 1))
        weights[-1, 0] = 1
    return F.pad(weights, (0, -weights.shape[1] % 8))


def biases(
    module: nn.Module,
    query_size: Sequence[int],
    key_size: Sequence[int],
    grid: tuple[Sequence[int], Sequence[int]],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """B1 (h, n, M) and B2 (h, n, N), the position biases of the two steps, from the tables of `module`.

    A class token, for which the tables `ac_bias` and `ca_bias` stand, comes before the positions.

    Args:
        module: Holds the tables of `register_tables`.
        query_size: Size of the map of queries.
        key_size: Size of the map of keys.
        grid: The grid of agents that the tables were made for, and the one in use; the tables are resized when these
            differ, as the authors' segmentation code does.
        dtype: What fused attention takes; otherwise the biases are float32 at least.
    """
    rank = len(query_size)
    letters = AXES[-rank:]
    token = hasattr(module, "ac_bias")
    names = ["an", "na", *("ac", "ca") * token, *(name for x in letters for name in (f"a{x}", f"{x}a"))]
    # By attribute: replicas of DataParallel, and what torch's parametrizations compute, are no parameters of a module.
    tables: dict[str, Tensor] = {f"{name}_bias": exact(getattr(module, f"{name}_bias")) for name in names}
    # The grid, a line per axis, and the class token: (h, n, 7, ..., 7), (h, n, size), (h, n, 1)
    keys = [tables["an_bias"], *(tables[f"a{letter}_bias"].squeeze(0).flatten(2) for letter in letters)]
    queries = [tables["na_bias"], *(tables[f"{letter}a_bias"].squeeze(0).flatten(1, -2).mT for letter in letters)]
    if token:
        keys.append(tables["ac_bias"].squeeze(0))
        queries.append(tables["ca_bias"].squeeze(0).mT)
    keys, queries = ([resize_agents(each, *grid) for each in group] for group in (keys, queries))
    if launch_bound(keys[0]) and all(_entries(*each) <= KEPT for each in ((keys, key_size), (queries, query_size))):
        return _first_bias(keys, key_size, dtype), _second_bias(queries, query_size, dtype)
    same = all(certain(query == key) for query, key in zip(query_size, key_size, strict=True))
    weights = [linear_weights(TABLE_SIDE, size, keys[0]) for size in key_size]
    first = table_bias(keys[0], keys[1 : rank + 1], weights)
    if not same:
        weights = [linear_weights(TABLE_SIDE, size, queries[0]) for size in query_size]
    second = table_bias(queries[0], queries[1 : rank + 1], weights)
    if token:
        first, second = torch.cat([keys[-1], first], dim=-1), torch.cat([queries[-1], second], dim=-1)
    return first, second


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, h, N, d)."""
    return x.reshape(*x.shape[:2], heads, x.shape[-1] // heads).transpose(1, 2)


def two_steps(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, biases: tuple[Tensor, Tensor], scale: float, drop: float = 0.0
) -> Tensor:
    """Agents gather the values, then hand them to the queries.

    V_A = softmax(scale A K^T + B1) V, out = softmax(scale Q A^T + B2) V_A. Logits and softmax are float32 at least.

    Args:
        q: (..., h, N, d).
        k: (..., h, M, d).
        v: (..., h, M, d).
        agents: (..., h, n, d).
        biases: B1 (h, n, M) and B2 (h, n, N), or with leading axes.
        scale: Factor of the products.
        drop: Probability of attention dropout.

    Returns:
        (..., h, N, d).
    """
    if launch_bound(q):
        ahead = q.shape[:-3]
        q, k, v, agents = (each.flatten(0, -4) for each in (q, k, v, agents))
        first, second = (_mask(each, ahead, q.dtype) for each in (biases[0], biases[1].mT))
        gathered = scaled_dot_product(agents, k, v, first, scale, drop)  # (B, h, n, d)
        return torch.unflatten(scaled_dot_product(q, agents, gathered, second, scale, drop), 0, ahead)
    first, second = agent_weights(q, k, agents, scale, biases)
    if drop:
        first, second = nn.functional.dropout(first, drop), nn.functional.dropout(second, drop)
    gathered = torch.matmul(first.to(v.dtype), v)  # (B, h, n, d)
    return torch.matmul(second.to(v.dtype).mT, gathered)


def _mask(bias: Tensor, ahead: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`bias` (h, ., .), or with leading axes that broadcast to `ahead`, as a mask (1 or prod(ahead), h, ., .)."""
    bias = bias.to(dtype)
    return bias[None] if bias.dim() == 3 else bias.expand(*ahead, *bias.shape[-3:]).flatten(0, -4)


def agent_weights(
    q: Tensor, k: Tensor, agents: Tensor, scale: float, biases: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """softmax(scale A K^T + B1) (..., h, n, M), over keys, and softmax(scale A Q^T + B2) (..., h, n, N), over agents.

    The second logits are kept as (n, N), agents first: B2 then needs no transposed copy.
    """
    q, k, agents = exact(q), exact(k), exact(agents) * scale
    # In place: at full resolution a fresh buffer costs more than the sum.
    first = torch.matmul(agents, k.mT).add_(biases[0])
    second = torch.matmul(agents, q.mT).add_(biases[1])
    return first.softmax(-1), second.softmax(-2)
