"""Draws docs/images/mechanisms.png: what one query sees in each mechanism, computed by the blocks themselves.

    python docs/draw_mechanisms.py

Blocks with a softmax show their `attention_map`, the others the positions whose input changes the query's output.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from visattn.attention import (
    AgentAttention,
    BiLevelRoutingAttention,
    DepthwiseConvolution,
    EfficientLocalAttention,
    FullAttention,
    GridAttention,
    HaloAttention,
    NeighborhoodAttention,
    PartialSelfAttention,
    WindowAttention,
)
from visattn.viz import attention_map

SIDE, QUERY = 16, (6, 4)
SEEN, MARK, LINE = np.array([0.0, 0.45, 0.70]), "#d55e00", "#9a9a9a"
TARGET = Path(__file__).resolve().parent / "images" / "mechanisms.png"


def image() -> Tensor:
    """A smooth map (1, 16, 16, 32) with a few blobs, so that routing has something to choose by."""
    axis = torch.linspace(0, 1, SIDE)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    waves = [torch.sin(6.3 * (a * row + b * column) + c) for a, b, c in torch.randn(32, 3).tolist()]
    return torch.stack(waves, dim=-1)[None]


def seen(block: nn.Module, x: Tensor) -> np.ndarray:
    """The weights (16, 16) of the query, from 0 to 1; of blocks without weights how much the output moves."""
    if hasattr(block, "attention_map"):
        weights = attention_map(block, x, QUERY)[0].mean(0)
    else:
        x = x.clone().requires_grad_()
        block(x)[0][QUERY].square().sum().backward()
        weights = x.grad[0].abs().sum(-1)
    return (weights / weights.max()).detach().numpy()


def plain(block: nn.Module) -> nn.Module:
    """`block` with queries of zero, where all keys in reach weigh the same."""
    for name, parameter in block.named_parameters():
        if "qkv" in name or name.startswith(("q.", "rpb", "pos_embed", "rel_pos")):
            nn.init.zeros_(parameter)
    return block


def strips() -> nn.Module:
    """Agent attention in strips, the vertical ones alone: heads of the other branch are horizontal."""
    return plain(AgentAttention(32, 2, variant="cswin", split_size=4, agent_num=4, window_size=SIDE))


def routed() -> nn.Module:
    """Bi-level routing with four by four regions that choose three."""
    block = BiLevelRoutingAttention(32, 1, n_win=4, topk=3)
    nn.init.eye_(block.qkv.qkv.weight[:32].data)
    nn.init.eye_(block.qkv.qkv.weight[32:64].data)
    return block


def by_distance() -> nn.Module:
    """PAT_sf with a bias that falls with the distance."""
    block = PartialSelfAttention(32, 4)
    nn.init.zeros_(block.attn.qkv.weight)
    table = block.attn.rpe_k.lookup_table_bias.data
    table[:] = -0.35 * (torch.arange(table.shape[1]) - table.shape[1] // 2).abs()
    return block


def panels() -> list[tuple[str, str, nn.Module, int]]:
    """Title, what it says, the block, and the distance of the lines that show regions (0: none)."""
    near = {"kernel_size": 5, "rel_pos_bias": False}
    return [
        ("full, lepe, position", "every position", plain(FullAttention(32)), 0),
        ("neighborhood", "kernel 5", plain(NeighborhoodAttention(32, **near)), 0),
        ("neighborhood", "kernel 5, dilation 3", plain(NeighborhoodAttention(32, **near, dilation=3)), 0),
        ("neighborhood", "kernel 8, stride 4", plain(NeighborhoodAttention(32, kernel_size=8, stride=4)), 4),
        ("neighborhood", "kernel 5, causal rows", plain(NeighborhoodAttention(32, **near, is_causal=(True, False))), 0),
        ("window", "windows of 4", plain(WindowAttention(32, window_size=4)), 4),
        ("window", "windows of 4, shift 2", plain(WindowAttention(32, window_size=4, shift_size=2)), -4),
        ("grid", "4 x 4 spread evenly", plain(GridAttention(32, grid_size=4)), 0),
        ("halo", "blocks of 4, halo 2", plain(HaloAttention(32, 4, block_size=4, halo_size=2)), 4),
        ("bilevel", "4 x 4 regions, top 3", routed(), 4),
        ("agent", "all, through agents", plain(AgentAttention(32, 2, agent_num=16, window_size=SIDE)), 0),
        ("agent, cswin", "strips of 4, both ways", strips(), 0),
        ("partial_self", "bias by distance", by_distance(), 0),
        ("ela", "averages of strips", EfficientLocalAttention(32, variant="T"), 0),
        ("conv", "kernel 7, fixed", DepthwiseConvolution(32), 0),
    ]


def main() -> None:
    """Draws the picture."""
    torch.manual_seed(4)
    figure = Figure(figsize=(10.4, 7.0), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    x = image()
    for number, (title, words, block, step) in enumerate(panels(), 1):
        axes = figure.add_subplot(3, 5, number)
        share = seen(block.eval(), x)
        depth = np.where(share > 1e-9, 0.18 + 0.72 * share, 0)[..., None]
        axes.imshow(1 - depth * (1 - SEEN), interpolation="nearest")
        for edge in np.arange(1, SIDE):
            offset = 2 if step < 0 else 0
            strong = step and (edge - offset) % abs(step) == 0
            for draw in (axes.axhline, axes.axvline):
                draw(edge - 0.5, color=LINE if strong else "#eeeeee", linewidth=0.9 if strong else 0.5)
        axes.add_patch(Rectangle((QUERY[1] - 0.5, QUERY[0] - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=2.2))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{title}\n{words}", fontsize=9, linespacing=1.25)
    figure.savefig(TARGET, format="png", metadata={"Software": None})
    print(f"{TARGET}: {TARGET.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    sys.exit(main())
