"""PAT_ch, PAT_sp and PAT_sf against the authors' outputs, their definitions in float64, and torch's batch norm."""

import copy
import math

import pytest
import torch
from torch import nn

from visattn.attention import _norm, partial
from visattn.attention._norm import batch_norm
from visattn.attention.partial import (
    PartialChannelAttention,
    PartialSelfAttention,
    PartialSpatialAttention,
    bucket,
)

BLOCKS = {"ch": PartialChannelAttention, "sp": PartialSpatialAttention, "sf": PartialSelfAttention}


def randomised(block, std=0.5):
    """`block` in float64 with weights and running statistics that all show in the output."""
    block = block.double()
    torch.manual_seed(1)
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 2)
        elif tensor.is_floating_point():
            nn.init.normal_(tensor, std=std)
    return block


def image(*shape):
    torch.manual_seed(2)
    return torch.randn(*shape, dtype=torch.float64) * 2 + 1


def channels_first(block, x):
    return block(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("name", "dim"), [("ch", 64), ("sp", 64), ("sf", 256)])
def test_official_outputs(golden, name, dim, index):
    case = golden("partialnet", f"pat_{name}_a")
    block = case.load_into(BLOCKS[name](dim))
    assert case.error(index, "out", channels_first(block, case.input(index))) <= 1


class MLPBlock(nn.Module):
    """The official block around the attention, by its state-dict names: x + mlp(mix(x)); PAT_sf has a shortcut more."""

    def __init__(self, mixing, dim, activation, spatial):
        super().__init__()
        self.spatial_mixing, self.shortcut = mixing, isinstance(mixing, PartialSelfAttention)
        layers = [nn.Conv2d(dim, 2 * dim, 1, bias=False), nn.BatchNorm2d(2 * dim), activation]
        layers += [nn.Conv2d(2 * dim, dim, 1, bias=False)]
        self.mlp = nn.Sequential(*layers, *spatial)

    def forward(self, x):
        mixed = channels_first(self.spatial_mixing, x)
        if self.shortcut:
            x = mixed = x + mixed
        for layer in self.mlp:
            mixed = channels_first(layer, mixed) if isinstance(layer, PartialSpatialAttention) else layer(mixed)
        return x + mixed


def test_official_block_of_early_stages(golden):
    case = golden("partialnet", "mlpblock_se_sp_a")
    block = case.load_into(MLPBlock(PartialChannelAttention(48), 48, nn.GELU(), [PartialSpatialAttention(48)]))
    assert case.error(0, "out", block(case.input(0))) <= 1


def test_official_block_of_the_last_stage(golden):
    case = golden("partialnet", "mlpblock_self_a")
    block = case.load_into(MLPBlock(PartialSelfAttention(128), 128, nn.ReLU(), []))
    assert case.error(0, "out", block(case.input(0))) <= 1
    block.shortcut = False
    assert case.error(0, "out", block(case.input(0))) > 100


@pytest.mark.parametrize("size", [(5, 7), (1, 3), (1, 1), (3, 2, 5)])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "function"), [("ch", "channel"), ("sp", "spatial")])
def test_definitions_agree(reference, name, function, training, size):
    block = randomised(BLOCKS[name](12, rank=len(size))).train(training)
    x = image(3, *size, 12)
    state = copy.deepcopy(block.state_dict())
    expected = getattr(reference("partial"), function)(x, state, training=training)
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("size", "n_div"), [((3, 4), 4), ((1, 1), 2), ((2, 3, 2), 4)])
def test_loops_agree_on_self_attention(reference, size, n_div):
    block = randomised(PartialSelfAttention(16, 2, rank=len(size), n_div=n_div)).eval()
    x = image(2, *size, 16)
    with torch.no_grad():
        expected = reference("partial").self_attention(x, block.state_dict(), 2, n_div)
        torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-11)


def test_buckets_of_all_distances(reference):
    distances = [math.sqrt(square) for square in range(40_000)]
    naive = reference("partial").bucket
    expected = [naive(distance) for distance in distances[::7]]
    assert bucket(torch.tensor(distances[::7])).tolist() == expected
    assert max(expected) == 40
    assert bucket(torch.tensor([20.4, 21.0, 159.0, 1e6])).tolist() == [20, 20, 40, 40]


