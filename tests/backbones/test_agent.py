"""The Agent Attention families: golden cases of the official code, tables for other image sizes, and an oracle."""

import pytest
import timm
import torch
from torch.nn import functional as F

import visattn
from visattn.backbones import FAMILIES, agent_cswin
from visattn.errors import UserError

SLOW = pytest.mark.slow
WHOLE = [
    ("agent_deit_t", 224),
    pytest.param("agent_deit_t_160", 160, marks=SLOW),
    pytest.param("agent_pvt_t", 224, marks=SLOW),
    ("agent_pvt_t_160", 160),
    pytest.param("agent_swin_t", 224, marks=SLOW),
    ("agent_swin_t_160", 160),
]
PUBLISHED = {  # millions of parameters, as in the authors' tables
    "deit": {"t": 6.0, "s": 22.6, "b": 87.2},
    "pvt": {"t": 11.6, "s": 20.6, "m": 35.9, "l": 48.7},
    "swin": {"t": 28.9, "s": 49.7, "b": 88.1},
    "cswin": {"t": 20.5, "s": 32.8, "b": 73.2},
}
NAMES = [f"va_agent_{family}_{size}" for family, sizes in PUBLISHED.items() for size in sizes]
SMALL = {  # constructor arguments that make each family quick
    "va_agent_deit_t": {"dim": 24, "depth": 3},
    "va_agent_pvt_t": {"widths": (8, 16, 24, 32), "heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)},
    "va_agent_swin_t": {"dim": 12, "depths": (1, 1, 1, 2)},
    "va_agent_cswin_t": {"dim": 8, "depths": (1, 1, 2, 1), "agent_blocks": (1, 1, 0, 0)},
}
each = pytest.mark.parametrize("name", SMALL)


def small(name, img_size=64, **kwargs):
    """A small member of the family, with weights that make every part count."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=img_size, **{"num_classes": 5, **SMALL[name], **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def image(height, width, batch=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def official(model, name):
    """The state dict of `model` under the authors' names."""
    return {FAMILIES[name].official_name(key): value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("variant", "size"), WHOLE)
def test_official_models(golden, variant, size):
    case = golden("agent_attention", variant)
    name = f"va_{variant.removesuffix('_160')}"
    model = visattn.load_official(name, case.state_dict(), img_size=size)
    assert sum(parameter.numel() for parameter in model.parameters()) == case.facts["parameters"]
    if "deit" not in name:
        case.check_backbone(model)
        return
    for index in case.cases:
        with torch.no_grad():
            last, maps = model.forward_intermediates(case.input(index), [0, 5, 11], return_prefix_tokens=True)
            found = {"logits": model.forward_head(last)}
        for block, (places, token) in zip((0, 5, 11), maps, strict=True):
            found |= {f"block{block}": places, f"block{block}_cls": token[:, 0]}
        assert set(found) == set(case.facts["cases"][index]["outputs"])
        for key, value in found.items():
            assert case.error(index, key, value) < 1, key


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_the_published_ones(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    _, _, family, size = name.split("_")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == PUBLISHED[family][size]


@pytest.mark.parametrize("thickness", [(2, 2), (2, 3)])
def test_cswin_is_what_loops_compute(reference, thickness):
    """On the authors' names; the second image is rectangular."""
    size = tuple(32 * side for side in thickness)
    heads = (2, 4, 8, 16)
    model = small("va_agent_cswin_t", size, dim=16, depths=(1, 2, 2, 1), agent_blocks=(1, 2, 0, 0)).double()
    state = official(model, "va_agent_cswin_t")
    x = image(*size).double()
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        wanted, logits = reference("agent_cswin").stages(
            x[0], state, (1, 2, 2, 1), heads, (9, 16, 0, 0), thickness, reference("agent").strips
        )
        for found, want in zip(maps, wanted, strict=True):
            torch.testing.assert_close(found[0].movedim(0, -1), want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.forward_head(last)[0], logits, rtol=1e-9, atol=1e-9)


def test_strips_do_not_see_their_padding():
    """Of a map with columns left over, whole strips do not change when the rest is cut off."""
    torch.manual_seed(0)
    strips = agent_cswin.CrossShapedAttention(8, 2, (2, 2)).attns[0]
    qkv = torch.randn(3, 2, 4, 5, 4)
    torch.testing.assert_close(strips(qkv)[:, :, :4], strips(qkv[:, :, :, :4]))
    # The column left over attends to itself alone, so a strip of that thickness gives the same.
    alone = agent_cswin.CrossShapedAttention(8, 2, (1, 1)).attns[0]
    alone.load_state_dict(strips.state_dict())
    torch.testing.assert_close(strips(qkv)[:, :, 4:], alone(qkv[:, :, :, 4:]))


@each
def test_another_image_size_is_refused_with_a_way_out(name):
    model = small(name)
    with pytest.raises(ValueError, match=r"64 x 64 pixels, got 64 x 96: create it with img_size=\(64, 96\)"):
        model(image(64, 96))
    for wrong in (31, (64, 31), (64, 64, 64), 64.0, True):
        with pytest.raises((UserError, TypeError), match=r"img_size|iterable"):
            small(name, wrong)


@each
def test_maps_of_rectangles(name):
    model = timm.create_model(name, features_only=True, img_size=(64, 100), **SMALL[name])
    maps = model(image(64, 100))
    sides = [(64 // r, 100 // r) for r in model.feature_info.reduction()]
    if "deit" not in name:
        assert model.feature_info.reduction() == [4, 8, 16, 32]
    if "swin" in name:  # odd maps are padded before they are halved
        sides = [(16, 25), (8, 13), (4, 7), (2, 4)]
    assert [tuple(each.shape[1:]) for each in maps] == [
        (channels, *side) for channels, side in zip(model.feature_info.channels(), sides, strict=True)
    ]


@pytest.mark.parametrize("name", ["va_agent_deit_t", "va_agent_pvt_t"])
def test_tables_resized_on_load_are_those_of_a_dynamic_model(name, tmp_path):
    """Three ways to the same numbers: resize at every call, as official weights are loaded, and as our own are."""
    model = small(name, (64, 96))
    dynamic = small(name, (64, 96), dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    x = image(96, 80)
    with torch.no_grad():
        wanted = dynamic(x)
        assert torch.equal(dynamic(image(64, 96)), model(image(64, 96)))
        settings = {"img_size": (96, 80), **SMALL[name]}
        loaded = visattn.load_official(name, official(model, name), **settings)
        torch.testing.assert_close(loaded(x), wanted, rtol=1e-4, atol=1e-5)
        own = timm.create_model(name, num_classes=5, checkpoint_path=tmp_path / "weights.pth", **settings).eval()
        assert torch.equal(own(x), loaded(x))


def test_tables_are_resized_as_the_authors_do():
    """Agent tables linearly, relative positions bicubically, positions bilinearly and without the class token."""
    swin, other = small("va_agent_swin_t", 224), small("va_agent_swin_t", 160)
    other.load_state_dict(swin.state_dict())
    key = "stages.0.blocks.0.attn.ha_bias"  # (1, h, H, 1, n)
    old, new = swin.state_dict()[key], other.state_dict()[key]
    line = F.interpolate(old[0, :, :, 0].mT, size=40, mode="linear").mT
    assert torch.equal(new[0, :, :, 0], line)
    key = "stages.3.blocks.0.attn.rel_pos.relative_position_bias_table"
    old, new = swin.state_dict()[key], other.state_dict()[key]
    table = F.interpolate(old.T.reshape(1, -1, 13, 13), size=(9, 9), mode="bicubic")
    torch.testing.assert_close(new, table.reshape(-1, 81).T)
    deit, other = small("va_agent_deit_t", (64, 96)), small("va_agent_deit_t", (96, 80))
    other.load_state_dict(deit.state_dict())
    old, new = deit.stem.pos_embed, other.stem.pos_embed
    assert torch.equal(old[:, 0], new[:, 0])
    grid = F.interpolate(old[:, 1:].reshape(1, 4, 6, -1).movedim(-1, 1), size=(6, 5), mode="bilinear")
    torch.testing.assert_close(new[:, 1:], grid.flatten(2).mT)


@pytest.mark.parametrize(("size", "window"), [(224, 7), (288, 9), (384, 12), (160, 5)])
def test_swin_windows_follow_the_published_configurations(size, window):
    with torch.device("meta"):
        model = timm.create_model("va_agent_swin_s", img_size=size, depths=(1, 1, 4, 2), agent_blocks=(1, 1, 0, 0))
        assert model(torch.empty(1, 3, size, size)).shape == (1, 1000)
    third, last = ([block.attn for block in stage.blocks] for stage in model.stages[2:])
    assert [attn.window_size for attn in last] == [(window, window)] * 2
    side = max(7, window)
    assert [attn.window_size for attn in third] == [(side, side)] * 4
    assert [attn.shift_size for attn in third] == [(0, 0), (side // 2, side // 2)] * 2


def test_what_swin_computes_from_sizes_is_checked_and_dropped():
    arguments = {"dim": 12, "depths": (1, 1, 2, 2), "agent_blocks": (1, 1, 0, 0), "num_classes": 5}
    model = small("va_agent_swin_t", 224, **arguments)
    state = official(model, "va_agent_swin_t")
    for prefix in ("layers.2.blocks.0", "layers.2.blocks.1", "layers.3.blocks.0", "layers.3.blocks.1"):
        state[f"{prefix}.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    state["layers.2.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    arguments = {"dim": 12, "depths": (1, 1, 2, 2), "agent_blocks": (1, 1, 0, 0)}
    x = image(224, 224)
    loaded = visattn.load_official("va_agent_swin_t", state, **arguments)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert visattn.load_official("va_agent_swin_t", state, img_size=384, **arguments).num_classes == 5
    for key, shape in (("attn.relative_position_index", (25, 25)), ("attn_mask", (4, 25, 25))):
        with pytest.raises(UserError, match=key):
            visattn.load_official(
                "va_agent_swin_t", {**state, f"layers.2.blocks.1.{key}": torch.zeros(shape)}, **arguments
            )


@each
def test_official_state_dicts_are_taken_whole(name):
    state = official(small(name), name)
    settings = {"img_size": 64, **SMALL[name]}
    visattn.load_official(name, state, **settings)
    for key in (next(key for key in state if key.endswith("an_bias")), "head.weight"):
        with pytest.raises(UserError, match=f"missing: {key}"):
            visattn.load_official(name, {k: v for k, v in state.items() if k != key}, num_classes=5, **settings)
        with pytest.raises(UserError, match=f"wrong: {key}"):
            visattn.load_official(name, {**state, key: state[key][..., :-1]}, num_classes=5, **settings)
    with pytest.raises(UserError, match="unexpected: other"):
        visattn.load_official(name, {**state, "other": torch.zeros(1)}, **settings)
    maps = visattn.load_official(name, state, features_only=True, **settings)
    assert len(maps(image(64, 64))) == len(maps.feature_info.channels())


def test_no_decay_is_the_authors():
    """Agent tables are decayed; relative positions of Swin and positions of DeiT are not, those of PVT are."""
    exempt = {name: small(name, 224 if "_swin" in name else 64).no_weight_decay() for name in SMALL}
    assert exempt["va_agent_deit_t"] == {"stem.pos_embed", "stem.cls_token"}
    assert exempt["va_agent_pvt_t"] == exempt["va_agent_cswin_t"] == set()
    assert {key.rsplit(".", 1)[1] for key in exempt["va_agent_swin_t"]} == {"relative_position_bias_table"}


def test_the_base_token_model_has_agents_in_its_first_blocks():
    with torch.device("meta"):
        model = timm.create_model("va_agent_deit_b")
    kinds = [type(block.attn).__name__ for block in model.blocks]
    assert kinds == ["AgentAttention"] * 4 + ["FullAttention"] * 8
    assert model.blocks[0].attn.agent_num == 81


def test_token_model():
    """Pools, layouts of maps, the class token, and blocks with plain attention."""
    model = small("va_agent_deit_t", (64, 96), agent_blocks=2)
    x = image(64, 96, 2)
    with torch.no_grad():
        tokens = model.forward_features(x)
        assert tokens.shape == (2, 25, 24)
        ((places, token),) = model.forward_intermediates(x, 1, return_prefix_tokens=True, norm=True)[1]
        assert torch.equal(places.flatten(2).mT, tokens[:, 1:])
        assert torch.equal(token, tokens[:, :1])
        for layout, shape in (("NCHW", (2, 24, 4, 6)), ("NHWC", (2, 4, 6, 24)), ("NLC", (2, 24, 24))):
            maps = model.forward_intermediates(x, [0, -1], output_fmt=layout, intermediates_only=True, stop_early=True)
            assert [tuple(each.shape) for each in maps] == [shape] * 2
        for pool, pooled in (
            ("token", tokens[:, 0]),
            ("avg", tokens[:, 1:].mean(1)),
            ("max", tokens[:, 1:].amax(1)),
            ("", tokens),
        ):
            model.reset_classifier(0, pool)
            torch.testing.assert_close(model(x), pooled)
    with pytest.raises(ValueError, match="'token', 'avg', 'max'"):
        model.reset_classifier(5, "mean")
    with pytest.raises(ValueError, match="'NCHW', 'NHWC' or 'NLC'"):
        model.forward_intermediates(x, output_fmt="NCL")


@pytest.mark.parametrize("name", ["va_agent_deit_t", "va_agent_cswin_t"])
def test_checkpointing_changes_nothing(name):
    results = []
    for again in (False, True):
        model = small(name)
        model.set_grad_checkpointing(again)
        out = model(image(64, 64))
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
