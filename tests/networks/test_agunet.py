"""AGUNet and DAUNet against the golden cases of the official code, and what they do beyond them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from visattn.attention import AttentionGate, ChannelAttention, PositionAttention
from visattn.errors import UserError
from visattn.networks import create_model, prediction
from visattn.networks.agunet_weights import official_names
from visattn.weights import load_official

GOLDEN = Path(__file__).parent.parent / "golden"
FACTS = json.loads((GOLDEN / "agunet/agunet_full.json").read_text())
SMALL = {"filters": (4, 6, 8), "classes": 3}


def golden_module():
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOLDEN_FILL = golden_module()


@pytest.fixture(scope="module")
def official():
    return {key: torch.from_numpy(GOLDEN_FILL.fill(key, shape)) for key, shape, _, filled in FACTS["entries"] if filled}


@pytest.fixture(scope="module")
def network(official):
    return load_official("agunet", official)


def with_statistics(network):
    """`network` in eval mode with batch norms and gammas that are not the neutral ones they start with."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(module, PositionAttention | ChannelAttention):
            nn.init.constant_(module.gamma, 0.7)
    return network.eval()


@pytest.mark.parametrize("index", range(len(FACTS["cases"])))
def test_every_stored_output(network, index):
    facts, stored = FACTS["cases"][index], np.load(GOLDEN / "agunet/agunet_full.npz")
    found = {}

    def keep(name):
        return lambda module, arguments, output: found.update({name: output})

    handles = [level.register_forward_hook(keep(f"dec{i}")) for i, level in enumerate(network.decoder)]
    handles.append(network.encoder[-1].register_forward_hook(keep("bottom")))
    with torch.no_grad():
        outputs = network(torch.from_numpy(GOLDEN_FILL.make_input(facts["input_seed"], facts["input_shape"])))
    for handle in handles:
        handle.remove()
    found |= {f"logit{i}": output for i, output in enumerate(outputs)}
    found |= {f"prob{i}": output.softmax(dim=1) for i, output in enumerate(outputs)}
    assert found.keys() == facts["outputs"].keys()
    for name, fact in facts["outputs"].items():
        assert list(found[name].shape) == fact["shape"]
        error = np.abs(GOLDEN_FILL.sample(found[name].numpy()) - stored[f"case{index}/{name}"]).max()
        assert error <= 2e-5 * fact["std"], f"{name}: {error / fact['std']} of its standard deviation"


def test_parameters_are_keras_s():
    assert sum(p.numel() for p in create_model("agunet").parameters()) == FACTS["parameters"]
    # Keras counts the statistics of batch norms too.
    state = create_model("daunet").state_dict()
    assert sum(v.numel() for k, v in state.items() if not k.endswith("num_batches_tracked")) == 31_044_090


def test_names_are_the_official_ones(network):
    own = {theirs for _, theirs in official_names(network) if not theirs.endswith("num_batches_tracked")}
    assert own == {key for key, *_ in FACTS["entries"]}
    # Along the creation order a kind's numbers rise by one, so heads come last and the deepest first.
    heads = [theirs for ours, theirs in official_names(network) if ours.startswith("heads.0.")]
    assert heads == ["conv3d_36.kernel", "conv3d_36.bias"]


