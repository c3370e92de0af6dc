"""PartialNet against the official code's outputs; every stored tensor, and the entries taken over whole."""

import pytest
import timm
import torch

import visattn
from visattn.backbones import partialnet
from visattn.errors import UserError

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("va_partialnet_t0", "partialnet_t0"),
        pytest.param("va_partialnet_t0", "partialnet_t0_sp", marks=SLOW),
        pytest.param("va_partialnet_t2", "partialnet_t2", marks=SLOW),
        pytest.param("va_partialnet_s", "partialnet_s", marks=SLOW),
    ],
)
def test_whole_models(golden, name, variant):
    case = golden("partialnet", variant)
    model = visattn.load_official(name, case.state_dict())
    assert sum(each.numel() for each in model.parameters()) == case.facts["parameters"]
    case.check_backbone(model)


def test_dense_form(golden):
    case = golden("partialnet", "partialnet_t2_det")
    network = visattn.load_official("va_partialnet_t2", case.state_dict(), features_only=True)
    assert sum(each.numel() for each in network.parameters()) == case.facts["parameters"]
    with torch.no_grad():
        maps = network(case.input(0))
    for number, each in enumerate(maps, 1):
        assert case.error(0, f"out{number}", each) < 1


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("va_partialnet_t0", 3_486_160),
        ("va_partialnet_t1", 6_144_552),
        ("va_partialnet_t2", 12_269_816),
        ("va_partialnet_s", 28_013_304),
        ("va_partialnet_m", 59_179_000),
        ("va_partialnet_l", 100_641_336),
    ],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(each.numel() for each in model.parameters()) == count


def test_activations():
    """Golden cases fix T0, T2 and S; T1 has T0's, M and L have the others'."""
    for name, act in (("t1", torch.nn.GELU), ("m", torch.nn.ReLU), ("l", torch.nn.ReLU)):
        with torch.device("meta"):
            model = timm.create_model(f"va_partialnet_{name}")
        assert isinstance(model.stages[0].blocks[0].mlp.act, act)
        assert isinstance(model.head.pre_logits.act, act)


def test_options_and_their_official_names():
    model = timm.create_model("va_partialnet_t0", num_classes=5, layer_scale=0.5, pat_sp=True, num_heads=6).eval()
    state = {partialnet.official_name(key): value for key, value in model.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    expected = {"stages.4.blocks.7.layer_scale": (128,), "stages.6.blocks.1.mlp.4.conv_attn.weight": (1, 128, 1, 1)}
    expected["stages.6.blocks.0.spatial_mixing.attn.rpe_k.lookup_table_bias"] = (6, 81)
    assert expected.items() <= shapes.items()
    again = visattn.load_official(
        "va_partialnet_t0", state, layer_scale=0.5, num_heads=6
    )  # PAT_sp shows in the entries
    x = torch.randn(2, 3, 32, 70)  # the last map is one position high
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    del state["stages.3.norm.bias"]
    with pytest.raises(UserError, match=r"stages\.3\.norm\.bias"):
        visattn.load_official("va_partialnet_t0", state, layer_scale=0.5, num_heads=6)


def test_a_single_position_trains():
    model = timm.create_model("va_partialnet_t0", num_classes=2).train()
    logits = model(torch.randn(1, 3, 32, 32))
    logits.sum().backward()
    assert all(each.grad.isfinite().all() for each in model.parameters())


def test_images_are_cropped_as_in_the_authors_test():
    config = timm.get_pretrained_cfg("va_partialnet_s")
    assert (config.crop_pct, config.interpolation) == (0.9, "bicubic")


def test_errors():
    with pytest.raises(UserError, match="depths"):
        timm.create_model("va_partialnet_t0", depths=(1, 2))
    with pytest.raises(UserError, match="act"):
        timm.create_model("va_partialnet_t0", act="silu")
