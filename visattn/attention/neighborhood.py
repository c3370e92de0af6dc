"""Neighbourhood attention: every position attends to a window around itself, in one, two or three dimensions.

Papers: Hassani et al., "Neighborhood Attention Transformer", arXiv 2204.07143; "Dilated Neighborhood Attention
Transformer", arXiv 2209.15001; "Generalized Neighborhood Attention", arXiv 2504.16922:
out_i = sum_j softmax_j(q_i k_j / sqrt(d) + b(j - i)) v_j over the keys j in the window of i (`_neighborhood_windows`).
Official code: https://github.com/SHI-Labs/NATTEN, release 0.21.7 (MIT), for the operator;
https://github.com/SHI-Labs/Neighborhood-Attention-Transformer, revision d334f5b (MIT), for the module and its bias.

Deviations:
- NATTEN has no position bias since 0.20, and before that only without strides and causality. Here `rpb` goes with every
  setting: with any of them a key is less than a kernel away from its query, so the table has an entry for it.
- NATTEN refuses a window larger than the map, and so does the operator. The module takes any size, by a named policy.
- Dropout of attention weights, which NAT's module offers and its models leave at 0, is left out.

Legend: B batch, *S spatial axes, C channels, H query heads, G key heads (G divides H; query head h uses key head
h div (H / G)), D head dim of query and key, V head dim of value.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention import _checks as check
from visattn.attention._backend import BACKENDS, natten_attention, resolve
from visattn.attention._neighborhood_reference import neighborhood_reference
from visattn.attention._neighborhood_tiles import neighborhood_tiles
from visattn.attention._neighborhood_traced import neighborhood_traced
from visattn.attention._neighborhood_windows import Axis, axes_of, bounds, check_fits
from visattn.attention._precision import autocast_enabled, autocast_type, exact, without_autocast
from visattn.attention._windows import flat_index, known_zero

Backend = Literal["auto", "reference", "torch", "natten"]
SmallMaps = Literal["clip", "pad", "error"]


@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    is_causal: bool | Sequence[bool] = ...,
    scale: float | None = ...,
    rpb: Tensor | None = ...,
    backend: Backend = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    is_causal: bool | Sequence[bool] = ...,
    scale: float | None = ...,
    rpb: Tensor | None = ...,
    backend: Backend = ...,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    backend: Backend = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every position to its own window, with the semantics of NATTEN 0.21.7.

    Settings are one value for all spatial axes or one per axis.

    Args:
        query: (B, *S, H, D), one to three spatial axes.
        key: (B, *S, G, D).
        value: (B, *S, G, V).
        kernel_size: Length of the window, at least 2, and at most the axis divided by the dilation.
        stride: Positions that share a window, 1 to `kernel_size`; equal to it, attention is within blocks.
        dilation: Distance between neighbouring keys of a window.
        is_causal: Whether keys behind the query (of a higher index) are left out.
        scale: Factor of the scores; None: D ** -0.5.
        rpb: (H, *(2 * kernel_size - 1)), added to the scaled scores by key index - query index + kernel_size - 1.
        backend: "auto", "reference" (slow and plain), "torch" (fast, everywhere) or "natten" (its compiled library).
        return_lse: Whether to return the log-sum-exp of the scores too.

    Returns:
        (B, *S, H, V), and with `return_lse` also (B, *S, H): natural logarithm, float32 at least.

    Raises:
        ValueError: If shapes, types or settings do not fit together.
        ImportError: If natten is asked for and its library is missing.
    """
    _check_tensors(query, key, value)
    axes = axes_of(query.dim() - 3, kernel_size, stride, dilation, is_causal)
    check_fits(query.shape[1:-2], axes)
    if rpb is not None and tuple(rpb.shape) != (query.shape[-2], *(2 * axis.kernel - 1 for axis in axes)):
        wanted = (query.shape[-2], *(2 * axis.kernel - 1 for axis in axes))
        raise ValueError(f"rpb must be (heads, *(2 * kernel_size - 1)) = {wanted}, got {tuple(rpb.shape)}")
    out, lse = attend(query, key, value, axes, scale, rpb, backend, return_lse)
    if lse is None:
        return out
    return out, lse


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() not in (4, 5, 6) or query.dim() != key.dim() or query.dim() != value.dim():
        raise ValueError(f"query, key and value must be (B, *S, heads, channels) with 1 to 3 spatial axes, {shapes}")
    if query.shape[:-2] != key.shape[:-2] or query.shape[:-2] != value.shape[:-2]:
        raise ValueError(f"query, key and value must have the same batch and spatial sizes, {shapes}")
    if 0 in query.shape[1:]:
        raise ValueError(f"only the batch may be empty, {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same head dim, {shapes}")
    if key.shape[-2] != value.shape[-2] or query.shape[-2] % key.shape[-2]:
        raise ValueError(f"key and value must have the same number of heads, a divisor of the query's, {shapes}")
    kinds = {query.dtype, key.dtype, value.dtype}
    if not query.is_floating_point() or (len(kinds) > 1 and not autocast_enabled(query.device)):
        raise ValueError(f"query, key and value must have one floating type, got {', '.join(map(str, kinds))}")
    if query.device != key.device or query.device != value.device:
        raise ValueError(
            f"query, key and value must be on one device, got {query.device}, {key.device}, {value.device}"
        )


