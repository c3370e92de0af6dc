"""Neighbourhood attention by its definition: gather the keys of every query, then softmax over them.

Slow (it copies kernel^rank keys for every query) and plain: the other backends are compared with it. It runs in every
floating type, differentiates twice, takes symbolic sizes, and needs nothing but PyTorch.

Legend: B batch, *S spatial sizes, N positions, H query heads, G key heads, R = H / G query heads per key head, D head
dim of query and key, V head dim of value, K keys per query (product of the kernel).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from visattn.attention._neighborhood_windows import Axis, limits


def _tables(length: int, axis: Axis, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For every position of an axis and each of its keys, all (length, kernel).

    Returns:
        The key's position (in range even where there is no such key), whether there is one, and key index - query index
        + kernel - 1, the index into a table of relative positions.
    """
    position = torch.arange(length, device=device)
    x, group = position // axis.dilation, position % axis.dilation
    first, last = limits(x, (length - group + axis.dilation - 1) // axis.dilation, axis)
    key = first[:, None] + torch.arange(axis.kernel, device=device)
    valid = key < last[:, None]
    key = torch.minimum(key, last[:, None] - 1)
    return group[:, None] + axis.dilation * key, valid, key - x[:, None] + axis.kernel - 1


def neighborhood_reference(
    query: Tensor, key: Tensor, value: Tensor, axes: Sequence[Axis], scale: float, rpb: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of every query to its own window.

    Args:
        query: (B, *S, H, D).
        key: (B, *S, G, D).
        value: (B, *S, G, V).
        axes: the settings of each spatial axis.
        scale: factor of the scores.
        rpb: (H, *(2 * kernel - 1)) relative position bias, added to the scaled scores, or None.

    Returns:
        (B, *S, H, V) and the natural logarithm of the softmax denominator, (B, *S, H).
    """
    batch, sizes, heads, groups = query.shape[0], query.shape[1:-2], query.shape[-2], key.shape[-2]
    rank = len(sizes)
    tables = [_tables(size, axis, query.device) for size, axis in zip(sizes, axes, strict=True)]

    def spread(table: Tensor, axis: int) -> Tensor:
        """(length, kernel) of one axis -> (1, .., length, .., 1, 1, .., kernel, .., 1), to combine with the others."""
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = table.shape
        return table.reshape(shape)

    flat, valid = torch.zeros((), dtype=torch.int64, device=query.device), torch.ones((), device=query.device).bool()
    for number, (positions, seen, _) in enumerate(tables):
        flat = flat * sizes[number] + spread(positions, number)  # (*S so far, *K so far)
        valid = valid & spread(seen, number)
    count = flat.shape[rank:].numel()
    flat, valid = flat.reshape(-1), valid.reshape(-1, count)  # (N * K), (N, K)

    tokens = valid.shape[0]
    wide, deep = query.shape[-1], value.shape[-1]
    q = query.reshape(batch, tokens, groups, heads // groups, wide)
    k = key.reshape(batch, tokens, groups, wide)[:, flat].reshape(batch, tokens, count, groups, wide)
    v = value.reshape(batch, tokens, groups, deep)[:, flat].reshape(batch, tokens, count, groups, deep)
    # Half types keep 8 or 11 bits: the scores and the softmax are computed in float32, as every backend does.
    precise = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("bngrd,bnkgd->bngrk", q.to(precise), k.to(precise)) * scale
    if rpb is not None:
        index = torch.zeros((), dtype=torch.int64, device=query.device)
        for number, (_, _, offset) in enumerate(tables):
            index = index * rpb.shape[1 + number] + spread(offset, number)
        bias = rpb.to(precise).flatten(1)[:, index.reshape(-1)].reshape(groups, heads // groups, tokens, count)
        scores = scores + bias.permute(2, 0, 1, 3)
    scores = scores.masked_fill(~valid[:, None, None, :], -torch.inf)
    lse = torch.logsumexp(scores, -1)  # (B, N, G, R)
    out = torch.einsum("bngrk,bnkgv->bngrv", torch.softmax(scores, -1), v.to(precise)).to(query.dtype)
    return out.reshape(batch, *sizes, heads, deep), lse.reshape(batch, *sizes, heads)
