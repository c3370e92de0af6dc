"""PAT_ch, PAT_sp and PAT_sf as their definitions read, in float64: torch's own layers, and loops over pairs.

All take x (B, *S, C) and the official state dict.
"""

import itertools
import math

import torch
import torch.nn.functional as F

CONV = {2: F.conv2d, 3: F.conv3d}


def norm(x, state, name, training, eps=1e-5):
    """Batch norm of x (B, C, *S); in training with the batch's own biased variance."""
    if training:
        axes = [0, *range(2, x.ndim)]
        mean = x.mean(axes)
        variance = ((x.movedim(1, -1) - mean) ** 2).movedim(-1, 1).mean(axes)
    else:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    out = (x.movedim(1, -1) - mean) / (variance + eps).sqrt()
    return (out * state[f"{name}.weight"] + state[f"{name}.bias"]).movedim(-1, 1)


def hard_sigmoid(x):
    return ((x + 3) / 6).clamp(0, 1)


def channel(x, state, n_div=4, training=False):
    maps = x.movedim(-1, 1)
    rank = maps.ndim - 2
    first = maps.shape[1] // n_div
    left, right = maps[:, :first], maps[:, first:]
    left = CONV[rank](left, state["partial_conv3.weight"], padding=1)
    flat = right.flatten(2)
    deviation = flat.std(dim=2) if flat.shape[2] > 1 else torch.zeros_like(flat[..., 0])
    pair = torch.stack((flat.mean(2), deviation), dim=-1)[:, :, None]  # (B, c, 1, 2)
    gate = hard_sigmoid(norm(F.conv2d(pair, state["attn.cfc1.weight"]), state, "attn.bn", training))
    gated = right * gate.reshape(*right.shape[:2], *(1,) * rank)
    return torch.cat([left, norm(gated, state, "norm", training)], dim=1).movedim(1, -1)


def spatial(x, state, partial=0.5, training=False):
    maps = x.movedim(-1, 1)
    rank = maps.ndim - 2
    first = maps.shape[1] - int(maps.shape[1] * partial)
    left, right = maps[:, :first], maps[:, first:]
    gate = hard_sigmoid(CONV[rank](left, state["conv_attn.weight"]))
    right = CONV[rank](norm(right, state, "norm2", training), state["conv.weight"])
    return torch.cat([norm(left * gate, state, "norm", training), right], dim=1).movedim(1, -1)


def bucket(distance):
    """The piecewise function of iRPE with alpha 20, beta 40, gamma 160."""
    distance = round(distance)
    if distance <= 20:
        return distance
    return min(40, round(20 + math.log(distance / 20) / math.log(160 / 20) * (40 - 20)))


def self_attention(x, state, heads, n_div=4):
    out = torch.empty_like(x)
    width = x.shape[-1]
    first = width // n_div
    rest = width - first
    rank = x.ndim - 2
    convolved = CONV[rank](x[..., :first].movedim(-1, 1), state["partial_conv3.weight"], padding=1)
    out[..., :first] = convolved.movedim(1, -1)
    places = list(itertools.product(*map(range, x.shape[1:-1])))
    head = rest // heads
    for image in range(x.shape[0]):
        tokens = x[image].flatten(0, -2)[:, first:]
        tokens = F.layer_norm(tokens, (rest,), state["norm.weight"], state["norm.bias"], eps=1e-6)
        qkv = tokens @ state["attn.qkv.weight"].T
        mixed = torch.zeros_like(tokens)
        for h in range(heads):
            q, k, v = (qkv[:, part * rest + h * head : part * rest + (h + 1) * head] for part in range(3))
            for i, here in enumerate(places):
                logits = []
                for j, there in enumerate(places):
                    index = 40 + bucket(math.dist(here, there))
                    bias = state["attn.rpe_k.lookup_table_bias"][h, index]
                    logits.append((q[i] * head**-0.5 * k[j]).sum() + bias)
                weights = torch.stack(logits).exp()
                mixed[i, h * head : (h + 1) * head] = (weights[:, None] * v).sum(0) / weights.sum()
        mixed = mixed @ state["attn.proj.weight"].T + state["attn.proj.bias"]
        out[image, ..., first:] = mixed.reshape(*x.shape[1:-1], rest)
    return out
