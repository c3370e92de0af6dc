"""Pictures of attention: what is looked at is where it is drawn, and wrong input is explained."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from visattn.attention import AgentAttention, FullAttention, simulate
from visattn.errors import UserError
from visattn.viz import attention_map, draw_attention, draw_neighborhood


def test_options_reach_the_block_and_nothing_is_recorded():
    block = AgentAttention(8, 2, variant="deit", agent_num=4, window_size=4)
    x = torch.randn(1, 1 + 6, 8, requires_grad=True)
    weights = attention_map(block, x, (1, 2), size=(2, 3))
    assert weights.shape == (1, 2, 2, 3)
    assert not weights.requires_grad


def test_the_looked_at_cells_glow():
    image = np.full((40, 60, 3), (200, 120, 90), np.uint8)
    weights = torch.zeros(2, 4, 6)
    weights[0, 1, 2] = 0.5
    picture = draw_attention(image, weights)
    assert picture.shape == image.shape
    cells = picture.reshape(4, 10, 6, 10, 3).swapaxes(1, 2).reshape(24, 100, 3)
    assert (cells == cells[:, :1]).all()
    different = (cells[:, 0] != cells[0, 0]).any(-1)
    assert different.nonzero()[0].tolist() == [1 * 6 + 2]
    assert len(set(cells[0, 0].tolist())) == 1  # the rest is grey
    assert (draw_attention(image, weights, (3, 5)) != picture)[29:, 49:].any()
    assert not (draw_attention(image, weights, (3, 5)) != picture)[:28, :48].any()


def test_any_image_and_any_map():
    weights = FullAttention(8, 2).attention_map(torch.randn(1, 5, 7, 8), (4, 6))[0]
    for shape in ((33, 50), (33, 50, 1), (3, 2, 3)):
        image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        picture = draw_attention(image, weights.requires_grad_(), (4, 6))
        assert picture.shape == (*shape[:2], 3)
        assert picture.dtype == np.uint8
    assert (draw_attention(image, np.zeros((2, 2))) <= 255).all()
    assert np.array_equal(draw_attention(image, 2 * weights.detach()), draw_attention(image, weights.detach().numpy()))


@pytest.mark.parametrize(
    ("image", "weights", "query", "message"),
    [
        ((4, 4, 3), np.zeros((1, 2, 4, 4)), None, r"\(heads, h, w\)"),
        ((4, 4, 2), np.zeros((4, 4)), None, r"\(H, W, 3\)"),
        ((4, 4, 3), np.full((4, 4), np.nan), None, "finite"),
        ((4, 4, 3), np.full((4, 4), -1.0), None, "negative"),
        ((4, 4, 3), np.zeros((4, 4)), (4, 0), "index"),
        ((4, 4, 3), np.zeros((4, 4)), (0,), "index"),
    ],
)
def test_wrong_input_is_explained(image, weights, query, message):
    with pytest.raises(ValueError, match=message):
        draw_attention(np.zeros(image, np.uint8), weights, query)


def test_a_missing_matplotlib_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="report"):
        draw_neighborhood(simulate(8, 3), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_importing_it_is_light():
    code = "import sys, visattn.viz; assert not {'torch', 'matplotlib', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
