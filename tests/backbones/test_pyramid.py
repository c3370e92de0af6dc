"""The pyramid: every mixer in every rank it exists for, plans per stage and per block, strides per axis, errors."""

import pytest
import timm
import torch

import visattn
from visattn.attention import ATTENTION
from visattn.errors import UserError

assert visattn.__version__
SMALL = {"depths": (1, 1), "widths": (32, 64), "strides": (4, 2), "num_classes": 3, "mlp_ratio": 1.0}
MIXERS = [(name, rank) for name, block in ATTENTION.items() for rank in block.supported_ranks if rank in (2, 3)]


def mixers(model):
    return [[type(block.mixer).__name__ for block in stage.blocks] for stage in model.stages]


@pytest.mark.parametrize(("name", "rank"), MIXERS)
def test_every_mixer_learns(name, rank):
    torch.manual_seed(0)
    model = timm.create_model("va_pyramid", **SMALL, dims=rank, in_chans=2, attention=name)
    x = torch.randn(2, 2, *((36, 43, 30)[:rank]))
    logits = model(x)
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    missing = [key for key, each in model.named_parameters() if each.grad is None or not each.grad.isfinite().all()]
    assert not missing
    assert type(model.stages[1].blocks[0].mixer) is ATTENTION[name]


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    "options", [{"stem": "patch"}, {"mlp": "conv", "norm": "batch"}, {"norm": "rms", "layer_scale": 1e-2}]
)
def test_options(rank, options):
    model = timm.create_model("va_pyramid", **SMALL, dims=rank, attention="conv", **options, positional_conv=False)
    maps = timm.create_model(
        "va_pyramid", **SMALL, dims=rank, attention="conv", **options, features_only=True
    )(torch.randn(1, 3, *((37, 42, 33)[:rank])))  # fmt: skip
    assert [tuple(each.shape[2:]) for each in maps] == [(10, 11, 9)[:rank], (5, 6, 5)[:rank]]  # rounded up
    names = {key for key, _ in model.named_parameters()}
    assert not any(".position." in key for key in names)
    assert any("scale1.gamma" in key for key in names) == ("layer_scale" in options)
    model(torch.randn(2, 3, *(32,) * rank)).sum().backward()


def test_plans_per_stage_and_per_block():
    plan = ["conv", [{"name": "neighborhood", "kernel_size": 3}, "identity"]]
    model = timm.create_model("va_pyramid", **SMALL | {"depths": (2, 2)}, attention=plan)
    assert mixers(model) == [
        ["DepthwiseConvolution"] * 2,
        ["NeighborhoodAttention", type(ATTENTION["identity"](1)).__name__],
    ]
    assert "kernel_size=(3, 3)" in repr(model.stages[1].blocks[0].mixer)


def test_strides_per_axis():
    """A volume of thick slices keeps its slices at first, and they are not mixed where they are kept."""
    model = timm.create_model(
        "va_pyramid3d_tiny", strides=((1, 2, 2), (1, 2, 2), 2, 2), features_only=True, attention="identity"
    ).eval()  # fmt: skip
    assert model.feature_info.reduction() == [2, 4, 8, 16]  # the axis that is reduced most decides
    assert model.model.stages[1].downsample.conv.kernel_size == (1, 3, 3)
    maps = model(torch.randn(1, 1, 8, 32, 40))
    assert [tuple(each.shape[2:]) for each in maps] == [(8, 16, 20), (8, 8, 10), (4, 4, 5), (2, 2, 3)]


def test_presets():
    for name, dims in (("va_pyramid_small", 2), ("va_pyramid3d_small", 3)):
        with torch.device("meta"):
            model = timm.create_model(name, attention="window")
        assert model.stages[0].blocks[0].mixer.rank == dims


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "nieghborhood"}, "neighborhood"),
        ({"attention": {"name": "neighborhood", "kernel": 3}}, "kernel_size"),
        ({"attention": ["conv"]}, "one entry per stage"),
        ({"attention": ["conv", ["conv", "conv"]]}, "stage 1 has 1 blocks, but 2"),
        ({"attention": {"name": "neighborhood", "num_heads": 7}}, "32 channels"),
        ({"widths": (32,)}, "one entry per stage"),
        ({"strides": (4, (2, 2, 2))}, "one per axis"),
        ({"strides": (6, 2)}, "power of 2"),
        ({"strides": (4, 0)}, "above 0"),
        ({"dims": 4}, "dims must be 2 or 3"),
        ({"norm": "group"}, "norm"),
        ({"stem": "linear"}, "stem"),
    ],
)
def test_errors_say_what_would_fit(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        timm.create_model("va_pyramid", **{**SMALL, **arguments})
    assert str(error.value).count("\n") < 6


def test_a_mixer_of_another_rank_is_refused(monkeypatch):
    monkeypatch.setattr(ATTENTION["conv"], "supported_ranks", (2,))
    with pytest.raises(UserError, match="exists for 2-D only, not 3-D"):
        timm.create_model("va_pyramid", **SMALL, dims=3, attention="conv")
