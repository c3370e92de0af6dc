"""Agent-PVT: the pyramid vision transformer, its attention on reduced keys replaced by agents on all of them.

Papers: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874;
Wang et al., "Pyramid Vision Transformer", ICCV 2021, arXiv 2102.12122.
Official code: https://github.com/LeapLabTHU/Agent-Attention, revision 207ce3e, agent_transformer/models/agent_pvt.py
(no licence file; nothing is copied from it).

As coded: patches of 4 and then of 2 pixels, each a convolution, a LayerNorm (eps 1e-5) and learned positions; norms in
blocks have eps 1e-6; there is no norm after the last stage. Learned positions are decayed like other weights.

Deviations:
- Images may be rectangular, and of any size with `dynamic_img_size`.
- Drop path starts at rate 0 and grows linearly, as there; dropout exists before the classifier only.

Legend: B batch, C channels, H and W sides of a map.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visattn.attention import AgentAttention, FullAttention
from visattn.backbones._agent import ORIGIN, Block, Patches, fit_official, fit_on_load, stage_positions
from visattn.backbones._backbone import Backbone, Head, Stage
from visattn.backbones._build import build, config, image_size
from visattn.blocks import drop_path_rates, init_linear

REDUCTIONS = (4, 8, 16, 32)


def agent_pvt(
    *,
    img_size: int | Sequence[int] = 224,
    dynamic_img_size: bool = False,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    depths: Sequence[int] = (2, 2, 2, 2),
    widths: Sequence[int] = (64, 128, 320, 512),
    heads: Sequence[int] = (1, 2, 5, 8),
    mlp_ratios: Sequence[float] = (8, 8, 4, 4),
    agents: Sequence[int] = (9, 16, 49, 49),
    agent_blocks: Sequence[int] | None = None,
    sr_ratios: Sequence[int] = (8, 4, 2, 1),
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Backbone:
    """Build Agent-PVT.

    Args:
        img_size: Height and width of the images that the position tables are stored for, or one number for both.
        dynamic_img_size: Take images of any size and resize the tables at every call. Otherwise other sizes
            are refused.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: `avg`, `max`, or empty for none.
        depths: Blocks of each stage.
        widths: Channels of each stage.
        heads: Heads of each stage.
        mlp_ratios: Width of the MLP over that of the stage.
        agents: Agents of each stage, squares.
        agent_blocks: How many blocks of each stage, the first ones, have agents; the rest have PVT's own attention.
            None: all.
        sr_ratios: Reduction of the keys of PVT's own attention.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
    """
    height, width = image_size(img_size)
    fixed = None if dynamic_img_size else (height, width)
    rates = drop_path_rates(drop_path_rate, depths)
    stages = []
    first: nn.Module = nn.Identity()
    for index, (depth, dim) in enumerate(zip(depths, widths, strict=True)):
        grid = height // REDUCTIONS[index], width // REDUCTIONS[index]
        down: nn.Module = nn.Identity()
        if index == 0:
            first = Patches(in_chans, dim, 4, img_size=fixed, grid=grid)
        else:
            down = Patches(widths[index - 1], dim, 2, first=False, grid=grid)
        blocks = []
        for i in range(depth):
            attention: nn.Module
            if agent_blocks is None or i < agent_blocks[index]:
                attention = AgentAttention(dim, heads[index], variant="pvt", agent_num=agents[index], window_size=grid)
            else:
                attention = FullAttention(dim, heads[index], variant="pvt", sr_ratio=sr_ratios[index])
            blocks.append(Block(dim, attention, mlp_ratios[index], 1e-6, rates[index][i]))
        stages.append(Stage(down, blocks))
    network = Backbone(
        first,
        stages,
        widths=widths,
        reductions=REDUCTIONS,
        norm=nn.Identity(),
        head=Head(widths[-1], num_classes, pool=global_pool, channels_last=True, drop_rate=drop_rate),
        in_chans=in_chans,
        num_classes=num_classes,
        channels_last=True,
    )
    network.apply(init_linear)
    fit_on_load(network, stage_positions)
    return network


def official_name(key: str) -> str:
    """The authors' name of our parameter `key`."""
    part, _, rest = key.partition(".")
    if part == "stages":
        number, place, rest = rest.split(".", 2)
        stage = int(number) + 1
        if place == "blocks":
            return f"block{stage}.{rest}"
    elif part == "stem":
        stage = 1
    else:
        return key.replace("head.fc.", "head.")
    return f"pos_embed{stage}" if rest == "pos_embed" else f"patch_embed{stage}.{rest}"


def unused(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """There are no entries that the official code never reads."""
    return {}


def translate(official: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict with tables for the image size of `model`."""
    return fit_official(official, model, official_name, stage_positions(model))


_CONFIG = config("stem.proj", fixed_input_size=True, **ORIGIN)
default_cfgs = generate_default_cfgs({f"va_agent_pvt_{size}": _CONFIG for size in "tsml"})


@register_model
def va_agent_pvt_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Two blocks per stage, 11.6M parameters."""
    return build(agent_pvt, "va_agent_pvt_t", pretrained, **{"drop_path_rate": 0.1, **kwargs})


@register_model
def va_agent_pvt_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Blocks 3, 4, 6, 3; 20.6M parameters."""
    plan = {"depths": (3, 4, 6, 3), "drop_path_rate": 0.1}
    return build(agent_pvt, "va_agent_pvt_s", pretrained, **{**plan, **kwargs})


@register_model
def va_agent_pvt_m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Blocks 3, 4, 18, 3; 35.9M parameters."""
    plan = {"depths": (3, 4, 18, 3), "drop_path_rate": 0.3}
    return build(agent_pvt, "va_agent_pvt_m", pretrained, **{**plan, **kwargs})


@register_model
def va_agent_pvt_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Blocks 3, 8, 27, 3; 48.7M parameters."""
    plan = {"depths": (3, 8, 27, 3), "drop_path_rate": 0.3}
    return build(agent_pvt, "va_agent_pvt_l", pretrained, **{**plan, **kwargs})
