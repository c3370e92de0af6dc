"""What every registered backbone promises; the table is timm's registry, so a new name is tested at once.

The fast tier takes one name per family and the small pyramids; `make test-all` takes all.
"""

import copy
import math
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import group_parameters
from torch import nn

import visattn
from visattn.backbones import FAMILIES
from visattn.blocks import DropPath

assert visattn.__version__
CLASSES = 7
FIRST = {next(name for name, module in FAMILIES.items() if module is each) for each in FAMILIES.values()}
FAST = (FIRST | {"va_pyramid_tiny", "va_pyramid3d_tiny"}) - {"va_pyramid"}
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    """Of module scope, so that all tests of a name run one after another and share `made`."""
    return request.param


@pytest.fixture(scope="module")
def made(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES).eval()


@pytest.fixture
def model(made):
    """A new model of that name; making one takes longer than copying it."""
    return copy.deepcopy(made)


def smallest(model):
    """The least size that the model takes, as its configuration says; odd and not square where it may be."""
    cfg = model.default_cfg
    if cfg.get("input_size") is None:  # volumes, which timm's records do not know
        return (33, 20, 26)
    if cfg.get("fixed_input_size"):
        return cfg["input_size"][1:]
    return cfg["min_input_size"][1:] if cfg.get("min_input_size") else (33, 46)


def example(model, size=None, in_chans=None, batch=2):
    """A batch of random images or volumes."""
    size = size or smallest(model)
    return torch.randn(batch, in_chans or model.in_chans, *size, generator=torch.Generator().manual_seed(0))


def channels_first(x, model):
    return x.movedim(-1, 1) if model.output_fmt == "NHWC" else x


@torch.no_grad()
def test_classifies(name, model):
    x = example(model)
    features = model.forward_features(x)
    logits = model(x)
    assert logits.shape == (2, CLASSES)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])
    assert torch.equal(model.forward_head(features), logits)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(pooled), logits)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model.forward_head(features), pooled)
    model.reset_classifier(3)
    assert model.forward_head(features).shape == (2, 3)
    model.reset_classifier(0, "")
    assert model.forward_head(features).ndim == features.ndim  # every position by itself
    model.reset_classifier(3, "max")
    assert model.forward_head(features).shape == (2, 3)
    with torch.device("meta"):
        bare = timm.create_model(name, num_classes=0, global_pool="")
    assert "head.fc.weight" not in bare.state_dict()
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model(name, no_such_argument=1)


def test_configuration(name):
    """What timm's record says of the model, and what its functions promise; nothing is computed."""
    rates = {"drop_rate": 0.25, "drop_path_rate": 0.3}
    model = timm.create_model(name, device="meta", dtype=torch.float64, **rates).eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(each.is_meta for each in tensors.values())
    assert all(each.dtype == torch.float64 for each in tensors.values() if each.is_floating_point())
    cfg = model.default_cfg
    assert model.num_classes == cfg["num_classes"]
    assert {f"{cfg['first_conv']}.weight", f"{cfg['classifier']}.weight"} <= set(model.state_dict())
    assert all(model.get_submodule(each["module"]) for each in model.feature_info)
    if cfg.get("input_size"):
        assert cfg["input_size"][0] == model.in_chans
        features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta", dtype=torch.float64))
        if cfg.get("pool_size"):
            assert channels_first(features, model).shape == (1, model.num_features, *cfg["pool_size"])
    # Stochastic depth grows up to the rate that was asked for, which dropout does not touch.
    found = [each.rate for each in model.modules() if isinstance(each, DropPath)]
    assert max(found) == pytest.approx(0.3)
    assert {each.p for each in model.head.modules() if isinstance(each, nn.Dropout)} == {0.25}
    model.requires_grad_(False)
    model.reset_classifier(0)
    assert not any(each.requires_grad for each in model.parameters())
    model.reset_classifier(3)
    new = model.get_classifier().weight
    assert new.is_meta
    assert new.dtype == torch.float64
    assert new.requires_grad
    assert not any(module.training for module in model.modules())


