"""Attention gates as their formulas read, with torch's channels-first layers, in float64."""

import torch
import torch.nn.functional as F

CONV = {2: F.conv2d, 3: F.conv3d}
MODE = {2: "bilinear", 3: "trilinear"}


def norm(x, state, name, eps):
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, variance, state[f"{name}.weight"], state[f"{name}.bias"], eps=eps)


def conv(x, state, name, stride=1):
    return CONV[x.ndim - 2](x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride=stride)


def concatenate(x, skip, state):
    """x and skip (B, C, *S)."""
    ours = norm(conv(x, state, "x_conv"), state, "x_norm", 1e-3)
    theirs = norm(conv(skip, state, "skip_conv"), state, "skip_norm", 1e-3)
    joined = F.relu(torch.cat([ours, theirs], dim=1))
    return skip * torch.sigmoid(norm(conv(joined, state, "psi"), state, "psi_norm", 1e-3))


def add(x, skip, state, stride, transform):
    """x (B, F, *T) and skip (B, C, *S)."""
    mode = MODE[x.ndim - 2]
    reduced = conv(skip, state, "theta", stride)
    asked = F.interpolate(conv(x, state, "phi"), size=reduced.shape[2:], mode=mode)
    weights = torch.sigmoid(conv(F.relu(reduced + asked), state, "psi"))
    gated = skip * F.interpolate(weights, size=skip.shape[2:], mode=mode)
    return norm(conv(gated, state, "W.0"), state, "W.1", 1e-5) if transform else gated
