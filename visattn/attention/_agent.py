"""What all forms of agent attention share: agents, bias tables that fit any map, and the two softmax steps.

Every resampling here is separable, so it is written as one small matrix per axis: average pooling to the agents, and
the linear resizing of tables and values. Matrices built from sizes alone stay exact when nothing has to be resized
(they are then the identity), take any rank, need no branch on the size, and cost less on the CPU than pooling and
interpolating whole maps, forward and backward.

Legend: B batch, *S spatial axes with N positions in all, C channels, h heads, d channels of a head, n agents,
M keys (N, or fewer after reduction).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

TABLE_SIDE = 7  # an_bias and na_bias are stored on a 7 x 7 grid whatever the map
AXES = "dhw"  # names of the last one, two or three axes


def linear_weights(source: int, target: int, like: Tensor) -> Tensor:
    """The matrix (target, source) of linear interpolation with half-pixel centres; the identity for equal sizes.

    The same numbers as `F.interpolate(mode="linear", align_corners=False)`: positions beyond the outer centres take the
    edge value.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    at = (torch.arange(target, device=like.device, dtype=dtype) + 0.5) * (source / target) - 0.5
    at = at.clamp(0, source - 1)
    grid = torch.arange(source, device=like.device, dtype=dtype)
    return (1 - (at[:, None] - grid).abs()).clamp(min=0).to(like.dtype)


def average_weights(source: int, target: int, like: Tensor) -> Tensor:
    """The matrix (target, source) of adaptive average pooling; cells overlap and repeat where target > source."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    cell = torch.arange(target, device=like.device)
    start = (cell * source) // target
    end = ((cell + 1) * source + target - 1) // target
    grid = torch.arange(source, device=like.device)
    inside = (grid >= start[:, None]) & (grid < end[:, None])
    return (inside.to(dtype) / (end - start)[:, None].to(dtype)).to(like.dtype)


def along_axes(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`x` (B, *S, C) with the matrix (T_i, S_i) applied along spatial axis i: (B, *T, C)."""
    size = list(x.shape)
    for axis in range(len(weights) - 1, -1, -1):
        rows = 1
        for each in size[: axis + 1]:
            rows = rows * each
        columns = 1
        for each in size[axis + 2 :]:
            columns = columns * each
        x = torch.matmul(weights[axis], x.reshape(rows, size[axis + 1], columns))  # (rows, T_i, columns)
        size[axis + 1] = weights[axis].shape[0]
    return x.reshape(size)


def resize_linear(x: Tensor, size: Sequence[int]) -> Tensor:
    """`x` (B, *S, C) at the spatial `size`, by linear interpolation without anti-aliasing."""
    weights = [linear_weights(old, new, x) for old, new in zip(x.shape[1:-1], size, strict=True)]
    return along_axes(x, weights)


def pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """`x` (B, *S, C) averaged over the cells of a grid of `size`: (B, *size, C)."""
    weights = [average_weights(old, new, x) for old, new in zip(x.shape[1:-1], size, strict=True)]
    return along_axes(x, weights)


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


def table_bias(grid: Tensor, axes: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """The bias (h, n, positions of `size`): `grid` resized, plus one value per axis.

    Rows of an interpolation matrix sum to 1, so the values of an axis are added as soon as that axis has its final size
    and travel through the remaining axes unchanged. Nothing but the result is as large as the map.

    Args:
        grid: (h, n, 7, ..., 7).
        axes: One (h, n, stored size) per spatial axis.
        size: The map's size.
    """
    heads, agents = grid.shape[:2]
    rank = len(size)
    bias = grid.flatten(2)[..., None]  # (h, n, rows still on the grid, positions already final)
    done = 1
    for axis in range(rank - 1, -1, -1):
        rows = TABLE_SIDE**axis
        bias = bias.reshape(heads, agents, rows, TABLE_SIDE, done)
        weights = linear_weights(TABLE_SIDE, size[axis], grid)
        stored = torch.matmul(axes[axis], linear_weights(axes[axis].shape[-1], size[axis], grid).mT)  # (h, n, size)
        if axis == rank - 1:
            bias = torch.matmul(bias[..., 0], weights.mT) + stored[:, :, None]  # (h, n, rows, size)
        else:
            bias = torch.matmul(weights, bias) + stored[:, :, None, :, None]  # (h, n, rows, size, done)
        done = done * size[axis]
    return bias.reshape(heads, agents, done)


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
    tables = {name: p.float() if p.dtype.itemsize < 4 else p for name, p in module.named_parameters(recurse=False)}
    out = []
    for own, names, size in (
        ("an_bias", [f"a{letter}_bias" for letter in AXES[-rank:]], key_size),
        ("na_bias", [f"{letter}a_bias" for letter in AXES[-rank:]], query_size),
    ):
        axes = [tables[name][0] for name in names]
        if own == "na_bias":
            axes = [table.movedim(-1, 1) for table in axes]
        axes = [resize_agents(table.flatten(2), *grid) for table in axes]
        out.append(table_bias(resize_agents(tables[own], *grid), axes, size))
    return out[0], out[1]


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
        q: (B, h, N, d).
        k: (B, h, M, d).
        v: (B, h, M, d).
        agents: (B, h, n, d), times the scale.
        biases: B1 (h, n, M) and B2 (h, n, N), or with a leading axis that broadcasts over B.
        drop: Probability of attention dropout.

    Returns:
        (B, h, N, d).
    """
    first, second = agent_weights(q, k, agents, biases)
    if drop:
        first, second = nn.functional.dropout(first, drop), nn.functional.dropout(second, drop)
    gathered = torch.matmul(first.to(v.dtype), v)  # (B, h, n, d)
    return torch.matmul(second.to(v.dtype).mT, gathered)


def agent_weights(q: Tensor, k: Tensor, agents: Tensor, biases: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """softmax(A K^T + B1) (B, h, n, M), over the keys, and softmax(A Q^T + B2) (B, h, n, N), over the agents."""
    if agents.dtype.itemsize < 4:
        q, k, agents = q.float(), k.float(), agents.float()
    first = torch.matmul(agents, k.mT) + biases[0]
    second = torch.matmul(agents, q.mT) + biases[1]
    return first.softmax(-1), second.softmax(-2)
