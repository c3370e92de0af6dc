"""Neighbourhood attention against dense attention, and its settings against plain neighbourhood attention.

Dense attention computes something else, so ours is compared with the definition. Inputs are query, key and value.
Strides, dilations and causality may take 1.3 times the time of the plain form with the same kernel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention import neighborhood_attention


class Neighborhood(nn.Module):
    """`neighborhood_attention` with fixed settings."""

    def __init__(self, kernel: int, backend: str = "torch", **settings: object) -> None:
        super().__init__()
        self.settings = {"kernel_size": kernel, "backend": backend, **settings}

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; all (B, *S, heads, d)."""
        return neighborhood_attention(query, key, value, **self.settings)


class Dense(nn.Module):
    """Attention of all to all by PyTorch's fused kernel."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; all (B, *S, heads, d)."""
        flat = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*flat).transpose(1, 2).reshape(query.shape)


def work(shape: tuple[int, ...], kernel: int) -> tuple[float, float, float]:
    """Operations, bytes and exponentials that the definition needs."""
    scores = math.prod(shape[:-1]) * kernel ** (len(shape) - 3)
    return 4 * scores * shape[-1], 4 * 4 * math.prod(shape), scores


def case(name: str, shape: tuple[int, ...], kernel: int, floors: tuple[float, float], **settings: object) -> tuple:
    """Against dense attention, or with settings against the plain form."""
    return (
        name,
        lambda: Neighborhood(kernel, **settings),
        lambda: Neighborhood(kernel) if settings else Dense(),
        lambda: tuple(torch.randn(3, *shape)),
        floors,
        {"reference": lambda: Neighborhood(kernel, "reference", **settings), "work": work(shape, kernel)},
    )


PLANE, VOLUME = (1, 56, 56, 2, 32), (1, 24, 24, 24, 2, 16)
SAME = (1 / 1.3, 1 / 1.3)

CASES = [
    case("NA2D 56x56 k7, 2 heads d32; dense", PLANE, 7, (3.0, 3.7)),
    case("NA2D 88x88 k7, 2 heads d32; dense", (1, 88, 88, 2, 32), 7, (3.0, 3.7)),
    case("NA3D 24^3 k5, 2 heads d16; dense", VOLUME, 5, (8.5, 8.5)),
    case("NA2D 56x56 k7 dilation 2; plain", PLANE, 7, SAME, dilation=2),
    case("NA2D 56x56 k7 dilation 3; plain", PLANE, 7, SAME, dilation=3),
    case("NA2D 56x56 k7 dilation 8; plain", PLANE, 7, SAME, dilation=8),
    case("NA2D 56x56 k7 stride 2; plain", PLANE, 7, SAME, stride=2),
    case("NA2D 56x56 k7 stride 7; plain", PLANE, 7, SAME, stride=7),
    case("NA2D 56x56 k7 causal; plain", PLANE, 7, SAME, is_causal=True),
    case("NA3D 24^3 k5 dilation 2; plain", VOLUME, 5, SAME, dilation=2),
    case("NA3D 24^3 k5 stride 3; plain", VOLUME, 5, SAME, stride=3),
    case("NA3D 24^3 k5 causal; plain", VOLUME, 5, SAME, is_causal=(True, False, False)),
]
