"""Which keys a query of neighbourhood attention sees along one axis.

Source: "Generalized Neighborhood Attention", https://arxiv.org/abs/2504.16922, as implemented by NATTEN 0.21.7
(https://github.com/SHI-Labs/NATTEN, MIT); dilation and the inward-shifted window as in NAT and DiNAT
(https://github.com/SHI-Labs/Neighborhood-Attention-Transformer @ d334f5b, MIT). Written from the definition below.

Axes are independent: the window of a query is the product of its windows along the axes. Along one axis of length L
with kernel size K, stride S and dilation D, position i lies in the dilation group g = i mod D and has index x = i div D
there; the group has N = ceil((L - g) / D) members, and only they can be keys. What follows counts within the group.

- not causal: the queries of a stride group share the window of their leader, the middle query (the right one of two),
  c = min((x div S) * S + S div 2, N - 1). The window begins at clamp(c - K div 2, 0, N - K) and has K keys: at a border
  it is shifted inwards, never cut. An even kernel reaches one further to the left.
- causal: the leader is the last query, c = min((x div S) * S + S - 1, N - 1); the keys are the j with c - K < j <= x.

A group with fewer than K members, which NATTEN refuses, is seen whole ("clipped").
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value", int, bool)


class Axis(NamedTuple):
    """The settings of one axis."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False


def _per_axis(name: str, value: Value | Sequence[Value], rank: int, kind: type, least: int) -> tuple[Value, ...]:
    """`value` once per axis; ValueError unless every one is a `kind` of at least `least`."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    wanted = "a bool" if kind is bool else f"an int >= {least}"
    good = len(values) == rank and all(isinstance(v, int) and isinstance(v, bool) == (kind is bool) for v in values)
    if not good or any(v < least for v in values):
        raise ValueError(f"{name} must be {wanted}, or a tuple of {rank} of them (one per axis), got {value!r}")
    return values


def axes_of(
    rank: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> tuple[Axis, ...]:
    """Checks the settings and spreads them over `rank` axes.

    Raises:
        ValueError: if a setting has the wrong type, length or range, or a stride exceeds its kernel size.
    """
    axes = tuple(
        Axis(*values)
        for values in zip(
            _per_axis("kernel_size", kernel_size, rank, int, 2),
            _per_axis("stride", stride, rank, int, 1),
            _per_axis("dilation", dilation, rank, int, 1),
            _per_axis("is_causal", is_causal, rank, bool, 0),
            strict=True,
        )
    )
    for axis in axes:
        if axis.stride > axis.kernel:
            raise ValueError(
                f"stride must not exceed kernel_size on any axis: stride {axis.stride} with kernel_size {axis.kernel} "
                "would skip keys"
            )
    return axes


def check_fits(sizes: Sequence[int], axes: Sequence[Axis]) -> None:
    """ValueError if a dilated kernel is longer than its axis."""
    for number, (size, axis) in enumerate(zip(sizes, axes, strict=True)):
        if axis.kernel * axis.dilation > size:
            raise ValueError(
                f"kernel_size {axis.kernel} * dilation {axis.dilation} exceeds the {size} positions of spatial axis "
                f"{number}: with this dilation kernel_size can be at most {size // axis.dilation}"
            )


@functools.lru_cache(maxsize=512)
def bounds(members: int, axis: Axis) -> tuple[tuple[int, int], ...]:
    """First and one-past-last key of every query in a dilation group of `members`; both never decrease."""
    pairs = []
    for x in range(members):
        group = x // axis.stride * axis.stride
        if axis.causal:
            leader = min(group + axis.stride - 1, members - 1)
            pairs.append((max(leader - axis.kernel + 1, 0), x + 1))
        else:
            leader = min(group + axis.stride // 2, members - 1)
            start = min(max(leader - axis.kernel // 2, 0), max(members - axis.kernel, 0))
            pairs.append((start, min(start + axis.kernel, members)))
    return tuple(pairs)


def limits(x: Tensor, members: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """`bounds` of the queries of index `x` in dilation groups of `members`, as two tensors; sizes may be symbolic."""
    kernel, stride, _, causal = axis
    leader = torch.minimum(x // stride * stride + (stride - 1 if causal else stride // 2), members - 1)
    if causal:
        return (leader - kernel + 1).clamp(min=0), x + 1
    first = torch.minimum(leader - kernel // 2, members - kernel).clamp(min=0)
    return first, torch.minimum(first + kernel, members)
