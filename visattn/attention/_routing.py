"""The steps of bi-level routing that need no parameters: means of regions, their choice, attention under a mask.

Legend: B batch, *S spatial axes with N tokens, C channels, R regions, T tokens of a region, k chosen regions, h heads,
d channels of a head.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visattn.attention._backend import launch_bound, scaled_dot_product
from visattn.attention._precision import exact, exact_logits
from visattn.attention._resample import KEPT, kept
from visattn.attention._windows import certain, known_zero, window_partition

# The mask is built for so many pairs of tokens of an image at a time, never for all of a large map.
MASK_ENTRIES = 1024**2


class RoutedAttention(NamedTuple):
    """What `BiLevelRoutingAttention.forward_with_attention` returns.

    Attributes:
        out: The block's output, (B, *S, C).
        r_weight: Softmax over the kept logits of every region, (B, R, k).
        r_idx: The chosen regions, best first, (B, R, k).
        attention: Softmaxed attention of every token to the tokens of the regions chosen by its own,
            (B, R, h, T, k * U).
    """

    out: Tensor
    r_weight: Tensor
    r_idx: Tensor
    attention: Tensor


class Windows(NamedTuple):
    """Queries, keys and values in windows, and what the routing and the convolution need besides."""

    q: Tensor  # (B, R, T, Cqk)
    k: Tensor  # (B, R, U, Cqk)
    v: Tensor  # (B, R, U, C)
    value_map: Tensor  # (B, *S, C), S padded in the legacy variant
    means: Tensor  # (B, R, C), of the input
    window: tuple[int, ...]  # tokens per axis of a region
    counts: tuple[int, ...]  # regions per axis


def region_means(windows: Tensor, sizes: Sequence[int], window: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Mean (B, R, C) of the tokens of `windows` (B, R, T, C) that lie inside a map of `sizes`; in float32 at least.

    Args:
        windows: As `window_partition` gives them.
        sizes: The map.
        window: Tokens per axis of a region.
        counts: Regions per axis.
    """
    total = exact(windows).sum(2)
    if known_zero(*(n * w - s for n, w, s in zip(counts, window, sizes, strict=True))):
        return total / math.prod(window)
    return total / window_partition(total.new_ones(1, *sizes, 1), window, counts).sum(2)


def map_means(x: Tensor, window: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The `region_means` (B, R, C) of a map `x` (B, *S, C); where operators are dear, whole regions by a single one."""
    sizes = x.shape[1:-1]
    pairs = list(zip(counts, window, strict=True))
    if not (launch_bound(x) and known_zero(*(n * w - s for (n, w), s in zip(pairs, sizes, strict=True)))):
        return region_means(window_partition(x, window, counts), sizes, window, counts)
    inner = tuple(range(2, 2 * len(sizes) + 1, 2))
    tokens = x.reshape(x.shape[0], *(each for pair in pairs for each in pair), x.shape[-1])  # (B, n1, w1, n2, ..., C)
    return tokens.mean(inner, dtype=torch.promote_types(x.dtype, torch.float32)).flatten(1, -2)


def choose(q: Tensor, k: Tensor, scale: float, topk: int) -> tuple[Tensor, Tensor]:
    """Softmax over the kept logits, and the regions chosen, best first, (B, R, k), by queries and keys (B, R, C)."""
    logits = exact_logits(q, k, scale)  # (B, R, R)
    best, index = logits.topk(min(topk, logits.shape[-1]), dim=-1)
    return best.softmax(-1), index


def region_of(window: Sequence[int], counts: Sequence[int], like: Tensor) -> Tensor:
    """The region of every token of a map of `counts` regions of `window` tokens per axis, both row-major: (N,).

    On the device of `like`.
    """
    small = certain(math.prod(window) * math.prod(counts) <= KEPT)
    sizes = tuple(window), tuple(counts)
    return kept(_region_of, like, *sizes) if small else _region_of(*sizes, like)


def _region_of(window: tuple[int, ...], counts: tuple[int, ...], like: Tensor) -> Tensor:
    region = torch.zeros(1, dtype=torch.long, device=like.device)
    for w, n in zip(window, counts, strict=True):
        region = (region[:, None] * n + torch.arange(n * w, device=like.device) // w).flatten()
    return region


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, regions: tuple[Tensor, Tensor], count: int, scale: float
) -> Tensor:
    """Attention of every token to the tokens of the regions that its own chose.

    Args:
        q: (B, h, N, d).
        k: (B, h, M, d).
        v: (B, h, M, .).
        chosen: The regions chosen by each, (B, R, k).
        regions: The region of every query (N,) and of every key (M,).
        count: Regions R.
        scale: Factor of the logits.

    Returns:
        (B, h, N, .).
    """
    if certain(chosen.shape[-1] == count):
        return scaled_dot_product(q, k, v, None, scale)
    # Additive, as the kernel wants it: a boolean mask would be converted at full size.
    mask = q.new_full((q.shape[0], count, count), -torch.inf).scatter(2, chosen, 0.0)
    mask = mask.index_select(2, regions[1])  # (B, R, M)
    group = max(1, MASK_ENTRIES // k.shape[2])
    parts = zip(torch.split(regions[0], group), torch.split(q, group, dim=2), strict=True)
    outs = [scaled_dot_product(part, k, v, mask.index_select(1, rows)[:, None], scale) for rows, part in parts]
    return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]