def test_learns_with_and_without_checkpointing(made, model):
    model.train()
    x = example(model, batch=1 if model.default_cfg.get("fixed_input_size") else 2)  # those are large
    # Where a residual branch ends in a norm's factor that begins at 0, no gradient would come into the branch.
    factors = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    begin = {
        key: torch.ones_like(value) if key in factors and not value.any() else value
        for key, value in made.state_dict().items()
    }
    results = []
    for again in (False, True):
        model.set_grad_checkpointing(again)
        model.load_state_dict(begin)  # training moves running statistics
        model.zero_grad()
        torch.manual_seed(0)
        logits = model(x)
        logits.square().sum().backward()
        results.append((logits.detach(), {key: each.grad for key, each in model.named_parameters()}))
    (logits, grads), (logits_again, grads_again) = results
    assert torch.equal(logits, logits_again)
    missing = [key for key, grad in grads.items() if grad is None or not grad.isfinite().all()]
    assert not missing
    # A norm behind it takes the bias of a convolution off again, so its gradient is rounding noise.
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for key, grad in grads.items():
        assert float((grad - grads_again[key]).abs().max()) <= 1e-5 * largest, key
    if len(x) == 1:  # where stochastic depth leaves a branch out of the only image, it gets no gradient
        for module in model.modules():
            if isinstance(module, DropPath):
                module.rate = 0.0
        model.zero_grad()
        model(x).square().sum().backward()
        grads = {key: each.grad for key, each in model.named_parameters()}
    assert sum(not grad.any() for grad in grads.values()) <= len(grads) // 10


