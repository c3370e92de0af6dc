"""Agent attention on 56 x 56 positions, 96 channels, against the official formulation, written from its definition.

Each case is (name, ours, baseline, make_inputs, floors): two builders of modules that give equal outputs on the tensors
of `make_inputs`, and the least ratio of the baseline's time to ours, forward and forward with backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention import AgentAttention

SIDE, DIM, HEADS = 56, 96, 3


class OfficialAgentAttention(nn.Module):
    """The published module: one projection, adaptive pooling, interpolated tables repeated for every image."""

    def __init__(self, agents: int, dim: int = DIM, heads: int = HEADS, size: tuple[int, int] = (SIDE, SIDE)) -> None:
        super().__init__()
        self.agents, self.dim, self.heads, self.size = agents, dim, heads, size
        self.scale = (dim // heads) ** -0.5
        self.layers()
        self.tables()
        self.pool = nn.AdaptiveAvgPool2d(round(agents**0.5))

    def layers(self) -> None:
        """Projections and the convolution."""
        self.qkv, self.proj = nn.Linear(self.dim, 3 * self.dim), nn.Linear(self.dim, self.dim)
        self.dwc = nn.Conv2d(self.dim, self.dim, 3, padding=1, groups=self.dim)

    def tables(self) -> None:
        """The tables of both steps."""
        height, width = self.size
        shapes = {
            "an": (self.heads, self.agents, 7, 7),
            "na": (self.heads, self.agents, 7, 7),
            "ah": (1, self.heads, self.agents, height, 1),
            "aw": (1, self.heads, self.agents, 1, width),
            "ha": (1, self.heads, height, 1, self.agents),
            "wa": (1, self.heads, 1, width, self.agents),
        }
        for name, shape in shapes.items():
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(shape) * 0.02))

    def split(self, x: Tensor) -> Tensor:
        """Heads of (B, N, C): (B, h, N, d)."""
        return x.reshape(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3)

    def map(self, x: Tensor) -> Tensor:
        """The map (B, C, H, W) of (B, N, C)."""
        return x.reshape(x.shape[0], *self.size, self.dim).permute(0, 3, 1, 2)

    def biases(self, batch: int) -> tuple[Tensor, Tensor]:
        """B1 (B, h, n, N) and B2 (B, h, N, n), once per image."""

        def table(grid: Tensor) -> Tensor:
            resized = F.interpolate(grid, size=self.size, mode="bilinear")
            return resized.reshape(1, self.heads, self.agents, -1).repeat(batch, 1, 1, 1)

        lines = (self.ah_bias + self.aw_bias).reshape(1, self.heads, self.agents, -1).repeat(batch, 1, 1, 1)
        first = table(self.an_bias) + lines
        lines = (self.ha_bias + self.wa_bias).reshape(1, self.heads, -1, self.agents).repeat(batch, 1, 1, 1)
        return first, table(self.na_bias).permute(0, 1, 3, 2) + lines

    def mix(self, q: Tensor, k: Tensor, v: Tensor, pooled: Tensor, biases: tuple[Tensor, Tensor]) -> Tensor:
        """The two steps on tokens (B, N, C), with agents from the map (B, C, H, W)."""
        agents = self.split(self.pool(pooled).reshape(len(q), self.dim, -1).permute(0, 2, 1))
        heads, keys, values = self.split(q), self.split(k), self.split(v)
        gathered = ((agents * self.scale) @ keys.transpose(-2, -1) + biases[0]).softmax(-1) @ values
        out = ((heads * self.scale) @ agents.transpose(-2, -1) + biases[1]).softmax(-1) @ gathered
        return out.transpose(1, 2).reshape(q.shape)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value (B, N, C) of tokens."""
        return self.qkv(x).reshape(*x.shape[:2], 3, self.dim).permute(2, 0, 1, 3).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, H, W, C)."""
        q, k, v = self.project(x.reshape(len(x), -1, self.dim))
        out = self.mix(q, k, v, self.map(q), self.biases(len(x)))
        out = out + self.dwc(self.map(v)).permute(0, 2, 3, 1).reshape(out.shape)
        return self.proj(out).reshape(x.shape)


def pair(agents: int) -> tuple[nn.Module, nn.Module]:
    """Ours and the official formulation with equal weights."""
    torch.manual_seed(0)
    official = OfficialAgentAttention(agents)
    ours = AgentAttention(DIM, HEADS, agent_num=agents, window_size=SIDE)
    ours.load_state_dict(official.state_dict())
    return ours, official


def inputs(batch: int) -> tuple[Tensor, ...]:
    """Features (B, H, W, C)."""
    return (torch.randn(batch, SIDE, SIDE, DIM),)


CASES = [
    (
        f"agent 56x56 C96, {agents} agents, batch {batch}",
        lambda agents=agents: pair(agents)[0],
        lambda agents=agents: pair(agents)[1],
        lambda batch=batch: inputs(batch),
        (1.15, 0.95),
    )
    for agents in (49, 9)
    for batch in (1, 2)
]
