"""MobileNetV2 with ELA against the authors' outputs; ResNets with ELA against torchvision's networks."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import visattn
from visattn.attention import EfficientLocalAttention
from visattn.backbones import mobilenetv2_ela
from visattn.errors import UserError

SLOW = pytest.mark.slow
STAGES = {"features1": 0, "features3": 1, "features6": 2, "features13": 3, "features17": 4}


def test_stored_outputs(golden):
    case = golden("ela", "mbv2_ela_l")
    model = visattn.load_official("va_mobilenetv2_ela_l", case.state_dict())
    assert sum(each.numel() for each in model.parameters()) == case.facts["parameters"] == 3_916_904
    assert {mobilenetv2_ela.official_name(key) for key in model.state_dict()} == {
        key for key, *_ in case.facts["entries"]
    }
    for index in case.cases:
        with torch.no_grad():
            last, maps = model.forward_intermediates(case.input(index))
            logits = model.forward_head(last)
        assert set(case.facts["cases"][index]["outputs"]) == {"logits", *STAGES}
        assert case.error(index, "logits", logits) < 1
        for key, stage in STAGES.items():
            assert case.error(index, key, maps[stage]) < 1, key


def test_without_attention_it_is_torchvisions_network():
    """With gates of 1, at another width and number of classes."""
    model = timm.create_model("va_mobilenetv2_ela_l", width_mult=0.5, num_classes=10).double().eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.running_mean.normal_(generator=generator)
        elif isinstance(module, EfficientLocalAttention):
            nn.init.zeros_(module.gn.weight)
            nn.init.constant_(module.gn.bias, 50.0)  # a sigmoid of 1
    reference = torchvision.models.mobilenet_v2(width_mult=0.5, num_classes=10).double().eval()
    ours = [value for key, value in model.state_dict().items() if ".ela." not in key]
    theirs = reference.state_dict()
    assert [each.shape for each in ours] == [each.shape for each in theirs.values()]
    reference.load_state_dict(dict(zip(theirs, ours, strict=True)))
    x = torch.randn(2, 3, 75, 46, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        assert torch.allclose(model(x), reference(x), rtol=1e-9)


@pytest.mark.parametrize("ela", ["T", "B", "S", "L"])
@pytest.mark.parametrize("width_mult", [0.35, 0.5, 1.0])
def test_variants_and_widths(ela, width_mult):
    with torch.device("meta"):
        model = timm.create_model("va_mobilenetv2_ela_l", ela=ela, width_mult=width_mult)
    blocks = [block for stage in model.stages for block in stage.blocks]
    gates = [each for each in model.modules() if isinstance(each, EfficientLocalAttention)]
    assert len(gates) == len(blocks) - 1 == 16
    assert not hasattr(blocks[0].branch, "ela")
    assert {each.variant for each in gates} == {ela}
    assert {each.gn.num_groups for each in gates} <= ({16, 32} if ela == "T" else {16})
    assert model.num_features == 1280


def test_wider_than_one_widens_the_last_layer_too():
    with torch.device("meta"):
        model = timm.create_model("va_mobilenetv2_ela_l", width_mult=1.4)
    assert model.num_features == model.head_hidden_size == 1792
    assert model.feature_info[-1]["num_chs"] == 448


@pytest.mark.parametrize(
    ("name", "plain", "inner"),
    [
        ("va_resnet18_ela_l", "resnet18", 2 * (64 + 128 + 256 + 512)),
        pytest.param("va_resnet50_ela_l", "resnet50", 3 * 64 + 4 * 128 + 6 * 256 + 3 * 512, marks=SLOW),
    ],
)
def test_without_attention_it_is_torchvisions_resnet(name, plain, inner):
    """Gates of 0: x + ELA(x) is x."""
    model = timm.create_model(name, num_classes=7).double().eval()
    reference = getattr(torchvision.models, plain)(num_classes=7).double().eval()
    counts = [sum(each.numel() for each in network.parameters()) for network in (model, reference)]
    assert counts[0] - counts[1] == 58 * inner  # 8 channels by kernel 7, and the norm's 2
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(module, EfficientLocalAttention):
            nn.init.zeros_(module.gn.weight)
            nn.init.constant_(module.gn.bias, -1e3)
    theirs = {}
    for key, value in model.state_dict().items():
        if ".ela." in key:
            continue
        part, _, rest = key.replace(".blocks.", ".").replace(".branch.", ".").partition(".")
        if part == "stages":
            stage, block, layer, *inside = rest.split(".")
            if layer == "shortcut":
                layer, inside[0] = "downsample", {"conv": "0", "bn": "1"}[inside[0]]
            else:
                layer, inside = {"conv": layer, "bn": layer.replace("conv", "bn")}[inside[0]], inside[1:]
            theirs[".".join([f"layer{int(stage) + 1}", block, layer, *inside])] = value
        elif part == "stem":
            theirs[rest.replace("conv1.conv", "conv1").replace("conv1.bn", "bn1")] = value
        else:
            theirs[rest] = value
    reference.load_state_dict(theirs)
    x = torch.randn(2, 3, 75, 46, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        assert torch.allclose(model(x), reference(x), rtol=1e-9)


@pytest.mark.parametrize("name", ["va_resnet18_ela_l", "va_resnet50_ela_l"])
def test_attention_is_behind_the_3x3_convolution(name):
    with torch.device("meta"):
        model = timm.create_model(name, ela="S")
    for stage in model.stages:
        for block in stage.blocks:
            names = list(block.branch._modules)
            before = getattr(block.branch, names[names.index("ela") - 1])
            assert before.conv.kernel_size == (3, 3)
            assert isinstance(before.bn.act, nn.ReLU)
            assert names.index("ela") == len(names) - 2
            assert block.branch.ela.inner.inner.variant == "S"


@pytest.mark.parametrize("name", ["va_mobilenetv2_ela_l", "va_resnet18_ela_l"])
def test_takes_any_size(name):
    model = timm.create_model(name, features_only=True, in_chans=1).eval()
    for size in ((32, 32), (33, 50)):
        with torch.no_grad():
            maps = model(torch.randn(1, 1, *size))
        for each, channels, step in zip(
            maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
        ):
            assert each.shape[1:] == (channels, *(-(-side // step) for side in size))


def test_mistakes_are_explained():
    with pytest.raises(UserError, match="ela"):
        timm.create_model("va_mobilenetv2_ela_l", ela="XL")
    with pytest.raises(UserError, match="ela"):
        timm.create_model("va_resnet18_ela_l", ela="XL")
    with pytest.raises(UserError, match="width_mult must be above 0"):
        timm.create_model("va_mobilenetv2_ela_l", width_mult=0)
    state = timm.create_model("va_mobilenetv2_ela_l").state_dict()
    official = {mobilenetv2_ela.official_name(key): value for key, value in state.items()}
    with pytest.raises(UserError, match=r"wrong: features\.2\.conv\.6\.conv\.weight is"):
        visattn.load_official("va_mobilenetv2_ela_l", {**official, "features.2.conv.6.conv.weight": torch.ones(2)})


@pytest.mark.filterwarnings("ignore")  # torch.jit.script is deprecated, and warns of type hints
@pytest.mark.parametrize("name", ["va_mobilenetv2_ela_l", "va_resnet18_ela_l"])
def test_torchscript_compiles_it(name):
    """The only families that it can compile: timm's checks of it are in force for these."""
    with timm.set_scriptable(True):
        model = timm.create_model(name, num_classes=3).eval()
    scripted = torch.jit.script(model)
    x = torch.randn(2, 3, 33, 46)
    with torch.no_grad():
        assert torch.equal(scripted(x), model(x))
