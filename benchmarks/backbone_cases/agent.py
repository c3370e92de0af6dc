"""The Agent Attention families against the official formulation of their attention, written from its definition."""

import torch
from attention import CASES as BLOCKS
from attention import load
from backbones import swapped
from torch import Tensor, nn

from visattn.attention import AgentAttention, WindowAttention
from visattn.backbones._cross_shaped import CrossShapedAttention, Strips

Agents = load(BLOCKS, "agent").OfficialAgentAttention


class Deit(Agents):
    """With a class token: a query and a key, not pooled and not convolved."""

    def tables(self) -> None:
        """The tables of both steps, and the class token's."""
        super().tables()
        self.ac_bias = nn.Parameter(torch.zeros(1, self.heads, self.agents, 1))
        self.ca_bias = nn.Parameter(torch.zeros(1, self.heads, 1, self.agents))

    def forward(self, x: Tensor, *size: tuple[int, int]) -> Tensor:
        """Mix `x` (B, 1 + N, C)."""
        q, k, v = self.project(x)
        first, second = self.biases(len(x))
        first = torch.cat([self.ac_bias.repeat(len(x), 1, 1, 1), first], dim=-1)
        second = torch.cat([self.ca_bias.repeat(len(x), 1, 1, 1), second], dim=-2)
        out = self.mix(q, k, v, self.map(q[:, 1:]), (first, second))
        local = self.dwc(self.map(v[:, 1:])).permute(0, 2, 3, 1).reshape(out[:, 1:].shape)
        out[:, 1:] = out[:, 1:] + local
        return self.proj(out)


class Pvt(Agents):
    """Two projections; the published configurations do not reduce keys."""

    def layers(self) -> None:
        """Projections and the convolution."""
        super().layers()
        del self.qkv
        self.q, self.kv = nn.Linear(self.dim, self.dim), nn.Linear(self.dim, 2 * self.dim)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value (B, N, C) of tokens."""
        k, v = self.kv(x).reshape(*x.shape[:2], 2, self.dim).permute(2, 0, 1, 3)
        return self.q(x), k, v


class Whole(Agents):
    """The branch of CSwin over the whole map: no projections, a convolution of another name."""

    def layers(self) -> None:
        """The convolution."""
        self.get_v = nn.Conv2d(self.dim, self.dim, 3, padding=1, groups=self.dim)

    def forward(self, qkv: Tensor) -> Tensor:
        """Mix (3, B, N, C)."""
        q, k, v = qkv
        out = self.mix(q, k, v, self.map(q), self.biases(len(q)))
        return out + self.get_v(self.map(v)).permute(0, 2, 3, 1).reshape(out.shape)


class OfficialStrips(nn.Module):
    """Softmax attention in strips of a map of tokens, and a convolution of the values that ends with the strip."""

    def __init__(self, dim: int, heads: int, thickness: tuple[int | None, int | None]) -> None:
        super().__init__()
        self.heads, self.thickness, self.scale = heads, thickness, (dim // heads) ** -0.5
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, qkv: Tensor) -> Tensor:
        """Mix (3, B, N, C) of a square map."""
        _, batch, tokens, dim = qkv.shape
        side = round(tokens**0.5)
        high, wide = (thick or side for thick in self.thickness)

        def windows(x: Tensor) -> Tensor:
            x = x.transpose(-2, -1).reshape(batch, dim, side // high, high, side // wide, wide)
            return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, high * wide, dim)

        def heads(x: Tensor) -> Tensor:
            return x.reshape(len(x), high * wide, self.heads, -1).permute(0, 2, 1, 3).contiguous()

        q, k, v = (windows(x) for x in qkv)
        maps = v.transpose(-2, -1).reshape(-1, dim, high, wide)
        local = heads(self.get_v(maps).reshape(len(v), dim, -1).transpose(-2, -1))
        q, k, v = heads(q), heads(k), heads(v)
        out = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v + local
        out = out.transpose(1, 2).reshape(batch, side // high, side // wide, high, wide, dim)
        return out.permute(0, 1, 3, 2, 4, 5).reshape(batch, tokens, dim)


class CrossShaped(nn.Module):
    """The attention of a CSwin block: one projection, and branches on parts of the channels."""

    def __init__(self, dim: int, parts: list[nn.Module]) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attns = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, H, W, C)."""
        batch, dim = len(x), x.shape[-1]
        qkv = self.qkv(x.reshape(batch, -1, dim)).reshape(batch, -1, 3, dim).permute(2, 0, 1, 3)
        parts = [attend(part) for attend, part in zip(self.attns, qkv.chunk(len(self.attns), -1), strict=True)]
        return self.proj(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).reshape(x.shape)


class Windows(nn.Module):
    """Swin's attention in windows that are not shifted, as those of a map of one window: the published last stage."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rel_pos = nn.Module()
        table = torch.zeros((2 * window - 1) ** 2, heads)
        self.rel_pos.relative_position_bias_table = nn.Parameter(table)
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None]) + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, H, W, C)."""
        batch, height, width, dim = x.shape
        side = self.window
        x = x.reshape(batch, height // side, side, width // side, side, dim).permute(0, 1, 3, 2, 4, 5)
        qkv = self.qkv(x.reshape(-1, side * side, dim)).reshape(-1, side * side, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = self.rel_pos.relative_position_bias_table[self.index.flatten()].reshape(side**2, side**2, -1)
        weights = ((q * self.scale) @ k.transpose(-2, -1) + bias.permute(2, 0, 1)[None]).softmax(-1)
        out = self.proj((weights @ v).transpose(1, 2).reshape(-1, side * side, dim))
        out = out.reshape(batch, height // side, width // side, side, side, dim)
        return out.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, dim)


def agents(ours: AgentAttention) -> nn.Module:
    """The official form of a block with agents."""
    plan = (ours.agent_num, ours.dim, ours.num_heads, ours.window_size)
    if ours.variant == "cswin":
        return CrossShaped(ours.dim, [Whole(*plan)])
    return {"deit": Deit, "pvt": Pvt, "swin": Agents}[ours.variant](*plan)


def strips(ours: CrossShapedAttention) -> nn.Module:
    """The official form of a block with strips."""

    def part(each: Strips) -> nn.Module:
        return OfficialStrips(each.get_v.in_channels, each.num_heads, each.thickness)

    return CrossShaped(ours.dim, [part(each) for each in ours.attns])


def windows(ours: WindowAttention) -> nn.Module:
    """The official form of a block with windows."""
    return Windows(ours.dim, ours.num_heads, ours.window_size[0])


def official(model: nn.Module) -> nn.Module:
    """The official formulation with the weights of `model`."""
    return swapped(model, {AgentAttention: agents, CrossShapedAttention: strips, WindowAttention: windows})


CASES = [
    (f"va_agent_{family}_t", {"drop_path_rate": 0.0}, official, (0.95, 0.95))
    for family in ("deit", "pvt", "swin", "cswin")
]
