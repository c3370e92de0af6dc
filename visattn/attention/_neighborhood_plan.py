"""How a map is cut into tiles for neighbourhood attention; integers only, no tensors.

A tile is a block of queries with the union of their windows as keys: the block and its halo. Tiles that differ by a
shift only form a run along each axis and a unit over all axes: they share sizes and mask. The groups of a dilated axis
have one of two lengths, and groups of equal length join a unit too. So a unit's queries and keys are strided views of
the map. A box is as much of a unit as is computed at once.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from visattn.attention._neighborhood_windows import Axis, bounds


class Run(NamedTuple):
    """Consecutive tiles of one axis that differ by a shift only, counted within a dilation group.

    Attributes:
        tiles: number of tiles.
        queries: queries of a tile.
        keys: keys of a tile, the union of its queries' windows.
        query_start: first query of the first tile; each further tile begins `queries` later.
        key_start: first key of the first tile; each further tile begins `queries` later.
        bounds: for each query of a tile the first and the one-past-last of its keys, counted from the tile's first key.
    """

    tiles: int
    queries: int
    keys: int
    query_start: int
    key_start: int
    bounds: tuple[tuple[int, int], ...]

    @property
    def masked(self) -> bool:
        """Whether some query does not see every key of its tile."""
        return any(pair != (0, self.keys) for pair in self.bounds)


@functools.lru_cache(maxsize=4096)
def runs(members: int, axis: Axis, tile: int) -> tuple[Run, ...]:
    """Covers a dilation group with tiles of `tile` queries (the last may have fewer), equal ones joined into runs."""
    pairs = bounds(members, axis)
    found: list[Run] = []
    for first in range(0, members, tile):
        window = pairs[first : first + tile]
        start, stop = window[0][0], window[-1][1]
        run = Run(1, len(window), stop - start, first, start, tuple((a - start, b - start) for a, b in window))
        last = found[-1] if found else None
        if (
            last
            and run[1:3] + run.bounds == last[1:3] + last.bounds
            and run.key_start - last.key_start == last.tiles * tile
        ):
            found[-1] = last._replace(tiles=last.tiles + 1)
        else:
            found.append(run)
    return tuple(found)


class Unit(NamedTuple):
    """Tiles that share sizes and mask: one run along every axis, within one class of dilation groups.

    Attributes:
        groups: for each axis the first dilation group and their number.
        runs: for each axis its run of tiles.
    """

    groups: tuple[tuple[int, int], ...]
    runs: tuple[Run, ...]

    @property
    def queries(self) -> int:
        """Queries of a tile."""
        return math.prod(run.queries for run in self.runs)

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return math.prod(run.keys for run in self.runs)


def _classes(size: int, dilation: int) -> list[tuple[int, int, int]]:
    """(first group, number of groups, members) of the dilation groups of one axis; only two lengths occur."""
    longer = size % dilation
    found = [(0, longer, size // dilation + 1), (longer, dilation - longer, size // dilation)]
    return [item for item in found if item[1] and item[2]]


def _cuts(members: int, axis: Axis) -> list[tuple[Run, ...]]:
    """Ways to cut an axis into equal tiles of whole stride groups."""
    lengths = set()
    for pieces in range(1, members + 1):
        groups = math.ceil(members / pieces / axis.stride)
        lengths.add(min(groups * axis.stride, members))
    useful = {tile for tile in lengths if tile <= 4 * axis.kernel and axis.kernel <= 16 * tile}
    return [runs(members, axis, tile) for tile in sorted(useful or {min(lengths)})]


# Microseconds of forward and backward on one core with AVX-512, fitted to 16 tilings; only their ratios matter.
TILE_TIME, SCORE_TIME, CHANNEL_TIME, UNIT_TIME = 27.0, 5.8e-3, 1.5e-4, 500.0


def _cost(cuts: Sequence[tuple[Run, ...]], copies: int, width: int, limit: int) -> tuple[int, float]:
    """Scores of the largest tile, as far as they exceed the limit, and the estimated time of `copies` maps."""
    tiles = math.prod(sum(run.tiles for run in cut) for cut in cuts)
    scores = math.prod(sum(run.tiles * run.keys * run.queries for run in cut) for cut in cuts)
    units = math.prod(len(cut) for cut in cuts)
    largest = math.prod(max(run.keys * run.queries for run in cut) for cut in cuts)
    time = copies * (TILE_TIME * tiles + (SCORE_TIME + CHANNEL_TIME * width) * scores) + UNIT_TIME * units
    return max(largest, limit), time


# The same for attention of all to all.
DENSE_SCORE_TIME, DENSE_CHANNEL_TIME = 1.9e-3, 1e-4


def whole_of(
    sizes: Sequence[int], axes: Sequence[Axis], width: int, copies: int, limit: int, time: float
) -> Unit | None:
    """The undivided map as one tile, if attention of all to all is estimated to take less than `time`."""
    scores = math.prod(sizes) ** 2
    if any(axis.dilation > 1 for axis in axes):
        return None
    if copies * scores * (DENSE_SCORE_TIME + DENSE_CHANNEL_TIME * width) >= time:
        return None
    unit = Unit(((0, 1),) * len(axes), tuple(runs(size, axis, size)[0] for size, axis in zip(sizes, axes, strict=True)))
    return None if scores > limit and any(run.masked for run in unit.runs) else unit


def units_of(
    sizes: Sequence[int], axes: Sequence[Axis], width: int, copies: int, limit: int
) -> tuple[tuple[Unit, ...], float]:
    """Cuts the map into the tiles of least estimated time, and tells that time in microseconds.

    Args:
        sizes: of the map.
        axes: settings of each axis.
        width: channels of a head.
        copies: maps that are computed together, batch times heads.
        limit: of the scores of one tile, kept where any cut allows it.
    """
    found: list[Unit] = []
    time = 0.0
    per_axis = [_classes(size, axis.dilation) for size, axis in zip(sizes, axes, strict=True)]
    for classes in itertools.product(*per_axis):
        options = [_cuts(members, axis) for (_, _, members), axis in zip(classes, axes, strict=True)]
        times = copies * math.prod(count for _, count, _ in classes)
        costs = ((_cost(cuts, times, width, limit), cuts) for cuts in itertools.product(*options))
        (_, cost), best = min(costs)
        time += cost
        groups = tuple((first, count) for first, count, _ in classes)
        found.extend(Unit(groups, chosen) for chosen in itertools.product(*best))
    return tuple(found), time


def _split(lead: Sequence[int], limit: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts leading dimensions into (starts, sizes) of at most `limit` elements, the inner dimensions whole first."""
    inner, whole = 1, len(lead)
    while whole and inner * lead[whole - 1] <= limit:
        whole -= 1
        inner *= lead[whole]
    if not whole:
        yield (0,) * len(lead), tuple(lead)
        return
    step, rest = max(1, limit // inner), tuple(lead[whole:])
    for outer in itertools.product(*(range(size) for size in lead[: whole - 1])):
        for start in range(0, lead[whole - 1], step):
            sizes = (1,) * len(outer) + (min(step, lead[whole - 1] - start), *rest)
            yield (*outer, start, *((0,) * len(rest))), sizes


class Box(NamedTuple):
    """Tiles computed at once: a part of a unit.

    Attributes:
        unit: number of the unit.
        starts: where the part begins along (B, *groups, *tiles, G).
        sizes: its size along the same dimensions.
        rows: of the scores of a tile: queries, times the query heads of a key head.
        keys: of a tile.
    """

    unit: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: int
    keys: int

    @property
    def tiles(self) -> int:
        """Number of tiles, times key heads."""
        return math.prod(self.sizes)


def boxes_of(units: Sequence[Unit], batch: int, groups: int, repeat: int, width: int, most: int) -> list[Box]:
    """Cuts units into boxes, each of one tile of one key head or of at most `most` elements: scores and keys.

    Args:
        units: That cover the map.
        batch: Number of maps.
        groups: Key heads.
        repeat: Query heads of a key head.
        width: Channels of a head.
        most: See above.
    """
    found = []
    for number, unit in enumerate(units):
        lead = (batch, *(count for _, count in unit.groups), *(run.tiles for run in unit.runs), groups)
        rows = repeat * unit.queries
        for starts, sizes in _split(lead, max(1, most // (unit.keys * (rows + width)))):
            found.append(Box(number, starts, sizes, rows, unit.keys))
    return found


class View(NamedTuple):
    """A strided view of a tensor: sizes, strides and the offset from the tensor's first element."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides of a tensor (B, *S, heads, channels)


def view_of(layout: Layout, box: Box, unit: Unit, axes: Sequence[Axis], side: str) -> View:
    """The tiles of a box in one tensor.

    Args:
        layout: of the tensor.
        box: part of the unit.
        unit: the tiles.
        axes: settings of each axis.
        side: "q" for the tokens of the queries, "k" for those of the keys.

    Returns:
        A view (B, *groups, *tiles, G, R, *tokens, channels); R is 1 where the tensor has as many heads as the key.
    """
    shape, strides = layout
    tiles, tokens, sizes, offset = [], [], [], 0
    for number, (axis, run) in enumerate(zip(axes, unit.runs, strict=True)):
        stride = strides[1 + number]
        start, size = (run.query_start, run.queries) if side == "q" else (run.key_start, run.keys)
        tiles.append(stride * axis.dilation * run.queries)
        tokens.append(stride * axis.dilation)
        sizes.append(size)
        offset += stride * (unit.groups[number][0] + axis.dilation * start)
    *along, head, channel = strides
    repeat = box.rows // unit.queries if side == "q" else 1
    all_strides = (*along, *tiles, head * repeat, head, *tokens, channel)
    offset += sum(start * stride for start, stride in zip(box.starts, all_strides, strict=False))
    return View((*box.sizes, repeat, *sizes, shape[-1]), all_strides, offset)


def dense(sizes: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(sizes[number + 1 :]) for number in range(len(sizes)))


def turns_of(view: View, unit: Unit) -> list[tuple[View, View]]:
    """Splits tiles that overlap in a tensor into turns within which they do not.

    Returns:
        For every turn its tiles in a contiguous copy of `view`, and in the tensor itself.
    """
    first = 1 + len(unit.groups)
    steps = [min(-(-run.keys // run.queries), view.sizes[first + number]) for number, run in enumerate(unit.runs)]
    found = []
    for turn in itertools.product(*map(range, steps)):
        sizes = list(view.sizes)
        source, target = list(dense(sizes)), list(view.strides)
        from_offset, to_offset = 0, view.offset
        for number, (start, step) in enumerate(zip(turn, steps, strict=True)):
            place = first + number
            sizes[place] = -(-(sizes[place] - start) // step)
            from_offset += start * source[place]
            to_offset += start * target[place]
            source[place] *= step
            target[place] *= step
        found.append((View((*sizes,), (*source,), from_offset), View((*sizes,), (*target,), to_offset)))
    return found
