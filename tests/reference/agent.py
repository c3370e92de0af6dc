"""Agent attention as the paper writes it: loops over queries, agents and keys, in float64.

Tables are resized with torch's own interpolation and agents averaged cell by cell, so nothing is shared with the
matrices of the implementation.
"""

import itertools
import math

import torch
import torch.nn.functional as F

MODE = {1: "linear", 2: "bilinear", 3: "trilinear"}
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LETTERS = {1: "w", 2: "hw", 3: "dhw"}


def resize(x, size):
    """x (A, B, *S) to `size`."""
    return F.interpolate(x, size=tuple(size), mode=MODE[len(size)], align_corners=False)


def pool(x, grid):
    """x (*S, C) averaged over overlapping cells: (prod(grid), C)."""
    size = x.shape[:-1]
    rows = []
    for cell in itertools.product(*map(range, grid)):
        part = x
        for axis, (index, sides, full) in enumerate(zip(cell, grid, size, strict=True)):
            first, last = math.floor(index * full / sides), math.ceil((index + 1) * full / sides)
            part = part.narrow(axis, first, last - first)
        rows.append(part.flatten(0, -2).mean(0))
    return torch.stack(rows)


def bias(tables, kind, size):
    """(h, n, positions): the resized grid plus one resized table per axis; kind is "keys" or "queries"."""
    rank = len(size)
    grid = tables["an_bias" if kind == "keys" else "na_bias"]
    total = resize(grid, size)
    for axis, letter in enumerate(LETTERS[rank]):
        table = tables[f"a{letter}_bias" if kind == "keys" else f"{letter}a_bias"][0]
        if kind == "queries":
            table = table.movedim(-1, 1)
        line = F.interpolate(table.flatten(2), size=size[axis], mode="linear", align_corners=False)
        shape = [1] * rank
        shape[axis] = size[axis]
        total = total + line.reshape(*line.shape[:2], *shape)
    return total.flatten(2)


def two_steps(q, k, v, agents, first, second, heads):
    """q (N, C), k and v (M, C), agents (n, C), first (h, n, M), second (h, n, N): (N, C)."""
    width = q.shape[1] // heads
    out = torch.zeros_like(q)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        gathered = []
        for a in range(agents.shape[0]):
            logits = [(agents[a, part] * width**-0.5 * k[m, part]).sum() + first[head, a, m] for m in range(k.shape[0])]
            weights = torch.stack(logits).exp()
            gathered.append((weights[:, None] * v[:, part]).sum(0) / weights.sum())
        for n in range(q.shape[0]):
            logits = [
                (q[n, part] * width**-0.5 * agents[a, part]).sum() + second[head, a, n] for a in range(agents.shape[0])
            ]
            weights = torch.stack(logits).exp()
            out[n, part] = (weights[:, None] * torch.stack(gathered)).sum(0) / weights.sum()
    return out


def convolve(v, weight, offset):
    """The depthwise convolution of v (*S, C) with zeros beyond the border: (N, C)."""
    rank = v.ndim - 1
    return CONV[rank](v.movedim(-1, 0)[None], weight, offset, padding=1, groups=v.shape[-1])[0].flatten(1).T


def attend(x, state, heads, grid, size, variant="swin", sr_ratio=1):
    """One image: x (N, C) or (1 + N, C), its map of `size`. Weights by their official names, float64."""
    width = x.shape[-1]
    zero = torch.zeros(3 * width, dtype=x.dtype)
    key_size = size
    if variant == "pvt":
        q = x @ state["q.weight"].T + state.get("q.bias", zero[:width])
        source = x
        if sr_ratio > 1:
            maps = x.reshape(*size, width).movedim(-1, 0)[None]
            # An axis shorter than the kernel, which the official code refuses, is filled up with zeros.
            short = [max(0, sr_ratio - each) for each in reversed(size)]
            maps = F.pad(maps, [amount for each in short for amount in (0, each)])
            maps = CONV[len(size)](maps, state["sr.weight"], state["sr.bias"], stride=sr_ratio)[0]
            key_size = maps.shape[1:]
            source = F.layer_norm(maps.flatten(1).T, (width,), state["norm.weight"], state["norm.bias"])
        kv = source @ state["kv.weight"].T + state.get("kv.bias", zero[: 2 * width])
        k, v = kv[:, :width], kv[:, width:]
    else:
        qkv = x @ state["qkv.weight"].T + state.get("qkv.bias", zero)
        q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
    first, second = bias(state, "keys", key_size), bias(state, "queries", size)
    token = variant == "deit"
    if token:
        first = torch.cat([state["ac_bias"][0], first], dim=2)
        second = torch.cat([state["ca_bias"][0].transpose(1, 2), second], dim=2)
    agents = pool(q[token:].reshape(*size, width), grid)
    out = two_steps(q, k, v, agents, first, second, heads)
    values = v[token:].reshape(*key_size, width)
    if tuple(key_size) != tuple(size):
        values = resize(values.movedim(-1, 0)[None], size)[0].movedim(0, -1)
    out[token:] = out[token:] + convolve(values, state["dwc.weight"], state["dwc.bias"])
    return out @ state["proj.weight"].T + state["proj.bias"]


def strips(x, state, heads, grid, split, full=False):
    """The CSwin form on one map x (*S, C); the last strip of an axis holds what is left, with no padding at all."""
    size, width = x.shape[:-1], x.shape[-1]
    rank = len(size)
    qkv = x @ state["qkv.weight"].T + state["qkv.bias"]
    branches = 1 if full else rank
    share = width // branches
    out = torch.zeros_like(x)
    for branch in range(branches):
        tables = {key.split(".", 2)[2]: value for key, value in state.items() if key.startswith(f"attns.{branch}.")}
        start = branch * share
        q, k, v = (qkv[..., part * width + start : part * width + start + share] for part in range(3))
        sides = [each if full or axis == branch else split for axis, each in enumerate(size)]
        for corner in itertools.product(*(range(0, each, side) for each, side in zip(size, sides, strict=True))):
            index = tuple(slice(at, at + side) for at, side in zip(corner, sides, strict=True))
            inner = q[index].shape[:-1]
            # Where a strip is cut short, tables and cells of agents are those of the whole strip.
            first, second = bias(tables, "keys", sides), bias(tables, "queries", sides)
            inside = torch.zeros(sides, dtype=torch.bool)
            inside[tuple(slice(0, each) for each in inner)] = True
            first, second = (each[:, :, inside.flatten()] for each in (first, second))
            whole = torch.full((*sides, share), float("nan"), dtype=x.dtype)
            whole[inside] = q[index].reshape(-1, share)
            agents, kept = [], []
            for number, cell in enumerate(itertools.product(*map(range, grid))):
                part = whole
                for axis, (at, side, full_size) in enumerate(zip(cell, grid, sides, strict=True)):
                    begin, end = math.floor(at * full_size / side), math.ceil((at + 1) * full_size / side)
                    part = part.narrow(axis, begin, end - begin)
                rows = part.flatten(0, -2)
                rows = rows[~rows.isnan().any(1)]
                if len(rows):
                    agents.append(rows.mean(0))
                    kept.append(number)
            mixed = two_steps(
                q[index].flatten(0, -2),
                k[index].flatten(0, -2),
                v[index].flatten(0, -2),
                torch.stack(agents),
                first[:, kept],
                second[:, kept],
                heads // branches,
            )
            mixed = mixed + convolve(v[index], tables["get_v.weight"], tables["get_v.bias"])
            out[(*index, slice(start, start + share))] = mixed.reshape(*inner, share)
    return out @ state["proj.weight"].T + state["proj.bias"]
