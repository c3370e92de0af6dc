"""PraNet against the golden cases of the official code, and what it does beyond them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import visattn.networks.features
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.losses import build_loss
from visattn.networks import create_model, prediction
from visattn.networks.pranet import UNUSED, official_name
from visattn.weights import load_official, load_renamed, unwrap

GOLDEN = Path(__file__).parent.parent / "golden"
FACTS = json.loads((GOLDEN / "pranet/pranet.json").read_text())


def golden_module():
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOLDEN_FILL = golden_module()


@pytest.fixture(scope="module")
def official():
    """The official state dict of the golden cases."""
    return {key: torch.from_numpy(GOLDEN_FILL.fill(key, shape)) for key, shape, _, filled in FACTS["entries"] if filled}


@pytest.fixture(scope="module")
def network(official):
    return load_official("pranet", official)


@pytest.mark.parametrize("index", range(len(FACTS["cases"])))
def test_every_stored_output(network, index):
    facts = FACTS["cases"][index]
    reference = np.load(GOLDEN / "pranet/pranet.npz")
    found = {}
    handles = [
        network.backbone.net[f"layer{i}"].register_forward_hook(
            lambda module, arguments, output, i=i: found.update({f"stage{i}": output.clone()})
        )
        for i in (1, 2, 3, 4)
    ]
    with torch.no_grad():
        outputs = network(torch.from_numpy(GOLDEN_FILL.make_input(facts["input_seed"], facts["input_shape"])))
    for handle in handles:
        handle.remove()
    found.update(zip(network.output_names, outputs, strict=True))
    assert found.keys() == facts["outputs"].keys()
    for name, fact in facts["outputs"].items():
        assert list(found[name].shape) == fact["shape"]
        stored = reference[f"case{index}/{name}"]
        error = np.abs(GOLDEN_FILL.sample(found[name].numpy()) - stored).max() / np.abs(stored).max()
        assert error <= max(20 * fact["noise"], 5e-6), f"{name}: {error}"


def test_the_prediction_is_map2(network):
    assert not network.training
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        outputs = network(x)
    assert network.output_names == ("map2", "map3", "map4", "map5")
    assert prediction(outputs) is outputs[0]


def test_parameters_and_norms(network):
    unused = sum(np.prod(s) for k, s, *_ in FACTS["entries"] if k.startswith("resnet.fc"))
    assert sum(p.numel() for p in network.parameters()) == FACTS["parameters"] - unused
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}


def test_the_official_initialisation():
    torch.manual_seed(0)
    network = create_model("pranet")
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        elif isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            weight = module.weight.detach()
            if name.startswith("backbone."):  # kaiming normal, fan out, ReLU
                expected = (2 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5
                assert abs(weight.abs().max()) > 3 * expected, "a normal distribution has tails"
            else:  # PyTorch's default: uniform within 1/sqrt(fan in)
                bound = weight[0].numel() ** -0.5
                assert 0.99 * bound < weight.abs().max() <= bound, name
                expected = bound / 3**0.5
            assert weight.std().item() == pytest.approx(expected, rel=0.06), name


# Loading


def test_every_entry_matters():
    """Each official entry reaches a place of its own; wrapped, with a counter, and without the unused classifier."""
    marked = {
        key: torch.full(tuple(shape), number + 0.5)
        for number, (key, shape, _, filled) in enumerate(FACTS["entries"])
        if filled and key not in UNUSED
    }
    counted = marked | {"resnet.bn1.num_batches_tracked": torch.tensor(7)}
    network = load_official("pranet", {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in counted.items()}})
    assert network.backbone.net.bn1.num_batches_tracked == 7
    values = [v.flatten()[0].item() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")]
    assert sorted(values) == [v.flatten()[0].item() for v in marked.values()]


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda s: s.pop("ra3_conv2.bn.running_var"), ["missing: ra3_conv2.bn.running_var"]),
        (lambda s: s.update({"ra3_conv9.bn.bias": torch.zeros(1)}), ["unexpected: ra3_conv9.bn.bias"]),
        (lambda s: s.update({"head.decoder.conv5.bias": torch.zeros(1)}), ["unexpected: head.decoder.conv5.bias"]),
        (lambda s: s.update({"resnet.fc.bias": torch.zeros(10)}), ["resnet.fc.bias is (10,), expected (1000,)"]),
        (
            lambda s: s.update({"agg1.conv5.weight": torch.zeros(2, 96, 1, 1)}),
            ["agg1.conv5.weight is (2, 96, 1, 1), expected (1, 96, 1, 1)"],
        ),
        (lambda s: s.update({"agg1.conv5.bias": torch.zeros(1, dtype=torch.int64)}), ["agg1.conv5.bias holds"]),
        (lambda s: s.update({"agg1.conv5.bias": "text"}), ["'agg1.conv5.bias'", "is no tensor, but str"]),
        (lambda s: s.clear(), ["the state dict is empty"]),
    ],
)
def test_a_state_dict_that_does_not_fit(official, network, change, texts):
    state = dict(official)
    change(state)
    before = network.head.decoder.conv5.bias.clone()
    with pytest.raises(UserError) as error:
        load_renamed(network, unwrap(state), official_name, UNUSED, "official PraNet")
    for text in texts:
        assert text in str(error.value)
    assert len(str(error.value).splitlines()) <= 6
    assert torch.equal(before, network.head.decoder.conv5.bias), "nothing is loaded if anything is wrong"


def test_other_arguments_do_not_fit_the_official_weights(official):
    with pytest.raises(UserError, match=r"resnet\.conv1\.0\.weight is \(32, 3, 3, 3\), expected \(32, 1, 3, 3\)"):
        load_official("pranet", official, in_channels=1)
    with pytest.raises(UserError, match="Did you mean 'pranet'"):
        load_official("prannet", official)
    with pytest.raises(UserError, match="Did you mean 'classes'"):
        load_official("pranet", official, clases=1)


# Sizes, channels, classes, backbones


@pytest.mark.parametrize("size", [(70, 101), (64, 96), (33, 32)])
def test_any_size_is_padded_below_and_right_with_zeros_and_cropped(network, size):
    x = torch.randn(1, 3, *size)
    height, width = (-(-side // 32) * 32 for side in size)
    with torch.no_grad():
        outputs = network(x)
        padded = network(F.pad(x, (0, width - size[1], 0, height - size[0])))
        other = network(F.pad(x, (0, width - size[1], 0, height - size[0]), value=1.0))
    for output, whole in zip(outputs, padded, strict=True):
        assert output.shape == (1, 1, *size)
        assert torch.equal(output, whole[..., : size[0], : size[1]])
    if size != (height, width):
        assert not torch.equal(outputs[0], other[0][..., : size[0], : size[1]]), "the padding is not seen at all"


@pytest.mark.parametrize(
    ("backbone", "options", "in_channels", "classes"),
    [
        ("resnet10t", {}, 1, 4),
        ("convnext_atto", {}, 5, 2),
        ("vit_tiny_patch16_224", {"depth": 3}, 3, 1),
        ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1]}, 1, 2),
        ("hrnet_w18_small", {}, 3, 3),
        ("resnet10t", {"output_stride": 8}, 3, 1),
    ],
)
def test_backbones_channels_and_classes(backbone, options, in_channels, classes):
    torch.manual_seed(0)
    network = create_model(
        "pranet",
        backbone=backbone,
        in_channels=in_channels,
        classes=classes,
        channels=8,
        backbone_args=options,
    )
    outputs = network(torch.randn(2, in_channels, 71, 97))
    assert [tuple(o.shape) for o in outputs] == [(2, classes, 71, 97)] * 4
    sum(o.square().mean() for o in outputs).backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert bool(frozen) == (backbone == "hrnet_w18_small"), "only there do layers lead to maps that are not used"


def test_two_exclusive_classes_are_the_binary_network():
    """A softmax over (0, s) is the sigmoid of s, in the reverse attention as in the output."""
    binary, pair = _twins(classes=2, activation="softmax", copies=(None, 0))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for one, two in zip(binary(x), pair(x), strict=True):
            torch.testing.assert_close(two[:, 1:] - two[:, :1], one, rtol=1e-4, atol=1e-5)


def test_the_same_region_twice_is_the_binary_network():
    binary, pair = _twins(classes=2, activation="sigmoid", copies=(0, 0))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for one, two in zip(binary(x), pair(x), strict=True):
            torch.testing.assert_close(two, one.expand_as(two), rtol=1e-4, atol=1e-5)


def _twins(classes, activation, copies):
    """A binary network, and one of `classes` whose output channels copy the binary one (or are 0 where None)."""
    torch.manual_seed(0)
    arguments = {"backbone": "resnet10t", "channels": 8}
    binary = create_model("pranet", **arguments).eval()
    several = create_model("pranet", classes=classes, activation=activation, **arguments).eval()
    state = binary.state_dict()
    for key, own in several.state_dict().items():
        if own.shape != state[key].shape:
            rows = [torch.zeros_like(state[key]) if source is None else state[key] for source in copies]
            state[key] = torch.cat(rows)
    several.load_state_dict(state)
    return binary, several


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    network = create_model("pranet")
    x, target = torch.randn(2, 3, 96, 96), torch.zeros(2, 96, 96, dtype=torch.uint8)
    target[:, 20:70, 30:90] = 1
    criterion = build_loss({"name": "structure"}, Labels.from_config({"background": 0, "polyp": 255}))
    optimiser = torch.optim.AdamW(network.parameters(), lr=5e-4)
    losses = []
    for _ in range(3):
        loss = criterion(network(x), target)
        optimiser.zero_grad()
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
        optimiser.step()
    dead = [n for n, p in network.named_parameters() if p.grad.abs().max() == 0]
    assert dead == []
    assert losses[-1] < 0.9 * losses[0]


def test_half_precision():
    torch.manual_seed(0)
    network = create_model("pranet", backbone="resnet10t", channels=8).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        full = network(x)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = network(x)[0]
    assert torch.isfinite(half).all()
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max() + 0.05


def test_a_backbone_for_one_size_only():
    network = create_model("pranet", backbone="botnet26t_256", channels=8, backbone_args={"img_size": [64, 96]})
    assert network.backbone.fixed_size == (64, 96)
    with torch.no_grad():
        assert network(torch.randn(2, 3, 50, 96))[0].shape == (2, 1, 50, 96)
    with pytest.raises(UserError, match=r"64x96 pixels only, not 65x96"):
        network(torch.randn(1, 3, 65, 96))


def test_a_backbone_that_needs_larger_multiples():
    network = create_model("pranet", backbone="maxvit_pico_rw_256", channels=8)
    assert network.backbone.padded_size((100, 257)) == (256, 512)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"backbone": "resnet18x"}, "Did you mean 'resnet18'"),
        ({"backbone": "hf-hub:timm/resnet18"}, "unknown backbone"),
        ({"backbone": "resnet18", "backbone_args": {"bogus": 1}}, "unexpected keyword argument 'bogus'"),
        ({"backbone": "resnet18", "backbone_args": {"checkpoint_path": "x"}}, "'checkpoint_path' is set by"),
        ({"backbone": "resnet18", "clases": 2}, "Did you mean 'classes'"),
        ({"classes": 0}, "classes must be a whole number above 0"),
        ({"channels": 2.5}, "channels must be a whole number"),
        ({"in_channels": True}, "in_channels must be a whole number"),
        ({"activation": "tanh"}, "activation must be sigmoid or softmax"),
    ],
)
def test_mistakes_are_explained(arguments, text):
    with pytest.raises(UserError) as error:
        create_model("pranet", **arguments)
    assert text in str(error.value)
    assert len(str(error.value).splitlines()) <= 6


def test_rehearsal_leaves_the_network_alone():
    features = visattn.networks.features.TimmFeatures("resnet10t", 3)
    assert features.training
    assert all(t.device.type == "cpu" for t in [*features.parameters(), *features.buffers()])
    assert all(b == 0 for n, b in features.named_buffers() if n.endswith("num_batches_tracked"))
