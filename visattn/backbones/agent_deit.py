"""Agent-DeiT: a vision transformer on patches of 16 pixels with a class token, its attention replaced by agents.

Papers: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874;
Touvron et al., "Training data-efficient image transformers", ICML 2021, arXiv 2012.12877.
Official code: https://github.com/LeapLabTHU/Agent-Attention, revision 207ce3e, agent_transformer/models/agent_deit.py
(no licence file; nothing is copied from it).

As coded: the class token is a query and a key, but not pooled into agents and not convolved; norms have eps 1e-6; the
base model has agents in its first four blocks and plain attention in the others.

Deviations:
- Images may be rectangular, and of any size with `dynamic_img_size`.
- Dropout exists before the classifier only.

Legend: B batch, C channels, H and W sides of the map of patches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visattn.attention import AgentAttention, FullAttention
from visattn.backbones._agent import (
    ORIGIN,
    Block,
    Size,
    check_size,
    fit_official,
    fit_on_load,
    position_table,
    resized_grid,
)
from visattn.backbones._backbone import Head, Indices, spare_tables, taken_indices
from visattn.backbones._build import build, config, image_size
from visattn.blocks import drop_path_rates, init_linear

PATCH = 16
POOLS = ("token", "avg", "max", "")


@register_notrace_module  # it asks about sizes, which torch.fx cannot follow
class Tokens(nn.Module):
    """The first layer: patches as tokens with their positions, behind the class token.

    Args:
        in_chans: Channels of the images.
        dim: Channels C.
        grid: Height and width of the map that the positions are stored for.
        img_size: The size that images must have; None: any.
    """

    def __init__(self, in_chans: int, dim: int, grid: Size, img_size: Size | None) -> None:
        super().__init__()
        self.grid, self.img_size = grid, img_size
        self.proj = nn.Conv2d(in_chans, dim, PATCH, stride=PATCH)
        self.cls_token = position_table(1, dim)
        self.pos_embed = position_table(1 + math.prod(grid), dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """The tokens (B, 1 + H W, C) of images (B, in_chans, *), and (H, W)."""
        check_size(x, self.img_size)
        maps = self.proj(x).movedim(1, -1)  # (B, H, W, C)
        size = (maps.shape[1], maps.shape[2])
        grid = resized_grid(torch.unflatten(self.pos_embed[:, 1:], 1, self.grid), size, "bilinear")
        first = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([first, (maps + grid).flatten(1, 2)], dim=1), size


class AgentDeit(nn.Module):
    """A plain vision transformer with agents, with the interface of timm's models.

    Its features are tokens (B, 1 + H W, C), the class token first. Maps, as of `forward_intermediates`, come without
    the class token.

    Args:
        img_size: Height and width of the images that the position tables are stored for, or one number for both.
        dynamic_img_size: Take images of any size and resize the tables at every call. Otherwise other sizes
            are refused.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: What is classified: `token`, the class token; `avg` or `max` over the positions of the map; empty:
            every token.
        dim: Channels C.
        depth: Blocks.
        num_heads: Heads.
        agent_num: Agents, a square.
        agent_blocks: How many blocks, the first ones, have agents; the rest have plain attention. None: all.
        mlp_ratio: Width of the MLP over `dim`.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Attributes:
        feature_info: A record per block: `num_chs`, `reduction`, `module`.
        num_features: C.
        head_hidden_size: C.
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        dynamic_img_size: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        agent_num: int = 49,
        agent_blocks: int | None = None,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = image_size(img_size)
        grid = (height // PATCH, width // PATCH)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.num_prefix_tokens = 1
        self.output_fmt = "NLC"
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": PATCH, "module": f"blocks.{index}"} for index in range(depth)
        ]
        self.stem = Tokens(in_chans, dim, grid, None if dynamic_img_size else (height, width))
        blocks = []
        for index, rate in enumerate(drop_path_rates(drop_path_rate, [depth])[0]):
            attention: nn.Module
            if agent_blocks is None or index < agent_blocks:
                attention = AgentAttention(dim, num_heads, variant="deit", agent_num=agent_num, window_size=grid)
            else:
                attention = FullAttention(dim, num_heads)
            blocks.append(Block(dim, attention, mlp_ratio, 1e-6, rate))
        self.blocks = nn.Sequential(*blocks)
        self.norm: nn.Module = nn.LayerNorm(dim, 1e-6)
        self.global_pool = _pool(global_pool)
        self.head = Head(dim, num_classes, pool="", channels_last=True, drop_rate=drop_rate)
        self.apply(init_linear)
        fit_on_load(self, _positions)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(spare_tables(fn, 4), recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone."""
        return {"stem.pos_embed", "stem.cls_token"}

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, from the image on."""
        return {
            "stem": r"^stem",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether backward computes the blocks' activations again instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; 0 classes leave it out, an empty `global_pool` leaves the pooling out."""
        if global_pool is not None:
            self.global_pool = _pool(global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, like=next(self.parameters()))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Maps after several blocks, without the class token, and what `forward_features` gives.

        Args:
            x: (B, in_chans, H, W).
            indices: Blocks to take: None all, an integer the last so many, else a list (negative from the end).
            return_prefix_tokens: Give pairs of a map and the class token (B, 1, C).
            norm: Whether maps are taken after the final norm.
            stop_early: Stop at the last block asked for.
            output_fmt: `NCHW`, `NHWC`, or `NLC` for tokens (B, H W, C).
            intermediates_only: Give only the list of maps.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW', 'NHWC' or 'NLC', got {output_fmt!r}")
        taken = taken_indices(len(self.feature_info), indices)
        found: list[Any] = []
        x, size = self.stem(x)
        for index, block in enumerate(self.blocks):
            if stop_early and index > max(taken):
                break
            x = self._run(block, x, size)
            if index in taken:
                tokens = self.norm(x) if norm else x
                places = tokens[:, 1:]
                if output_fmt != "NLC":
                    places = torch.unflatten(places, 1, size)
                if output_fmt == "NCHW":
                    places = places.movedim(-1, 1)
                found.append((places, tokens[:, :1]) if return_prefix_tokens else places)
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: Indices = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last one asked for, and on request the norm and the head."""
        taken = taken_indices(len(self.feature_info), indices)
        self.blocks = self.blocks[: max(taken) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + H W, C) after the last norm, the class token first."""
        x, size = self.stem(x)
        for block in self.blocks:
            x = self._run(block, x, size)
        x = self.norm(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of `forward_features`' tokens, or the features before the classifier."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 1:].mean(1)
        elif self.global_pool == "max":
            x = x[:, 1:].amax(1)
        out: Tensor = self.head(x, pre_logits=pre_logits)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def _run(self, block: nn.Module, x: Tensor, size: Size) -> Tensor:
        """One block, which is told the size of the map if its attention asks for it."""
        arguments = (x, size) if isinstance(block.attn, AgentAttention) else (x,)
        if self.grad_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, *arguments, use_reentrant=False)
        else:
            out = block(*arguments)
        return out


def _pool(name: str) -> str:
    if name not in POOLS:
        raise ValueError(f"global_pool must be 'token', 'avg', 'max' or '' (none), got {name!r}")
    return name


def _positions(model: nn.Module) -> dict[str, str]:
    """The block whose tables tell the sides of the map that `pos_embed` belongs to."""
    return {"stem.pos_embed": "blocks.0.attn"}


def official_name(key: str) -> str:
    """The authors' name of our parameter `key`."""
    if key.startswith("stem.proj."):
        return key.replace("stem.", "patch_embed.")
    return key.removeprefix("stem.").replace("head.fc.", "head.")


def unused(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """There are no entries that the official code never reads."""
    return {}


def translate(official: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict with tables for the image size of `model`."""
    return fit_official(official, model, official_name, _positions(model))


_CONFIG = config("stem.proj", fixed_input_size=True, pool_size=None, **ORIGIN)
default_cfgs = generate_default_cfgs({f"va_agent_deit_{size}": _CONFIG for size in "tsb"})


def _quarters(depth: int = 12, **_: Any) -> tuple[int, ...]:
    """The last block of each quarter of the network, whose maps `features_only=True` gives by default."""
    return tuple(sorted({-(-depth * part // 4) - 1 for part in (1, 2, 3, 4)}))


@register_model
def va_agent_deit_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """192 channels, 6.0M parameters."""
    return build(AgentDeit, "va_agent_deit_t", pretrained, **{"out_indices": _quarters(**kwargs), **kwargs})


@register_model
def va_agent_deit_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """384 channels, 22.6M parameters."""
    plan = {"dim": 384, "num_heads": 6, "drop_path_rate": 0.1, "out_indices": _quarters(**kwargs)}
    return build(AgentDeit, "va_agent_deit_s", pretrained, **{**plan, **kwargs})


@register_model
def va_agent_deit_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """768 channels, agents in the first four of twelve blocks, 87.2M parameters."""
    plan = {
        "dim": 768,
        "num_heads": 12,
        "agent_num": 81,
        "agent_blocks": 4,
        "drop_path_rate": 0.3,
        "out_indices": _quarters(**kwargs),
    }
    return build(AgentDeit, "va_agent_deit_b", pretrained, **{**plan, **kwargs})
