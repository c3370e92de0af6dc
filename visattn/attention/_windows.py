"""Windows of channels-last maps of any rank, in pairs: cut and put back, pad and crop; and relative-position biases.

Sources of the two kinds of bias:
- tables: Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030 (stored flat, query minus key), and Tu et al.,
  "MaxViT", ECCV 2022, arXiv 2204.01697 (stored as a grid per head, key minus query, in the authors' TensorFlow code).
- log-MLP: the idea of Liu et al., "Swin Transformer V2", CVPR 2022, arXiv 2111.09883, in the form of timm 1.0.31's
  MaxViT-RMLP models (Apache-2.0): an MLP of sign(d) ln(1 + |d|), d in tokens, without a sigmoid.

Everything is built from views and a few small matrices, so there are no index buffers, and no size is fixed.

Legend: B batch, *S spatial axes, C channels, W windows, T tokens of a window, h heads, P tokens per axis of a window.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TableLayout = Literal["flat", "grid"]
Pool = Callable[..., Tensor]
ADAPTIVE: dict[tuple[str, int], Pool] = {
    ("ada_avgpool", 2): F.adaptive_avg_pool2d,
    ("ada_avgpool", 3): F.adaptive_avg_pool3d,
    ("ada_maxpool", 2): F.adaptive_max_pool2d,
    ("ada_maxpool", 3): F.adaptive_max_pool3d,
}
POOL: dict[tuple[str, int], Pool] = {
    ("avgpool", 2): F.avg_pool2d,
    ("avgpool", 3): F.avg_pool3d,
    ("maxpool", 2): F.max_pool2d,
    ("maxpool", 3): F.max_pool3d,
}


def certain(condition: bool) -> bool:
    """Whether `condition`, a comparison of sizes, holds for sure; where a size is symbolic it may not be known.

    Asking in this way puts no condition on the symbol, so a graph exported for a range of sizes serves both outcomes.
    """
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy, so not at the top

    return statically_known_true(condition)


def known_zero(*amounts: int) -> bool:
    """Whether every amount is zero for sure, see `certain`."""
    return all(certain(amount == 0) for amount in amounts)


def ceil_div(sizes: Sequence[int], by: Sequence[int]) -> tuple[int, ...]:
    """Each size divided and rounded up."""
    return tuple((size + each - 1) // each for size, each in zip(sizes, by, strict=True))


def pad_axes(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """`x` (B, *S, C) with zeros before and after each spatial axis; `x` itself where there is nothing to add."""
    if torch.compiler.is_exporting():
        sizes = [size + more for size, more in zip(x.shape[1:-1], after, strict=True)]
        x = _take(x, [torch.arange(size, device=x.device) for size in sizes])
        after = (0,) * len(sizes)
    if known_zero(*before, *after):
        return x
    amounts = [0, 0]
    for first, last in zip(reversed(before), reversed(after), strict=True):
        amounts += [first, last]
    return F.pad(x, amounts)


def pad_to(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """`x` (B, *S, C) with zeros at the end of each spatial axis up to `sizes`; `crop` takes them off again."""
    lacking = [wanted - size for size, wanted in zip(x.shape[1:-1], sizes, strict=True)]
    return pad_axes(x, (0,) * len(lacking), lacking)


def crop(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The first `sizes` tokens of each spatial axis of `x` (B, *S, C)."""
    if torch.compiler.is_exporting():
        return _take(x, [torch.arange(size, device=x.device) for size in sizes])
    for axis, size in enumerate(sizes, start=1):
        if not known_zero(x.shape[axis] - size):
            x = x.narrow(axis, 0, size)
    return x


def every(x: Tensor, step: int) -> Tensor:
    """Every `step`-th token of each spatial axis of `x` (B, *S, C), the first included."""
    if torch.compiler.is_exporting():
        return _take(x, [torch.arange(0, size, step, device=x.device) for size in x.shape[1:-1]])
    return x[(slice(None), *(slice(None, None, step),) * (x.dim() - 2))]


