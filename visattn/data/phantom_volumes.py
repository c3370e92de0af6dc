"""Synthetic volumes by name, for what reads cases; each kind is drawn in a file of its own."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visattn.data.geometry import Geometry
from visattn.data.phantom_head import phantom_head, write_heads
from visattn.data.phantom_hippocampus import phantom_hippocampus, write_hippocampi
from visattn.data.phantoms import PHANTOM_SEED, VOLUME_KINDS, kind_of
from visattn.errors import unknown

Volume = tuple[NDArray[np.float32], NDArray[np.uint8], Geometry]
"""Values (1, I, J, K), labels (I, J, K), and the grid."""

DRAWN: dict[str, Callable[[int, int], Volume]] = {"head": phantom_head, "hippocampus": phantom_hippocampus}
"""What draws each kind, from index and seed."""

WRITERS: dict[str, Callable[[Path, int, int, Callable[[], None]], None]] = {
    "head": write_heads,
    "hippocampus": write_hippocampi,
}
"""What writes a folder of each kind: folder, count, seed, and what to call after each."""


def read_phantom(name: str) -> Volume:
    """Draw the volume `name` of the word phantom; see `phantom_head` and `phantom_hippocampus`.

    The last few are kept: a case's image, labels and grid are asked for one after the other.

    Raises:
        UserError: No kind is called so.
    """
    kind = kind_of(name)
    if kind not in DRAWN:
        raise unknown("phantom", kind, VOLUME_KINDS)
    image, labels, geometry = _kept(kind, int(name.rpartition("_")[2]))
    return image.copy(), labels.copy(), geometry


@lru_cache(maxsize=8)
def _kept(kind: str, index: int) -> Volume:
    return DRAWN[kind](index, PHANTOM_SEED)
