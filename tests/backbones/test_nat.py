"""NAT and DiNAT against the official code's outputs, and the plans of all their sizes."""

import pytest
import timm
import torch

import visattn
from visattn.attention import NeighborhoodAttention
from visattn.backbones import dinat_s, nat
from visattn.backbones.nat import neighborhood_transformer
from visattn.errors import UserError

SLOW = pytest.mark.slow


@pytest.mark.parametrize("variant", ["dinat_mini", pytest.param("nat_mini", marks=SLOW)])
def test_whole_models(golden, variant):
    case = golden("nat", variant)
    model = visattn.load_official(f"va_{variant}", case.state_dict())
    assert sum(each.numel() for each in model.parameters()) == case.facts["parameters"]
    case.check_backbone(model)


def test_official_entries_are_taken_over_whole(golden):
    official = golden("nat", "dinat_mini").state_dict()
    maps = visattn.load_official("va_dinat_mini", official, features_only=True, out_indices=(0, 1), in_chans=3)
    reduction = maps.model.stages[1].downsample.reduction.weight
    assert torch.equal(reduction, official["levels.0.downsample.reduction.weight"])
    table = "levels.1.blocks.2.attn.rpb"
    broken = {key: value for key, value in official.items() if key != "levels.2.downsample.norm.bias"}
    broken[table] = official[table][:, :11]
    with pytest.raises(UserError, match=r"missing: levels\.2\.downsample\.norm\.bias") as caught:
        visattn.load_official("va_dinat_mini", broken)
    assert f"{table} is (4, 11, 13), expected (4, 13, 13)" in str(caught.value)


# Counts of nat_mini, nat_tiny and dinat_s_tiny are the official ones; of the others the official pages name millions.
@pytest.mark.parametrize(
    ("name", "count", "scaled", "rate"),
    [
        ("va_nat_mini", 19_984_174, False, 0.2),
        ("va_nat_tiny", 27_901_582, False, 0.2),
        ("va_nat_small", 50_743_297, True, 0.3),
        ("va_nat_base", 89_769_652, True, 0.5),
        ("va_dinat_mini", 19_984_174, False, 0.2),
        ("va_dinat_tiny", 27_901_582, False, 0.2),
        ("va_dinat_small", 50_719_681, False, 0.3),
        ("va_dinat_base", 89_769_652, True, 0.5),
        ("va_dinat_large", 200_943_514, False, 0.35),
        ("va_dinat_s_tiny", 28_288_354, False, 0.2),
        ("va_dinat_s_small", 49_606_258, False, 0.3),
        ("va_dinat_s_base", 87_768_224, False, 0.5),
        ("va_dinat_s_large", 196_532_476, False, 0.35),
    ],
)
def test_plans(name, count, scaled, rate):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(each.numel() for each in model.parameters()) == count
    assert hasattr(model.stages[0].blocks[0].scale1, "gamma") is scaled
    assert model.stages[-1].blocks[-1].drop_path1.rate == pytest.approx(rate)
    assert dilations(model) == ({} if "dinat" not in name else {0: 8, 1: 4, 2: 2})
    heads = {each.dim // each.num_heads for each in model.modules() if isinstance(each, NeighborhoodAttention)}
    assert heads == {32}
    assert {each.eps for each in model.modules() if isinstance(each, torch.nn.LayerNorm)} == {1e-5}
    assert all(name.endswith("rpb") for name in model.no_weight_decay())
    assert len(model.no_weight_decay()) == sum(len(stage.blocks) for stage in model.stages)


def dilations(model):
    """The dilation of each stage that has any; every second block must have it, and no other."""
    found = {}
    for index, stage in enumerate(model.stages):
        each = [block.mixer.axes[0].dilation for block in stage.blocks]
        assert set(each[::2]) == {1}
        assert len(set(each[1::2])) == 1
        if each[1] > 1:
            found[index] = each[1]
    return found


def test_settings_for_384_pixels():
    with torch.device("meta"):
        finer = timm.create_model("va_dinat_large", dilations=(13, 6, 3, 1))
        wider = timm.create_model("va_dinat_large", kernel_size=11)
    assert dilations(finer) == {0: 13, 1: 6, 2: 3}
    assert wider.stages[0].blocks[1].mixer.rpb.shape == (6, 21, 21)
    assert dilations(wider) == {0: 8, 1: 4, 2: 2}


def test_dilations_may_be_named_for_each_block():
    plan = {"dim": 32, "depths": (3, 1), "num_heads": (1, 2), "mlp_ratio": 2}
    model = neighborhood_transformer(**plan, dilations=((1, 2, 3), 4))
    assert [block.mixer.axes[0].dilation for block in model.stages[0].blocks] == [1, 2, 3]
    assert model.stages[1].blocks[0].mixer.axes[0].dilation == 1
    with pytest.raises(ValueError, match="each of 3 blocks"):
        neighborhood_transformer(**plan, dilations=((1, 2), 4))
    with pytest.raises(ValueError, match="each of 2 stages"):
        neighborhood_transformer(**plan, dilations=(1, 2, 1))


def test_official_names_of_the_third_family():
    with torch.device("meta"):
        model = timm.create_model("va_dinat_s_tiny")
    names = {dinat_s.official_name(key) for key in model.state_dict()}
    assert len(names) == len(model.state_dict())
    inside = (
        "norm1.weight",
        "attn.rpb",
        "attn.qkv.bias",
        "attn.proj.weight",
        "norm2.bias",
        "mlp.fc1.weight",
        "mlp.fc2.bias",
    )
    wanted = {f"layers.2.blocks.5.{each}" for each in inside}
    wanted |= {
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "patch_embed.norm.weight",
        "norm.bias",
        "head.weight",
    }
    wanted |= {f"layers.{index}.downsample.{each}" for index in (0, 1, 2) for each in ("norm.bias", "reduction.weight")}
    assert wanted <= names
    assert not any(name.startswith("layers.3.downsample") for name in names)
    scaled = {nat.official_name(f"stages.1.blocks.0.scale{number}.gamma") for number in (1, 2)}
    assert scaled == {"levels.1.blocks.0.gamma1", "levels.1.blocks.0.gamma2"}


def test_stem_of_the_third_family_pads_at_the_end():
    stem = timm.create_model("va_dinat_s_tiny", features_only=True, out_indices=(0,)).model.stem
    x = torch.randn(1, 3, 33, 38)
    padded = torch.nn.functional.pad(x, (0, 2, 0, 3))
    expected = torch.nn.functional.conv2d(padded, stem[1].weight, stem[1].bias, stride=4).permute(0, 2, 3, 1)
    with torch.no_grad():
        torch.testing.assert_close(stem(x), stem[3](expected))