def test_every_pair_gets_the_bias_of_its_distance():
    """On a long map, so that buckets beyond the linear part are used."""
    block = PartialSelfAttention(16, 2)
    with torch.no_grad():
        block.attn.rpe_k.lookup_table_bias.copy_(torch.arange(162.0).reshape(2, 81))
        bias = block.attn.rpe_k((2, 90)).reshape(2, 2, 90, 2, 90)
    assert bias[0, 0, 3, 0, 3] == 40
    assert bias[1, 1, 10, 0, 12] == 81 + 40 + 2  # the root of 5
    assert bias[0, 0, 0, 0, 80] == 40 + round(20 + math.log(4) / math.log(8) * 20)
    assert torch.equal(bias, bias.permute(0, 3, 4, 1, 2))


@pytest.mark.parametrize("name", ["ch", "sp"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_torch(reference, name, momentum):
    """After two steps in training, the running statistics are those that torch's own layers keep of the features."""
    block = randomised(BLOCKS[name](12)).train()
    norms = {key: module for key, module in block.named_modules() if isinstance(module, nn.BatchNorm2d)}
    twins = {key: copy.deepcopy(module) for key, module in norms.items()}
    for key in norms:
        norms[key].momentum = twins[key].momentum = momentum
    for step in range(2):
        x = image(3, 5, 4, 12) + step
        block(x)
        seen = features_before_norms(block, x)
        for key, twin in twins.items():
            twin(seen[key])
    for key, twin in twins.items():
        for entry, value in twin.state_dict().items():
            torch.testing.assert_close(norms[key].state_dict()[entry], value, rtol=1e-9, atol=1e-10)
        assert norms[key].num_batches_tracked == 2


def features_before_norms(block, x):
    """What each norm of PAT_ch or PAT_sp is given, from the definition."""
    maps = x.movedim(-1, 1)
    if isinstance(block, PartialSpatialAttention):
        left, right = maps[:, :6], maps[:, 6:]
        return {"norm": left * nn.functional.hardsigmoid(block.conv_attn(left)), "norm2": right}
    right = maps[:, 3:]
    pair = torch.stack((right.mean((2, 3)), right.flatten(2).std(2)), dim=-1)[:, :, None]
    mixed = block.attn.cfc1(pair)
    gate = nn.functional.hardsigmoid(copy.deepcopy(block.attn.bn)(mixed))
    return {"attn.bn": mixed, "norm": right * gate}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["ch", "sp"])
def test_gradients_in_training_and_evaluation(name, training):
    block = randomised(BLOCKS[name](8)).train(training)
    x = image(2, 3, 2, 8).requires_grad_()
    parameters = list(block.parameters())
    assert torch.autograd.gradcheck(lambda *inputs: block(inputs[0]), (x, *parameters), atol=1e-6)


def test_the_fast_training_step_is_the_composed_one(monkeypatch):
    """Outputs, gradients and running statistics of the two ways to compute PAT_sp."""
    fast = randomised(PartialSpatialAttention(10, partial=0.3)).train()
    slow = copy.deepcopy(fast)
    monkeypatch.setattr(slow, "_as_one_step", lambda x: False)
    x = image(3, 5, 4, 10)
    assert fast._as_one_step(x)
    assert not fast._as_one_step(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not fast._as_one_step(x)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [block(each) for block, each in zip((fast, slow), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for out in outputs:
        (out * image(3, 5, 4, 10)).sum().backward()
    # torch's hard sigmoid has the slope 1/6 in single precision only, whatever the dtype.
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(fast.buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5, 4, 10), (2, 2, 3, 2, 10), (1, 1, 1, 10)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["ch", "sp"])
def test_torchs_kernels_compute_the_same_on_other_devices(monkeypatch, name, training, shape):
    """Outputs, gradients and running statistics of the way that is taken where it is not the CPU."""
    composed = randomised(BLOCKS[name](10, rank=len(shape) - 2)).train(training)
    kernels = copy.deepcopy(composed)
    x, weight = image(*shape), image(*shape)
    x[..., 7] = 0.25
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    expected = composed(inputs[0])
    (expected * weight).sum().backward()
    for module in (_norm, partial):
        monkeypatch.setattr(module, "by_kernel", lambda x: True)
    out = kernels(inputs[1])
    (out * weight).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    # torch's kernel keeps running statistics, and the hard sigmoid its slope, to single precision.
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(composed.parameters(), kernels.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(composed.buffers(), kernels.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_gradients_of_mean_and_deviation():
    x = image(2, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(_norm.Spread.apply, x)
    assert torch.autograd.gradgradcheck(_norm.Spread.apply, x)
    constant = torch.ones(1, 5, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(_norm.spread(constant)[1].square().sum(), constant, create_graph=True)
    (again,) = torch.autograd.grad(grad.square().sum(), constant)
    assert not grad.any()
    assert not again.any()


def test_gradients_of_small_deviations_fit_float16():
    """As a loss scaled for float16 sends them: the quotient is beyond its range, its share for a position is not."""
    values = (0.1 + 1e-3 * image(1, 3136, 4)).half()
    found = []
    for dtype in (torch.float16, torch.float64):
        x = values.to(dtype, copy=True).requires_grad_()
        (200 * _norm.spread(x)[1].sum()).backward()
        found.append(x.grad.double())
    torch.testing.assert_close(*found, rtol=0.02, atol=5e-3)


def test_a_constant_channel_has_no_deviation_and_no_infinite_gradient():
    block = PartialChannelAttention(8).train()
    x = torch.ones(2, 4, 4, 8, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_a_large_mean_costs_no_digits(scale):
    """Mean 1000 with a spread of 1 or less: a variance from squares minus the squared mean would be noise."""
    norm = nn.BatchNorm2d(4, eps=1e-12).train()
    torch.manual_seed(0)
    exact = 1000 + torch.randn(2, 9, 9, 4, dtype=torch.float64) * scale
    x = exact.float()
    expected = copy.deepcopy(norm).double()(x.double().movedim(-1, 1)).movedim(1, -1)
    assert (batch_norm(norm, x).double() - expected).abs().max() < 1e-3 / scale


@pytest.mark.parametrize("name", ["ch", "sp", "sf"])
def test_a_single_position_trains_in_a_batch_of_one(name):
    block = BLOCKS[name](16).train()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    assert block(torch.randn(1, 1, 1, 16)).isfinite().all()
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())


def test_an_empty_batch_leaves_the_running_statistics_alone():
    block = PartialSpatialAttention(16).train()
    assert block(torch.randn(0, 3, 3, 16)).shape == (0, 3, 3, 16)
    assert block.norm.running_var.eq(1).all()


def test_dropout_is_officially_a_tenth_and_only_in_training():
    block = PartialSelfAttention(16)
    assert block.attn.attn_drop == block.attn.proj_drop.p == 0.1
    x = image(1, 5, 5, 16).float()
    assert torch.equal(block.eval()(x), block(x))
    assert not torch.equal(block.train()(x), block(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PartialChannelAttention(16, n_div=1), "n_div must be from 2 to dim=16"),
        (lambda: PartialChannelAttention(3), "n_div must be from 2 to dim=3"),
        (lambda: PartialChannelAttention(16, rank=1), "rank 2, 3"),
        (lambda: PartialSpatialAttention(16, partial=1.0), "from 1 to 15, got 1.0"),
        (lambda: PartialSelfAttention(16, 5), r"the 12 attended channels: one of \[1, 2, 3, 4, 6, 12\]"),
        (lambda: PartialSelfAttention(16, proj_drop=-1), "proj_drop must be a number in"),
    ],
)
def test_refused_arguments_say_what_is_valid(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["ch", "sp", "sf"])
def test_refused_inputs_say_what_is_valid(name):
    with pytest.raises(ValueError, match=r"takes \(B, \*S, 16\) with 2 spatial axes"):
        BLOCKS[name](16)(torch.zeros(1, 16, 5, 5))


def test_attention_map_is_the_weight_of_each_value():
    block = randomised(PartialSelfAttention(16, 2)).eval()
    block.attn.proj.weight.data.copy_(torch.eye(12))
    block.attn.proj.bias.data.zero_()
    x = image(2, 3, 5, 16)
    weights = block.attention_map(x, (1, 4))
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 2, dtype=x.dtype))
    values = block.attn.heads(block.norm(x[..., 4:]))[2]  # (B, h, N, d)
    out = torch.einsum("bhn,bhnd->bhd", weights.flatten(2), values).flatten(1)
    torch.testing.assert_close(out, block(x)[:, 1, 4, 4:], rtol=1e-10, atol=1e-12)


def test_what_inference_keeps_can_be_trained_with():
    """The entries of the bias are kept from call to call; an inference tensor could not be saved for a gradient."""
    block = PartialSelfAttention(16, 2).train()
    x = torch.randn(2, 5, 9, 16)
    with torch.inference_mode():
        block(x)
    block(x).sum().backward()
    assert block.attn.rpe_k.lookup_table_bias.grad.any()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 1, 3)])
def test_the_spread_of_nothing_and_of_one_is_zero(shape):
    """In silence, though torch warns of both; warnings are errors here."""
    x = torch.ones(shape, requires_grad=True)
    mean, deviation = _norm.spread(x)
    assert mean.shape == deviation.shape == (shape[0], 3)
    assert (deviation == 0).all()
    (grad,) = torch.autograd.grad((mean + deviation).sum(), x)
    assert torch.equal(grad, torch.ones(shape))
