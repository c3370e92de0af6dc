"""HaloNet against stored outputs of timm's code and against the installed timm itself, and the paper's table."""

import pytest
import timm
import torch

import visattn
from visattn.attention import HaloAttention
from visattn.backbones import halonet
from visattn.errors import UserError

SLOW = pytest.mark.slow


@SLOW
@pytest.mark.parametrize("variant", ["halonet26t", "halonet50ts"])
def test_stored_outputs(golden, variant):
    case = golden("halonet", variant)
    model = visattn.load_official(f"va_{variant}", case.state_dict())
    assert sum(each.numel() for each in model.parameters()) == case.facts["parameters"]
    case.check_backbone(model)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("halonet26t", (256, 256)),
        pytest.param("halonet50ts", (256, 256), marks=SLOW),
        pytest.param("sehalonet33ts", (256, 256), marks=SLOW),
        pytest.param("sehalonet33ts", (256, 512), marks=SLOW),
        pytest.param("haloregnetz_b", (224, 224), marks=SLOW),
        pytest.param("haloregnetz_b", (448, 224), marks=SLOW),
    ],
)
def test_computes_what_timm_computes(randomised, name, size):
    reference = randomised(timm.create_model(name, num_classes=11))
    model = visattn.load_official(f"va_{name}", reference.state_dict()).double()
    assert model.num_classes == 11
    x = torch.randn(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(x)
        assert (model(x) - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("va_halonet26t", 12_480_288),
        ("va_halonet50ts", 22_733_280),
        ("va_sehalonet33ts", 13_691_712),
        ("va_haloregnetz_b", 11_680_072),
    ],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(each.numel() for each in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "millions", "layers", "image"),
    [
        ("h0", 5.5, 50, 256),
        ("h1", 8.1, 59, 256),
        ("h2", 9.4, 62, 256),
        ("h3", 11.8, 65, 320),
        ("h4", 19.1, 65, 384),
        ("h5", 30.7, 98, 448),
        ("h6", 43.4, 101, 512),
        ("h7", 67.4, 107, 600),
    ],
)
def test_the_papers_networks_have_its_counts(name, millions, layers, image):
    with torch.device("meta"):
        model = timm.create_model(f"va_halonet_{name}")
    count = sum(each.numel() for each in model.parameters()) / 1e6
    # The table rounds; of H6, 43.46 here, it cuts off the rest.
    assert abs(count - millions) < (0.06 if name == "h6" else 0.05)
    blocks = [len(stage.blocks) for stage in model.stages]
    assert 3 * sum(blocks) + 2 == layers
    assert model.default_cfg["input_size"] == (3, image, image)
    heads = [stage.blocks[0].branch.self_attn.inner.num_heads for stage in model.stages]
    assert heads == [4, 8, 8, 8]


@SLOW
def test_h1_is_the_network_that_timm_drew_apart_from_its_heads(randomised):
    """timm's untrained halonet_h1 has 8 heads in the first stage too; nothing else differs."""
    reference = randomised(timm.create_model("halonet_h1", num_classes=5))
    plan = halonet.Stages(("HHH", "HHH", "H" * 10, "HHH"), (64, 128, 256, 512), (64, 128, 256, 512), halonet.Halo(8, 3))
    model = visattn.load_official("va_halonet_h1", reference.state_dict(), plan=plan).double()
    x = torch.randn(1, 3, 256, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(x)
        assert (model(x) - expected).abs().max() < 1e-10 * expected.abs().max()


def test_values_and_queries_have_the_papers_widths():
    with torch.device("meta"):
        model = timm.create_model("va_halonet_h5")
    attention = model.stages[1].blocks[0].branch.self_attn.inner
    assert isinstance(attention, HaloAttention)
    assert (attention.dim, attention.dim_out, attention.dim_head, attention.stride) == (128, 320, 16, 2)
    assert (attention.block_size, attention.halo_size) == ((14, 14), (2, 2))
    assert model.stages[1].blocks[0].branch.conv3_1x1.conv.out_channels == 256
    assert model.num_features == model.head_hidden_size == 1536


@pytest.mark.parametrize("name", ["va_haloregnetz_b", "va_halonet_h0"])
def test_takes_any_size(name):
    model = timm.create_model(name, features_only=True).eval()
    with torch.no_grad():
        for size in ((32, 32), (77, 50)):
            maps = model(torch.randn(1, 3, *size))
            assert [each.shape[1] for each in maps] == model.feature_info.channels()
            assert all(each.isfinite().all() for each in maps)


def test_border_is_as_in_a_larger_map(randomised):
    """A map that no block divides: its logits are those of attention over a map that goes on with zeros."""
    model = randomised(timm.create_model("va_halonet_h0", features_only=True)).model
    block = model.stages[0].blocks[0].branch.self_attn
    x = torch.randn(1, 64, 13, 9, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(block(x), block(torch.nn.functional.pad(x, (0, 7, 0, 3)))[..., :13, :9])


def test_wrong_weights_are_refused():
    state = {halonet.official_name(k): v for k, v in timm.create_model("va_sehalonet33ts").state_dict().items()}
    assert "final_conv.conv.weight" in state
    with pytest.raises(UserError, match=r"missing: stages\.3\.1\.self_attn\.pos_embed\.width_rel"):
        visattn.load_official(
            "va_sehalonet33ts", {k: v for k, v in state.items() if k != "stages.3.1.self_attn.pos_embed.width_rel"}
        )
    with pytest.raises(UserError, match=r"unexpected: stages\.0\.blocks\.0\.conv1_1x1\.conv\.bias"):
        visattn.load_official("va_sehalonet33ts", {**state, "stages.0.blocks.0.conv1_1x1.conv.bias": torch.ones(1)})


@pytest.mark.parametrize("name", ["halonet26t", "halonet50ts", "sehalonet33ts", "haloregnetz_b"])
def test_images_are_prepared_as_in_timm(name):
    ours, theirs = timm.get_pretrained_cfg(f"va_{name}"), timm.get_pretrained_cfg(name)
    for key in ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes", "first_conv"):
        assert getattr(ours, key) == getattr(theirs, key), key


@SLOW
def test_norms_begin_as_in_timm():
    model, reference = timm.create_model("va_haloregnetz_b"), timm.create_model("haloregnetz_b")
    assert {each.eps for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)} == {1e-5}
    expected = reference.state_dict()
    for key, value in model.state_dict().items():
        if key.endswith(("bn.weight", "post_attn.weight")):
            assert torch.equal(value, expected[halonet.official_name(key)]), key
