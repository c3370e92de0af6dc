"""Cross-contextual attention as its definition reads: all tokens projected to keys and values, loops over heads."""

import torch
import torch.nn.functional as F


def attention(query, tokens, state, name, heads):
    """What query (1, C) reads from [LN(query), tokens (M, C)]."""
    query = F.layer_norm(query, query.shape[-1:], state[f"{name}.fn.norm.weight"], state[f"{name}.fn.norm.bias"])
    context = torch.cat([query, tokens])
    q = query @ state[f"{name}.fn.fn.to_q.weight"].T
    k, v = (context @ state[f"{name}.fn.fn.to_kv.weight"].T).chunk(2, dim=1)
    width = q.shape[1] // heads
    read = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights = torch.stack([(q[0, part] * each[part]).sum() * width**-0.5 for each in k]).exp()
        read.append((weights[:, None] * v[:, part]).sum(0) / weights.sum())
    return torch.cat(read) @ state[f"{name}.fn.fn.to_out.0.weight"].T + state[f"{name}.fn.fn.to_out.0.bias"]


def project(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"] if f"{name}.weight" in state else x


def exchange(x, skip, state, heads, depth, tokens):
    """One image: x (N, C) and skip (M, C')."""
    streams = [x, skip]
    first = [each.mean(0, keepdim=True) for each in streams]
    keys = [each if tokens == "all" else each[1:] for each in streams]
    summary = list(first)
    for layer in range(depth):
        before = list(summary)
        for own, other in ((0, 1), (1, 0)):
            name = f"layers.{layer}.{own}"
            query = project(before[own], state, f"{name}.project_in")
            read = attention(query, keys[other], state, name, heads)
            summary[own] = before[own] + project(read[None], state, f"{name}.project_out")
    out = []
    for stream, start, end in zip(streams, first, summary, strict=True):
        out.append(stream + end - start if tokens == "all" else torch.cat([end, stream[1:]]))
    return out
