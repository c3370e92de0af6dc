"""Reverse attention against a loop in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from visattn.attention import FUSION, ReverseAttention
from visattn.attention.reverse import resize_linear

SIZES = {2: (5, 7), 3: (2, 3, 5)}


def inputs(rank, classes, size=None):
    generator = torch.Generator().manual_seed(rank * 10 + classes)
    x = torch.randn(3, *SIZES[rank], 11, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(3, *(size or SIZES[rank]), classes, generator=generator, dtype=torch.float64)
    return x, logits


def test_it_is_in_the_table():
    assert FUSION["reverse"] is ReverseAttention
    assert ReverseAttention.supported_ranks == (2, 3)
    assert list(ReverseAttention().parameters()) == []
    assert "softmax" in repr(ReverseAttention("softmax"))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    ("activation", "classes", "reading"),
    [
        (None, 1, "sigmoid"),
        ("sigmoid", 1, "sigmoid"),
        ("sigmoid", 3, "sigmoid"),
        (None, 3, "softmax"),
        ("softmax", 4, "softmax"),
    ],
)
def test_equals_the_loop(rank, activation, classes, reading):
    x, logits = inputs(rank, classes)
    y = ReverseAttention(activation)(x, logits)
    assert y.shape == x.shape
    for index in itertools.product(range(3), *(range(n) for n in SIZES[rank])):
        row = [float(v) for v in logits[index]]
        if reading == "sigmoid":
            left = 1 - max(1 / (1 + math.exp(-v)) for v in row)
        else:
            left = math.exp(row[0]) / sum(math.exp(v) for v in row)
        torch.testing.assert_close(y[index], x[index] * left, rtol=1e-12, atol=1e-12)


def test_one_class_is_the_papers_formula():
    x, logits = inputs(2, 1)
    assert torch.allclose(ReverseAttention()(x, logits), (1 - torch.sigmoid(logits)) * x, rtol=1e-14)


@pytest.mark.parametrize("rank", [2, 3])
def test_coarser_logits_are_resized_linearly(rank):
    x, coarse = inputs(rank, 2, {2: (2, 3), 3: (1, 2, 2)}[rank])
    block = ReverseAttention()
    mode = {2: "bilinear", 3: "trilinear"}[rank]
    fine = F.interpolate(coarse.movedim(-1, 1), size=SIZES[rank], mode=mode, align_corners=False).movedim(1, -1)
    assert torch.equal(block(x, coarse), block(x, fine))
    assert not torch.equal(block(x, coarse), block(x, fine.flip(-2)))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_gradients(rank, activation):
    x, logits = inputs(rank, 2)
    x, logits = x[:1, :2, :2, ..., :3], logits[:1, :2, :2]
    torch.autograd.gradcheck(ReverseAttention(activation), (x.requires_grad_(), logits.requires_grad_()))


def test_half_precision_keeps_small_weights():
    """1 - sigmoid(12) is 6e-6; in bfloat16 the subtraction would give 0."""
    x, logits = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.full((1, 1, 1, 1), 12.0, dtype=torch.bfloat16)
    y = ReverseAttention()(x, logits)
    assert y.dtype == torch.bfloat16
    assert y.item() == pytest.approx(math.exp(-12), rel=0.01)
    assert ReverseAttention()(x, logits.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_huge_logits_and_empty_batches(activation):
    block = ReverseAttention(activation)
    x = torch.ones(1, 1, 2, 3)
    logits = torch.tensor([1e30, -1e30]).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert torch.isfinite(block(x, logits)).all()
    assert block(torch.zeros(0, 4, 5, 3), torch.zeros(0, 2, 2, 2)).shape == (0, 4, 5, 3)


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="activation must be"):
        ReverseAttention("tanh")
    with pytest.raises(ValueError, match="always 1"):
        ReverseAttention("softmax")(*inputs(2, 1))
    with pytest.raises(ValueError, match="2 or 3 spatial axes"):
        ReverseAttention()(torch.zeros(1, 4, 3), torch.zeros(1, 4, 1))
    with pytest.raises(ValueError, match="2 or 3 spatial axes"):
        ReverseAttention()(torch.zeros(1, 4, 4, 3), torch.zeros(1, 4, 4, 4, 1))


def test_resizing_to_the_same_size_is_free():
    x = torch.randn(1, 2, 3, 4)
    assert resize_linear(x, (3, 4)) is x
