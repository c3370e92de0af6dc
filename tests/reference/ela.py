"""Efficient local attention in plain loops over images, channels and positions, in float64."""

import torch

# kernel, channels of a convolution group, groups of the norm
SETTINGS = {"T": (5, 1, 32), "B": (7, 1, 16), "S": (5, 8, 16), "L": (7, 8, 16)}


def gate(strip, weight, scale, offset, variant):
    """strip (L, C): sigmoid(GN(Conv1d(strip))), (L, C)."""
    kernel, group, norm_groups = SETTINGS[variant]
    length, channels = strip.shape
    convolved = torch.zeros_like(strip)
    for channel in range(channels):
        first = channel // group * group
        for position in range(length):
            for tap in range(kernel):
                at = position + tap - kernel // 2
                if 0 <= at < length:
                    for inner in range(group):
                        convolved[position, channel] += weight[channel, inner, tap] * strip[at, first + inner]
    width = channels // norm_groups
    out = torch.zeros_like(strip)
    for number in range(norm_groups):
        part = convolved[:, number * width : (number + 1) * width]
        mean = part.mean()
        deviation = ((part - mean) ** 2).mean().add(1e-5).sqrt()
        out[:, number * width : (number + 1) * width] = (part - mean) / deviation
    return 1 / (1 + (-(out * scale + offset)).exp())


def attend(x, weight, scale, offset, variant):
    """x (B, *S, C)."""
    out = x.clone()
    rank = x.ndim - 2
    for image in range(x.shape[0]):
        for axis in range(rank):
            strip = x[image].movedim(axis, 0).flatten(1, -2).mean(1)
            weights = gate(strip, weight, scale, offset, variant)
            out[image] = (out[image].movedim(axis, -2) * weights).movedim(-2, axis)
    return out
