"""Sliding windows: what they cover, what they average, and that memory bounds change nothing."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from visattn.inference3d import (
    VIEWS,
    gaussian,
    largest,
    plan_windows,
    probabilities,
    require_eval,
    stream_logits,
    strips,
    window_logits,
)


def blended(call, volume, grid, **options):
    parts = [sums / weight for _, sums, weight in stream_logits(call, volume, grid, **options)]
    return torch.cat(parts, dim=1)


def by_hand(call, volume, grid):
    """Whole volume, float64, no rolling: sums and weights of every window."""
    sums, weights = 0.0, torch.zeros(grid.size, dtype=torch.float64)
    kernel = torch.einsum("i,j,k->ijk", *(gaussian(length).double() for length in grid.patch))
    total = None
    for d in grid.starts[0]:
        for h in grid.starts[1]:
            for w in grid.starts[2]:
                window = torch.zeros(volume.shape[0], *grid.patch)
                index = [
                    torch.arange(start, start + length) for start, length in zip((d, h, w), grid.patch, strict=True)
                ]
                inside = [(i >= 0) & (i < size) for i, size in zip(index, grid.size, strict=True)]
                take = [i[ok] for i, ok in zip(index, inside, strict=True)]
                put = [torch.nonzero(ok)[:, 0] for ok in inside]
                window[(slice(None), *torch.meshgrid(*put, indexing="ij"))] = volume[
                    (slice(None), *torch.meshgrid(*take, indexing="ij"))
                ]
                logits = call(window[None])[0].double()
                if total is None:
                    total = torch.zeros(len(logits), *grid.size, dtype=torch.float64)
                at = (slice(None), *torch.meshgrid(*take, indexing="ij"))
                of = (slice(None), *torch.meshgrid(*put, indexing="ij"))
                total[at] += (logits * kernel)[of]
                weights[at[1:]] += kernel[of[1:]]
    assert sums == 0.0
    return total / weights


def position_dependent(channels=3):
    """A network whose answer depends on where in the window a voxel lies, so that weights and places matter."""

    def call(windows):
        d, h, w = windows.shape[2:]
        ramp = torch.arange(d)[:, None, None] * 0.3 + torch.arange(h)[:, None] * 0.1 - torch.arange(w) * 0.2
        return torch.stack([windows.sum(dim=1) * (k + 1) + ramp * k for k in range(channels)], dim=1)

    return call


@pytest.mark.parametrize("size", [(10, 9, 8), (7, 20, 5), (6, 6, 6), (3, 4, 11), (1, 1, 1), (17, 6, 13)])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_blending_is_the_weighted_mean_of_windows(size, batch):
    torch.manual_seed(0)
    volume = torch.randn(2, *size)
    grid = plan_windows(size, (6, 5, 4), 0.5)
    call = position_dependent()
    result = blended(call, volume, grid, batch=batch)
    torch.testing.assert_close(result.double(), by_hand(call, volume, grid), rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 60)] * 3),
    patch=st.tuples(*[st.integers(1, 24)] * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75]),
)
def test_windows_cover_every_voxel_and_overlap_enough(size, patch, overlap):
    grid = plan_windows(size, patch, overlap)
    for starts, length, window in zip(grid.starts, size, patch, strict=True):
        covered = np.zeros(length, bool)
        for start in starts:
            covered[max(start, 0) : start + window] = True
        assert covered.all()
        if length <= window:
            assert len(starts) == 1
            before, after = -starts[0], starts[0] + window - length
            assert 0 <= after - before <= 1
        else:
            assert starts[0] == 0
            assert starts[-1] == length - window
            steps = np.diff(starts)
            assert steps.max() <= max(1, math.floor(window * (1 - overlap)))
            assert steps.max() - steps.min() <= 1
    assert grid.count == math.prod(len(starts) for starts in grid.starts)


def test_a_network_without_surroundings_is_reproduced_exactly():
    """What depends on no position comes out as if the volume had gone through whole."""
    torch.manual_seed(0)
    network = nn.Conv3d(2, 4, 1).eval()
    volume = torch.randn(2, 13, 17, 11)
    result = blended(network, volume, plan_windows((13, 17, 11), (8, 8, 8)))
    torch.testing.assert_close(result, network(volume[None])[0].detach())


@pytest.mark.parametrize("count", [1, 2, 3, 7, 17])
def test_strips_change_no_bit(count):
    torch.manual_seed(0)
    volume, grid = torch.randn(1, 9, 17, 10), plan_windows((9, 17, 10), (4, 6, 4))
    call = position_dependent()
    whole = blended(call, volume, grid, batch=2)
    edges = np.linspace(0, 17, count + 1).round().astype(int)
    parts = [
        blended(call, volume, grid, batch=2, rows=slice(int(low), int(high))) for low, high in itertools.pairwise(edges)
    ]
    assert torch.equal(torch.cat(parts, dim=2), whole)


def test_strips_keep_to_the_memory():
    grid = plan_windows((1024, 1024, 1024), (96, 96, 96))
    for memory in (2**28, 2**30, 2**32):
        cut = strips(grid, 8, memory)
        assert cut[0].start == 0
        assert cut[-1].stop == 1024
        assert all(a.stop == b.start for a, b in itertools.pairwise(cut))
        assert max(s.stop - s.start for s in cut) * 2 * 4 * 8 * 96 * 1024 <= memory
    assert len(strips(plan_windows((9, 9, 9), (4, 4, 4)), 2, 2**30)) == 1
    with pytest.raises(ValueError, match="hold no row"):
        strips(grid, 8, 1000)


def test_planes_leave_as_soon_as_they_are_final():
    """What is kept is as deep as a window, however deep the volume."""
    volume = torch.zeros(1, 200, 4, 4)
    kept = []
    for first, sums, weight in stream_logits(nn.Conv3d(1, 2, 1), volume, plan_windows((200, 4, 4), (8, 4, 4))):
        assert sums.shape[1:] == weight.shape
        kept.append((first, sums.shape[1], sums.untyped_storage().nbytes()))
    assert sum(n for _, n, _ in kept) == 200
    assert [first for first, _, _ in kept] == np.cumsum([0, *(n for _, n, _ in kept)])[:-1].tolist()
    assert {size for _, _, size in kept} == {2 * 8 * 4 * 4 * 4}


def test_sources_are_only_cut_never_converted_whole(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "v.npy", "w+", np.int16, (1, 9, 8, 7))
    array[:] = np.arange(array.size).reshape(array.shape) % 50

    class Spy:
        shape = array.shape

        def __getitem__(self, index):
            piece = array[index]
            assert piece.size <= 4**3
            return piece

    grid = plan_windows((9, 8, 7), (4, 4, 4))
    call = position_dependent()
    expected = blended(call, torch.from_numpy(array.astype(np.float32)), grid)
    assert torch.equal(blended(call, Spy(), grid), expected)


def test_the_batch_halves_when_memory_does_not_suffice():
    seen = []

    def call(windows):
        seen.append(len(windows))
        if len(windows) > 2:
            raise torch.OutOfMemoryError("no memory")
        return position_dependent()(windows)

    volume, grid = torch.randn(1, 9, 9, 9), plan_windows((9, 9, 9), (4, 4, 4))
    result = blended(call, volume, grid, batch=8)
    assert torch.equal(result, blended(position_dependent(), volume, grid, batch=2))
    assert seen[:2] == [4, 2]  # a row holds 4 windows
    assert max(seen[2:]) == 2  # for good

    def never(windows):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        blended(never, volume, grid)


def test_progress_counts_windows():
    done = []
    grid = plan_windows((9, 9, 9), (4, 4, 4))
    blended(position_dependent(), torch.randn(1, 9, 9, 9), grid, batch=3, advance=done.append)
    assert sum(done) == grid.count


def test_views_are_averaged_as_probabilities():
    assert len(VIEWS["flips"]) == 8
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Conv3d(1, 3, 3, padding=1)).eval() for _ in range(2)]
    x = torch.randn(2, 1, 5, 6, 7)
    with torch.no_grad():
        assert torch.equal(window_logits(networks[:1], x, "softmax"), networks[0](x))
        expected = torch.zeros(2, 3, 5, 6, 7)
        for network in networks:
            for axes in VIEWS["flips"]:
                expected += network(x.flip(axes)).flip(axes).softmax(dim=1) / 16
        got = window_logits(networks, x, "softmax", "flips")
        torch.testing.assert_close(got.softmax(dim=1), expected)
        both = window_logits(networks, x, "sigmoid")
        torch.testing.assert_close(both.sigmoid(), sum(n(x).sigmoid() for n in networks) / 2)


def test_side_outputs_are_left_out():
    x = torch.randn(1, 1, 4, 4, 4)
    assert torch.equal(window_logits([lambda x: (x, x * 2)], x, "sigmoid"), x)


def test_largest_is_argmax_with_ties_to_the_first():
    torch.manual_seed(0)
    logits = torch.randint(0, 3, (5, 7, 8, 9)).float()
    assert torch.equal(largest(logits).long(), torch.from_numpy(logits.numpy().argmax(axis=0)))
    assert largest(logits).dtype == torch.uint8


def test_probabilities_and_guards():
    logits = torch.randn(3, 2, 2, 2)
    torch.testing.assert_close(probabilities(logits, "softmax").sum(dim=0), torch.ones(2, 2, 2))
    torch.testing.assert_close(probabilities(logits, "sigmoid"), logits.sigmoid())
    with pytest.raises(Exception, match="unknown activation"):
        probabilities(logits, "relu")
    with pytest.raises(ValueError, match="training mode"):
        require_eval([nn.Conv3d(1, 1, 1)])
    with pytest.raises(ValueError, match="overlap must be"):
        plan_windows((4, 4, 4), (2, 2, 2), 1.0)
    with pytest.raises(ValueError, match="cannot cover"):
        plan_windows((4, 4), (2, 2))


@pytest.mark.slow  # imports MONAI
def test_labels_agree_with_monai():
    from monai.inferers import sliding_window_inference

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 3, 3, padding=1)).eval()
    volume = nn.functional.avg_pool3d(torch.randn(1, 24, 32, 24), 3, 1, 1) * 8
    grid = plan_windows((24, 32, 24), (16, 16, 16))  # sizes where both put the windows at the same places
    # The kernel is handed over because MONAI's own raises small weights to 1e-3, so that at the faces of a volume the
    # edges of windows count as much as their middles.
    kernel = torch.einsum("i,j,k->ijk", *[gaussian(16)] * 3)
    with torch.no_grad():
        theirs = sliding_window_inference(
            volume[None], (16, 16, 16), 2, network, overlap=0.5, mode="gaussian", roi_weight_map=kernel
        )[0]
        ours = blended(network, volume, grid)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
