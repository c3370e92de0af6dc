"""BiFormer against the official code's outputs; every stored tensor, and the entries taken over whole."""

import pytest
import timm
import torch

import visattn
from visattn.errors import UserError

SLOW = pytest.mark.slow
WHOLE = [
    ("biformer_tiny", {}),
    pytest.param("biformer_small", {}, marks=SLOW),
    pytest.param("biformer_small_autopad", {}, marks=SLOW),
    pytest.param("biformer_stl", {}, marks=SLOW),
]


def outputs(model, x):
    """What the cases store: maps, logits, and what attention and MLP of each stage's last block return."""
    found = {}

    def keep(name):
        return lambda _module, _inputs, out: found.update({name: out})

    hooks = []
    for number, stage in enumerate(model.stages, 1):
        hooks.append(stage.blocks[-1].attn.register_forward_hook(keep(f"probe_attn{number}")))
        hooks.append(stage.blocks[-1].mlp.register_forward_hook(keep(f"probe_mlp{number}")))
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        found["logits"] = model.forward_head(last)
    for hook in hooks:
        hook.remove()
    return found | {f"stage{number}": each for number, each in enumerate(maps, 1)}


@pytest.mark.parametrize(("variant", "kwargs"), WHOLE)
def test_whole_models(golden, variant, kwargs):
    case = golden("biformer", variant)
    model = visattn.load_official(f"va_{variant.removesuffix('_autopad')}", case.state_dict(), **kwargs)
    assert sum(each.numel() for each in model.parameters()) == case.facts["parameters"]
    for index in case.cases:
        found = outputs(model, case.input(index))
        stored = case.facts["cases"][index]["outputs"]
        assert set(stored) <= set(found)
        for name in stored:
            assert case.error(index, name, found[name]) < 1, name


@SLOW
def test_dense_form(golden):
    case = golden("biformer", "biformer_mm_small")
    network = visattn.load_official("va_biformer_small", case.state_dict(), features_only=True)
    assert sum(each.numel() for each in network.parameters()) == case.facts["parameters"]
    assert network.model.stages[0].blocks[0].attn.n_win == (8, 8)
    with torch.no_grad():
        maps = network(case.input(0))
    for number, each in enumerate(maps, 1):
        assert case.error(0, f"out{number}", each) < 1


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("va_biformer_tiny", 13_142_760),
        ("va_biformer_small", 25_536_232),
        ("va_biformer_base", 56_804_968),
        ("va_biformer_stl", 28_372_552),
        ("va_biformer_stl_nchw", 28_372_552),
    ],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(each.numel() for each in model.parameters()) == count


def official(model, family):
    return {family.official_name(key): value for key, value in model.state_dict().items()}


def test_options_and_their_official_names():
    from visattn.backbones import biformer

    tiny = {"depths": (1, 1, 1, 1), "widths": (32, 64, 96, 128), "num_classes": 5}
    options = {"layer_scale": 1e-2, "mlp_dwconv": True, "topks": (0, 2, -1, -2), "pre_norm": False}
    model = timm.create_model("va_biformer_tiny", **tiny, **options)
    state = official(model, biformer)
    expected = {
        "stages.0.0.gamma1": (32,),
        "stages.0.0.attn.1.weight": (32, 32, 1, 1),
        "stages.0.0.attn.2.bias": (32,),
        "stages.0.0.mlp.1.dwconv.weight": (96, 1, 3, 3),
        "stages.1.0.attn.qkv.qkv.weight": (192, 64),
        "stages.2.0.attn.qkv.weight": (288, 96),
        "stages.3.0.attn.lepe.weight": (128, 1, 5, 5),
        "downsample_layers.0.4.running_var": (32,),
        "downsample_layers.3.1.weight": (128,),
        "head.bias": (5,),
        "norm.running_mean": (128,),
    }
    assert expected.items() <= {key: tuple(value.shape) for key, value in state.items()}.items()
    assert "stages.2.0.attn.lepe.weight" not in state
    again = visattn.load_official("va_biformer_tiny", state, **{**tiny, **options})
    x = torch.randn(2, 3, 45, 70)
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))


def test_later_form_takes_convolutions_as_linear_layers():
    from visattn.backbones import biformer_stl

    tiny = {"depths": (1, 1, 1, 1), "widths": (32, 64, 96, 128), "num_classes": 5}
    model = timm.create_model("va_biformer_stl_nchw", **tiny).eval()
    state = official(model, biformer_stl)
    assert state["stages.3.blocks.0.attn.qkv.weight"].shape == (384, 128, 1, 1)
    assert "stages.3.blocks.0.attn.qkv.bias" not in state
    assert state["stages.3.blocks.0.attn.lepe.weight"].shape == (128, 1, 5, 5)
    assert state["stages.0.blocks.0.attn.qkv_linear.weight"].shape == (96, 32, 1, 1)
    stored = {
        key: value[:, :, None, None] if ".mlp." in key and value.ndim == 2 else value for key, value in state.items()
    }
    again = visattn.load_official("va_biformer_stl_nchw", stored, **tiny)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    stored["stages.0.blocks.0.mlp.2.weight"] = torch.zeros(32, 127, 1, 1)
    with pytest.raises(UserError, match=r"stages\.0\.blocks\.0\.mlp\.2\.weight is \(32, 127\)"):
        visattn.load_official("va_biformer_stl_nchw", stored, **tiny)


def test_convolutions_begin_as_torchs():
    """Linear layers begin at std 0.02; the 1x1 convolutions of the later form, linear layers here, do not."""
    tiny = {"depths": (1, 1, 1, 1), "widths": (32, 64, 96, 128)}
    torch.manual_seed(0)
    for name, std in (("va_biformer_stl", 0.02), ("va_biformer_stl_nchw", (3 * 128) ** -0.5)):
        model = timm.create_model(name, **tiny)
        mlp = model.stages[3].blocks[0].mlp
        assert mlp.fc1.weight.std().item() == pytest.approx(std, rel=0.05)
        assert bool(mlp.fc1.bias.any()) is ("nchw" in name)
        assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert model.stages[3].blocks[0].attn.lepe.weight.std().item() == pytest.approx((3 * 25) ** -0.5, rel=0.1)


def test_sizes():
    tiny = {"depths": (1, 1, 1, 1), "widths": (32, 64, 96, 128), "num_classes": 5}
    model = timm.create_model("va_biformer_tiny", **tiny, features_only=True).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 33, 50))
    assert [tuple(each.shape[2:]) for each in maps] == [
        (9, 13),
        (5, 7),
        (3, 4),
        (2, 2),
    ]  # rounded up, as convolutions do
    strict = timm.create_model("va_biformer_tiny", **tiny, auto_pad=False).eval()
    with pytest.raises(ValueError, match="auto_pad"):
        strict(torch.randn(1, 3, 64, 64))
    with pytest.raises(UserError, match="multiples of 32"):
        timm.create_model("va_biformer_tiny", widths=(48, 96, 192, 384))
