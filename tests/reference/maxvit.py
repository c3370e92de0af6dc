"""Window and grid attention from their definitions, one query and head at a time, in NumPy. Maps are (B, *S, C)."""

import itertools

import numpy as np


def attention(x, weights, heads, size, kind, bias, shift=None, per_head=False, boundary="mask"):
    """Output (B, *S, C), and {(image, query, head): {key: weight}} with the keys inside the map.

    Args:
        bias: Function of head and offset, query minus key, one number per axis.
    """
    sizes, dim = x.shape[1:-1], x.shape[-1]
    shift = shift or (0,) * len(sizes)
    shift = [s if n > p else 0 for s, n, p in zip(shift, sizes, size, strict=True)]
    padded = [-(-n // p) * p for n, p in zip(sizes, size, strict=True)]
    d = dim // heads
    qkv = np.zeros((x.shape[0], *padded, dim))
    qkv[(slice(None), *(slice(0, n) for n in sizes))] = x
    qkv = qkv @ weights["qkv.weight"].T + weights["qkv.bias"]

    def channels(which, head):
        first = (head * 3 + which) * d if per_head else which * dim + head * d
        return slice(first, first + d)

    def group(at):  # window, place in it, and the side of the seam that a shift leaves
        window, place, seam = [], [], []
        for a, n, p, s in zip(at, padded, size, shift, strict=True):
            moved = (a - s) % n
            window.append(moved // p if kind == "window" else moved % (n // p))
            place.append(moved % p if kind == "window" else moved // (n // p))
            seam.append(a < s)
        return tuple(window), tuple(place), tuple(seam)

    tokens = list(itertools.product(*map(range, padded)))
    out, maps = np.zeros(x.shape), {}
    for image, query, head in itertools.product(range(len(x)), itertools.product(*map(range, sizes)), range(heads)):
        window, place, seam = group(query)
        keys, logits = [], []
        for key in tokens:
            other, where, side = group(key)
            inside = all(k < n for k, n in zip(key, sizes, strict=True))
            if other != window or side != seam or (boundary == "mask" and not inside):
                continue
            q, k = qkv[(image, *query)][channels(0, head)], qkv[(image, *key)][channels(1, head)]
            keys.append(key)
            logits.append(q @ k * d**-0.5 + bias(head, tuple(a - b for a, b in zip(place, where, strict=True))))
        p = np.exp(np.array(logits) - max(logits))
        p /= p.sum()
        out[(image, *query)][head * d : (head + 1) * d] = sum(
            w * qkv[(image, *key)][channels(2, head)] for w, key in zip(p, keys, strict=True)
        )
        maps[image, query, head] = dict(zip(keys, p, strict=True))
    return out @ weights["proj.weight"].T + weights["proj.bias"], maps
