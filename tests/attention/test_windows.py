import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.attention._relative import RelativePositionMlp, RelativePositionTable, toeplitz
from visattn.attention._windows import (
    ceil_div,
    crop,
    flat_index,
    grid_partition,
    grid_reverse,
    overlapping_windows,
    pad_axes,
    pad_to,
    window_partition,
    window_reverse,
)

F64 = torch.float64
PAIRS = {"window": (window_partition, window_reverse), "grid": (grid_partition, grid_reverse)}


def numbered(sizes, batch=2, channels=3):
    """A map whose every value is different."""
    shape = (batch, *sizes, channels)
    return torch.arange(1, math.prod(shape) + 1, dtype=F64).reshape(shape)


axes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=3)


@pytest.mark.parametrize("kind", PAIRS)
@settings(deadline=None, max_examples=60)
@given(axes=axes)
def test_reverse_undoes_partition_on_any_size(kind, axes):
    partition, reverse = PAIRS[kind]
    sizes, window = [a for a, _ in axes], [w for _, w in axes]
    x = numbered(sizes)
    windows = partition(x, window)
    assert windows.shape == (2, math.prod(ceil_div(sizes, window)), math.prod(window), 3)
    assert torch.equal(reverse(windows, window, sizes), x)
    assert windows.sum() == x.sum()  # nothing but zeros was added


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("sizes", [(7, 4), (6, 3), (2, 5, 1)])
def test_exported_form_is_the_same(monkeypatch, kind, sizes):
    """torch.export takes the tokens by index; the results are those of padding and views."""
    partition, reverse = PAIRS[kind]
    window = (3, 2, 2)[: len(sizes)]
    x = numbered(sizes)
    windows, padded = partition(x, window), pad_to(x, [s + 2 for s in sizes])
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(partition(x, window), windows)
    assert torch.equal(reverse(windows, window, sizes), x)
    assert torch.equal(pad_to(x, [s + 2 for s in sizes]), padded)
    assert torch.equal(crop(padded, sizes), x)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("window", [(2, 3), (3, 1), (2, 1, 3)])
def test_partition_against_a_loop(kind, window):
    """Distinct sizes per axis, so that a swapped axis cannot pass."""
    counts = (5, 2, 4)[: len(window)]
    sizes = tuple(w * n for w, n in zip(window, counts, strict=True))
    x = numbered(sizes)
    windows = PAIRS[kind][0](x, window)
    for w, cell in enumerate(itertools.product(*map(range, counts))):
        for t, token in enumerate(itertools.product(*map(range, window))):
            if kind == "window":
                at = [c * p + i for c, p, i in zip(cell, window, token, strict=True)]
            else:
                at = [c + n * i for c, n, i in zip(cell, counts, token, strict=True)]
            assert torch.equal(windows[:, w, t], x[(slice(None), *at)])


