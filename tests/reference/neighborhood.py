"""Generalised neighbourhood attention by its definition, one query at a time, in float64 and plain Python.

Written from the definition alone: nothing is shared with the package. Arrays are (B, *S, heads, channels).
"""

import itertools
import math

import numpy as np


def keys_of(position, length, kernel, stride, dilation, causal):
    """Positions along one axis that the query at `position` attends to."""
    group = [p for p in range(length) if p % dilation == position % dilation]
    x, n = group.index(position), len(group)
    if causal:
        leader = min(x // stride * stride + stride - 1, n - 1)
        return [p for j, p in enumerate(group) if leader - kernel < j <= x]
    leader = min(x // stride * stride + stride // 2, n - 1)
    if n <= kernel:
        return group
    start = leader - kernel // 2
    while start < 0:
        start += 1
    while start + kernel > n:
        start -= 1
    return group[start : start + kernel]


def attention(query, key, value, kernel, stride, dilation, causal, scale=None, rpb=None):
    """(out, lse) of arrays query (B, *S, H, D), key (B, *S, G, D), value (B, *S, G, V)."""
    query, key, value = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    sizes, heads = query.shape[1:-2], query.shape[-2]
    repeat = heads // key.shape[-2]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    out, lse = np.zeros((*query.shape[:-1], value.shape[-1])), np.zeros(query.shape[:-1])
    windows = [
        [keys_of(p, size, *settings) for p in range(size)]
        for size, *settings in zip(sizes, kernel, stride, dilation, causal, strict=True)
    ]
    for batch, *place, head in np.ndindex(*query.shape[:-1]):
        scores, values = [], []
        for other in itertools.product(*(window[p] for window, p in zip(windows, place, strict=True))):
            score = scale * float(query[(batch, *place, head)] @ key[(batch, *other, head // repeat)])
            if rpb is not None:
                offsets = ((o - p) // d + k - 1 for o, p, d, k in zip(other, place, dilation, kernel, strict=True))
                score += float(rpb[(head, *offsets)])
            scores.append(score)
            values.append(value[(batch, *other, head // repeat)])
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        out[(batch, *place, head)] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        lse[(batch, *place, head)] = top + math.log(sum(weights))
    return out, lse
