"""What the four Agent Attention families share: blocks, patches, and position tables that follow the image size.

Every table of these networks is stored for one image size, so a model is built for a size (`img_size`) and refuses
images of another, unless it is told to resize its tables as it goes (`dynamic_img_size`). Weights that were saved for
another size are resized as they are loaded, by `fitted`.

Legend: B batch, C channels, H and W sides of a map, h heads, n agents.
"""

import logging
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from visattn.attention._windows import certain
from visattn.blocks import Mlp, drop_path

_logger = logging.getLogger(__name__)

ORIGIN = {"origin_url": "https://github.com/LeapLabTHU/Agent-Attention", "paper_ids": "arXiv:2312.08874"}
Size = tuple[int, int]
Positions = Callable[[nn.Module], dict[str, str]]
"""Gives each `pos_embed` of a model with the prefix of an agent block on the same map."""
LINES = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}
"""Tables of an agent block with one value per row or column of the map, and the axis along which they run."""


@register_notrace_module  # attention chooses its way by sizes, which torch.fx cannot follow
class Block(nn.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut.

    Args:
        dim: Channels C.
        attn: Keeps the shape of its first argument.
        mlp_ratio: Width of the MLP over `dim`.
        eps: Of the norms.
        drop_path_rate: Stochastic depth of both branches.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, eps: float, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = attn
        self.drop_path1 = drop_path(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = drop_path(drop_path_rate)

    def forward(self, x: Tensor, *size: Size) -> Tensor:
        """(B, H, W, C) to the same shape; or tokens (B, 1 + HW, C), with (H, W) where the attention takes it."""
        x = x + self.drop_path1(self.attn(self.norm1(x), *size))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


@register_notrace_module
class Patches(nn.Module):
    """Patches of a map or of an image as vectors: a convolution that steps by its kernel, and a norm.

    Pixels behind the last whole patch of an axis are not seen.

    Args:
        in_chans: Channels of the map.
        dim: Channels C of a vector.
        patch: Side of a patch.
        img_size: The size that images must have, of a first layer; None: any, or no first layer.
        first: Whether the input is an image (B, in_chans, H, W), otherwise a map (B, H, W, in_chans).
        grid: Height and width of a map to give every position of it a learned vector, under `pos_embed`; None: none.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch: int,
        *,
        img_size: Size | None = None,
        first: bool = True,
        grid: Size | None = None,
    ) -> None:
        super().__init__()
        self.img_size, self.first, self.grid = img_size, first, grid
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim)
        self.pos_embed = None if grid is None else position_table(math.prod(grid), dim)

    def forward(self, x: Tensor) -> Tensor:
        """The map of patches (B, H / patch, W / patch, C)."""
        if self.first:
            check_size(x, self.img_size)
        else:
            x = x.movedim(-1, 1)
        x = self.norm(self.proj(x).movedim(1, -1))
        if self.pos_embed is not None and self.grid is not None:
            x = x + resized_grid(torch.unflatten(self.pos_embed, 1, self.grid), (x.shape[1], x.shape[2]), "bilinear")
        return x


def position_table(positions: int, dim: int) -> nn.Parameter:
    """Learned vectors (1, positions, dim), drawn from a truncated normal of std 0.02."""
    table = nn.Parameter(torch.empty(1, positions, dim))
    nn.init.trunc_normal_(table, std=0.02)
    return table


def check_size(x: Tensor, img_size: Size | None) -> None:
    """Refuse images (B, in_chans, H, W) of another size than `img_size`; None: take any."""
    if img_size is not None and tuple(x.shape[-2:]) != img_size:
        height, width = x.shape[-2:]
        raise ValueError(
            f"this model was built for images of {img_size[0]} x {img_size[1]} pixels, got {height} x {width}: create "
            f"it with img_size=({height}, {width}), or with dynamic_img_size=True for images of any size"
        )


def resized_grid(grid: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """`grid` (1, H, W, C) at another height and width, by `bilinear` or `bicubic` interpolation; itself if it fits."""
    if all(certain(old == new) for old, new in zip(grid.shape[1:3], size, strict=True)):
        return grid
    return F.interpolate(grid.movedim(-1, 1), size=tuple(size), mode=mode).movedim(1, -1)


def _line(table: Tensor, axis: int, length: int) -> Tensor:
    """`table` with `axis` resized linearly."""
    moved = table.movedim(axis, -1)
    resized = F.interpolate(moved.flatten(1, -2), size=length, mode="linear")
    return resized.reshape(*moved.shape[:-1], length).movedim(-1, axis)


def _relative(table: Tensor, entries: int) -> Tensor:
    """`table` (sides ** 2, h) of a square window for another one, bicubically as in the authors' code."""
    old, new = math.isqrt(len(table)), math.isqrt(entries)
    return resized_grid(table.reshape(1, old, old, -1), (new, new), "bicubic").reshape(entries, -1)


def _position(table: Tensor, old: Size, new: Size) -> Tensor:
    """`table` (1, tokens + positions, C) for a map of another size; tokens before the positions stay as they are."""
    tokens = table.shape[1] - math.prod(old)
    grid = resized_grid(torch.unflatten(table[:, tokens:], 1, old), new, "bilinear")
    return torch.cat([table[:, :tokens], grid.flatten(1, 2)], dim=1)


def _sides(shapes: Mapping[str, tuple[int, ...]], block: str) -> Size | None:
    """Height and width of the map that the agent tables of `block` are for; None if they are not there."""
    rows, columns = (shapes.get(f"{block}.{name}", ()) for name in ("ha_bias", "wa_bias"))
    return (rows[2], columns[3]) if len(rows) == len(columns) == 5 else None


def fitted(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], positions: Mapping[str, str]
) -> dict[str, Tensor]:
    """Weights with their position tables resized to other shapes.

    Agent tables are resized linearly and tables by relative position bicubically, as by the authors' training script,
    `pos_embed` bilinearly, as by their models. Whatever does not fit for another reason is left for others to refuse.

    Args:
        tensors: A state dict.
        wanted: The shapes by the same keys.
        positions: For each `pos_embed` the prefix of an agent block on the same map, whose tables tell the map's sides.
    """
    out = dict(tensors)
    given = {key: tuple(table.shape) for key, table in tensors.items()}
    for key, shape in wanted.items():
        table = tensors.get(key)
        if table is None or table.dim() != len(shape):
            continue
        kind = key.rsplit(".", 1)[-1]
        line = LINES.get(kind)
        unequal = [axis for axis, sides in enumerate(zip(table.shape, shape, strict=True)) if len(set(sides)) > 1]
        if line is not None and unequal == [line]:
            out[key] = _line(table, line, shape[line])
        elif kind == "relative_position_bias_table" and unequal == [0] and math.isqrt(len(table)) ** 2 == len(table):
            out[key] = _relative(table, shape[0])
        elif key in positions:
            # Maps of 2 x 3 and of 3 x 2 have as many positions, so shapes do not tell.
            old, new = _sides(given, positions[key]), _sides(wanted, positions[key])
            if old and new and old != new and math.prod(old) <= table.shape[1]:
                out[key] = _position(table, old, new)
    changed = [key for key in wanted if key in tensors and out[key] is not tensors[key]]
    if changed:
        _logger.info("resized %d position tables that were saved for another image size", len(changed))
    return out


class _FitOnLoad:
    """What a model does first when a state dict of its own is loaded: tables of another image size are resized."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions

    def __call__(self, module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: object) -> None:
        """Change `state_dict` in place, a hook of torch."""
        own = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        given = {name: state_dict[prefix + name] for name in own if isinstance(state_dict.get(prefix + name), Tensor)}
        for name, table in fitted(given, own, self.positions(module)).items():
            state_dict[prefix + name] = table


def fit_on_load(model: nn.Module, positions: Positions) -> None:
    """Let `model` resize the position tables of any state dict that it loads, as `fitted` does."""
    model.register_load_state_dict_pre_hook(_FitOnLoad(positions))  # type: ignore[no-untyped-call]


def fit_official(
    official: Mapping[str, Tensor],
    model: nn.Module,
    official_name: Callable[[str], str],
    positions: Mapping[str, str],
) -> dict[str, Tensor]:
    """The authors' state dict with tables of the sizes that `model` has; `positions` by the model's own names."""
    wanted = {official_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    places = {official_name(key): official_name(f"{block}.x").removesuffix(".x") for key, block in positions.items()}
    return fitted(official, wanted, places)


def stage_positions(model: nn.Module) -> dict[str, str]:
    """For each `pos_embed` of a backbone in stages, the attention of the stage's first block."""
    names = [name for name, _ in model.named_parameters() if name.endswith("pos_embed")]
    return {name: f"stages.{0 if name.startswith('stem') else name.split('.')[1]}.blocks.0.attn" for name in names}
