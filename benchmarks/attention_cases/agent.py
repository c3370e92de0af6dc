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

    def __init__(self, agents: int) -> None:
        super().__init__()
        self.agents, self.scale = agents, (DIM // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.dwc = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)
        shapes = {"an": (7, 7), "na": (7, 7), "ah": (SIDE, 1), "aw": (1, SIDE)}
        for name, shape in shapes.items():
            lead = (HEADS, agents) if name in ("an", "na") else (1, HEADS, agents)
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(*lead, *shape) * 0.02))
        self.ha_bias = nn.Parameter(torch.randn(1, HEADS, SIDE, 1, agents) * 0.02)
        self.wa_bias = nn.Parameter(torch.randn(1, HEADS, 1, SIDE, agents) * 0.02)
        self.pool = nn.AdaptiveAvgPool2d(round(agents**0.5))

    def heads(self, x: Tensor) -> Tensor:
        """Heads of (B, N, C): (B, h, N, d)."""
        return x.reshape(*x.shape[:2], HEADS, -1).permute(0, 2, 1, 3)

    def table(self, grid: Tensor, batch: int) -> Tensor:
        """The grid at the map's size, once per image."""
        resized = F.interpolate(grid, size=(SIDE, SIDE), mode="bilinear")
        return resized.reshape(1, HEADS, self.agents, -1).repeat(batch, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, H, W, C)."""
        batch, tokens = x.shape[0], SIDE * SIDE
        x = x.reshape(batch, tokens, DIM)
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, DIM).permute(2, 0, 1, 3).unbind(0)
        maps = q.reshape(batch, SIDE, SIDE, DIM).permute(0, 3, 1, 2)
        agents = self.heads(self.pool(maps).reshape(batch, DIM, -1).permute(0, 2, 1))
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        lines = (self.ah_bias + self.aw_bias).reshape(1, HEADS, self.agents, -1).repeat(batch, 1, 1, 1)
        bias = self.table(self.an_bias, batch) + lines
        gathered = ((agents * self.scale) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        lines = (self.ha_bias + self.wa_bias).reshape(1, HEADS, -1, self.agents).repeat(batch, 1, 1, 1)
        bias = self.table(self.na_bias, batch).permute(0, 1, 3, 2) + lines
        out = ((q * self.scale) @ agents.transpose(-2, -1) + bias).softmax(-1) @ gathered
        out = out.transpose(1, 2).reshape(batch, tokens, DIM)
        values = v.transpose(1, 2).reshape(batch, SIDE, SIDE, DIM).permute(0, 3, 1, 2)
        out = out + self.dwc(values).permute(0, 2, 3, 1).reshape(batch, tokens, DIM)
        return self.proj(out).reshape(batch, SIDE, SIDE, DIM)


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
