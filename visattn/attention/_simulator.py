"""What neighbourhood attention costs, and what a tiled kernel makes of it: counted, not modelled.

Paper: Hassani et al., "Generalized Neighborhood Attention", arXiv 2504.16922, section 3 (its own simulator is not
published). A tiled kernel computes whole products of a tile of queries and a tile of keys: for every tile of queries
all key tiles that hold a key of one of its queries. Tiles lie on a grid, within a dilation group. What it computes
beyond the definition is masked, and lost; a setting where nothing is lost is called perfectly block-sparse.

Legend: L length, K kernel, S stride, D dilation of an axis; counts are products over the axes.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visattn.attention._neighborhood_windows import Axis, axes_of, bounds, check_fits


def _groups(length: int, axis: Axis) -> Iterator[tuple[int, int]]:
    """(members, how many dilation groups have them)."""
    longer = length % axis.dilation
    for members, count in ((length // axis.dilation + 1, longer), (length // axis.dilation, axis.dilation - longer)):
        if count:
            yield members, count


def _pairs(length: int, axis: Axis) -> int:
    """Queries times their keys along one axis."""
    return sum(count * sum(last - first for first, last in bounds(n, axis)) for n, count in _groups(length, axis))


def _visits(length: int, axis: Axis, tile_q: int, tile_kv: int) -> int:
    """Pairs of a query tile and a key tile that a kernel computes along one axis."""
    total = 0
    for members, count in _groups(length, axis):
        pairs = bounds(members, axis)
        for first in range(0, members, tile_q):
            start, stop = pairs[first][0], pairs[min(first + tile_q, members) - 1][1]
            total += count * ((stop - 1) // tile_kv - start // tile_kv + 1)
    return total


def _computed(size: Sequence[int], axes: Sequence[Axis], tile_q: Sequence[int], tile_kv: Sequence[int]) -> int:
    visits = math.prod(_visits(*each) for each in zip(size, axes, tile_q, tile_kv, strict=True))
    return visits * math.prod(tile_q) * math.prod(tile_kv)


def _shapes(count: int, rank: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `count` as a product of `rank` factors."""
    if rank == 1:
        yield (count,)
        return
    for first in range(1, count + 1):
        if count % first == 0:
            for rest in _shapes(count // first, rank - 1):
                yield first, *rest


@dataclass(frozen=True)
class Simulation:
    """The counts for one head of one map.

    Attributes:
        size: Of the map.
        axes: Kernel, stride, dilation and causality of each axis.
        tile_q: Queries of a tile, per axis.
        tile_kv: Keys of a tile, per axis.
        pairs: Queries times their keys, by the definition.
        computed: Products of a query and a key that the tiled kernel computes.
        full: The same for attention of all to all on the same tiles.
    """

    size: tuple[int, ...]
    axes: tuple[Axis, ...]
    tile_q: tuple[int, ...]
    tile_kv: tuple[int, ...]
    pairs: int
    computed: int
    full: int

    @property
    def speedup(self) -> float:
        """How much faster than full attention the tiled kernel can be."""
        return self.full / self.computed

    @property
    def ideal(self) -> float:
        """How much faster than full attention anything can be: by the products that are needed."""
        return math.prod(self.size) ** 2 / self.pairs

    @property
    def block_sparse(self) -> bool:
        """Whether every product that is computed is needed."""
        return self.computed == self.pairs

    def flops(self, head_dim: int) -> int:
        """Operations of both products, forward, by the definition; a kernel does `computed / pairs` times as many."""
        return 4 * head_dim * self.pairs

    def bytes(self, head_dim: int, element: int = 2) -> int:
        """Bytes of query, key, value and output, each moved once, of `element` bytes a number."""
        return 4 * math.prod(self.size) * head_dim * element

    def mask(self) -> Tensor:
        """Whether a query (row) sees a key (column), (N, N) bool; rows and columns in row-major order of the map."""
        seen = torch.ones(1, 1, dtype=torch.bool)
        for axis, length in enumerate(self.size):
            seen = torch.kron(seen, torch.stack([self.line(axis, position) for position in range(length)]))
        return seen

    def line(self, axis: int, position: int) -> Tensor:
        """Which positions along `axis` a query at `position` of it sees, (L,) bool."""
        length, setting = self.size[axis], self.axes[axis]
        x, group = divmod(position, setting.dilation)
        first, last = bounds(math.ceil((length - group) / setting.dilation), setting)[x]
        seen = torch.zeros(length, dtype=torch.bool)
        seen[group + setting.dilation * first : group + setting.dilation * last : setting.dilation] = True
        return seen

    def tiles(self, axis: int) -> Tensor:
        """How much of every product of a query tile (row) and a key tile (column) along `axis` is needed, from 0 to 1.

        Tiles come group by group where there is dilation; 0 means that the product is not computed. The share of a
        product on the whole map is that of its axes, multiplied.
        """
        length, setting, q, kv = self.size[axis], self.axes[axis], self.tile_q[axis], self.tile_kv[axis]
        blocks = []
        for group in range(min(setting.dilation, length)):
            members = math.ceil((length - group) / setting.dilation)
            pairs = bounds(members, setting)
            share = torch.zeros(math.ceil(members / q), math.ceil(members / kv))
            for x, (first, last) in enumerate(pairs):
                for tile in range(first // kv, (last - 1) // kv + 1):
                    share[x // q, tile] += min(last, (tile + 1) * kv) - max(first, tile * kv)
            blocks.append(share / (q * kv))
        shares: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return shares

    def best_tile(self, queries: bool = True, keys: bool = True) -> "Simulation":
        """The same with the tile shapes, of as many queries and keys, that compute least.

        Args:
            queries: Whether the shape of the query tile may change.
            keys: Whether that of the key tile may.
        """
        rank = len(self.size)
        ours = _shapes(math.prod(self.tile_q), rank) if queries else [self.tile_q]
        theirs = _shapes(math.prod(self.tile_kv), rank) if keys else [self.tile_kv]
        least = min(itertools.product(ours, theirs), key=lambda each: _computed(self.size, self.axes, *each))
        return _simulate(self.size, self.axes, *least)

    def nearby_block_sparse(self, reach: int = 2, most: int | None = None) -> "list[Simulation]":
        """Perfectly block-sparse settings with kernels at most `reach` away and any stride, nearest first.

        Args:
            reach: How far a kernel may be from this one, per axis.
            most: How many to return; None: all.
        """

        def options(length: int, axis: Axis) -> list[Axis]:
            kernels = range(max(2, axis.kernel - reach), min(axis.kernel + reach, length // axis.dilation) + 1)
            return [axis._replace(kernel=k, stride=s) for k in kernels for s in range(1, k + 1)]

        def distance(axes: Sequence[Axis]) -> tuple[int, int]:
            changes = [
                (abs(a.kernel - b.kernel), abs(a.stride - b.stride)) for a, b in zip(axes, self.axes, strict=True)
            ]
            return sum(k for k, _ in changes), sum(s for _, s in changes)

        # The product is block-sparse exactly when every axis is, so axes are searched one by one.
        clean: list[list[Axis]] = []
        for length, axis, q, kv in zip(self.size, self.axes, self.tile_q, self.tile_kv, strict=True):
            choices = options(length, axis)
            clean.append([each for each in choices if _visits(length, each, q, kv) * q * kv == _pairs(length, each)])
        found = sorted(itertools.product(*clean), key=distance)[:most]
        return [_simulate(self.size, axes, self.tile_q, self.tile_kv) for axes in found]

    def table(self) -> str:
        """The counts as lines of text."""
        rows = {
            "map": self.size,
            "kernel, stride, dilation, causal": [tuple(axis) for axis in self.axes],
            "tiles of queries, keys": f"{self.tile_q}, {self.tile_kv}",
            "products needed": f"{self.pairs:,}",
            "products computed": f"{self.computed:,} ({self.computed / self.pairs:.2f}x)",
            "full attention on these tiles": f"{self.full:,}",
            "speed-up, at most": f"{self.speedup:.2f}x on these tiles, {self.ideal:.2f}x in all",
            "perfectly block-sparse": "yes" if self.block_sparse else "no",
        }
        return "\n".join(f"{name:34}{value}" for name, value in rows.items())


def _simulate(
    size: tuple[int, ...], axes: tuple[Axis, ...], tile_q: tuple[int, ...], tile_kv: tuple[int, ...]
) -> Simulation:
    everything = tuple(Axis(max(length, 2), 1, 1, False) for length in size)
    return Simulation(
        size,
        axes,
        tile_q,
        tile_kv,
        math.prod(_pairs(*each) for each in zip(size, axes, strict=True)),
        _computed(size, axes, tile_q, tile_kv),
        _computed(size, everything, tile_q, tile_kv),
    )


def simulate(
    size: int | Sequence[int],
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    tile_q: int | Sequence[int] = 8,
    tile_kv: int | Sequence[int] = 8,
) -> Simulation:
    """Counts what neighbourhood attention needs and what a tiled kernel computes, for one head of one map.

    Args:
        size: Of the map, one to three axes.
        kernel: Length of the window, for all axes or per axis, as are the others.
        stride: Positions that share a window.
        dilation: Distance between neighbouring keys.
        causal: Whether keys behind the query are left out.
        tile_q: Queries of a tile.
        tile_kv: Keys of a tile.

    Returns:
        The counts, with a `table`, the `mask`, the `best_tile` and `nearby_block_sparse` settings.

    Raises:
        ValueError: If a setting is out of range or a window does not fit into the map.
    """
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(sizes) <= 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"size must be one to three integers of at least 1, got {size!r}")
    axes = axes_of(len(sizes), kernel, stride, dilation, causal)
    check_fits(sizes, axes)
    tiles = []
    for name, tile in (("tile_q", tile_q), ("tile_kv", tile_kv)):
        values = (tile,) * len(sizes) if isinstance(tile, int) else tuple(tile)
        if len(values) != len(sizes) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in values):
            raise ValueError(
                f"{name} must be an int >= 1, or a tuple of {len(sizes)} of them (one per axis), got {tile!r}"
            )
        tiles.append(values)
    return _simulate(sizes, axes, tiles[0], tiles[1])
