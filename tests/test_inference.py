import numpy as np
import pytest
import torch
from torch import nn

from visattn.errors import UserError
from visattn.inference import iter_probabilities, predict_probabilities


class Fixed(nn.Module):
    """Returns given logits, whatever the image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits


def bilinear(grid, size):
    """Half-pixel bilinear resize, slowly, in float64."""
    h, w = grid.shape
    out = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            v = min(max((y + 0.5) * h / size[0] - 0.5, 0), h - 1)
            u = min(max((x + 0.5) * w / size[1] - 0.5, 0), w - 1)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            fy, fx = v - y0, u - x0
            top = grid[y0, x0] * (1 - fx) + grid[y0, x1] * fx
            low = grid[y1, x0] * (1 - fx) + grid[y1, x1] * fx
            out[y, x] = top * (1 - fy) + low * fy
    return out


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_logits_are_resized_then_activated(activation):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 7) * 4
    sizes = [(11, 13), (3, 17)]
    results = predict_probabilities(Fixed(logits).eval(), torch.zeros(2, 3, 5, 7), sizes, activation)
    for index, (result, size) in enumerate(zip(results, sizes, strict=True)):
        expected = np.stack([bilinear(logits[index, k].double().numpy(), size) for k in range(3)])
        if activation == "sigmoid":
            expected = 1 / (1 + np.exp(-expected))
        else:
            expected = np.exp(expected) / np.exp(expected).sum(axis=0)
        assert result.shape == (3, *size)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, atol=2e-6)


def test_prediction_is_the_first_of_several_outputs():
    logits = torch.randn(1, 1, 4, 4)
    side = torch.full((1, 1, 2, 2), 99.0)
    alone = predict_probabilities(lambda _: logits, torch.zeros(1, 3, 4, 4), [(4, 4)], "sigmoid")
    several = predict_probabilities(lambda _: (logits, side), torch.zeros(1, 3, 4, 4), [(4, 4)], "sigmoid")
    np.testing.assert_array_equal(alone[0], several[0])
    np.testing.assert_allclose(alone[0], logits[0].sigmoid().numpy(), atol=1e-7)


def test_flips_undo_themselves_for_a_pixelwise_network():
    torch.manual_seed(1)
    network = nn.Conv2d(3, 2, 1).eval()
    images = torch.randn(2, 3, 6, 9)
    plain = predict_probabilities(network, images, [(13, 8)] * 2, "softmax")
    flipped = predict_probabilities(network, images, [(13, 8)] * 2, "softmax", tta="flips")
    for one, other in zip(plain, flipped, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_flips_average_the_probabilities_of_four_views():
    torch.manual_seed(2)
    network = nn.Conv2d(1, 1, 3, padding=1).eval()  # not symmetric, so views differ
    image = torch.randn(1, 1, 5, 8)
    (result,) = predict_probabilities(network, image, [(5, 8)], "sigmoid", tta="flips")
    views = []
    with torch.no_grad():
        for axes in ([], [2], [3], [2, 3]):
            views.append(network(torch.flip(image, axes)).flip(axes).sigmoid())
    np.testing.assert_allclose(result, torch.stack(views).mean(0)[0].numpy(), atol=1e-6)
    (plain,) = predict_probabilities(network, image, [(5, 8)], "sigmoid")
    assert np.abs(result - plain).max() > 1e-3


def test_low_precision_logits_are_resized_in_float32():
    logits = torch.tensor([[[[0.0, 1.0]]]], dtype=torch.bfloat16)
    (result,) = predict_probabilities(lambda _: logits, torch.zeros(1, 1, 1, 2), [(1, 64)], "sigmoid")
    assert len(np.unique(result)) == 34, "bfloat16 would leave fewer steps between the two"


def test_no_gradient_is_kept_and_nothing_is_computed_early():
    network = nn.Conv2d(1, 1, 1).eval()
    iterator = iter_probabilities(network, torch.zeros(1, 1, 2, 2), [(2, 2)], "sigmoid")
    next(iterator)
    assert torch.is_grad_enabled()


def test_misuse():
    network = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="training mode"):
        predict_probabilities(network, torch.zeros(1, 1, 2, 2), [(2, 2)], "sigmoid")
    with pytest.raises(ValueError, match="2 images, but 1 sizes"):
        predict_probabilities(network.eval(), torch.zeros(2, 1, 2, 2), [(2, 2)], "sigmoid")
    with pytest.raises(UserError, match="Did you mean 'flips'"):
        predict_probabilities(network, torch.zeros(1, 1, 2, 2), [(2, 2)], "sigmoid", tta="flip")
