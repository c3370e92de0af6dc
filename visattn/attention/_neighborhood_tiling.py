"""What is decided once for maps of some size: how they are cut, and what is added to the scores of each kind of tile.

Legend: B batch, *S spatial axes, H query heads, G key heads, R = H / G, D head dim; `rows` of a tile are R times its
queries.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from visattn.attention._neighborhood_plan import Run, Unit, units_of, whole_of
from visattn.attention._neighborhood_windows import Axis

Kept = TypeVar("Kept", Tensor, Tensor | None)

# Elements of a piece (its scores and its keys) for each thread: its buffers then stay within a second-level cache.
PIECE = 3 << 16
# A piece, and masks that are kept, are also no larger than this many times the query: that bounds the memory of a call.
SHARE = 3


def _spread(table: Tensor, number: int, rank: int) -> Tensor:
    """(queries, keys) of one axis, shaped to combine with the other axes into (*queries, *keys)."""
    shape = [1] * (2 * rank)
    shape[number], shape[rank + number] = table.shape
    return table.view(shape)


def _seen(unit: Unit, device: torch.device) -> Tensor | None:
    """Whether a query sees a key, (queries, keys), or None where every query sees every key."""
    rank, seen = len(unit.runs), None
    for number, run in enumerate(unit.runs):
        if run.masked:
            limits = torch.tensor(run.bounds, device=device)
            keys = torch.arange(run.keys, device=device)
            mask = _spread((keys >= limits[:, :1]) & (keys < limits[:, 1:]), number, rank)
            seen = mask if seen is None else seen & mask
    if seen is None:
        return None
    sizes = [run.queries for run in unit.runs] + [run.keys for run in unit.runs]
    return seen.expand(sizes).reshape(unit.queries, unit.keys)


def _offsets(run: Run, axis: Axis, device: torch.device) -> Tensor:
    """(queries, keys): key index - query index + kernel - 1, the index into a table of relative positions."""
    query = torch.arange(run.queries, device=device)[:, None] + run.query_start
    key = torch.arange(run.keys, device=device) + run.key_start
    return (key - query + axis.kernel - 1).clamp(0, 2 * axis.kernel - 2)  # what lies outside is masked


class Tiling:
    """How maps of some size are cut, and what is added to the scores of each kind of tile.

    Args:
        sizes: Of the map.
        axes: Settings of each axis.
        batch: B.
        groups: G.
        repeat: R.
        width: D.

    Attributes:
        units: The tiles.
        whole: The map as one tile if attention of all to all, under a mask, is the faster way, else None.
    """

    def __init__(
        self, sizes: tuple[int, ...], axes: tuple[Axis, ...], batch: int, groups: int, repeat: int, width: int
    ) -> None:
        self.axes, self.repeat = axes, repeat
        self.numel = batch * math.prod(sizes) * groups * repeat * width
        copies = batch * groups * repeat
        self.units, time = units_of(sizes, axes, width, copies, self.limit(1))
        self.whole = whole_of(sizes, axes, width, copies, self.limit(1), time)
        self._small = sum(unit.queries * unit.keys for unit in self.units) * repeat <= SHARE * self.numel
        self._kept: dict[tuple[Any, ...], Any] = {}

    def limit(self, workers: int) -> int:
        """Elements of a piece for so many threads."""
        return min(PIECE * workers, SHARE * self.numel)

    def _keep(self, make: Callable[[Unit, Tensor], Kept], unit: Unit, like: Tensor) -> Kept:
        place = (make.__name__, id(unit), like.device, like.dtype)
        if place in self._kept:
            kept: Kept = self._kept[place]
            return kept
        made = make(unit, like)
        if self._small and type(made) in (Tensor, type(None)):  # no fake or functional tensor outlives its context
            self._kept[place] = made
        return made

    def _mask(self, unit: Unit, like: Tensor) -> Tensor | None:
        """0 where a row sees a key, else -inf: (1, rows, keys)."""
        seen = _seen(unit, like.device)
        if seen is None:
            return None
        mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -math.inf)
        return mask.repeat(1, self.repeat, 1)

    def _index(self, unit: Unit, like: Tensor) -> Tensor:
        """For every query and key of a tile the place in the flattened table of relative positions."""
        rank = len(self.axes)
        index = torch.zeros((), dtype=torch.int64, device=like.device)
        for place, (run, axis) in enumerate(zip(unit.runs, self.axes, strict=True)):
            index = index * (2 * axis.kernel - 1) + _spread(_offsets(run, axis, like.device), place, rank)
        return index.reshape(-1)

    def bias(self, unit: Unit, table: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to the scores of a unit's tiles, (G or 1, rows, keys): the mask and the position bias."""
        mask = self._keep(self._mask, unit, like)
        if table is None:
            return mask
        index = self._keep(self._index, unit, like)
        bias = table.flatten(1).index_select(1, index).view(-1, self.repeat * unit.queries, unit.keys)
        return bias if mask is None else bias + mask

    def add_table_gradient(self, unit: Unit, grad: Tensor, table: Tensor) -> None:
        """Adds to `table` (places, H) the gradient of a unit's bias (G, rows, keys)."""
        index = self._keep(self._index, unit, grad)
        # index_put_ is repeatable on every device; scatter_add_ and index_add_ are not.
        table.index_put_((index,), grad.reshape(table.shape[1], -1).t(), accumulate=True)


# What is kept has no effect but speed: every layer of a network asks again at every step.
@functools.lru_cache(maxsize=64)
def tiling_of(
    sizes: tuple[int, ...], axes: tuple[Axis, ...], batch: int, groups: int, repeat: int, width: int
) -> Tiling:
    """`Tiling` with these arguments; those used last are kept."""
    return Tiling(sizes, axes, batch, groups, repeat, width)