def _not_for_natten(
    tensors: tuple[Tensor, Tensor, Tensor], axes: tuple[Axis, ...], scale: float, rpb: Tensor | None, return_lse: bool
) -> str:
    """What natten's kernels cannot do of a call; empty if they can do all of it."""
    query, _, value = tensors
    if rpb is not None:
        return "no position bias"
    if any(axis.kernel * axis.dilation > size for axis, size in zip(axes, query.shape[1:-2], strict=True)):
        return "no window larger than the map"
    if query.shape[-1] % 8 or value.shape[-1] % 8:
        return "no head dim but multiples of 8"
    if scale == 0:
        return "no scale of 0, which it takes for its default"
    if return_lse and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "no gradient of the log-sum-exp, which it would leave out in silence"
    return ""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: tuple[Axis, ...],
    scale: float | None,
    rpb: Tensor | None,
    backend: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`neighborhood_attention` of checked tensors; a window larger than its axis is clipped to it."""
    if autocast_enabled(query.device) and query.dtype != torch.float64:
        kind = autocast_type(query.device)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    unsupported = ""
    if backend in ("auto", "natten") and not torch.compiler.is_compiling():  # no condition on symbolic sizes
        unsupported = _not_for_natten((query, key, value), axes, scale, rpb, return_lse)
    chosen = resolve(backend, query, unsupported)
    if chosen == "reference":
        out, lse = neighborhood_reference(query, key, value, axes, scale, rpb)
        return out, lse if return_lse else None
    if chosen == "natten":
        kernel, stride, dilation, causal = zip(*axes, strict=True)
        settings = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "is_causal": causal}
        out, lse = natten_attention(query, key, value, scale=scale, **settings)
        return out, lse if return_lse else None
    if torch.compiler.is_compiling():
        return neighborhood_traced(query, key, value, axes, scale, rpb, return_lse)
    return neighborhood_tiles(query, key, value, axes, scale, rpb, return_lse)


class NeighborhoodAttention(nn.Module):
    """Self-attention within a window around each position: projection, `neighborhood_attention`, projection.

    Border policy: at a border the window is shifted inwards, so that it keeps its size (`is_causal` axes: it is cut).
    A map, or the dilation group of an axis, that is smaller than the window follows `small_maps`.

    The state dict has the official keys: qkv, rpb, proj.

    Args:
        dim: Channels C.
        num_heads: A divisor of `dim`; None: heads of at most 32 channels.
        kernel_size: Length of the window, at least 2, for all axes or per axis. NAT's is 7.
        stride: Positions that share a window.
        dilation: Distance between neighbouring keys.
        is_causal: Whether keys behind the query are left out.
        rank: Number of spatial axes.
        qkv_bias: Whether the first projection has a bias.
        qk_scale: Factor of the scores; None: head dim ** -0.5.
        rel_pos_bias: Whether a learned bias per head and relative position is added to the scores.
        proj_drop: Dropout after the last projection.
        small_maps: What happens where kernel_size * dilation exceeds the map. "clip": the window is clipped to the map
            or dilation group. "pad": NAT's rule, the input is zero-padded at the end to kernel_size * dilation before
            the projection, so padding takes part with the projection's bias, and is cropped again. "error": ValueError.
        backend: See `neighborhood_attention`.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        kernel_size: int | Sequence[int] = 7,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        rank: int = 2,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        rel_pos_bias: bool = True,
        proj_drop: float = 0.0,
        small_maps: SmallMaps = "clip",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.num_heads = check.heads_of(dim, num_heads)
        self.dim = dim
        self.rank = check.rank_of("NeighborhoodAttention", rank, self.supported_ranks)
        self.axes = axes_of(rank, kernel_size, stride, dilation, is_causal)
        self.scale = (dim // self.num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.small_maps = check.choice("small_maps", small_maps, ("clip", "pad", "error"))
        self.backend = check.choice("backend", backend, BACKENDS)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(self.num_heads, *(2 * axis.kernel - 1 for axis in self.axes)))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(check.probability("proj_drop", proj_drop))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """NAT's initial values: weights and table from a truncated normal distribution of std 0.02, biases 0."""
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: (B, *S, C), any size of at least 1 per axis.

        Returns:
            (B, *S, C).

        Raises:
            ValueError: If `x` has another shape, or is smaller than the window and `small_maps` is "error".
        """
        check.channels_last("NeighborhoodAttention", x, self.dim, (self.rank,))
        query, key, value = self._project(x)
        out, _ = attend(query, key, value, self.axes, self.scale, self.rpb, self.backend, False)
        out = out.flatten(-2)
        for number, size in enumerate(x.shape[1:-1], start=1):
            if not known_zero(out.shape[number] - size):
                out = out.narrow(number, 0, size)
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value (B, *S, H, D) of `x` (B, *S, C), which is padded first if it has to be."""
        check.channels_last("NeighborhoodAttention", x, self.dim, (self.rank,))
        sizes = x.shape[1:-1]
        if self.small_maps == "error":
            check_fits(sizes, self.axes)
        elif self.small_maps == "pad":
            missing = [max(axis.kernel * axis.dilation - size, 0) for axis, size in zip(self.axes, sizes, strict=True)]
            if not known_zero(*missing):  # padding by nothing would copy
                x = F.pad(x, [0, 0] + [each for gap in reversed(missing) for each in (0, gap)])
        qkv = torch.unflatten(self.qkv(x), -1, (3, self.num_heads, self.dim // self.num_heads))
        query, key, value = qkv.unbind(-3)
        return query, key, value

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """How much the position at index `query` attends to every position.

        Args:
            x: (B, *S, C).
            query: Index of a position in the map.

        Returns:
            (B, H, *S), summing to 1 over the map, padding included where `small_maps` is "pad".

        Raises:
            ValueError: If `query` is not in the map.
        """
        q, k, _ = self._project(x)
        sizes = x.shape[1:-1]
        flat_index(query, sizes)  # refuses an index outside
        flat = 0
        place, table = [slice(None)], [slice(None)]
        for at, size, axis in zip(query, k.shape[1:-2], self.axes, strict=True):
            flat = flat * size + at
            index, group = divmod(at, axis.dilation)
            first, last = bounds(-(-(size - group) // axis.dilation), axis)[index]
            place.append(slice(group + axis.dilation * first, group + axis.dilation * (last - 1) + 1, axis.dilation))
            table.append(slice(first - index + axis.kernel - 1, last - index + axis.kernel - 1))
        with without_autocast(x.device):
            keys = exact(k[tuple(place)])  # (B, *window, H, D)
            scores = torch.einsum("bhd,b...hd->bh...", exact(q.flatten(1, -3)[:, flat]) * self.scale, keys)
        if self.rpb is not None:
            scores = scores + self.rpb[tuple(table)]
        weights = scores.flatten(2).softmax(-1).reshape(scores.shape)
        seen = weights.new_zeros(weights.shape[:2] + k.shape[1:-2])
        seen[(slice(None), *place)] = weights
        return seen

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        kernel, stride, dilation, causal = zip(*self.axes, strict=True)
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, kernel_size={kernel}, stride={stride}, dilation={dilation}, "
            f"is_causal={causal}, rel_pos_bias={self.rpb is not None}, small_maps={self.small_maps!r}, "
            f"backend={self.backend!r}"
        )
