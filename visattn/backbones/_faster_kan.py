"""FasterKAN: layers that learn a function of each input channel as a sum of bumps on a fixed grid.

Paper: Liu et al., "KAN: Kolmogorov-Arnold Networks", arXiv 2404.19756, in the form of FasterKAN by A. Delis:
f(x) = W vec(b), b_cg = 1 - tanh((LN(x)_c - grid_g) / 0.33)^2.
Official code: https://github.com/Omid-Nejati/MedViTV2, revision 8d54f66 (MIT), where it takes the place of an MLP.

Deviations: the grid, a frozen parameter there, is a buffer here; its values are loaded all the same.

Legend: C channels, G grid points.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

GRID = (-2.0, 2.0, 8)  # first and last point, number of points
WIDTH = 0.33  # of a bump


class Bumps(nn.Module):
    """The values of G bumps around fixed points: (..., C) to (..., C, G)."""

    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(*GRID))

    def forward(self, x: Tensor) -> Tensor:
        """1 - tanh((x - grid) / 0.33)^2, the slope of tanh."""
        # Dividing before the G-fold expansion saves a pass over it.
        out = torch.tanh((x / WIDTH).unsqueeze(-1) - self.grid / WIDTH)
        return 1 - out.square()


class FasterKANLayer(nn.Module):
    """Norm, bumps, and one linear map of all of them, without bias: (..., in_features) to (..., out_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(in_features)
        self.rbf = Bumps()
        self.spline_linear = nn.Linear(in_features * GRID[2], out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.spline_linear(self.rbf(self.layernorm(x)).flatten(-2))
        return out


class FasterKAN(nn.Module):
    """Layers between the given widths, one after another, on the last axis.

    Args:
        widths: Channels of the input, of every layer in between, and of the output.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(FasterKANLayer(width, width_out) for width, width_out in pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., widths[0]) to (..., widths[-1])."""
        out: Tensor = self.layers(x)
        return out
