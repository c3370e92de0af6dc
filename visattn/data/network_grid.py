"""From the voxels of the file to the network's grid: turned and resampled in one pass, a block at a time.

A block stays in a core's cache while it is multiplied, axis by axis, by the parts of the matrices of `resample.py` that
are not zero. The last product writes to the result, and turns the axes meanwhile. Blocks have fixed sizes and places,
whatever memory there is; axes that keep their length are copied, to the last bit.

Legend: D x H x W the result's axes. A block has them in the order t, s, f: f runs along the memory of the source; t is
H if f is D, else D, so that a block's voxels lie close together in the result as well.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visattn.data.native_grid import PRODUCT, Band, Part
from visattn.scratch import release

_ROWS, _COLUMNS = 8, 256  # new voxels of a block along t and s, at most
_VOXELS = 2**22  # old ones of a block


def to_network(source: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Resample `source` (D, H, W), a view with any strides, to the size of `out`, which is contiguous.

    What is not finite counts as the mean of the rest.
    """
    if not _pass(source, out, None):
        _pass(source, out, _finite_mean(source))


def _pass(source: NDArray[np.float32], out: NDArray[np.float32], fill: float | None) -> bool:
    """Fill `out`, with `fill` for what is not finite; with None stop, False, where there is something."""
    lengths = [abs(stride) if n > 1 else math.inf for n, stride in zip(source.shape, source.strides, strict=True)]
    f = lengths.index(min(lengths))
    t = 1 if f == 0 else 0
    s = 3 - f - t
    old, new = source.transpose(t, s, f), torch.from_numpy(out).permute(t, s, f)
    bands = [Band.between(a, b) for a, b in zip(old.shape, new.shape, strict=True)]
    # How many old voxels there are to a new one.
    t_ratio, s_ratio, _ = (max(1.0, a / b) for a, b in zip(old.shape, new.shape, strict=True))
    columns = max(1, int(_COLUMNS / s_ratio))
    rows = min(_ROWS, max(1, int(_VOXELS / (t_ratio * s_ratio * columns * old.shape[2]))))
    along = bands[2].parts(0, new.shape[2], PRODUCT)
    for chunk in bands[1].parts(0, new.shape[1], columns):
        products = bands[1].parts(chunk.low, chunk.high, PRODUCT)
        for row in bands[0].parts(0, new.shape[0], rows):
            block = _finite(old[row.first : row.stop, chunk.first : chunk.stop], fill)
            if block is None:
                return False
            if bands[1].matrix is not None:
                block = _along_s(block, products, chunk)
            if row.matrix is not None:
                block = (row.matrix @ block.flatten(1)).view(-1, *block.shape[1:])
            _along_f(block, along, new[row.low : row.high, chunk.low : chunk.high])
            release(source)
            release(out)
    return True


def _finite(view: NDArray[np.float32], fill: float | None) -> Tensor | None:
    """The block, with `fill` for what is not finite; None if there is something and nothing to fill it with."""
    plain = view.flags.writeable and min(view.strides) >= 0  # as torch wants it
    block = torch.from_numpy(view if plain else np.array(view))
    if math.isfinite(float(block.sum())):  # one NaN or infinity makes the sum one; so may numbers that are very large
        return block
    finite = torch.isfinite(block)
    if finite.all():
        return block
    return None if fill is None else torch.where(finite, block, fill)


def _along_s(block: Tensor, products: list[Part], chunk: Part) -> Tensor:
    result = block.new_empty(len(block), chunk.high - chunk.low, block.shape[2])
    for part in products:
        assert part.matrix is not None
        taken = block[:, part.first - chunk.first : part.stop - chunk.first]
        made = result[:, part.low - chunk.low : part.high - chunk.low]
        torch.bmm(part.matrix.expand(len(block), -1, -1), taken, out=made)
    return result


def _along_f(block: Tensor, parts: list[Part], into: Tensor) -> None:
    if parts[0].matrix is None:
        into.copy_(block)
        return
    if into.stride(0) == into.shape[1] * into.stride(1):  # one large product in place of one a row
        into, block = into.view(1, -1, into.shape[2]), block.reshape(1, -1, block.shape[2])
    for part in parts:
        assert part.matrix is not None
        matrix = part.matrix.T.expand(len(block), -1, -1)
        torch.bmm(block[:, :, part.first : part.stop], matrix, out=into[:, :, part.low : part.high])


def _finite_mean(source: NDArray[np.float32]) -> float:
    """The mean of what is finite in (D, H, W); 0 if nothing is."""
    count, total = 0, 0.0
    # Planes along the slowest axis, as the file has them.
    for plane in np.moveaxis(source, int(np.argmax(np.abs(source.strides))), 0):
        finite = plane[np.isfinite(plane)]
        count, total = count + finite.size, total + float(finite.sum(dtype=np.float64))
        release(source)
    return total / count if count else 0.0
