"""Halo attention from its definition: one query and one head at a time, in NumPy. Maps are (B, *S, C), any rank."""

import itertools

import numpy as np


def halo(x, weights, heads, block, halo, dim_head, stride=1, boundary="zero", scale_relative=False, pool=1):
    """Output (B, *T, C) and, for every query, the attention to the positions of the map, by (image, query, head)."""
    rank = x.ndim - 2
    tables = [weights[f"pos_embed.{name}"] for name in ("depth_rel", "height_rel", "width_rel")[-rank:]]
    window = [b + 2 * t for b, t in zip(block, halo, strict=True)]

    def project(name):
        w = weights[f"{name}.weight"]
        return x @ w.reshape(w.shape[0], -1).T + weights.get(f"{name}.bias", 0.0)

    queries, keys = project("q"), project("kv")
    width = keys.shape[-1] // heads
    e = width - dim_head
    sizes = x.shape[1:-1]
    places = list(itertools.product(*[range(0, s, stride) for s in sizes]))
    out = np.zeros((x.shape[0], *[-(-s // stride) for s in sizes], heads * e))
    attention = {}
    for image, at, head in itertools.product(range(x.shape[0]), places, range(heads)):
        q = queries[(image, *at)][head * dim_head : (head + 1) * dim_head]
        first = [a // b * b - t for a, b, t in zip(at, block, halo, strict=True)]  # of the window
        own = [a % b // stride for a, b in zip(at, block, strict=True)]  # among the queries of the block
        logits, values, positions = [], [], []
        for cell in itertools.product(*map(range, window)):
            source = tuple(f + c for f, c in zip(first, cell, strict=True))
            inside = all(0 <= s < size for s, size in zip(source, sizes, strict=True))
            if not inside and boundary == "mask":
                continue
            kv = keys[(image, *source)][head * width : (head + 1) * width] if inside else np.zeros(width)
            relative = sum(q @ table[c - o + w - 1] for table, c, o, w in zip(tables, cell, own, window, strict=True))
            factor = dim_head**-0.5
            logits.append(factor * (q @ kv[:dim_head]) + relative * (factor if scale_relative else 1))
            values.append(kv[dim_head:])
            positions.append(source if inside else None)
        p = np.exp(np.array(logits) - max(logits))
        p /= p.sum()
        target = tuple(a // stride for a in at)
        out[(image, *target)][head * e : (head + 1) * e] = p @ np.array(values)
        attention[image, target, head] = dict(zip(positions, p, strict=True))
    if pool > 1:
        cells = [max(1, s // pool) for s in sizes]
        pooled = np.zeros((x.shape[0], *cells, heads * e))
        for cell in itertools.product(*map(range, cells)):
            box = tuple(slice(c * pool, c * pool + pool) for c in cell)
            part = out[(slice(None), *box)]
            pooled[(slice(None), *cell)] = part.reshape(len(x), -1, heads * e).mean(1)
        out = pooled
    return out, attention