@torch.no_grad()
def test_maps(name, model):
    x = example(model, batch=1)
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    info = model.feature_info
    assert len(maps) == len(info)
    sizes = x.shape[2:]
    for each, facts in zip(maps, info, strict=True):
        assert each.shape[:2] == (1, facts["num_chs"])
        reduction = facts["reduction"]
        assert all(s // reduction <= n <= math.ceil(s / reduction) for s, n in zip(sizes, each.shape[2:], strict=True))
    # Options change what is handed out, not what is computed.
    options = {"stop_early": True, "output_fmt": "NHWC", "intermediates_only": True}
    early = model.forward_intermediates(x, indices=[0, 1], **options)
    assert torch.equal(early[0].movedim(-1, 1), maps[0])
    assert torch.equal(early[1].movedim(-1, 1), maps[1])
    with pytest.raises(ValueError, match="out_indices"):
        model.forward_intermediates(x, indices=[len(info)])
    if last.ndim == x.ndim:  # a map, not tokens
        normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        assert torch.equal(normed[0], channels_first(last, model))

    # features_only is the same maps, of a model without what lies behind them.
    with torch.device("meta"):
        net = timm.create_model(name, features_only=True)
    taken = [info[index] for index in net.out_indices]
    assert len(taken) >= min(4, len(info))
    assert net.feature_info.channels() == [each["num_chs"] for each in taken]
    assert net.feature_info.reduction() == [each["reduction"] for each in taken]
    some = timm.create_model(name, features_only=True, out_indices=(0, 2)).eval()
    assert some.feature_info.channels() == [info[0]["num_chs"], info[2]["num_chs"]]
    own = some.model.state_dict()
    assert set(own) < set(model.state_dict())
    some.model.load_state_dict({key: model.state_dict()[key] for key in own})
    found = some(x)
    assert torch.equal(found[0], maps[0])
    assert torch.equal(found[1], maps[2])


@torch.no_grad()
@pytest.mark.parametrize("whole", ["va_dinat_mini", "va_dinat_s_tiny", "va_medvit_tiny", "va_medvit_dina_tiny"])
def test_sides_are_rounded_up_where_the_papers_do(whole):
    network = timm.create_model(whole, features_only=True, in_chans=1).eval()
    for height, width in [(32, 32), (45, 70)]:
        maps = network(torch.randn(2, 1, height, width))
        sizes = [(-(-height // step), -(-width // step)) for step in network.feature_info.reduction()]
        assert [tuple(each.shape[2:]) for each in maps] == sizes


@pytest.mark.slow
def test_features_train_every_parameter(name):
    """Distributed training fails on a parameter that gets no gradient."""
    net = timm.create_model(name, features_only=True, out_indices=(0, -2)).train()
    for module in net.modules():
        if isinstance(module, DropPath):
            module.rate = 0.0
    for again in (False, True):
        net.model.set_grad_checkpointing(again)
        net.zero_grad()
        sum(each.square().mean() for each in net(example(net.model, batch=2))).backward()
        assert not [key for key, each in net.named_parameters() if each.grad is None]


@torch.no_grad()
def test_other_precision_memory_and_batch(model):
    x = example(model)
    exact = copy.deepcopy(model).double()(x.double())[1:]
    x = x[1:]  # whatever its neighbour in the batch is
    logits = model(x)
    # Rounding to 8 bits may do what rounding to 24 does, 2^16 times over: networks differ in how they amplify it. Where
    # routes or regions are chosen, it may also choose others, and the results are alike only roughly.
    rounding = max(2**16 * float((logits - exact).abs().max()), 0.3 * float(exact.abs().max()))
    with torch.autocast("cpu", torch.bfloat16):
        assert float((model(x) - logits).abs().max()) <= rounding
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert float((half - logits).abs().max()) <= rounding
    memory = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    model = model.double().to(memory_format=memory)
    torch.testing.assert_close(model(x.double().contiguous(memory_format=memory)), exact, rtol=1e-6, atol=1e-8)
    assert all(each.is_contiguous(memory_format=memory) for each in model.parameters() if each.ndim == x.ndim)


def test_layers_for_optimisers(model):
    names = [key for key, _ in model.named_parameters()]
    assert set(model.no_weight_decay()) <= set(names)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layers) == set(names)
    top = max(layers.values())
    assert min(layers[key] for key in names if key.startswith("stem.")) == 0
    assert {key for key in names if layers[key] == top} >= {"head.fc.weight", "head.fc.bias"}
    # Nothing but the head and what follows the stages falls through to the last layer.
    assert not [key for key in names if layers[key] == top and key.startswith(("stem.", "stages.", "blocks."))]
    assert len(set(layers.values())) > len(model.feature_info)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert 2 < len(set(coarse.values())) <= len(set(layers.values()))


@torch.no_grad()
def test_saved_weights_of_four_channels(name, model, tmp_path):
    state = model.state_dict()
    first = f"{model.default_cfg['first_conv']}.weight"
    state[first] = torch.randn(len(state[first]), 4, *state[first].shape[2:])
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    again = timm.create_model(name, num_classes=CLASSES, in_chans=4, checkpoint_path=str(path)).eval()
    assert again.in_chans == 4
    assert set(again.state_dict()) == set(state)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    with torch.device("meta"):
        assert timm.create_model(name, in_chans=1).state_dict()[first].shape[1] == 1
    least = smallest(again)
    if again.default_cfg.get("input_size") is None or not again.default_cfg.get("fixed_input_size"):
        larger = [size + 3 + 8 * axis for axis, size in enumerate(least)]
        assert again(example(again, larger, in_chans=4, batch=1)).shape == (1, CLASSES)
    else:
        with pytest.raises(ValueError, match=r"img_size|size"):
            again(example(again, [size - 32 for size in least], in_chans=4))


@pytest.mark.slow
def test_a_seed_fixes_the_weights(name, made):
    torch.manual_seed(0)
    again = timm.create_model(name, num_classes=CLASSES).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in made.state_dict().items())


def test_names():
    own = {name for name in timm.list_models() if name.startswith("va_")}
    assert set(FAMILIES) == own
    for name, module in FAMILIES.items():
        assert timm.models.model_entrypoint(name).__module__ == module.__name__, name
        # timm groups names by the last part of their module's name: ours must not join its groups.
        group = module.__name__.rpartition(".")[2]
        assert set(timm.list_models(module=group)) == set(module.default_cfgs), group


IMPORTS = """
import warnings
warnings.simplefilter("error", UserWarning)  # timm warns where a name replaces another
{imports}
assert timm.is_model("va_pyramid_tiny") and timm.is_model("resnet18")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import visattn, timm",
        "import timm, visattn",
        "import timm.models, visattn",
        # Libraries look whether timm is there, and the import comes later.
        "import visattn, importlib.util; importlib.util.find_spec('timm'); import timm",
    ],
)
def test_either_import_order_registers(imports):
    subprocess.run([sys.executable, "-c", IMPORTS.format(imports=imports)], check=True, timeout=120)


@pytest.mark.slow
@torch.no_grad()
def test_exports(name, model):
    """In double precision: an exported program's sums come in another order, which va_medvit_* amplify."""
    if name not in FAST:
        pytest.skip("one per family")
    model, x = model.double(), example(model, batch=1).double()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_compiles(name, model):
    if name not in FAST:
        pytest.skip("one per family")
    model = model.double()  # sums come in another order, which in single precision shows
    x = example(model, batch=2).double()
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = traced(x)
    torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