def test_a_missing_and_a_strange_entry_are_named(official):
    with pytest.raises(UserError, match=r"missing: conv3d_4\.kernel"):
        load_official("agunet", {key: value for key, value in official.items() if key != "conv3d_4.kernel"})
    with pytest.raises(UserError, match=r"unexpected: conv3d_99\.kernel"):
        load_official("agunet", official | {"conv3d_99.kernel": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("agunet", {}),
        ("daunet", {}),
        ("daunet", {"position_attention": False}),
        ("daunet", {"channel_attention": False, "attention_guiding": False}),
    ],
)
def test_official_weights_round_trip(name, options):
    """What the names say leads back to the same network, by name and not by position."""
    torch.manual_seed(0)
    network = with_statistics(create_model(name, **SMALL, **options))
    state = network.state_dict()
    theirs = {official: state[ours].clone() for ours, official in official_names(network)}
    for key in theirs:
        if key.startswith("pam.conv_"):  # Keras keeps a 1x1x1 kernel
            theirs[key] = theirs[key][..., None, None, None]
    shuffled = dict(sorted(theirs.items()))
    assert list(shuffled) != list(theirs)
    x = torch.randn(1, 1, 12, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(load_official(name, shuffled, **SMALL, **options)(x), network(x), rtol=0, atol=0)


def test_daunet_without_the_projections_that_keras_never_saves():
    network = create_model("daunet", **SMALL)
    theirs = {official: network.state_dict()[ours] for ours, official in official_names(network)}
    saved = {key: value for key, value in theirs.items() if not key.startswith("pam.conv_")}
    with pytest.warns(UserWarning, match="never saves them"):
        load_official("daunet", saved, **SMALL)
    del theirs["pam.conv_b.kernel"]  # some of them: a damaged file
    theirs["pam.conv_c.kernel"] = theirs["pam.conv_c.kernel"][..., None, None, None]
    theirs["pam.conv_d.kernel"] = theirs["pam.conv_d.kernel"][..., None, None, None]
    with pytest.raises(UserError, match=r"missing: pam\.conv_b\.kernel"):
        load_official("daunet", theirs, **SMALL)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_transposed_convolution_is_keras_s(stride):
    """Each voxel adds its kernel at `stride` times its index, and what lies beyond the end is dropped."""
    from visattn.networks.agunet import _Upsample

    up = _Upsample(3, 1, 1, stride)
    nn.init.zeros_(up.conv.bias)
    x = torch.randn(1, 1, 3, 2, 4)
    expected = torch.zeros(1, 1, 3 * stride + 3, 2 * stride + 3, 4 * stride + 3)
    for i, j, k in np.ndindex(3, 2, 4):
        block = expected[..., i * stride : i * stride + 3, j * stride : j * stride + 3, k * stride : k * stride + 3]
        block += x[..., i, j, k] * up.conv.weight
    torch.testing.assert_close(up(x), expected[..., : 3 * stride, : 2 * stride, : 4 * stride])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("agunet", {}),
        ("agunet", {"gate": "add"}),
        ("agunet", {"gate": None}),
        ("agunet", {"multi_scale_input": False}),
        ("agunet", {"deep_supervision": False}),
        ("daunet", {}),
        ("daunet", {"attention_guiding": False}),
        ("daunet", {"dual_attention": "paper"}),
        ("daunet", {"position_attention": False}),
        ("daunet", {"channel_attention": False}),
        ("daunet", {"position_attention": False, "channel_attention": False}),
        ("daunet", {"dual_attention": None, "multi_scale_input": False, "deep_supervision": False}),
    ],
)
def test_every_switch_builds_a_network_that_learns(name, options, dims):
    torch.manual_seed(0)
    network = create_model(
        name, dims=dims, in_channels=2, **{"dropout": 0.0} if name == "daunet" else {}, **SMALL, **options
    )
    for module in network.modules():
        if isinstance(module, PositionAttention | ChannelAttention):
            nn.init.constant_(module.gamma, 0.5)  # at its start of 0 the projections get no gradient
    for kind, switch in ((PositionAttention, "position_attention"), (ChannelAttention, "channel_attention")):
        wanted = name == "daunet" and options.get("dual_attention", "code") is not None and options.get(switch, True)
        assert any(isinstance(m, kind) for m in network.modules()) == wanted
    assert any(isinstance(m, AttentionGate) for m in network.modules()) == (
        name == "agunet" and options.get("gate", "") is not None
    )
    size = (13, 10, 9)[:dims]
    outputs = network(torch.randn(2, 2, *size))
    maps = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(maps) == len(network.output_names) == (1 if options.get("deep_supervision") is False else 2)
    for i, logits in enumerate(maps):
        assert logits.shape == (2, 3, *(-(-side // 2**i) for side in size))
    assert prediction(outputs) is maps[0]
    sum(logits.square().mean() for logits in maps).backward()
    without = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias before a batch norm is subtracted again.
    assert [key for key in without if not key.endswith("bias")] == []


@pytest.mark.parametrize("name", ["agunet", "daunet"])
def test_padding_leaves_a_fitting_size_alone_and_acts_at_the_end(name):
    network = with_statistics(create_model(name, **SMALL))
    x = torch.randn(1, 1, 8, 8, 8)
    padded = torch.nn.functional.pad(x[..., :7, :6, :5], (0, 3, 0, 2, 0, 1))
    with torch.no_grad():
        small, large = network(x[..., :7, :6, :5]), network(padded)
    torch.testing.assert_close(small[0], large[0][..., :7, :6, :5])
    torch.testing.assert_close(small[1], large[1][..., :4, :3, :3])


def test_checkpointing_changes_memory_only():
    torch.manual_seed(0)
    network = create_model("agunet", **SMALL)
    x = torch.randn(2, 1, 8, 8, 8)
    gradients = []
    for enabled in (False, True):
        network.set_grad_checkpointing(enabled)
        network.zero_grad()
        network(x)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": (8,)}, "filters needs at least two"),
        ({"filters": (8, 0)}, "filters needs at least two"),
        ({"gate": "multiply"}, "gate must be concatenate, add or null"),
        ({"dims": 4}, "dims must be 2 or 3"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        create_model("agunet", **options)


def test_a_wrong_number_of_axes_is_told():
    with pytest.raises(ValueError, match=r"expected images \(B, C, D, H, W\)"):
        create_model("agunet", **SMALL)(torch.zeros(1, 1, 8, 8))
