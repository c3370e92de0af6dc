"""Position and channel attention as loops over pairs, in float64."""

import torch


def position(x, state):
    """x (B, *S, C); state holds conv_b, conv_c, conv_d and gamma."""
    out = torch.empty_like(x)
    width = state["conv_b.weight"].shape[0]
    none = torch.zeros(1, dtype=x.dtype)
    for image in range(x.shape[0]):
        tokens = x[image].flatten(0, -2)
        b, c, d = (tokens @ state[f"conv_{n}.weight"].T + state.get(f"conv_{n}.bias", none) for n in "bcd")
        mixed = torch.empty_like(tokens)
        for i in range(len(tokens)):
            energy = torch.stack([sum(c[i, n] * b[j, n] for n in range(width)) for j in range(len(tokens))]).exp()
            mixed[i] = sum(energy[j] / energy.sum() * d[j] for j in range(len(tokens)))
        out[image] = (state["gamma"] * mixed + tokens).reshape(x.shape[1:])
    return out


def channel(x, gamma, form):
    """x (B, *S, C)."""
    out = torch.empty_like(x)
    channels = x.shape[-1]
    for image in range(x.shape[0]):
        tokens = x[image].flatten(0, -2)
        similar = torch.stack(
            [torch.stack([tokens[:, i] @ tokens[:, j] for j in range(channels)]) for i in range(channels)]
        )
        weights = (similar - similar.max()).exp()
        weights = weights / weights.sum(1, keepdim=True)  # row i over all j
        mixed = torch.zeros_like(tokens)
        for target in range(channels):
            for source in range(channels):
                weight = weights[source, target] if form == "code" else weights[target, source]
                mixed[:, target] += weight * tokens[:, source]
        out[image] = (gamma * mixed + tokens).reshape(x.shape[1:])
    return out
