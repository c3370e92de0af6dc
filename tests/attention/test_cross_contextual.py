"""Cross-contextual attention against the official network's outputs and a slow loop."""

import pytest
import torch

from visattn.attention.cross_contextual import CrossContextualAttention


def randomised(block, std=0.3):
    torch.manual_seed(1)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return block.double().eval()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def official_blocks(state, **settings):
    """Our blocks with the official weights of each level, by level."""
    blocks = {}
    for level in range(3):
        prefix = f"decoder.Crossvit_layer.{level}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        blocks[level] = CrossContextualAttention(96 * 2**level, **settings).eval()
        blocks[level].load_state_dict(own)
    return blocks


def errors(golden, reference, index, **settings):
    case = golden("attswinunet", "cca_sa1_skip3")
    state = case.state_dict()
    blocks = official_blocks(state, **settings)
    with torch.no_grad():
        outputs = reference("attswinunet").forward(
            case.input(index), state, lambda level, x, skip: blocks[level](x, skip)
        )
    assert set(outputs) == set(case.facts["cases"][index]["outputs"])
    return {name: case.error(index, name, value) for name, value in outputs.items()}


@pytest.mark.slow  # a whole network of 47 million parameters
@pytest.mark.parametrize("index", [0, 1])
def test_official_network(golden, reference, index):
    assert max(errors(golden, reference, index).values()) <= 1


@pytest.mark.slow
def test_the_official_network_pins_the_block(golden, reference):
    """With all tokens taking part the first tokens come out otherwise; the encoder's outputs stay."""
    found = errors(golden, reference, 0, tokens="all")
    assert found["cca2_first_tokens"] > 100
    assert found["dec_up0"] <= 1


@pytest.mark.parametrize("tokens", ["code", "all"])
@pytest.mark.parametrize(
    ("size", "other", "skip_dim", "depth"),
    [((3, 4), (3, 4), None, 2), ((1, 1), (1, 1), None, 1), ((2, 5), (3, 1), 10, 2), ((2, 3, 2), (2, 3, 2), None, 3)],
)
def test_loops_agree(reference, size, other, skip_dim, depth, tokens):
    block = CrossContextualAttention(6, 3, skip_dim=skip_dim, dim_head=5, depth=depth, tokens=tokens)
    block = randomised(block)
    x, skip = draw(2, *size, 6), draw(2, *other, skip_dim or 6)
    with torch.no_grad():
        out = block(x, skip)
        assert [each.shape for each in out] == [x.shape, skip.shape]
        for image in range(2):
            flat = x[image].flatten(0, -2), skip[image].flatten(0, -2)
            expected = reference("cross_contextual").exchange(*flat, block.state_dict(), 3, depth, tokens)
            for got, wanted in zip(out, expected, strict=True):
                torch.testing.assert_close(got[image].flatten(0, -2), wanted, rtol=1e-10, atol=1e-11)


def test_as_coded_it_acts_through_one_position():
    block = randomised(CrossContextualAttention(8, 2, dim_head=4))
    x, skip = draw(1, 4, 5, 8), draw(1, 4, 5, 8)
    for before, after in zip((x, skip), block(x, skip), strict=True):
        changed = (before != after).any(-1)[0].nonzero()
        assert changed.tolist() == [[0, 0]]


def test_as_coded_the_first_token_is_no_key():
    """It counts in the mean of its own stream alone, so the other stream does not notice it."""
    block = randomised(CrossContextualAttention(8, 2, dim_head=4))
    x, skip = draw(1, 3, 3, 8), draw(1, 3, 3, 8)
    other = skip.clone()
    other[:, 0, 0] += 1
    assert torch.equal(block(x, skip)[0], block(x, other)[0])
    everyone = randomised(CrossContextualAttention(8, 2, dim_head=4, tokens="all"))
    assert (everyone(x, skip)[0] - everyone(x, other)[0]).abs().max() > 1e-4


def test_with_all_tokens_the_order_of_positions_does_not_matter():
    block = randomised(CrossContextualAttention(8, 2, dim_head=4, tokens="all"))
    x, skip = draw(1, 4, 4, 8), draw(1, 4, 4, 8)
    moved = block(x.roll(1, 1), skip)
    torch.testing.assert_close(moved[0], block(x, skip)[0].roll(1, 1))
    torch.testing.assert_close(moved[1], block(x, skip)[1])


@pytest.mark.parametrize("tokens", ["code", "all"])
def test_gradients_reach_every_parameter(tokens):
    block = randomised(CrossContextualAttention(4, 2, dim_head=3, tokens=tokens))
    x, skip = draw(1, 2, 3, 4).requires_grad_(), draw(1, 2, 3, 4).requires_grad_()
    parameters = list(block.parameters())
    assert torch.autograd.gradcheck(lambda *each: block(*each[:2]), (x, skip, *parameters), fast_mode=True)
    sum(each.square().sum() for each in block(x, skip)).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_huge_features(dtype):
    block = CrossContextualAttention(16, 2, dim_head=8).eval()
    x, skip = torch.randn(2, 5, 5, 16), torch.randn(2, 5, 5, 16)
    exact = torch.cat(block(x, skip))
    with torch.autocast("cpu", dtype):
        assert (torch.cat(block(x, skip)) - exact).abs().max() <= 0.02 * exact.abs().max()
        assert all(each.isfinite().all() for each in block(x * 3e3, skip * 3e3))
    block = block.to(dtype)
    half = torch.cat(block(x.to(dtype), skip.to(dtype)))
    assert half.dtype == dtype
    assert (half.float() - exact).abs().max() <= 0.02 * exact.abs().max()
    assert all(each.isfinite().all() for each in block((x * 3e3).to(dtype), (skip * 3e3).to(dtype)))


def test_dropout_only_in_training():
    block = CrossContextualAttention(8, dropout=0.5)
    x, skip = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 8)
    assert torch.equal(block.eval()(x, skip)[0], block(x, skip)[0])
    assert not torch.equal(block.train()(x, skip)[0], block(x, skip)[0])


def test_empty_batch():
    out = CrossContextualAttention(8)(torch.zeros(0, 4, 4, 8), torch.zeros(0, 2, 2, 8))
    assert [each.shape for each in out] == [(0, 4, 4, 8), (0, 2, 2, 8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": "some"}, "'code', 'all', got 'some'"),
        ({"depth": 0}, "depth must be an integer of at least 1"),
        ({"num_heads": 0}, "num_heads must be an integer of at least 1"),
        ({"dropout": 1.0}, "dropout must be a number in"),
    ],
)
def test_refused_arguments_say_what_is_valid(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossContextualAttention(8, **arguments)


def test_refused_inputs_say_what_is_valid():
    block = CrossContextualAttention(8, skip_dim=4)
    with pytest.raises(ValueError, match=r"skip takes \(B, \*S, 4\)"):
        block(torch.zeros(1, 3, 3, 8), torch.zeros(1, 3, 3, 8))
    with pytest.raises(ValueError, match="one batch size, got 1 and 2"):
        block(torch.zeros(1, 3, 3, 8), torch.zeros(2, 3, 3, 4))
