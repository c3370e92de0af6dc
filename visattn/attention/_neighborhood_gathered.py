"""Neighbourhood attention on overlapping tiles in one call, where starting an operator costs more than most do.

The tiles of `_neighborhood_traced`, collected by index tensors that are kept between calls. Rows and their gradients
are taken by gathers, none is added up by atomics, so results are repeatable. Collected keys are kept for the gradient.

Legend: B batch, *S spatial sizes, N positions, H heads, c channels of a head, T tiles over all axes and dilation
groups, q queries and k keys of a tile, U kinds of tiles, M tiles that show a key to a query at most.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visattn.attention._backend import scaled_dot_product
from visattn.attention._neighborhood_traced import Cut, places_of, tiles_of
from visattn.attention._neighborhood_windows import Axis

# Tiles may hold so many keys for each position of the map, have so many scores in a call, and so many in an image's
# mask: that bounds the memory of a call, and of what is kept.
COPIES, SCORES, MASK = 4.5, 1 << 28, 1 << 23


class Rows(NamedTuple):
    """How rows are taken from (B, I, H, c) to (B, *O, c), and gradients back.

    Attributes:
        there: (*O) indices into the second and third axis, broadcast against each other.
        back: Likewise from what was taken to (B, I, M, H, c), where M is missing if it is 1.
        real: Which of the latter are there, 1 or 0, to be multiplied with them; None: all.
        summed: Whether there is an axis M.
    """

    there: tuple[Tensor, ...]
    back: tuple[Tensor, ...]
    real: Tensor | None
    summed: bool


class Plan(NamedTuple):
    """A map cut into tiles.

    Attributes:
        query: From (B, N, H, c) to (B, T, H, q, c).
        key: From (B, N, H, c) to (B, T, H, k, c).
        out: From (B, T, H, q, c) to (B, N, H, c).
        mask: 0 where a query sees a key, else -inf: (T, 1, q, k).
        kinds: (T,) below U.
        offset: (U, q, k) index into the flattened table of relative positions.
    """

    query: Rows
    key: Rows
    out: Rows
    mask: Tensor
    kinds: Tensor
    offset: Tensor


@functools.lru_cache(maxsize=256)
def _cuts(sizes: tuple[int, ...], axes: tuple[Axis, ...]) -> tuple[Cut, ...]:
    """How each axis is cut: a short one not at all, others such that the fewest scores are computed."""
    cuts = []
    for size, axis in zip(sizes, axes, strict=True):
        longest = -(-size // axis.dilation)
        whole = -(-longest // axis.stride) * axis.stride
        if longest <= 2 * axis.kernel:
            cuts.append(Cut(whole, longest, 1, longest))
            continue
        found = []
        for queries in range(-(-axis.kernel // axis.stride) * axis.stride, 2 * axis.kernel + 1, axis.stride):
            # A short dilation group may begin one key before a long one, see `Cut.of`.
            keys = queries - axis.stride + axis.kernel + (axis.dilation > 1 and queries == axis.stride)
            found.append(Cut(queries, keys, -(-longest // queries), longest))
        cuts.append(min(found, key=lambda cut: cut.tiles * cut.queries * cut.keys))
    return tuple(cuts)


def _plain(x: Tensor) -> bool:
    """Whether what is made beside `x` may be kept: no fake or functional tensor outlives its context."""
    return type(x) is Tensor


def fits(query: Tensor, key: Tensor, axes: tuple[Axis, ...]) -> bool:
    """Whether a call takes no more memory than allowed, every key head has one query head, and tensors are plain."""
    sizes, heads = tuple(query.shape[1:-2]), query.shape[-2]
    if key.shape[-2] != heads or query.numel() == 0 or not _plain(query):
        return False
    cuts = _cuts(sizes, axes)
    tiles = math.prod(cut.tiles * axis.dilation for cut, axis in zip(cuts, axes, strict=True))
    queries, keys = (math.prod(each) for each in zip(*((cut.queries, cut.keys) for cut in cuts), strict=True))
    mask = tiles * heads * queries * keys
    few: bool = tiles * keys <= COPIES * math.prod(sizes) and mask <= MASK and mask * query.shape[0] <= SCORES
    return few


def _inverse(key: Tensor, seen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For every position (N,) the places in the flattened `key` that hold it, (N, M), and which of these are real.

    Only places that are `seen` count: others have no gradient, and at borders they would make M twice as large.
    """
    used = seen.flatten().nonzero()[:, 0]
    position = key.flatten()[used]
    order = used[torch.argsort(position, stable=True)]
    counts = torch.bincount(position, minlength=count)
    step = torch.arange(int(counts.max()))
    places = (counts.cumsum(0) - counts)[:, None] + step
    return order[places.clamp(max=len(order) - 1)], step < counts[:, None]


