"""Window and grid attention: softmax attention among neighbours, and among tokens spread evenly over the whole map.

Papers: Tu et al., "MaxViT: Multi-Axis Vision Transformer", ECCV 2022, arXiv 2204.01697, section 3.2 (block and grid
attention); Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030, section 3.2 (shifted windows).
Code: github.com/google-research/maxvit (Apache-2.0) as ported in timm 1.0.31, timm/models/maxxvit.py, and timm's
swin_transformer.py (Apache-2.0) for the shift; nothing is copied from them.

Deviations:
- Every size is accepted, see `boundary`. MaxViT refuses sizes that are no multiple.
- A shifted map is padded first and rolled then, as in Swin's dense code; timm rolls first. Equal where nothing is
  padded.
- Tokens that the shift brought together from opposite borders exclude each other; Swin adds -100 to their logits.
- Rank 3.

Legend: B batch, *S spatial axes, C channels, P tokens per axis of a window, W windows, T tokens of a window, h heads,
d channels of a head.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from visattn.attention import _checks as check
from visattn.attention._backend import scaled_dot_product
from visattn.attention._precision import exact_logits
from visattn.attention._relative import RelativePositionMlp, RelativePositionTable, TableLayout
from visattn.attention._windows import (
    ceil_div,
    crop,
    flat_index,
    grid_partition,
    grid_reverse,
    known_zero,
    pad_to,
    window_partition,
    window_reverse,
)

Bias = Literal["table", "log_mlp", "none"]
QkvLayout = Literal["qkv", "per_head"]
Boundary = Literal["mask", "zero"]


def _build(block: Any, dim: int, num_heads: int | None, window: tuple[int, ...], options: dict[str, Any]) -> None:
    """Give `block` the checked settings and the parameters that both blocks have, under the official keys."""
    block.dim, block.num_heads = dim, check.heads_of(dim, num_heads)
    block.scale = (dim // block.num_heads) ** -0.5
    block.qkv_layout = check.choice("qkv_layout", options["qkv_layout"], ("qkv", "per_head"))
    block.boundary = check.choice("boundary", options["boundary"], ("mask", "zero"))
    block.bias = check.choice("bias", options["bias"], ("table", "log_mlp", "none"))
    table: Any = check.choice("table", options["table"], ("flat", "grid"))
    hidden = check.positive("bias_hidden", options["bias_hidden"])
    bias_hidden_rate = check.probability("bias_hidden_rate", options["bias_hidden_rate"])
    if bias_hidden_rate and block.bias != "log_mlp":
        raise ValueError(f"bias_hidden_rate needs bias='log_mlp', got bias={block.bias!r}")
    block.attn_drop = check.probability("attn_drop", options["attn_drop"])
    block.qkv = nn.Linear(dim, 3 * dim, bias=options["qkv_bias"])
    if block.bias == "table":
        block.rel_pos = RelativePositionTable(window, block.num_heads, table)
    elif block.bias == "log_mlp":
        block.rel_pos = RelativePositionMlp(window, block.num_heads, hidden, bias_hidden_rate)
    block.proj = nn.Linear(dim, dim)
    block.proj_drop = nn.Dropout(check.probability("proj_drop", options["proj_drop"]))


def _heads(block: Any, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B W, h, T, d) of `windows` (B, W, T, C)."""
    batch, count, tokens, dim = windows.shape
    qkv, heads = block.qkv(windows), block.num_heads
    if block.qkv_layout == "per_head":
        parts = qkv.reshape(batch * count, tokens, heads, 3, dim // heads).permute(3, 0, 2, 1, 4)
    else:
        parts = qkv.reshape(batch * count, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    q, k, v = parts.unbind(0)
    return q, k, v


def _bias(block: Any, mask: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """What SDPA takes as its mask, to broadcast over (B W, h, T, T), from `mask` (W, T, T), true where allowed."""
    bias = None if block.bias == "none" else block.rel_pos()[None].to(dtype)  # (1, h, T, T)
    if mask is None:
        return bias
    allowed = mask[:, None]  # (W, 1, T, T)
    if bias is None:
        return allowed.repeat(batch, 1, 1, 1)
    masked: Tensor = bias.masked_fill(~allowed, -torch.inf)
    return masked.repeat(batch, 1, 1, 1)


def _attend(block: Any, windows: Tensor, mask: Tensor | None, guide: tuple[Any, Tensor] | None = None) -> Tensor:
    """Attention in each of `windows` (B, W, T, C), projected: (B, W, T, C); `guide`: a second block and its windows."""
    q, k, v = _heads(block, windows)
    drop = block.attn_drop if block.training else 0.0
    out = scaled_dot_product(q, k, v, _bias(block, mask, windows.shape[0], q.dtype), block.scale, drop)
    if guide is not None:
        other, theirs = guide
        q, k, _ = _heads(other, theirs)
        led = scaled_dot_product(q, k, v, _bias(other, mask, theirs.shape[0], q.dtype), other.scale, drop)
        out = (out + led) / 2
    projected: Tensor = block.proj_drop(block.proj(out.transpose(1, 2).reshape(windows.shape)))
    return projected


def _row(block: Any, windows: Tensor, mask: Tensor | None, place: tuple[int, int]) -> Tensor:
    """Attention of one query, `place` = (window, token), to every token of every window: (B, W, T, h)."""
    window, token = place
    q, k, _ = _heads(block, windows[:, window : window + 1])
    logits = exact_logits(q[:, :, token, None], k, block.scale)[:, :, 0]  # (B, h, T)
    bias = _bias(block, None if mask is None else mask[window : window + 1], 1, logits.dtype)
    if bias is not None:
        own = bias[:, :, token]
        logits = logits.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else logits + own
    full: Tensor = logits.new_zeros(*windows.shape[:3], block.num_heads)
    full[:, window] = logits.softmax(-1).mT
    return full


def _labels(axes: Sequence[Tensor]) -> Tensor:
    """A number per place (1, *S, 1), equal where the numbers below 4 given for each axis all are; 0 for all zeros."""
    total = torch.zeros((1,) * (len(axes) + 2), dtype=torch.long, device=axes[0].device)
    for axis, each in enumerate(axes):
        total = 4 * total + each.reshape((1,) * (axis + 1) + (-1,) + (1,) * (len(axes) - axis))
    return total


def _allowed(labels: Tensor) -> Tensor:
    """(W, T, T), whether two tokens of a window have one label, of `labels` (1, W, T, 1)."""
    flat = labels[0, :, :, 0]
    return flat[:, :, None] == flat[:, None, :]


def _settings(block: Any, own: str) -> str:
    text = f"{block.dim}, num_heads={block.num_heads}, rank={block.rank}, {own}, bias={block.bias!r}"
    return f"{text}, qkv_layout={block.qkv_layout!r}, boundary={block.boundary!r}"


class WindowAttention(nn.Module):
    """Attention within windows of consecutive tokens, MaxViT's block attention and Swin's (shifted) windows.

    Border policy: see `boundary`. An axis that fits into one window is not shifted.

    Args:
        dim: Channels C.
        num_heads: Heads h, a divisor of `dim`; None: heads of at most 32 channels.
        rank: Number of spatial axes, 2 or 3.
        window_size: Tokens per axis of a window, P, one integer or one per axis.
        shift_size: Tokens by which windows are displaced, less than the window, one integer or one per axis.
        bias: `table`: a value per offset. `log_mlp`: computed from the logarithm of the offset. `none`.
        table: `flat`: Swin's and MaxViT-RW's [prod(2P - 1), h]. `grid`: MaxViT-TF's [h, 2P - 1, ...].
        qkv_layout: Order of the channels of `qkv`: `qkv`: all heads' queries, then keys, then values (Swin, MaxViT-TF).
            `per_head`: queries, keys and values of the first head, then of the next (MaxViT-RW).
        boundary: What fills up the last window of an axis. `mask`: nothing. `zero`: zeros before the projection, which
            are attended to, as in Swin's dense code.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        bias_hidden: Width of the hidden layer, for `log_mlp`.
        bias_hidden_rate: Probability of dropping a hidden value in training, for `log_mlp` (0.125 in timm).
        attn_drop: Probability of dropping an attention weight, in training.
        proj_drop: Probability of dropping an output, in training.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)
    dim: int

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        rank: int = 2,
        window_size: int | Sequence[int] = 7,
        shift_size: int | Sequence[int] = 0,
        bias: Bias = "table",
        table: TableLayout = "flat",
        qkv_layout: QkvLayout = "qkv",
        boundary: Boundary = "mask",
        qkv_bias: bool = True,
        bias_hidden: int = 512,
        bias_hidden_rate: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        self.rank = check.rank_of("WindowAttention", rank, self.supported_ranks)
        self.window_size = check.per_axis("window_size", window_size, rank)
        self.shift_size = (shift_size,) * rank if isinstance(shift_size, int) else tuple(shift_size)
        if len(self.shift_size) != rank or not all(
            0 <= s < w for s, w in zip(self.shift_size, self.window_size, strict=True)
        ):
            raise ValueError(
                f"shift_size must be from 0 to less than window_size={self.window_size}, got {shift_size!r}"
            )
        _build(self, dim, num_heads, self.window_size, options)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: (B, *S, C), any size of at least 1 per axis.

        Returns:
            (B, *S, C).

        Raises:
            ValueError: `x` has another shape.
        """
        windows, mask, shift = self._windows(x)
        return self._back(_attend(self, windows, mask), x.shape[1:-1], shift)

    def guided(self, x: Tensor, other: "WindowAttention", y: Tensor) -> Tensor:
        """Attend with the mean of the block's own weights and those that `other` gives the tokens of `y`.

        Args:
            x: (B, *S, C), as for `forward`; the values are of `x`.
            other: A block with as many heads, the same windows and the same shift.
            y: (B, *S, C'), what `other` attends in.

        Returns:
            (B, *S, C).
        """
        windows, mask, shift = self._windows(x)
        theirs, _, _ = other._windows(y)
        return self._back(_attend(self, windows, mask, (other, theirs)), x.shape[1:-1], shift)

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """How much the token at index `query` attends to every token of `x` (B, *S, C): (B, h, *S).

        With `boundary="zero"` what goes to padded tokens is missing.
        """
        sizes = x.shape[1:-1]
        flat_index(query, sizes)  # refuses an index outside
        windows, mask, shift = self._windows(x)
        counts = ceil_div(sizes, self.window_size)
        moved = [(i - s) % (n * w) for i, s, n, w in zip(query, shift, counts, self.window_size, strict=True)]
        window = flat_index([i // w for i, w in zip(moved, self.window_size, strict=True)], counts)
        token = flat_index([i % w for i, w in zip(moved, self.window_size, strict=True)], self.window_size)
        return self._back(_row(self, windows, mask, (window, token)), sizes, shift).movedim(-1, 1)

    def _windows(self, x: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """Windows (B, W, T, C), which pairs of tokens may attend (W, T, T) or None for all, and the shift in use."""
        check.channels_last("WindowAttention", x, self.dim, (self.rank,))
        sizes = x.shape[1:-1]
        counts = ceil_div(sizes, self.window_size)
        padded = [n * w for n, w in zip(counts, self.window_size, strict=True)]
        fits = zip(sizes, self.window_size, self.shift_size, strict=True)
        shift = tuple(s if s and size > w else 0 for size, w, s in fits)
        outside = self.boundary == "mask" and not known_zero(*(p - s for p, s in zip(padded, sizes, strict=True)))
        if any(shift):
            x = torch.roll(pad_to(x, padded), [-s for s in shift], list(range(1, self.rank + 1)))
        windows = window_partition(x, self.window_size, counts)
        if not any(shift) and not outside:
            return windows, None, shift
        axes = []
        for size, length, s in zip(sizes, padded, shift, strict=True):
            at = torch.arange(length, device=x.device)
            wrapped = at >= length - s  # came round from the start of the axis
            beyond = (at + s) % length >= size
            axes.append(wrapped.long() + 2 * beyond.long() if outside else wrapped.long())
        return windows, _allowed(window_partition(_labels(axes), self.window_size, counts)), shift

    def _back(self, windows: Tensor, sizes: Sequence[int], shift: tuple[int, ...]) -> Tensor:
        counts = ceil_div(sizes, self.window_size)
        if not any(shift):
            return window_reverse(windows, self.window_size, sizes, counts)
        padded = [n * w for n, w in zip(counts, self.window_size, strict=True)]
        rolled = window_reverse(windows, self.window_size, padded, counts)
        return crop(torch.roll(rolled, shift, list(range(1, self.rank + 1))), sizes)

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return _settings(self, f"window_size={self.window_size}, shift_size={self.shift_size}")


class GridAttention(nn.Module):
    """Attention among tokens at equal distances, a grid over the whole map: MaxViT's sparse global attention.

    Border policy: see `boundary`; an axis of S tokens has the distance S / P, rounded up.

    Args:
        dim: Channels C.
        num_heads: Heads h, a divisor of `dim`; None: heads of at most 32 channels.
        rank: Number of spatial axes, 2 or 3.
        grid_size: Tokens per axis of a grid, P, one integer or one per axis.
        bias: As in `WindowAttention`, in steps of the grid.
        table: As in `WindowAttention`.
        qkv_layout: As in `WindowAttention`.
        boundary: As in `WindowAttention`.
        qkv_bias: As in `WindowAttention`.
        bias_hidden: As in `WindowAttention`.
        bias_hidden_rate: As in `WindowAttention`.
        attn_drop: Probability of dropping an attention weight, in training.
        proj_drop: Probability of dropping an output, in training.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)
    dim: int

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        rank: int = 2,
        grid_size: int | Sequence[int] = 7,
        bias: Bias = "table",
        table: TableLayout = "flat",
        qkv_layout: QkvLayout = "qkv",
        boundary: Boundary = "mask",
        qkv_bias: bool = True,
        bias_hidden: int = 512,
        bias_hidden_rate: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        self.rank = check.rank_of("GridAttention", rank, self.supported_ranks)
        self.grid_size = check.per_axis("grid_size", grid_size, rank)
        _build(self, dim, num_heads, self.grid_size, options)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: (B, *S, C), any size of at least 1 per axis.

        Returns:
            (B, *S, C).

        Raises:
            ValueError: `x` has another shape.
        """
        windows, mask = self._windows(x)
        return grid_reverse(_attend(self, windows, mask), self.grid_size, x.shape[1:-1])

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """How much the token at index `query` attends to every token of `x` (B, *S, C): (B, h, *S).

        With `boundary="zero"` what goes to padded tokens is missing.
        """
        sizes = x.shape[1:-1]
        flat_index(query, sizes)  # refuses an index outside
        windows, mask = self._windows(x)
        steps = ceil_div(sizes, self.grid_size)
        window = flat_index([i % n for i, n in zip(query, steps, strict=True)], steps)
        token = flat_index([i // n for i, n in zip(query, steps, strict=True)], self.grid_size)
        return grid_reverse(_row(self, windows, mask, (window, token)), self.grid_size, sizes).movedim(-1, 1)

    def _windows(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Windows (B, W, T, C), and which pairs of tokens may attend (W, T, T) or None for all."""
        check.channels_last("GridAttention", x, self.dim, (self.rank,))
        sizes = x.shape[1:-1]
        windows = grid_partition(x, self.grid_size)
        padded = [n * g for n, g in zip(ceil_div(sizes, self.grid_size), self.grid_size, strict=True)]
        if self.boundary == "zero" or known_zero(*(p - s for p, s in zip(padded, sizes, strict=True))):
            return windows, None
        axes = [
            (torch.arange(length, device=x.device) >= size).long() for size, length in zip(sizes, padded, strict=True)
        ]
        return windows, _allowed(grid_partition(_labels(axes), self.grid_size))

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return _settings(self, f"grid_size={self.grid_size}")
