"""Windows of channels-last maps of any rank, in pairs: cut and put back, pad and crop.

Legend: B batch, *S spatial axes, C channels, W windows, T tokens of a window, P tokens per axis of a window.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    if not torch.compiler.is_compiling():
        return not any(amounts)
    return all(certain(amount == 0) for amount in amounts)


def short_of(size: int, least: int) -> int:
    """How much `size` lacks of `least`; nothing for sure where a symbolic size is known to be large enough."""
    return 0 if certain(size >= least) else max(least - size, 0)


def regroup(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x.reshape(shape)`; under torch.export by a copy, which asks nothing about symbolic sizes.

    A reshape asks whether one size is a multiple of another. That is not known of quotients, as the number of strips of
    a map is one, and the program would serve only those maps for which the answer is the same.
    """
    if not torch.compiler.is_exporting():
        return x.reshape(*shape)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return x.clone(memory_format=torch.contiguous_format).as_strided(tuple(shape), strides)


def room(count: int) -> int:
    """`count`, or one more under torch.export where it is symbolic and might be one.

    Tracing settles whether a size is one, and the program would then serve only maps for which the answer is the same.
    What is added is empty and cut off again.
    """
    if not torch.compiler.is_exporting() or certain(count >= 2) or certain(count <= 1):
        return count
    return count + 1


def real_tokens(window: Sequence[int], device: torch.device) -> Tensor | None:
    """Which tokens of a window are its own and not added by `room`, (T,); None if all are."""
    sides = [room(size) for size in window]
    if all(certain(side == size) for side, size in zip(sides, window, strict=True)):
        return None
    token = torch.arange(math.prod(sides), device=device)
    own = torch.ones_like(token, dtype=torch.bool)
    inner = math.prod(sides)
    for side, size in zip(sides, window, strict=True):
        inner = inner // side
        own = own & (token // inner % side < size)
    return own


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
        steps, beyond = list(inner), list(x.shape[1:-1])
        outer, inner = [room(each) for each in outer], [room(each) for each in inner]
        index = []
        for o, i, step, size in zip(outer, inner, steps, beyond, strict=True):
            token = torch.arange(i, device=x.device)
            at = torch.arange(o, device=x.device)[:, None] * step + token
            index.append(at.where(token < step, size))  # a token that `room` added lies beyond the end
        x = _take(x, index)
    else:
        x = pad_to(x, [o * i for o, i in zip(outer, inner, strict=True)])
        x = x.reshape(batch, *(size for pair in zip(outer, inner, strict=True) for size in pair), channels)
    x = x.permute(_order(len(outer), outer_first))  # from (B, o1, i1, o2, i2, ..., C)
    first, second = (math.prod(outer), math.prod(inner)) if outer_first else (math.prod(inner), math.prod(outer))
    return regroup(x, (batch, first, second, channels))  # (B, W, T, C)


def _merge(
    windows: Tensor, outer: Sequence[int], inner: Sequence[int], sizes: Sequence[int], outer_first: bool
) -> Tensor:
    batch, channels = windows.shape[0], windows.shape[-1]
    order = _order(len(outer), outer_first)
    steps = list(inner)
    outer, inner = [room(each) for each in outer], [room(each) for each in inner]
    x = windows.reshape(batch, *((*outer, *inner) if outer_first else (*inner, *outer)), channels)
    x = x.permute([order.index(axis) for axis in range(len(order))])  # (B, o1, i1, o2, i2, ..., C)
    if torch.compiler.is_exporting():
        for axis, (size, step) in enumerate(zip(sizes, steps, strict=True), start=1):
            at = torch.arange(size, device=x.device)
            x = x[(slice(None),) * axis + (at // step, at % step)]
        return x
    return crop(x.reshape(batch, *(o * i for o, i in zip(outer, inner, strict=True)), channels), sizes)


def _take(x: Tensor, index: Sequence[Tensor]) -> Tensor:
    """`x` (B, *S, C) at a tensor of positions per spatial axis, which takes the axis's place; zero beyond its end.

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
        raise ValueError(f"query must be an index into the map {tuple(sizes)}, got {tuple(index)}")
    position = 0
    for i, size in zip(index, sizes, strict=True):
        position = position * size + i
    return position
