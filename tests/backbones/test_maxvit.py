"""MaxViT against stored outputs of timm's code and against the installed timm itself, and any size of image."""

import pytest
import timm
import torch
from timm.models.maxxvit import checkpoint_filter_fn

import visattn
from visattn.attention import GridAttention, WindowAttention
from visattn.errors import UserError

SLOW = pytest.mark.slow
TABLE = "relative_position_bias_table"


@pytest.mark.parametrize(
    ("name", "case", "kwargs"),
    [
        pytest.param("rmlp_pico_rw_256", "rmlp_pico_rw_256", {}, marks=SLOW),
        ("rmlp_pico_rw_256", "rmlp_pico_rw_256_192", {"img_size": (192, 256)}),
        pytest.param("tiny_tf_224", "tiny_tf_224", {}, marks=SLOW),
        pytest.param("tiny_tf_224", "tiny_tf_224_160", {"img_size": (160, 192)}, marks=SLOW),
    ],
)
def test_stored_outputs(golden, name, case, kwargs):
    case = golden("maxvit", f"maxvit_{case}")
    model = visattn.load_official(f"va_maxvit_{name}", case.state_dict(), **kwargs)
    assert sum(each.numel() for each in model.parameters()) == case.facts["parameters"]
    case.check_backbone(model)


@pytest.mark.parametrize(
    ("name", "img_size", "size"),
    [
        ("maxvit_nano_rw_256", (64, 96), (64, 96)),
        pytest.param("maxvit_tiny_tf_224", (64, 32), (64, 64), marks=SLOW),  # a size that the partition divides
        pytest.param("maxvit_tiny_tf_224", 33, (33, 47), marks=SLOW),  # odd maps, where timm's partition is 1
        pytest.param("maxvit_tiny_tf_224", 224, (224, 448), marks=SLOW),
        pytest.param("maxvit_nano_rw_256", 256, (256, 256), marks=SLOW),
        pytest.param("maxvit_small_tf_224", 64, (64, 64), marks=SLOW),
        pytest.param("maxvit_base_tf_224", 64, (64, 64), marks=SLOW),
        pytest.param("maxvit_tiny_rw_256", 64, (64, 64), marks=SLOW),
        pytest.param("maxvit_rmlp_nano_rw_256", 64, (64, 64), marks=SLOW),
        pytest.param("maxvit_rmlp_tiny_rw_256", 64, (64, 64), marks=SLOW),
    ],
)
def test_computes_what_timm_computes(randomised, name, img_size, size):
    reference = randomised(timm.create_model(name, img_size=img_size, num_classes=11))
    model = visattn.load_official(f"va_{name}", reference.state_dict(), img_size=img_size)
    assert model.num_classes == 11
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # In double precision: weights as random as these amplify rounding. timm's coordinates (rmlp) remain rounded.
        expected, found = reference(x), model.double()(x)
    assert (found - expected).abs().max() < 1e-7 * expected.abs().max()


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")  # in timm's own resizing
@pytest.mark.parametrize(
    ("name", "img_size"),
    [
        pytest.param("maxvit_nano_rw_256", (96, 64), marks=SLOW),
        ("maxvit_nano_rw_256", (160, 416)),  # as many offsets as 256, in another order
        pytest.param("maxvit_tiny_tf_224", (64, 320), marks=SLOW),
    ],
)
def test_tables_are_resized_as_timm_does(name, img_size):
    official = timm.create_model(name).state_dict()
    model = visattn.load_official(f"va_{name}", official, img_size=img_size)
    expected = checkpoint_filter_fn(official, timm.create_model(name, img_size=img_size))
    own = model.state_dict()
    tables = [key for key in own if key.endswith("relative_position_bias_table")]
    assert len(tables) == 2 * sum(len(stage.blocks) for stage in model.stages)
    assert all(torch.equal(own[key], expected[key]) for key in tables)
    maps = visattn.load_official(f"va_{name}", official, img_size=img_size, features_only=True, out_indices=(0, 1))
    assert maps.feature_info.channels() == [64, 128]


def test_weights_of_the_own_form_are_taken_as_they_are(tmp_path):
    """Tables of 5 x 13 tokens have as many offsets as of 8 x 8; read again, they are those of 5 x 13."""
    small = {"widths": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "img_size": (160, 416), "num_classes": 3}
    model = timm.create_model("va_maxvit_nano_rw_256", **small).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    visattn.save_pretrained(model, tmp_path / "folder", licence="mit")
    for again in (
        timm.create_model("va_maxvit_nano_rw_256", checkpoint_path=tmp_path / "weights.pth", **small),
        visattn.from_pretrained(tmp_path / "folder"),
    ):
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "img_size"), [("nano_rw_256", 160), ("tiny_tf_224", (160, 64))])
def test_own_weights_for_another_size_are_resized(tmp_path, name, img_size):
    small = {"widths": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "num_classes": 3}
    state = timm.create_model(f"va_maxvit_{name}", **small).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = timm.create_model(f"va_maxvit_{name}", img_size=img_size, checkpoint_path=tmp_path / "weights.pth", **small)
    expected = visattn.load_official(f"va_maxvit_{name}", state, img_size=img_size, **small).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, "stages.0.blocks.0.attn_grid.attn.rel_pos." + TABLE: torch.ones(3)})


