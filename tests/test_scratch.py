"""Arrays that may lie in files."""

import numpy as np
import pytest

from visattn import scratch
from visattn.scratch import Scratch, copied


@pytest.mark.parametrize("index", [np.s_[:, :, 3:5], np.s_[::2, ::-1, 1], np.s_[2:4], np.s_[..., ::-1], np.s_[:0]])
def test_copies_are_equal_and_hold_little_of_the_file(tmp_path, monkeypatch, index):
    """A thin slab along the axis that is closest together lies in every page of the file."""
    monkeypatch.setattr(scratch, "SMALL", 4000)
    array = Scratch(tmp_path).zeros((50, 20, 30), np.float32)
    array[:] = np.arange(array.size).reshape(array.shape)
    read = []
    monkeypatch.setattr(scratch, "release", lambda view: read.append(view.nbytes))
    result = copied(array[index])
    assert np.array_equal(result, array[index])
    assert not np.shares_memory(result, array)
    assert len(read) >= min(len(array[index]), 24)  # a row of the slowest axis takes 2400 bytes of the file
    memory = np.arange(24.0).reshape(2, 3, 4)
    assert np.array_equal(copied(memory[:, :, 1]), memory[:, :, 1])
