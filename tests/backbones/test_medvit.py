"""MedViTV2 against the official code's outputs, and what its second form does differently."""

import math

import pytest
import timm
import torch

import visattn
from visattn.attention import NeighborhoodAttention
from visattn.backbones import FAMILIES
from visattn.backbones._faster_kan import FasterKAN
from visattn.backbones._medvit_block import GlobalPerception, LocalPerception
from visattn.errors import UserError

SLOW = pytest.mark.slow
COUNTS = {"tiny": 11_719_845, "small": 30_087_295, "base": 66_995_571, "large": 118_291_477}


@pytest.mark.parametrize(
    ("variant", "make"),
    [
        ("fasterkan", lambda: FasterKAN((48, 96, 48))),
        ("lfp_a", lambda: LocalPerception(32, 64, stride=2, scrambled=True)),
        ("gfp_a", lambda: GlobalPerception(64, 128, stride=2, sr_ratio=2, scrambled=True)),
    ],
)
def test_blocks(golden, variant, make):
    case = golden("medvitv2", variant)
    block = make().eval()
    dead = "conv." if variant == "gfp_a" else "-"
    state = {key: value for key, value in case.state_dict().items() if not key.startswith(dead)}
    missing, unexpected = block.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    with torch.no_grad():
        for index in case.cases:
            assert case.error(index, "out", block(case.input(index))) < 1


def official_count(model):
    """Parameters that the official model has: ours, those it never uses, and the grids, which are buffers here."""
    dead = FAMILIES["va_medvit_tiny"].unused(model)
    counted = [shape for key, shape in dead.items() if not key.endswith(("_mean", "_var", "num_batches_tracked"))]
    grids = sum(each.numel() for key, each in model.named_buffers() if key.endswith("rbf.grid"))
    return sum(each.numel() for each in model.parameters()) + sum(map(math.prod, counted)) + grids


@pytest.mark.parametrize("variant", ["medvit_tiny", pytest.param("medvit_small", marks=SLOW)])
def test_whole_models(golden, variant):
    case = golden("medvitv2", variant)
    official = case.state_dict()
    model = visattn.load_official(f"va_{variant}", official)
    assert official_count(model) == case.facts["parameters"]
    case.check_backbone(model)


def test_official_entries_are_taken_over_whole(golden):
    official = golden("medvitv2", "medvit_tiny").state_dict()
    grid = "features.3.kan.layers.0.rbf.grid"
    maps = visattn.load_official("va_medvit_tiny", official, features_only=True, out_indices=(0, 1))
    assert torch.equal(maps.model.stages[1].blocks[1].kan.layers[0].rbf.grid, official[grid])
    dead, lost = "features.3.conv.conv.3.weight", "features.10.kan.layers.1.spline_linear.weight"
    broken = {**official, grid: official[grid][:7], dead: official[dead][:, :, :1]}
    del broken[lost]
    with pytest.raises(UserError, match=f"missing: {lost}") as caught:
        visattn.load_official("va_medvit_tiny", broken)
    assert f"{grid} is (7,), expected (8,)" in str(caught.value)
    assert f"{dead} is (256, 1, 1, 3), expected (256, 1, 3, 3)" in str(caught.value)
    with pytest.raises(UserError, match="va_medvit_tiny"):
        visattn.load_official("va_medvit_dina_tiny", official)


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts(size):
    with torch.device("meta"):
        released, described = timm.create_model(f"va_medvit_{size}"), timm.create_model(f"va_medvit_dina_{size}")
    assert official_count(released) == official_count(described) == COUNTS[size]
    rate = {"tiny": 0.1, "small": 0.1, "base": 0.2, "large": 0.2}[size]
    assert released.stages[3].blocks[-1].kan_drop_path.rate == rate


def test_numbers_that_outputs_hardly_show():
    model = timm.create_model("va_medvit_tiny")
    norms = [each for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d | torch.nn.LayerNorm)]
    assert {each.eps for each in norms} == {1e-5}
    assert 0.015 < model.stages[3].blocks[0].kan.layers[0].spline_linear.weight.std() < 0.025
    assert 0.015 < model.stages[0].blocks[0].conv.conv[3].weight.std() < 0.025
    assert model.stages[1].blocks[1].kan.layers[0].rbf.grid.tolist() == torch.linspace(-2, 2, 8).tolist()
    assert model.no_weight_decay() == set()
    block = model.stages[3].blocks[0]
    rates = [each.rate for each in (block.mhsa_drop_path, block.mhca_drop_path, block.kan_drop_path)]
    assert rates == pytest.approx([0.075, 0.025, 0.1])


def dilations(model):
    attentions = [each for each in model.modules() if isinstance(each, NeighborhoodAttention)]
    return [axis.dilation for each in attentions for axis in each.axes[:1]]


def test_dilations():
    given = ((1, 2), (4,), (1, 1, 1, 3))
    with torch.device("meta"):
        assert dilations(timm.create_model("va_medvit_tiny")) == [1] * 7
        assert dilations(timm.create_model("va_medvit_dina_tiny")) == [1, 8, 1, 1, 2, 1, 2]
        assert dilations(timm.create_model("va_medvit_dina_tiny", dilations=given)) == [1, 2, 4, 1, 1, 1, 3]
    with pytest.raises(ValueError, match=r"\[2, 1, 4\] entries"):
        timm.create_model("va_medvit_dina_tiny", dilations=())


def touched(block, size):
    """Positions of the output that depend on the first position of a map."""
    x = torch.randn(1, block.norm2.num_features, *size, dtype=torch.float64)
    moved = x.clone()
    moved[..., 0, 0] += 1
    with torch.no_grad():
        return [tuple(each.tolist()) for each in ((block(moved) - block(x)).abs().amax((0, 1)) > 1e-12).nonzero()]


@pytest.mark.parametrize(("dilation", "seen"), [(1, [0, 1, 2, 3]), (2, [0, 2, 4, 6])])
def test_attention_of_the_described_form_sees_a_neighbourhood(dilation, seen):
    expected = [(row, column) for row in seen for column in seen]
    for scrambled in (False, True):
        block = LocalPerception(32, 32, dilation=dilation, scrambled=scrambled).double().eval()
        torch.nn.init.zeros_(block.conv.conv[8].weight)  # leaves out the rest of LFF, which sees the whole map
        for layer in (block.attn.qkv, block.attn.proj):
            torch.nn.init.normal_(layer.weight, std=0.3)
        assert (touched(block, (28, 30)) == expected) is not scrambled


def test_kan_of_the_described_form_sees_one_position():
    for scrambled in (False, True):
        block = GlobalPerception(128, 128, sr_ratio=1, scrambled=scrambled).double().eval()
        block.patch_embed = torch.nn.Conv2d(128, 96, 1, dtype=torch.float64)
        torch.nn.init.zeros_(block.e_mhsa.proj.weight)
        torch.nn.init.zeros_(block.mhca.projection.weight)
        assert (touched(block, (8, 12)) == [(0, 0)]) is not scrambled


def test_sizes_of_the_official_code_only():
    network = timm.create_model("va_medvit_tiny", any_size=False, features_only=True, out_indices=(0,)).eval()
    for size, refused in [((97, 97), False), ((97, 103), False), ((96, 96), True), ((112, 97), True)]:
        x = torch.randn(1, 3, *size)
        if refused:
            with pytest.raises(ValueError, match=f"got {size[0]}x{size[1]}"):
                network(x)
        else:
            network(x)
