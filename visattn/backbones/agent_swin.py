"""Agent-Swin: the Swin transformer, with agents over the whole map in its first stages and shifted windows in its last.

Papers: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874;
Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030.
Official code: https://github.com/LeapLabTHU/Agent-Attention, revision 207ce3e, agent_transformer/models/agent_swin.py
(no licence file; nothing is copied from it).

As coded: agents see the whole map, since the published configurations give their blocks a window of a quarter of the
image's side. Blocks without agents have windows of max(7, side // 32), which is an eighth of the former, or of the
whole map where it is smaller; every second one of them is shifted by half a window, unless the map is one window.
Tables by relative position are not decayed, tables of agents are.

Deviations:
- Rectangular images: agents see the whole map, where the official code cuts it into squares; a map is shifted along
  the axis that is longer than a window.
- Maps that are no multiple of the window, and odd ones before they are halved, are padded; padding is masked in
  attention. The official code refuses them. Pixels behind the last whole patch of 4 are not seen, as there.
- With `dynamic_img_size` images of any size are taken.

Legend: B batch, C channels, H and W sides of a map.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visattn.attention import AgentAttention, WindowAttention
from visattn.backbones._agent import ORIGIN, Block, Patches, Size, fit_official, fit_on_load, stage_positions
from visattn.backbones._backbone import Backbone, Head, Stage
from visattn.backbones._build import build, config, image_size
from visattn.blocks import PatchMerging, drop_path_rates, init_linear

REDUCTIONS = (4, 8, 16, 32)


def agent_swin(
    *,
    img_size: int | Sequence[int] = 224,
    dynamic_img_size: bool = False,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    agents: Sequence[int] = (9, 16, 49, 49),
    agent_blocks: Sequence[int] = (2, 2, 6, 0),
    mlp_ratio: float = 4.0,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Backbone:
    """Build Agent-Swin.

    Args:
        img_size: Height and width of the images that the position tables are stored for, or one number for both.
        dynamic_img_size: Take images of any size and resize the tables at every call. Otherwise other sizes
            are refused.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: `avg`, `max`, or empty for none.
        dim: Channels of the first stage, doubled from stage to stage.
        depths: Blocks of each stage.
        heads: Heads of each stage.
        agents: Agents of each stage, squares.
        agent_blocks: How many blocks of each stage, the first ones, have agents; the rest have windows.
        mlp_ratio: Width of the MLP over that of the stage.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
    """
    size = image_size(img_size)
    rates = drop_path_rates(drop_path_rate, depths)
    widths = [dim * 2**index for index in range(len(depths))]
    stages = []
    for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        grid = _grid(size, index)
        window = min(max(7, min(size) // 32), *grid)
        blocks = []
        for i in range(depth):
            attention: nn.Module
            if i < agent_blocks[index]:
                attention = AgentAttention(width, heads[index], agent_num=agents[index], window_size=grid)
            else:
                shift = i % 2 * (window // 2)
                attention = WindowAttention(width, heads[index], window_size=window, shift_size=shift)
            blocks.append(Block(width, attention, mlp_ratio, 1e-5, rates[index][i]))
        stages.append(Stage(nn.Identity() if index == 0 else PatchMerging(widths[index - 1]), blocks))
    network = Backbone(
        Patches(in_chans, dim, 4, img_size=None if dynamic_img_size else size),
        stages,
        widths=widths,
        reductions=REDUCTIONS,
        norm=nn.LayerNorm(widths[-1]),
        head=Head(widths[-1], num_classes, pool=global_pool, channels_last=True, drop_rate=drop_rate),
        in_chans=in_chans,
        num_classes=num_classes,
        channels_last=True,
        no_decay=("relative_position_bias_table",),
    )
    network.apply(init_linear)
    fit_on_load(network, stage_positions)
    return network


def _grid(size: Size, stage: int) -> Size:
    """The map of a stage for images of `size`: whole patches, halved and rounded up."""
    height, width = (-(-(side // 4) // 2**stage) for side in size)
    return height, width


def official_name(key: str) -> str:
    """The authors' name of our parameter `key`."""
    part, _, rest = key.partition(".")
    if part == "stages":
        number, place, rest = rest.split(".", 2)
        # A map is halved at the end of the stage before, there.
        return f"layers.{int(number) - (place == 'downsample')}.{place}.{rest}".replace(".rel_pos.", ".")
    return f"patch_embed.{rest}" if part == "stem" else key.replace("head.fc.", "head.")


def _windows(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """For each block with windows: the official prefix, positions of a window, and half of its side if shifted."""
    for name, module in model.named_modules():
        if isinstance(module, WindowAttention):
            prefix = official_name(f"{name.removesuffix('.attn')}.x").removesuffix(".x")
            yield prefix, math.prod(module.window_size), max(module.shift_size)


def unused(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Index tables of the official windows, which follow from their size."""
    return {f"{prefix}.attn.relative_position_index": (area, area) for prefix, area, _ in _windows(model)}


def translate(official: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict with tables for the image size of `model`, without what they compute from sizes."""
    fitting = fit_official(official, model, official_name, {})
    other_size = any(fitting[key] is not official[key] for key in fitting)
    for prefix, area, shift in _windows(model):
        index, mask = f"{prefix}.attn.relative_position_index", f"{prefix}.attn_mask"
        if other_size:
            fitting.pop(index, None)
        # One square per window of the image; blocks that are not shifted have none.
        if shift and (other_size or (mask in fitting and tuple(fitting[mask].shape[1:]) == (area, area))):
            fitting.pop(mask, None)
    return fitting


_CONFIG = config("stem.proj", fixed_input_size=True, **ORIGIN)
default_cfgs = generate_default_cfgs({f"va_agent_swin_{size}": _CONFIG for size in "tsb"})


@register_model
def va_agent_swin_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agents in stages 1 to 3, 28.9M parameters."""
    return build(agent_swin, "va_agent_swin_t", pretrained, **{"drop_path_rate": 0.2, **kwargs})


@register_model
def va_agent_swin_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agents in stages 1 and 2, 50M parameters."""
    plan = {"depths": (2, 2, 18, 2), "agent_blocks": (2, 2, 0, 0), "drop_path_rate": 0.3}
    return build(agent_swin, "va_agent_swin_s", pretrained, **{**plan, **kwargs})


@register_model
def va_agent_swin_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agents in stages 1 and 2 and in two blocks of stage 3, 88M parameters."""
    plan = {
        "dim": 128,
        "depths": (2, 2, 18, 2),
        "heads": (4, 8, 16, 32),
        "agent_blocks": (2, 2, 2, 0),
        "drop_path_rate": 0.5,
    }
    return build(agent_swin, "va_agent_swin_b", pretrained, **{**plan, **kwargs})