@settings(deadline=None, max_examples=60)
@given(axes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=3))
def test_overlapping_windows_and_their_gradient(axes):
    """Windows wider than, equal to and narrower than the step, with a remainder that no window reaches."""
    sizes, window, step = ([axis[i] for axis in axes] for i in range(3))
    window = [min(s, w) for s, w in zip(sizes, window, strict=True)]
    x = numbered(sizes).requires_grad_()
    windows = overlapping_windows(x, window, step)
    starts = [range(0, s - w + 1, t) for s, w, t in zip(sizes, window, step, strict=True)]
    expected = [
        x[(slice(None), *[slice(a, a + w) for a, w in zip(at, window, strict=True)])].flatten(1, -2)
        for at in itertools.product(*starts)
    ]
    expected = torch.stack(expected, 1)
    assert torch.equal(windows, expected)
    weight = torch.randn(windows.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    grads = [torch.autograd.grad((w * weight).sum(), x)[0] for w in (windows, expected)]
    torch.testing.assert_close(*grads)


def test_overlapping_windows_second_order():
    x = numbered((5, 4), 1, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: overlapping_windows(x, (3, 2), (2, 1)).square(), x)


def test_padding_and_cropping_leave_alone_what_fits():
    x = numbered((4, 6))
    assert pad_to(x, (4, 6)) is x
    assert crop(x, (4, 6)) is x
    assert torch.equal(pad_axes(x, (1, 0), (0, 2))[:, 1:, :6], x)
    assert pad_axes(x, (1, 0), (0, 2)).shape == (2, 5, 8, 3)


def test_flat_index():
    assert [flat_index(at, (2, 3, 4)) for at in itertools.product(range(2), range(3), range(4))] == list(range(24))
    for wrong in ((0, 3), (-1, 0), (0,), (0, 0, 0)):
        with pytest.raises(ValueError, match=r"into the map \(2, 3\)"):
            flat_index(wrong, (2, 3))


def pairs(window):
    """Position in row-major order and index of every query and key of a window."""
    tokens = list(itertools.product(*map(range, window)))
    return itertools.product(enumerate(tokens), enumerate(tokens))


@pytest.mark.parametrize("window", [(3, 2), (4,), (2, 3, 2), (1, 1)])
def test_toeplitz_is_key_minus_query(window):
    table = torch.randn(2, *[2 * w - 1 for w in window], dtype=F64)
    bias = toeplitz(table, window)
    for (i, query), (j, key) in pairs(window):
        at = tuple(k - q + w - 1 for q, k, w in zip(query, key, window, strict=True))
        assert torch.equal(bias[:, i, j], table[(slice(None), *at)])


@pytest.mark.parametrize("window", [(3, 2), (2, 3, 2)])
def test_table_layouts(window):
    flat, grid = (RelativePositionTable(window, 2, layout).double() for layout in ("flat", "grid"))
    sides = [2 * w - 1 for w in window]
    assert flat.relative_position_bias_table.shape == (math.prod(sides), 2)
    assert grid.relative_position_bias_table.shape == (2, *sides)
    a, b = flat(), grid()
    for (i, query), (j, key) in pairs(window):
        row = flat_index([q - k + w - 1 for q, k, w in zip(query, key, window, strict=True)], sides)
        assert torch.equal(a[:, i, j], flat.relative_position_bias_table[row])
        at = tuple(k - q + w - 1 for q, k, w in zip(query, key, window, strict=True))
        assert torch.equal(b[:, i, j], grid.relative_position_bias_table[(slice(None), *at)])


@pytest.mark.parametrize("window", [(3, 2), (1, 4), (2, 3, 2)])
def test_log_mlp(window):
    module = RelativePositionMlp(window, 2, hidden=7).double()
    bias = module()
    for (i, query), (j, key) in pairs(window):
        d = torch.tensor([q - k for q, k in zip(query, key, strict=True)], dtype=F64)
        hidden = (module.mlp.fc1(d.sign() * (1 + d.abs()).log())).relu()
        torch.testing.assert_close(bias[:, i, j], module.mlp.fc2(hidden))


def test_tables_equal_timm():
    """Second witness: the modules that timm's MaxViT models use."""
    from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp

    window = (5, 3)
    for theirs, ours in (
        (RelPosBias(window, 2), RelativePositionTable(window, 2)),
        (RelPosBiasTf(window, 2), RelativePositionTable(window, 2, "grid")),
        (RelPosMlp(window, 2, hidden_dim=9).eval(), RelativePositionMlp(window, 2, 9)),
    ):
        ours.load_state_dict(theirs.state_dict())
        expected = theirs.get_bias().detach().reshape(2, 15, 15)
        torch.testing.assert_close(ours().detach(), expected, atol=1e-6, rtol=1e-6)
        assert (expected - expected.mT).abs().max() > 1e-3  # so that a transposed bias could not pass


def test_log_mlp_drops_only_in_training():
    module = RelativePositionMlp((3, 3), 2, hidden=64, drop=0.5)
    assert not torch.equal(module(), module())
    module.eval()
    assert torch.equal(module(), module())