@SLOW
def test_old_weights_stored_as_convolutions_fit():
    model = timm.create_model("va_maxvit_rmlp_pico_rw_256", img_size=32)
    state = model.state_dict()
    old = {key: value[..., None, None] if key.endswith("qkv.weight") else value for key, value in state.items()}
    again = visattn.load_official("va_maxvit_rmlp_pico_rw_256", old, img_size=32)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in state.items())


def test_wrong_weights_are_refused():
    state = timm.create_model("va_maxvit_rmlp_pico_rw_256").state_dict()
    with pytest.raises(UserError, match=r"unexpected: head\.norm\.extra"):
        visattn.load_official("va_maxvit_rmlp_pico_rw_256", {**state, "head.norm.extra": torch.ones(1)})
    with pytest.raises(UserError, match=r"missing: norm\.weight"):
        visattn.load_official(
            "va_maxvit_rmlp_pico_rw_256", {key: value for key, value in state.items() if key != "norm.weight"}
        )
    with pytest.raises(UserError, match="wrong: "):
        visattn.load_official("va_maxvit_rmlp_pico_rw_256", {**state, "norm.weight": torch.ones(3)})


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tiny_tf_224", 30_916_528),
        pytest.param("small_tf_224", 68_927_956, marks=SLOW),
        pytest.param("base_tf_224", 119_467_708, marks=SLOW),
        pytest.param("large_tf_224", 211_785_560, marks=SLOW),
        pytest.param("xlarge_tf_224", 474_951_952, marks=SLOW),
        ("rmlp_pico_rw_256", 7_515_980),
        ("nano_rw_256", 15_451_148),
        pytest.param("rmlp_nano_rw_256", 15_501_452, marks=SLOW),
        pytest.param("rmlp_tiny_rw_256", 29_148_896, marks=SLOW),
        pytest.param("tiny_rw_256", 29_066_720, marks=SLOW),
    ],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = timm.create_model(f"va_maxvit_{name}")
    assert sum(each.numel() for each in model.parameters()) == count


def test_partition_follows_the_image_size():
    model = timm.create_model("va_maxvit_rmlp_pico_rw_256", img_size=(100, 77))
    windows = {each.window_size for each in model.modules() if isinstance(each, WindowAttention)}
    grids = {each.grid_size for each in model.modules() if isinstance(each, GridAttention)}
    assert windows == grids == {(3, 2)}


@pytest.mark.parametrize("name", ["va_maxvit_rmlp_pico_rw_256", pytest.param("va_maxvit_tiny_tf_224", marks=SLOW)])
def test_takes_any_size(name):
    model = timm.create_model(name, features_only=True, img_size=(100, 77)).eval()
    with torch.no_grad():
        for size in ((100, 77), (33, 50)):
            maps = model(torch.randn(1, 3, *size))
            assert [tuple(each.shape[2:]) for each in maps] == [
                tuple(-(-side // step) for side in size) for step in (4, 8, 16, 32)
            ]
            assert all(each.isfinite().all() for each in maps)


@pytest.mark.parametrize("img_size", [16, (224, 31), (224,), "224", 224.0])
def test_impossible_sizes_are_refused(img_size):
    with pytest.raises(UserError, match="img_size"):
        timm.create_model("va_maxvit_rmlp_pico_rw_256", img_size=img_size)


def test_norms_and_decay_are_the_official_ones():
    for name, norm, batch in (("rmlp_pico_rw_256", 1e-6, 1e-5), ("tiny_tf_224", 1e-5, 1e-3)):
        with torch.device("meta"):
            model = timm.create_model(f"va_maxvit_{name}")
        reference = timm.create_model(f"maxvit_{name}")  # which older releases of timm cannot make on `meta`
        assert {each.eps for each in model.modules() if isinstance(each, torch.nn.LayerNorm)} == {norm}
        assert {each.eps for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)} == {batch}
        assert model.no_weight_decay() == reference.no_weight_decay()


def test_training_drops_as_asked():
    model = timm.create_model("va_maxvit_rmlp_pico_rw_256", img_size=64, drop_path_rate=0.3, drop_rate=0.2)
    rates = [block.attn_grid.drop_path2 for stage in model.stages for block in stage.blocks]
    assert [getattr(each, "rate", 0) for each in rates] == pytest.approx([0.03 * i for i in range(11)])
    assert model.head.drop.p == 0.2
    assert model.stages[0].blocks[0].attn_block.attn.rel_pos.mlp.drop1.p == 0.125
