"""Agent-CSwin: the CSwin transformer, with agents over the whole map in its first stages and strips in its last.

Papers: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874;
Dong et al., "CSWin Transformer", CVPR 2022, arXiv 2107.00652.
Official code: https://github.com/LeapLabTHU/Agent-Attention, revision 207ce3e, agent_transformer/models/agent_cswin.py
(no licence file; nothing is copied from it).

As coded: the first convolution has kernel 7, stride 4 and padding 2. Blocks with agents have one branch over the whole
map, as in all published configurations. Blocks without agents have strips as thick as the last map is wide (7 at 224,
12 at 384), the last stage attends to its whole map. Nothing but vectors is exempt from weight decay.

Deviations:
- Rectangular images, and sizes that are no multiple of 32, whose last strips are padded; padding is masked.
- With `dynamic_img_size` images of any size are taken; strips keep the thickness that `img_size` gave them.

Legend: B batch, C channels, H and W sides of a map.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from visattn.attention import AgentAttention
from visattn.backbones._agent import ORIGIN, Block, Size, check_size, fit_official, fit_on_load, stage_positions
from visattn.backbones._backbone import Backbone, Head, Stage
from visattn.backbones._build import build, config, image_size
from visattn.backbones._cross_shaped import CrossShapedAttention
from visattn.blocks import drop_path_rates, init_linear

REDUCTIONS = (4, 8, 16, 32)


@register_notrace_module  # it asks about sizes, which torch.fx cannot follow
class Stem(nn.Module):
    """A convolution that overlaps, of stride 4, and a norm.

    Args:
        in_chans: Channels of the image.
        dim: Channels C of the map.
        img_size: The size that images must have; None: any.
    """

    def __init__(self, in_chans: int, dim: int, img_size: Size | None) -> None:
        super().__init__()
        self.img_size = img_size
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """The image (B, in_chans, H, W) as a map (B, (H + 1) / 4, (W + 1) / 4, C), rounded down."""
        check_size(x, self.img_size)
        out: Tensor = self.norm(self.conv(x).movedim(1, -1))
        return out


class Merge(nn.Module):
    """A convolution that overlaps, of stride 2, and a norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 C)."""
        out: Tensor = self.norm(self.conv(x.movedim(-1, 1)).movedim(1, -1))
        return out


def agent_cswin(
    *,
    img_size: int | Sequence[int] = 224,
    dynamic_img_size: bool = False,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    dim: int = 64,
    depths: Sequence[int] = (2, 4, 18, 1),
    heads: Sequence[int] = (2, 4, 8, 16),
    agents: Sequence[int] = (9, 16, 49, 49),
    agent_blocks: Sequence[int] = (2, 4, 0, 0),
    mlp_ratio: float = 4.0,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Backbone:
    """Build Agent-CSwin.

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
        agent_blocks: How many blocks of each stage, the first ones, have agents; the rest have strips.
        mlp_ratio: Width of the MLP over that of the stage.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
    """
    size = image_size(img_size)
    last = len(depths) - 1
    rates = drop_path_rates(drop_path_rate, depths)
    widths = [dim * 2**index for index in range(len(depths))]
    stages = []
    for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        blocks = []
        for i in range(depth):
            attention: nn.Module
            if i < agent_blocks[index]:
                attention = AgentAttention(
                    width,
                    heads[index],
                    variant="cswin",
                    agent_num=agents[index],
                    window_size=_grid(size, index),
                    split_size=None,
                )
            else:
                attention = CrossShapedAttention(width, heads[index], None if index == last else _grid(size, last))
            blocks.append(Block(width, attention, mlp_ratio, 1e-5, rates[index][i]))
        stages.append(Stage(nn.Identity() if index == 0 else Merge(widths[index - 1]), blocks))
    network = Backbone(
        Stem(in_chans, dim, None if dynamic_img_size else size),
        stages,
        widths=widths,
        reductions=REDUCTIONS,
        norm=nn.LayerNorm(widths[-1]),
        head=Head(widths[-1], num_classes, pool=global_pool, channels_last=True, drop_rate=drop_rate),
        in_chans=in_chans,
        num_classes=num_classes,
        channels_last=True,
    )
    network.apply(init_linear)
    fit_on_load(network, stage_positions)
    return network


def _grid(size: Size, stage: int) -> Size:
    """The map of a stage for images of `size`."""
    height, width = (-(-((side + 1) // 4) // 2**stage) for side in size)
    return height, width


def official_name(key: str) -> str:
    """The authors' name of our parameter `key`."""
    part, _, rest = key.partition(".")
    if part == "stages":
        number, place, rest = rest.split(".", 2)
        if place == "downsample":
            return f"merge{number}.{rest}"
        # Projections and strips belong to the block itself, there.
        return f"stage{int(number) + 1}.{rest.replace('.attn.', '.')}"
    if part == "stem":
        return f"stage1_conv_embed.{rest.replace('conv', '0').replace('norm', '2')}"
    return key.replace("head.fc.", "head.")


def unused(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """There are no entries that the official code never reads."""
    return {}


def translate(official: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict with tables for the image size of `model`."""
    return fit_official(official, model, official_name, {})


_CONFIG = config("stem.conv", fixed_input_size=True, **ORIGIN)
default_cfgs = generate_default_cfgs({f"va_agent_cswin_{size}": _CONFIG for size in "tsb"})
_DEEP: dict[str, Any] = {"depths": (3, 6, 29, 2), "agent_blocks": (3, 6, 0, 0)}


@register_model
def va_agent_cswin_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Blocks 2, 4, 18, 1; 20.5M parameters."""
    return build(agent_cswin, "va_agent_cswin_t", pretrained, **{"drop_path_rate": 0.2, **kwargs})


@register_model
def va_agent_cswin_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Blocks 3, 6, 29, 2; 33M parameters."""
    return build(agent_cswin, "va_agent_cswin_s", pretrained, **{**_DEEP, "drop_path_rate": 0.4, **kwargs})


@register_model
def va_agent_cswin_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """As the small one, wider, 73M parameters."""
    plan = {**_DEEP, "dim": 96, "heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
    return build(agent_cswin, "va_agent_cswin_b", pretrained, **{**plan, **kwargs})
