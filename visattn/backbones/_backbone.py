"""What every backbone is: stem, stages, norm and head, with timm's contract around them.

A family builds its parts and hands them to `Backbone`; there is no subclass per family. The parts work in one layout
throughout, channels-last (B, *S, C) or channels-first (B, C, *S); images come in and maps go out channels-first.

Legend: B batch, *S spatial axes, C channels, N classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from timm.models import checkpoint_seq, register_notrace_module
from torch import Tensor, nn

from visattn.blocks import Mlp as Mlp
from visattn.blocks import ToChannelsFirst as ToChannelsFirst
from visattn.blocks import ToChannelsLast as ToChannelsLast
from visattn.blocks import drop_path as drop_path
from visattn.blocks import drop_path_rates as drop_path_rates
from visattn.blocks import init_linear as init_linear

Indices = int | Sequence[int] | None


@register_notrace_module  # blocks choose their way by sizes, which torch.fx cannot follow
class Stage(nn.Module):
    """A change of resolution and width, then blocks.

    Args:
        downsample: Takes the previous map; the identity where nothing changes.
        blocks: Run one after another; these are what gradient checkpointing runs again.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """The next map."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting() and torch.is_grad_enabled():  # type: ignore[attr-defined]
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x


@register_notrace_module
class Head(nn.Module):
    """Global pooling and a classifier.

    Args:
        in_features: Channels C of the last map.
        num_classes: N; 0 leaves the classifier out.
        pool: `avg`, `max`, or empty: every position is then classified and a map comes out.
        channels_last: Layout of the map.
        norm: Applied to the pooled features, on the last axis.
        hidden: Applied after the norm, on the last axis: (B, C) to (B, hidden_features).
        hidden_features: Width after `hidden`; None: `in_features`.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        pool: str = "avg",
        channels_last: bool,
        norm: nn.Module | None = None,
        hidden: nn.Module | None = None,
        hidden_features: int | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_features = hidden_features or in_features
        self.channels_last = channels_last
        self.norm = norm or nn.Identity()
        self.pre_logits = hidden or nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Identity()
        self.pool = ""
        self.reset(num_classes, pool)

    def reset(self, num_classes: int, pool: str | None = None, like: Tensor | None = None) -> None:
        """A new classifier of `num_classes`, and new pooling unless None; on the device and of the dtype of `like`."""
        if pool is not None:
            if pool not in ("", "avg", "max"):
                raise ValueError(f"global_pool must be 'avg', 'max' or '' (none), got {pool!r}")
            self.pool = pool
        if num_classes == 0:
            self.fc = nn.Identity().train(self.training)
            return
        where: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        self.fc = nn.Linear(self.num_features, num_classes, **where).train(self.training)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, N) of a map; without pooling a map of logits in the layout of `x`."""
        if self.pool:
            # In the map's own layout: behind a batch norm the gradient of a moved axis breaks torch.compile.
            axes = list(range(1, x.ndim - 1)) if self.channels_last else list(range(2, x.ndim))
            x = x.mean(axes) if self.pool == "avg" else x.amax(axes)
        elif not self.channels_last:
            x = x.movedim(1, -1)
        x = self.drop(self.pre_logits(self.norm(x)))
        if not pre_logits:
            x = self.fc(x)
        return x if self.pool or self.channels_last else x.movedim(-1, 1)


class Backbone(nn.Module):
    """A hierarchical network for classification and for maps, with the interface of timm's models.

    Args:
        stem: Image (B, in_chans, *S) to the first map, in the backbone's layout.
        stages: Each gives one map.
        widths: Channels of each map.
        reductions: How many pixels of the image one position of each map stands for, per axis.
        norm: Applied to the last map by `forward_features`.
        head: Features to logits.
        in_chans: Channels of the image.
        channels_last: Layout between the parts.
        map_norms: Norms of the maps that `forward_intermediates` gives, one per stage; the un-normalised map goes on to
            the next stage. None: maps are given as they are.
        no_decay: Names of parameters, or ends of names, without weight decay beside biases and vectors.
        num_features: Channels after `norm`, where it is a convolution that changes them; None: as before.

    Attributes:
        feature_info: A record per map: `num_chs`, `reduction`, `module`.
        num_features: Channels of what `forward_features` gives.
        head_hidden_size: Width of the features before the classifier.
        output_fmt: `NHWC` or `NCHW`, the layout of `forward_features`.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        *,
        widths: Sequence[int],
        reductions: Sequence[int],
        norm: nn.Module,
        head: Head,
        in_chans: int,
        num_classes: int,
        channels_last: bool,
        map_norms: Sequence[nn.Module] | None = None,
        no_decay: Sequence[str] = (),
        num_features: int | None = None,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.channels_last = channels_last
        self.output_fmt = "NHWC" if channels_last else "NCHW"
        self.num_features = widths[-1] if num_features is None else num_features
        self.head_hidden_size = head.num_features
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{index}"}
            for index, (width, reduction) in enumerate(zip(widths, reductions, strict=True))
        ]
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.norm = norm
        self.head = head
        if map_norms is not None:
            self.map_norms = nn.ModuleList(map_norms)
        self._no_decay = tuple(no_decay)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(spare_tables(fn, max(weight.ndim for weight in self.stem.parameters())), recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone."""
        return (
            {name for name, _ in self.named_parameters() if name.endswith(self._no_decay)} if self._no_decay else set()
        )

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, from the image on."""
        blocks = [(r"^stages\.(\d+)", None)] if coarse else [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)", (0,)),
        ]  # fmt: skip
        return {"stem": r"^stem", "blocks": [*blocks, (r"^norm|^map_norms", (99999,))]}

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether backward computes the blocks' activations again instead of keeping them."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; 0 classes leave it out, an empty `global_pool` leaves the pooling out."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, next(self.parameters()))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of several stages, and what `forward_features` gives.

        Args:
            x: (B, in_chans, *S).
            indices: Stages to take: None all, an integer the last so many, else a list (negative from the end).
            norm: Whether the last stage's map is taken after the final norm.
            stop_early: Stop at the last stage asked for.
            output_fmt: `NCHW` (any rank, channels-first) or `NHWC`.
            intermediates_only: Give only the list of maps.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        taken = taken_indices(len(self.feature_info), indices)
        maps: list[Tensor] = []
        stages = list(self.stages)[: max(taken) + 1] if stop_early else list(self.stages)
        norms = getattr(self, "map_norms", None)
        x = self.stem(x)
        last = len(self.feature_info) - 1
        for index, stage in enumerate(stages):
            x = stage(x)
            if index in taken:
                found = self.norm(x) if norm and index == last else x
                if norms is not None:
                    found = norms[index](found)
                maps.append(self._as(found, output_fmt))
        if intermediates_only:
            return maps
        return (self.norm(x) if len(stages) == last + 1 else x), maps

    def prune_intermediate_layers(
        self, indices: Indices = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last one asked for, and on request the norm and the head."""
        taken = taken_indices(len(self.feature_info), indices)
        self.stages = self.stages[: max(taken) + 1]
        if hasattr(self, "map_norms"):
            # A norm whose map is not asked for would never get a gradient.
            self.map_norms = nn.ModuleList(
                norm if index in taken else nn.Identity() for index, norm in enumerate(self.map_norms)
            )
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
            self.head.norm = self.head.pre_logits = nn.Identity()
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, normalised, in the layout `output_fmt`."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = self.norm(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of `forward_features`' map, or the features before the classifier."""
        out: Tensor = self.head(x, pre_logits=pre_logits)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, N) of images (B, in_chans, *S)."""
        return self.forward_head(self.forward_features(x))

    def _as(self, x: Tensor, output_fmt: str) -> Tensor:
        if output_fmt == self.output_fmt:
            return x
        return x.movedim(-1, 1) if self.channels_last else x.movedim(1, -1)


def spare_tables(fn: Callable[[Tensor], Tensor], ndim: int) -> Callable[[Tensor], Tensor]:
    """`fn` of `nn.Module._apply` where weights of convolutions have `ndim` axes.

    `to(memory_format=...)` takes every tensor of four or five axes for such a weight, and torch refuses one of the
    other number. These are tables of positions, so they are handed over as vectors.
    """

    def spared(x: Tensor) -> Tensor:
        return fn(x.flatten()).view(x.shape) if x.ndim > 3 and x.ndim != ndim else fn(x)

    return spared


def taken_indices(number: int, indices: Indices) -> list[int]:
    """`indices` of `number` maps as absolute ones: None all, an integer the last so many, negative from the end."""
    if indices is None:
        return list(range(number))
    wanted = [number - indices + i for i in range(indices)] if isinstance(indices, int) else list(indices)
    absolute = [number + index if index < 0 else index for index in wanted]
    if not absolute or any(not 0 <= index < number for index in absolute):
        raise ValueError(f"out_indices must name some of the {number} maps (0 to {number - 1}), got {indices!r}")
    return absolute