@functools.lru_cache(maxsize=32)
def plan_of(
    sizes: tuple[int, ...], axes: tuple[Axis, ...], heads: int, device: torch.device, kind: torch.dtype
) -> Plan:
    """The plan of a map; indices are small and the same at every call."""
    with torch.inference_mode(False), torch.device("cpu"):
        cuts = _cuts(sizes, axes)
        tiles = tiles_of(sizes, axes, cuts, torch.device("cpu"))
        tile, row = places_of(sizes, axes, cuts, torch.device("cpu"))
        head = torch.arange(heads)
        places, real = _inverse(tiles.key, tiles.seen.any(1), math.prod(sizes))
        width = tiles.key.shape[1]
        own = torch.zeros(tiles.query.shape, dtype=torch.bool)  # rows that are not a query twice
        own[tile, row] = True
        to_tiles = (tiles.query[:, None], head[:, None])  # (T, H, q)
        to_map = (tile[:, None], head, row[:, None])  # (N, H)
        offset, kinds = torch.unique(tiles.offset, dim=0, return_inverse=True)
        mask = torch.zeros(tiles.seen.shape, dtype=kind).masked_fill_(~tiles.seen, -math.inf)
        keys = (places // width)[..., None], head, (places % width)[..., None]  # (N, M, H)
        plan = Plan(
            Rows(to_tiles, to_map, None, False),
            Rows((tiles.key[:, None], head[:, None]), keys, real[..., None, None].to(kind), True),
            Rows(to_map, to_tiles, None if own.all() else own[:, None, :, None].to(kind), False),
            mask[:, None],
            kinds,
            offset,
        )

        def moved(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.to(device)
            if isinstance(x, Rows):
                return Rows(*(moved(each) for each in x))
            return tuple(moved(each) for each in x) if isinstance(x, tuple) else x

        return Plan(*(moved(each) for each in plan))


class Take(torch.autograd.Function):
    """Rows of a tensor; their gradient is collected in the same way."""

    @staticmethod
    def forward(x: Tensor, rows: Rows) -> Tensor:
        """See `Rows`."""
        index: tuple[Any, ...] = (slice(None), *rows.there)
        return x[index]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the indices."""
        ctx.rows = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Every row from where it went, added up if there are several such places."""
        rows: Rows = ctx.rows
        index: tuple[Any, ...] = (slice(None), *rows.back)
        grad = grads[0][index]
        if rows.real is not None:
            grad = grad.mul_(rows.real)
        return grad.sum(2) if rows.summed else grad, None


def neighborhood_gathered(
    query: Tensor, key: Tensor, value: Tensor, axes: tuple[Axis, ...], scale: float, rpb: Tensor | None
) -> Tensor:
    """As `neighborhood_tiles`, of tensors that `fits` accepts, outside of autocast."""
    sizes = tuple(query.shape[1:-2])
    plan = plan_of(sizes, axes, query.shape[-2], query.device, query.dtype)
    q = Take.apply(query.flatten(1, -3), plan.query).flatten(1, 2)  # (B, T H, q, c)
    k, v = (Take.apply(each.flatten(1, -3), plan.key).flatten(1, 2) for each in (key, value))
    mask = plan.mask.expand(-1, query.shape[-2], -1, -1)
    if rpb is not None:
        bias = rpb.to(query.dtype).flatten(1)[:, plan.offset].transpose(0, 1)  # (U, H, q, k)
        mask = bias[plan.kinds] + plan.mask
    out = scaled_dot_product(q, k, v, mask.flatten(0, 1)[None], scale)
    out = torch.unflatten(out, 1, (-1, query.shape[-2]))  # (B, T, H, q, c)
    taken: Tensor = Take.apply(out, plan.out)
    return torch.unflatten(taken, 1, sizes)
