"""Back to the file's grid: what `resample` gives, and every bit the same however scores come and rows are cut."""

import numpy as np
import pytest
import torch

from visattn.data.native_grid import ROWS, Band, bands, native_rows, to_native
from visattn.data.resample import resample


def joined(scores, new, rows=None, held=0, steps=(9, 1, 30)):
    """All blocks of `scores` (K, D, h, W), which come in chunks of `steps` planes and are overwritten afterwards."""
    axes = bands(OLD, new)
    low, high = rows or (0, new[1])

    def stream():
        start = index = 0
        while start < scores.shape[1]:
            chunk = scores[:, start : start + steps[index % len(steps)]].clone()
            yield start, chunk
            chunk.fill_(float("nan"))
            start, index = start + chunk.shape[1], index + 1

    found = torch.full((len(scores), new[0], high - low, new[2]), float("nan"))
    for plane, row, block in to_native(stream(), axes, (low, high), held):
        found[:, plane : plane + block.shape[1], row - low : row - low + block.shape[2]] = block
    return found


OLD = (41, 75, 53)
SIZES = [OLD, (50, 75, 61), (41, 130, 47), (23, 40, 53), (90, 75, 53), (41, 100, 100)]


@pytest.mark.parametrize("new", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_blocks_join_to_what_resample_gives(new, channels):
    torch.manual_seed(0)
    scores = torch.randn(channels, *OLD)
    np.testing.assert_allclose(joined(scores, new), resample(scores, new), atol=2e-6)
    if new == OLD:
        assert torch.equal(joined(scores, new), scores)


@pytest.mark.parametrize("new", SIZES)
def test_strips_and_chunks_change_no_bit(new):
    torch.manual_seed(0)
    scores = torch.randn(7, *OLD)
    whole = joined(scores, new)
    assert torch.equal(joined(scores, new, steps=(41,)), whole)
    rows = Band.between(OLD[1], new[1])
    blocks = [rows.needs(low, min(low + ROWS, new[1])) for low in range(0, new[1], ROWS)]
    parts = native_rows(rows, max(stop - first for first, stop in blocks))
    assert len(parts) > 1
    for low, high in parts:
        first, stop = rows.needs(low, high)
        assert torch.equal(joined(scores[:, :, first:stop], new, (low, high), first), whole[:, :, low:high])
    with pytest.raises(ValueError, match="rows are fewer"):
        native_rows(rows, 3)
