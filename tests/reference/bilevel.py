"""Bi-level routing attention and attention with LePE from their definitions: one token, one head at a time, in NumPy.

Weights come as a dict of arrays under the official keys; maps are channels-last, (B, *S, C), of any rank.
"""

import itertools
import math

import numpy as np


def softmax(z):
    z = np.exp(z - z.max())
    return z / z.sum()


def affine(x, weights, key):
    w = weights[f"{key}.weight"]
    out = x @ w.reshape(w.shape[0], w.shape[1]).T
    return out + weights[f"{key}.bias"] if f"{key}.bias" in weights else out


def depthwise(x, weights):
    """Depthwise convolution of one map (*S, C) with zero padding; zero without weights."""
    if "lepe.weight" not in weights:
        return np.zeros_like(x)
    w = weights["lepe.weight"]  # (C, 1, *k)
    half = [k // 2 for k in w.shape[2:]]
    out = np.zeros_like(x) + weights["lepe.bias"]
    for at in itertools.product(*map(range, x.shape[:-1])):
        for tap in itertools.product(*map(range, w.shape[2:])):
            source = tuple(a + t - h for a, t, h in zip(at, tap, half, strict=True))
            if all(0 <= s < size for s, size in zip(source, x.shape[:-1], strict=True)):
                out[at] += w[(slice(None), 0, *tap)] * x[source]
    return out


def pooled(cells, mode, per_win, ratio):
    """Keys of one window (*w, C) pooled to a list of vectors, in row-major order."""
    window = cells.shape[:-1]
    if mode == "identity":
        return list(cells.reshape(-1, cells.shape[-1]))
    ranges = []
    for size in window:
        if mode.startswith("ada_"):
            ranges.append([range(i * size // per_win, -(-(i + 1) * size // per_win)) for i in range(per_win)])
        else:
            step = min(ratio, size)
            ranges.append([range(i * step, (i + 1) * step) for i in range(size // step)])
    reduce = np.mean if mode.endswith("avgpool") else np.max
    return [reduce([cells[at] for at in itertools.product(*cell)], axis=0) for cell in itertools.product(*ranges)]


def bilevel(
    x,
    weights,
    num_heads,
    n_win,
    topk,
    variant="legacy",
    scale=None,
    mode="identity",
    per_win=4,
    ratio=4,
    soft=False,
):
    """Output (B, *S, C), routing weights and indices (B, R, k), attention as a list over (image, region, head)."""
    rank = x.ndim - 2
    outs, all_weights, all_indices, attention = [], [], [], []
    for image in x:
        sizes = image.shape[:-1]
        if variant == "legacy":
            padded = [-(-s // n_win) * n_win for s in sizes]
            image = np.pad(image, [*[(0, p - s) for p, s in zip(padded, sizes, strict=True)], (0, 0)])
            window = [p // n_win for p in padded]
            qkv = affine(image, weights, "qkv.qkv")
        else:
            window = [max(1, s // n_win) for s in sizes]
            padded = [-(-s // w) * w for s, w in zip(sizes, window, strict=True)]
            qkv = affine(image, weights, "qkv_linear")
        dim = image.shape[-1]
        width = (qkv.shape[-1] - dim) // 2
        factor = width**-0.5 if scale is None else scale
        values = qkv[..., 2 * width :]
        local = depthwise(values, weights)
        valid = np.ones(qkv.shape[:-1], bool)
        grow = [(0, p - s) for p, s in zip(padded, qkv.shape[:-1], strict=True)]
        qkv, valid = np.pad(qkv, [*grow, (0, 0)]), np.pad(valid, grow)

        regions = list(itertools.product(*[range(p // w) for p, w in zip(padded, window, strict=True)]))
        boxes = [tuple(slice(i * w, (i + 1) * w) for i, w in zip(r, window, strict=True)) for r in regions]
        mean_q = [qkv[box][valid[box]][:, :width].mean(0) for box in boxes]
        mean_k = [qkv[box][valid[box]][:, width : 2 * width].mean(0) for box in boxes]
        if "router.emb.weight" in weights:
            mean_q = [affine(m, weights, "router.emb") for m in mean_q]
            mean_k = [affine(m, weights, "router.emb") for m in mean_k]
        keys = [pooled(qkv[box][..., width : 2 * width], mode, per_win, ratio) for box in boxes]
        vals = [pooled(qkv[box][..., 2 * width :], mode, per_win, ratio) for box in boxes]

        out = np.zeros((*padded, dim))
        d, e = width // num_heads, dim // num_heads
        image_weights, image_indices = [], []
        for region, box in enumerate(boxes):
            logits = np.array([mean_q[region] @ other * factor for other in mean_k])
            chosen = np.argsort(-logits, kind="stable")[: min(topk, len(boxes))]
            share = softmax(logits[chosen])
            image_weights.append(share)
            image_indices.append(chosen)
            factors = share if soft else np.ones_like(share)
            k = np.concatenate([np.stack(keys[c]) * f for c, f in zip(chosen, factors, strict=True)])
            v = np.concatenate([np.stack(vals[c]) * f for c, f in zip(chosen, factors, strict=True)])
            for head in range(num_heads):
                rows = []
                for inside in itertools.product(*map(range, window)):
                    at = tuple(b.start + i for b, i in zip(box, inside, strict=True))
                    q = qkv[at][head * d : (head + 1) * d]
                    p = softmax(k[:, head * d : (head + 1) * d] @ q * factor)
                    rows.append(p)
                    out[at][head * e : (head + 1) * e] = p @ v[:, head * e : (head + 1) * e]
                attention.append(np.stack(rows))
        cut = tuple(slice(0, s) for s in sizes)
        out = out[cut] + local[cut]
        if variant == "nchw":
            out = affine(out, weights, "output_linear")
        elif "wo.weight" in weights:
            out = affine(out, weights, "wo")
        outs.append(out)
        all_weights.append(image_weights)
        all_indices.append(image_indices)
    assert rank == len(window)
    return np.stack(outs), np.array(all_weights), np.array(all_indices), attention


def lepe(x, weights, num_heads, variant="legacy"):
    """Full attention plus a depthwise convolution of the input (legacy) or the values (nchw): (B, *S, C)."""
    outs = []
    for image in x:
        dim = image.shape[-1]
        qkv = affine(image, weights, "qkv")
        flat = qkv.reshape(-1, 3 * dim)
        d = dim // num_heads
        out = np.zeros((len(flat), dim))
        for i in range(len(flat)):
            for head in range(num_heads):
                cut = slice(head * d, (head + 1) * d)
                p = softmax(flat[:, dim:][:, cut] @ flat[i, :dim][cut] / math.sqrt(d))
                out[i, cut] = p @ flat[:, 2 * dim :][:, cut]
        source = image if variant == "legacy" else qkv[..., 2 * dim :]
        outs.append(affine(out.reshape(image.shape) + depthwise(source, weights), weights, "proj"))
    return np.stack(outs)
