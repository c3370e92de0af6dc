"""What all forms of agent attention share: agents, bias tables that fit any map, and the two softmax steps.

Legend: B batch, *S spatial axes with N positions in all, C channels, h heads, d channels of a head, n agents,
M keys (N, or fewer after reduction).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visattn.attention._resample import linear_weights, resize_linear
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


def biases(
    module: nn.Module, query_size: Sequence[int], key_size: Sequence[int], grid: tuple[Sequence[int], Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """B1 (h, n, M) and B2 (h, n, N), the position biases of the two steps, from the tables of `module`.

    Args:
        module: Holds the tables of `register_tables`.
        query_size: Size of the map of queries.
        key_size: Size of the map of keys.
        grid: The grid of agents that the tables were made for, and the one in use; the tables are resized when these
            differ, as the authors' segmentation code does.
    """
    rank = len(query_size)
    same = all(certain(query == key) for query, key in zip(query_size, key_size, strict=True))
    tables = {name: p.float() if p.dtype.itemsize < 4 else p for name, p in module.named_parameters(recurse=False)}
    weights = [linear_weights(TABLE_SIDE, size, tables["an_bias"]) for size in key_size]
    lines = [tables[f"a{letter}_bias"][0].flatten(2) for letter in AXES[-rank:]]  # (h, n, size)
    first = table_bias(resize_agents(tables["an_bias"], *grid), [resize_agents(each, *grid) for each in lines], weights)
    if not same:
        weights = [linear_weights(TABLE_SIDE, size, tables["na_bias"]) for size in query_size]
    lines = [tables[f"{letter}a_bias"][0].flatten(1, -2).mT for letter in AXES[-rank:]]
    second = table_bias(
        resize_agents(tables["na_bias"], *grid), [resize_agents(each, *grid) for each in lines], weights
    )
    return first, second


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, h, N, d)."""
    return x.reshape(*x.shape[:2], heads, x.shape[-1] // heads).transpose(1, 2)


def two_steps(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, biases: tuple[Tensor, Tensor], drop: float = 0.0
) -> Tensor:
    """Agents gather the values, then hand them to the queries.

    V_A = softmax(A K^T + B1) V, out = softmax(Q A^T + B2) V_A with A already scaled. Logits and softmax are float32 at
    least. The second logits are kept as (n, N), agents first: B2 then needs no transposed copy.

    Args:
        q: (..., h, N, d).
        k: (..., h, M, d).
        v: (..., h, M, d).
        agents: (..., h, n, d), times the scale.
        biases: B1 (h, n, M) and B2 (h, n, N), or with leading axes.
        drop: Probability of attention dropout.

    Returns:
        (..., h, N, d).
    """
    first, second = agent_weights(q, k, agents, biases)
    if drop:
        first, second = nn.functional.dropout(first, drop), nn.functional.dropout(second, drop)
    gathered = torch.matmul(first.to(v.dtype), v)  # (B, h, n, d)
    return torch.matmul(second.to(v.dtype).mT, gathered)


def agent_weights(q: Tensor, k: Tensor, agents: Tensor, biases: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """softmax(A K^T + B1) (..., h, n, M), over the keys, and softmax(A Q^T + B2) (..., h, n, N), over the agents."""
    if agents.dtype.itemsize < 4:
        q, k, agents = q.float(), k.float(), agents.float()
    # In place: at full resolution a fresh buffer costs more than the sum.
    first = torch.matmul(agents, k.mT).add_(biases[0])
    second = torch.matmul(agents, q.mT).add_(biases[1])
    return first.softmax(-1), second.softmax(-2)