def window_partition(x: Tensor, window: Sequence[int], counts: Sequence[int] | None = None) -> Tensor:
    """Consecutive tokens together: `x` (B, *S, C) as (B, W, T, C), windows and tokens in row-major order.

    An axis that is no multiple is zero-padded at its end; `window_reverse` takes the padding off again.

    Args:
        x: Any size.
        window: Tokens per axis of a window.
        counts: Windows per axis; None takes as many as hold the map. (A caller that knows them keeps symbolic sizes
            simple by saying so.)
    """
    return _split(x, counts or ceil_div(x.shape[1:-1], window), window, outer_first=True)


def window_reverse(
    windows: Tensor, window: Sequence[int], sizes: Sequence[int], counts: Sequence[int] | None = None
) -> Tensor:
    """The map (B, *sizes, C) of which `windows` (B, W, T, C) is the `window_partition`."""
    return _merge(windows, counts or ceil_div(sizes, window), window, sizes, outer_first=True)


def grid_partition(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens at equal distances together: `x` (B, *S, C) as (B, W, T, C) with T = prod(grid).

    An axis of S tokens, after zero-padding at its end to a multiple of P, has S/P windows; window i holds its tokens i,
    i + S/P, i + 2 S/P, ...

    Args:
        x: Any size.
        grid: Tokens per axis of a window, P.
    """
    return _split(x, grid, ceil_div(x.shape[1:-1], grid), outer_first=False)


def grid_reverse(windows: Tensor, grid: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The map (B, *sizes, C) of which `windows` (B, W, T, C) is the `grid_partition`."""
    return _merge(windows, grid, ceil_div(sizes, grid), sizes, outer_first=False)


def _order(rank: int, outer_first: bool) -> list[int]:
    """Axes of (B, o1, i1, o2, i2, ..., C) such that the axes of a window's tokens come last."""
    outer, inner = list(range(1, 2 * rank + 1, 2)), list(range(2, 2 * rank + 1, 2))
    return [0, *(outer + inner if outer_first else inner + outer), 2 * rank + 1]


def _split(x: Tensor, outer: Sequence[int], inner: Sequence[int], outer_first: bool) -> Tensor:
    batch, channels = x.shape[0], x.shape[-1]
    if torch.compiler.is_exporting():
        steps = [torch.arange(o, device=x.device)[:, None] * i for o, i in zip(outer, inner, strict=True)]
        x = _take(x, [step + torch.arange(i, device=x.device) for step, i in zip(steps, inner, strict=True)])
    else:
        x = pad_to(x, [o * i for o, i in zip(outer, inner, strict=True)])
        x = x.reshape(batch, *(size for pair in zip(outer, inner, strict=True) for size in pair), channels)
    x = x.permute(_order(len(outer), outer_first))  # from (B, o1, i1, o2, i2, ..., C)
    first, second = (math.prod(outer), math.prod(inner)) if outer_first else (math.prod(inner), math.prod(outer))
    return x.reshape(batch, first, second, channels)  # (B, W, T, C)


def _merge(
    windows: Tensor, outer: Sequence[int], inner: Sequence[int], sizes: Sequence[int], outer_first: bool
) -> Tensor:
    batch, channels = windows.shape[0], windows.shape[-1]
    order = _order(len(outer), outer_first)
    x = windows.reshape(batch, *((*outer, *inner) if outer_first else (*inner, *outer)), channels)
    x = x.permute([order.index(axis) for axis in range(len(order))])  # (B, o1, i1, o2, i2, ..., C)
    if torch.compiler.is_exporting():
        for axis, (size, i) in enumerate(zip(sizes, inner, strict=True), start=1):
            at = torch.arange(size, device=x.device)
            x = x[(slice(None),) * axis + (at // i, at % i)]
        return x
    return crop(x.reshape(batch, *(o * i for o, i in zip(outer, inner, strict=True)), channels), sizes)


def _take(x: Tensor, index: Sequence[Tensor]) -> Tensor:
    """`x` (B, *S, C) at a tensor of positions per spatial axis, whose shape takes the axis's place; zero beyond its end.

    For torch.export: it puts no condition on symbolic sizes, where views and padding ask about multiples and signs.
    """
    axis = 1
    for positions in index:
        size = x.shape[axis]
        inside = (positions < size).reshape(*positions.shape, *(1,) * (x.dim() - axis - 1))
        x = x[(slice(None),) * axis + (positions.clamp(max=size - 1),)].where(inside, 0)
        axis += positions.dim()
    return x


def pool_windows(windows: Tensor, window: Sequence[int], mode: str, per_axis: int) -> Tensor:
    """Tokens of `windows` (B, W, T, C), whose sides are `window`, pooled inside each: (B, W, U, C).

    Args:
        windows: As `window_partition` gives them.
        window: Tokens per axis, two or three of them.
        mode: A key of `ADAPTIVE`, to `per_axis` tokens per axis; or of `POOL`, by a ratio of `per_axis`, clipped to the
            window.
        per_axis: See `mode`.
    """
    batch, count, _, channels = windows.shape
    maps = windows.reshape(batch * count, *window, channels).movedim(-1, 1)  # (B W, C, *window)
    if (mode, len(window)) in ADAPTIVE:
        maps = ADAPTIVE[mode, len(window)](maps, (per_axis,) * len(window))
    else:
        maps = POOL[mode, len(window)](maps, tuple(min(per_axis, size) for size in window))
    tokens = maps.flatten(2).mT  # (B W, U, C)
    return tokens.reshape(batch, count, tokens.shape[1], channels)


class _Overlapping(torch.autograd.Function):
    """Windows that overlap. Their gradient is added up by a few whole slices, many times faster than unfold's own."""

    @staticmethod
    def forward(x: Tensor, window: tuple[int, ...], step: tuple[int, ...]) -> Tensor:
        rank, batch, channels = len(window), x.shape[0], x.shape[-1]
        for axis in range(rank):
            x = x.unfold(axis + 1, window[axis], step[axis])  # (B, n1, n2, ..., C, w1, w2, ...)
        counts = x.shape[1 : rank + 1]
        x = x.permute(0, *range(1, rank + 1), *range(rank + 2, 2 * rank + 2), rank + 1)
        return x.reshape(batch, math.prod(counts), math.prod(window), channels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.window, ctx.step = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        window, step = ctx.window, ctx.step
        batch, *sizes, channels = ctx.shape
        counts = [(size - w) // s + 1 for size, w, s in zip(sizes, window, step, strict=True)]
        reach = [-(-w // s) for w, s in zip(window, step, strict=True)]  # steps that one window covers
        rank = len(window)
        grad = grads[0].reshape(batch, *counts, *window, channels)
        grad = grad.permute(0, *(axis for i in range(1, rank + 1) for axis in (i, i + rank)), 2 * rank + 1)
        blocks = [n + r - 1 for n, r in zip(counts, reach, strict=True)]
        out = grad.new_zeros(batch, *(b * s for b, s in zip(blocks, step, strict=True)), channels)
        view = out.view(batch, *(size for pair in zip(blocks, step, strict=True) for size in pair), channels)
        for offset in _product(reach):
            part, target = grad, view
            for axis, first in enumerate(offset):
                length = min(step[axis], window[axis] - first * step[axis])
                part = part.narrow(2 * axis + 2, first * step[axis], length)
                target = target.narrow(2 * axis + 1, first, counts[axis]).narrow(2 * axis + 2, 0, length)
            target += part
        covered = pad_axes(out, (0,) * rank, [max(0, s - o) for s, o in zip(sizes, out.shape[1:-1], strict=True)])
        return crop(covered, sizes), None, None


def _product(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every index below `sizes`, in row-major order."""
    out: list[tuple[int, ...]] = [()]
    for size in sizes:
        out = [(*head, index) for head in out for index in range(size)]
    return out


def overlapping_windows(x: Tensor, window: Sequence[int], step: Sequence[int]) -> Tensor:
    """Every window of `x` (B, *S, C) that starts at a multiple of `step` and fits: (B, W, T, C), row-major."""
    if torch.compiler.is_exporting():
        starts = [
            torch.arange((size - w) // s + 1, device=x.device)[:, None] * s
            for size, w, s in zip(x.shape[1:-1], window, step, strict=True)
        ]
        x = _take(x, [start + torch.arange(w, device=x.device) for start, w in zip(starts, window, strict=True)])
        windows = x.permute(_order(len(window), outer_first=True))  # (B, n1, n2, ..., w1, w2, ..., C)
        return windows.flatten(1, len(window)).flatten(2, -2)
    out: Tensor = _Overlapping.apply(x, tuple(window), tuple(step))
    return out


def flat_index(index: Sequence[int], sizes: Sequence[int]) -> int:
    """Row-major position of the element at `index` of a map of `sizes`.

    Raises:
        ValueError: The index has another number of axes, or lies outside.
    """
    if len(index) != len(sizes) or any(not 0 <= i < size for i, size in zip(index, sizes, strict=True)):
        raise ValueError(f"an index into a map of size {tuple(sizes)} takes one value per axis below it, got {index}")
    position = 0
    for i, size in zip(index, sizes, strict=True):
        position = position * size + i
    return position


def toeplitz(table: Tensor, window: Sequence[int]) -> Tensor:
    """The bias (h, T, T), query by key, of a table (h, 2P - 1, ...) whose entry P - 1 + key - query is their bias."""
    rank = len(window)
    for axis, size in enumerate(window):
        # unfold gives entry a + b at (a, b); with a = P - 1 - query and b = key this is P - 1 + key - query.
        table = table.unfold(axis + 1, size, 1)
    table = table.flip(tuple(range(1, rank + 1)))  # (h, query axes, key axes)
    tokens = math.prod(window)
    return table.reshape(table.shape[0], tokens, tokens)


class RelativePositionTable(nn.Module):
    """A learned bias for every offset between two tokens of a window.

    Args:
        window: Tokens per axis, P.
        num_heads: Heads h.
        layout: How the table is stored. `flat`: Swin's [prod(2P - 1), h], by query minus key, drawn from a truncated
            normal of std 0.02. `grid`: the MaxViT authors' [h, 2P - 1, ...], by key minus query, drawn from a normal of
            std 0.02.
    """

    def __init__(self, window: Sequence[int], num_heads: int, layout: TableLayout = "flat") -> None:
        super().__init__()
        self.window, self.num_heads, self.layout = tuple(window), num_heads, layout
        self.sides = tuple(2 * size - 1 for size in window)
        shape = (math.prod(self.sides), num_heads) if layout == "flat" else (num_heads, *self.sides)
        self.relative_position_bias_table = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        if self.layout == "flat":
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        else:
            nn.init.normal_(self.relative_position_bias_table, std=0.02)

    def forward(self) -> Tensor:
        """The bias (h, T, T), query by key."""
        table: Tensor = self.relative_position_bias_table
        if self.layout == "flat":  # reversing the rows turns query minus key into key minus query on every axis
            table = table.flip(0).t().reshape(self.num_heads, *self.sides)
        return toeplitz(table, self.window)

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return f"window={self.window}, num_heads={self.num_heads}, layout={self.layout!r}"


class _Mlp(nn.Module):
    """Two layers with a ReLU between, under the official keys fc1 and fc2."""

    def __init__(self, inputs: int, hidden: int, outputs: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.drop1(self.fc1(x).relu()))
        return out


class RelativePositionMlp(nn.Module):
    """A bias computed from the offset between two tokens, so that any window size uses the same weights.

    Args:
        window: Tokens per axis, P.
        num_heads: Heads h.
        hidden: Width of the hidden layer.
        drop: Probability of dropping a hidden value, in training.
    """

    def __init__(self, window: Sequence[int], num_heads: int, hidden: int = 512, drop: float = 0.0) -> None:
        super().__init__()
        self.window, self.num_heads = tuple(window), num_heads
        self.mlp = _Mlp(len(self.window), hidden, num_heads, drop)

    def forward(self) -> Tensor:
        """The bias (h, T, T), query by key."""
        weight = self.mlp.fc1.weight
        axes = [torch.arange(size - 1, -size, -1, device=weight.device, dtype=weight.dtype) for size in self.window]
        offset = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # (2P - 1, ..., rank): query minus key,
        table = self.mlp(offset.sign() * offset.abs().log1p())  # so that the table runs by key minus query
        return toeplitz(table.movedim(-1, 0), self.window)

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return f"window={self.window}, num_heads={self.num_heads}"
