"""DAUNet's position and channel attention against slow loops, and what their two forms mean."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from visattn.attention.dual import ChannelAttention, PositionAttention


def randomised(block, std=0.5):
    torch.manual_seed(1)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return block.double()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize(
    ("size", "dim", "reduction"), [((3, 4), 16, 8), ((1, 1), 5, 8), ((2, 3, 2), 6, 2), ((2, 3), 4, 1)]
)
def test_position_loops_agree(reference, size, dim, reduction, form):
    block = randomised(PositionAttention(dim, form=form, reduction=reduction))
    x = draw(2, *size, dim)
    with torch.no_grad():
        torch.testing.assert_close(block(x), reference("dual").position(x, block.state_dict()), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (2, 3, 2)])
def test_channel_loops_agree(reference, size, form):
    block = randomised(ChannelAttention(6, form=form))
    x = draw(2, *size, 6) / 2
    with torch.no_grad():
        expected = reference("dual").channel(x, block.gamma, form)
        torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-11)


def test_the_forms_differ():
    """As coded, what a channel receives need not sum to 1; in the paper it does, so equal channels stay as they are."""
    x = draw(1, 4, 4, 3) / 2
    weights = ChannelAttention(3).weights(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 3, dtype=x.dtype))
    assert (weights.sum(-2) - 1).abs().max() > 0.1
    coded, paper = (randomised(ChannelAttention(3, form=form)) for form in ("code", "paper"))
    assert (coded(x) - paper(x)).abs().max() > 1e-3


def test_only_the_paper_has_biases():
    coded, paper = (
        {key for key, _ in PositionAttention(8, form=form).named_parameters()} for form in ("code", "paper")
    )
    assert coded == {"conv_b.weight", "conv_c.weight", "conv_d.weight", "gamma"}
    assert paper - coded == {"conv_b.bias", "conv_c.bias", "conv_d.bias"}


@pytest.mark.parametrize("block", [PositionAttention(16), ChannelAttention(16)])
def test_a_new_block_returns_its_input(block):
    x = torch.randn(2, 5, 3, 16)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("dim", [32, 256, 300])
def test_position_attention_runs_in_the_fused_kernel(dim):
    """Torch may use nothing but its fused kernel here, which never holds all pairs; it would raise otherwise."""
    block = PositionAttention(dim)
    x = torch.randn(1, 6, 7, dim, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        block(x).sum().backward()


def test_position_attention_saves_nothing_of_the_order_of_all_pairs():
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    x = torch.randn(1, 32, 32, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        PositionAttention(16)(x)
    assert 0 < max(saved) <= 4 * x.numel() < 32**4


def test_wide_features_are_attended_in_parts():
    """More channels than a fused kernel takes at once: the same as one product of all."""
    block = randomised(PositionAttention(600, reduction=2), std=0.05)
    x = draw(1, 2, 3, 600)
    tokens = x.flatten(1, 2)
    weights = (block.conv_c(tokens) @ block.conv_b(tokens).mT).softmax(-1)
    expected = tokens + block.gamma * (weights @ block.conv_d(tokens))
    torch.testing.assert_close(block(x).flatten(1, 2), expected, rtol=1e-10, atol=1e-11)


def test_attention_map():
    block = randomised(PositionAttention(8))
    x = draw(2, 3, 5, 8)
    weights = block.attention_map(x, (1, 4))
    assert weights.shape == (2, 1, 3, 5)
    torch.testing.assert_close(weights.sum((1, 2, 3)), torch.ones(2, dtype=x.dtype))
    out = torch.einsum("bhyx,byxc->bc", weights, block.conv_d(x))
    torch.testing.assert_close(x[:, 1, 4] + block.gamma * out, block(x)[:, 1, 4])


@pytest.mark.parametrize("block", [PositionAttention(8), ChannelAttention(8)])
def test_gradients(block):
    block = randomised(block)
    x = draw(1, 2, 3, 8).div(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda *each: block(each[0]), (x, *block.parameters()), fast_mode=True)


@pytest.mark.parametrize("kind", [PositionAttention, ChannelAttention])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_huge_energies_in_half_precision(kind, dtype):
    """Energies beyond the largest half number."""
    block = kind(16)
    torch.nn.init.ones_(block.gamma)
    x = torch.randn(1, 9, 9, 16) * 300
    with torch.autocast("cpu", dtype):
        assert block(x).isfinite().all()
    assert block.to(dtype)(x.to(dtype)).isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PositionAttention(8, form="danet"), "'code', 'paper', got 'danet'"),
        (lambda: ChannelAttention(8, form="danet"), "'code', 'paper', got 'danet'"),
        (lambda: PositionAttention(8, reduction=0), "reduction must be an integer of at least 1"),
        (lambda: ChannelAttention(0), "dim must be an integer of at least 1"),
    ],
)
def test_refused_arguments_say_what_is_valid(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", [PositionAttention, ChannelAttention])
def test_refused_inputs_say_what_is_valid(kind):
    with pytest.raises(ValueError, match=r"takes \(B, \*S, 8\) with 2 or 3 spatial axes"):
        kind(8)(torch.zeros(1, 5, 8))
