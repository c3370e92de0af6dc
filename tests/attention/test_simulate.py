"""The simulator's counts against counting on the mask, and the mask against the attention that it describes."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.attention import neighborhood_attention, simulate


@st.composite
def arguments(draw):
    axes = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(2, 9))
        kernel = draw(st.integers(2, size))
        dilation, stride = draw(st.integers(1, size // kernel)), draw(st.integers(1, kernel))
        axes.append((size, kernel, stride, dilation, draw(st.booleans()), *(draw(st.integers(1, 4)) for _ in range(2))))
    return tuple(zip(*axes, strict=True))


def grid(size, dilation, tile):
    """The number of the tile of every position along one axis: within a dilation group, counted by hand."""
    return [(p % dilation, p // dilation // tile) for p in range(size)]


@given(arguments=arguments())
@settings(max_examples=60, deadline=None)
def test_counts_agree_with_counting(arguments):
    found = simulate(*arguments)
    size, _, _, dilation, _, tile_q, tile_kv = arguments
    mask = found.mask().numpy()
    assert found.pairs == mask.sum()
    queries, keys = (
        [*itertools.product(*(grid(n, d, t) for n, d, t in zip(size, dilation, tile, strict=True)))]
        for tile in (tile_q, tile_kv)
    )
    visited = {(queries[row], keys[column]) for row, column in zip(*np.nonzero(mask), strict=True)}
    assert found.computed == len(visited) * math.prod(tile_q) * math.prod(tile_kv)
    assert found.computed >= found.pairs


@given(arguments=arguments())
@settings(max_examples=30, deadline=None)
def test_shares_of_tiles_add_up(arguments):
    found = simulate(*arguments)
    shares = [found.tiles(axis) for axis in range(len(found.size))]
    products = math.prod(found.tile_q) * math.prod(found.tile_kv)
    assert math.prod(float(share.double().sum()) for share in shares) * products == pytest.approx(found.pairs)
    assert math.prod(int((share > 0).sum()) for share in shares) * products == found.computed
    assert all(float(share.max()) <= 1 for share in shares)


@given(arguments=arguments())
@settings(max_examples=30, deadline=None)
def test_the_mask_is_that_of_the_attention(arguments):
    size, kernel, stride, dilation, causal, _, _ = arguments
    count = math.prod(size)
    eye = torch.eye(count, dtype=torch.float64).reshape(1, *size, 1, count)
    same = torch.zeros(1, *size, 1, 2, dtype=torch.float64)
    weights = neighborhood_attention(same, same, eye, kernel, stride, dilation, causal, backend="reference")
    assert torch.equal(weights.reshape(count, count) > 0, simulate(*arguments).mask())


def test_blocked_attention_on_its_own_tiles_loses_nothing():
    blocked = simulate((16, 24), 8, stride=8, tile_q=8, tile_kv=8)
    assert blocked.block_sparse
    assert blocked.speedup == blocked.ideal == 6
    sliding = simulate((16, 24), 7, tile_q=8, tile_kv=8)
    assert not sliding.block_sparse
    near = sliding.nearby_block_sparse()
    assert near[0].axes[0][:2] == (8, 8)
    assert all(each.block_sparse for each in near)
    assert simulate(16, 7).nearby_block_sparse(reach=0) == []


def test_best_tile_computes_least_of_its_size():
    start = simulate((12, 30), (3, 9), tile_q=(8, 2), tile_kv=(4, 4))
    best = start.best_tile()
    assert math.prod(best.tile_q) == math.prod(best.tile_kv) == 16
    for tile_q, tile_kv in itertools.product([(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)], repeat=2):
        assert best.computed <= simulate((12, 30), (3, 9), tile_q=tile_q, tile_kv=tile_kv).computed
    assert best.computed < start.computed
    assert start.best_tile(queries=False).tile_q == start.tile_q
    assert start.best_tile(keys=False).tile_kv == start.tile_kv
    assert best.computed <= start.best_tile(keys=False).computed < start.computed


def test_operations_bytes_and_table():
    found = simulate((56, 56), 7)
    assert found.pairs == 56 * 56 * 49
    assert found.flops(32) == 4 * 32 * found.pairs
    assert found.bytes(32) == 4 * 56 * 56 * 32 * 2
    assert found.full == (56 * 56) ** 2
    assert "153,664" in found.table()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 0}, "size"),
        ({"size": (4,) * 4}, "size"),
        ({"tile_q": 0}, "tile_q"),
        ({"tile_kv": (2, 2, 2)}, "tile_kv"),
        ({"kernel": 9}, "at most 8"),
        ({"stride": 4}, "stride"),
    ],
)
def test_settings_are_checked(changed, message):
    with pytest.raises(ValueError, match=message):
        simulate(**({"size": (8, 8), "kernel": 3} | changed))
